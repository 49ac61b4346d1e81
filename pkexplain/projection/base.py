"""What a projection is: a small frozen description that is bound to a model's blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from pkexplain.distributed import ProcessGroup
from pkexplain.gradients.layers import Block
from pkexplain.projection.coordinates import Coordinates
from pkexplain.projection.maps import Pieces, RowFactors
from pkexplain.projection.projector import Projector, SecondStage

__all__ = ["Projection", "WarmUp"]

_AUDITED_COORDINATES = 1 << 19
"""The most numbers that are kept of an audited example's displacement: 2 MiB in float32."""


@dataclass(frozen=True)
class WarmUp:
    """What a projection may depend on.

    Attributes:
        batches: The first batches of captured gradients of a segment.
        sizes: What each batch's gradients are multiplied by when they enter the optimizer; empty for ones.
        factors: What rows are multiplied by before they are projected, for each block; None for ones.
        total: The sum of what will be projected, ``(parameters,)``, if it is known: the segment is over; else None.
        room: The most columns of rows for which there is memory.
        group: The processes, each with its own batches.
    """

    batches: Sequence[Pieces] = ()
    sizes: Sequence[float] = ()
    factors: Mapping[int, RowFactors] | None = None
    total: Tensor | None = None
    room: int = 0
    group: ProcessGroup = field(default_factory=ProcessGroup)

    def thinned(self, most: int) -> list[Pieces]:
        """Keep every n-th example of every batch, so that about ``most`` are left, of as many steps as before."""
        examples = self.group.all_reduce_int(sum(len(pieces[0][1]) for pieces in self.batches if pieces))
        some = slice(None, None, max(1, examples // most))
        return [[(position, gradients.select(some)) for position, gradients in pieces] for pieces in self.batches]


@dataclass(frozen=True)
class Projection(ABC):
    """The description of a seeded linear map, not yet bound to a model."""

    kind: ClassVar[str]
    follows_gradients: ClassVar[bool] = False
    """Whether the map depends on gradients, so that every segment has its own."""
    keeps_everything: ClassVar[bool] = False
    """Whether a row is the displacement itself."""

    @property
    def warm_up(self) -> int:
        """The number of examples whose gradients are needed to fix the map."""
        return 0

    def warm_up_bytes(self, examples: int) -> int:
        """The most memory for them, and a batch more, when so many wait."""
        return 0

    @property
    def choosing(self) -> int:
        """With fewer examples than this, memory for more is worth rounding them."""
        return 0

    def row_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of stored rows, given the recorder's dtype."""
        return torch.float16 if dtype == torch.float32 else dtype

    @abstractmethod
    def bind(self, blocks: Sequence[Block], like: Tensor, warm_up: WarmUp) -> Projector:
        """Make the map for a model's blocks.

        Args:
            blocks: The model's blocks.
            like: A tensor of the dtype and device of the arithmetic.
            warm_up: The first gradients of the run, of at least ``warm_up`` examples if there are that many.
        """

    @abstractmethod
    def columns(self, blocks: Sequence[Block]) -> int:
        """Count the columns of a stored row, the same in every segment."""

    def width(self, blocks: Sequence[Block]) -> int:
        """Count the columns of a row while its segment is recorded, at the least."""
        return self.columns(blocks)

    def takes_sides(self, block: Block) -> bool:
        """Whether rows of a block can be multiplied by one factor for each row and column of its matrix."""
        return False

    def second_stage(
        self, projector: Projector, rows: Tensor, total: Tensor, rates: Tensor, group: ProcessGroup
    ) -> SecondStage | None:
        """Choose the directions along which a finished segment's rows are stored; None to store them as they are.

        Args:
            projector: The segment's projection.
            rows: The rows of this process's examples, ``(n, width)``.
            total: The sum of all rows, ``(width,)``.
            rates: The learning rate of each block, summed over the segment, ``(blocks,)``.
            group: The processes.
        """
        return None

    def audited_coordinates(self, blocks: Sequence[Block]) -> Coordinates:
        """Choose where audited displacements are kept: everywhere, or in a sample where that would be too many."""
        return Coordinates(blocks, None if self.keeps_everything else _AUDITED_COORDINATES)

    @abstractmethod
    def restore(self, blocks: Sequence[Block], like: Tensor, kept: Mapping[str, Tensor]) -> Projector:
        """Rebuild the same map from what `Projector.tensors` returned."""

    def describe(self) -> dict[str, Any]:
        """Describe the projection in plain data: its kind and its parameters."""
        return {"kind": self.kind, **asdict(self)}
