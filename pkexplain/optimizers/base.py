"""What a backward pass leaves behind, and where its gradients go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from pkexplain.distributed import ProcessGroup
from pkexplain.gradients.factors import ExampleGradients
from pkexplain.gradients.layers import Block
from pkexplain.gradients.rounded import rounded
from pkexplain.optimizers.displacement import Factors, RowAccumulator
from pkexplain.projection.base import Projection
from pkexplain.projection.coordinates import Coordinates
from pkexplain.projection.packed import Vector, pack
from pkexplain.projection.projector import Projector
from pkexplain.store.scratch import zeros_on_disk

__all__ = [
    "Audit",
    "CapturedBatch",
    "Factors",
    "RecordingSpec",
    "Totals",
]

_AUDIT_EXAMPLES = 16
_AUDIT_NUMBERS = 1 << 23
"""The most numbers that a segment keeps of them: 32 MiB in float32."""

_MISSED = 1e-2
"""The share of ‖Δθ‖ that the rounding of one of the ledger's vectors may take."""
_SEEDS = (1 << 63) - 1
_UNPACKED = 1 << 20
"""Vectors of up to so many parameters are stored in half precision, which costs little then."""


@dataclass
class CapturedBatch:
    """What one backward pass produced.

    Attributes:
        ids: Row numbers in the training set, ``(batch,)``, on the CPU.
        pieces: Block positions and their per-example gradients, while they wait to be projected.
        rows: Their sum in projection space, ``(batch, columns)``, once they are projected.
        audited: Positions of the audited examples in the batch, ``(chosen,)``, on the CPU.
        audit_rows: Their gradients without projection, at the sampled coordinates, ``(chosen, coordinates)``.
        derivatives: Loss derivatives, ``(batch,)``; None if the model's output was not seen.
        summed: Parameters whose gradient has arrived.
        everywhere: Examples in the batch over all processes; by default those of this process.
        device: Where gradients are.
        random: The state of torch's random numbers before the forward pass, if the run is to be replayed.
    """

    ids: Tensor
    pieces: list[tuple[int, ExampleGradients]] = field(default_factory=list)
    rows: Tensor | None = None
    audited: Tensor | None = None
    audit_rows: Tensor | None = None
    derivatives: Tensor | None = None
    summed: set[int] = field(default_factory=set)
    everywhere: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    random: Tensor | None = None

    def __post_init__(self) -> None:
        """Count the examples."""
        self.everywhere = self.everywhere or len(self.ids)

    def reset(self) -> None:
        """Forget what was captured: its gradients were zeroed before the optimizer saw them."""
        self.pieces.clear()
        self.rows = self.audited = self.audit_rows = self.derivatives = None
        self.summed.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of the waiting gradients."""
        return sum(gradients.nbytes for _, gradients in self.pieces)

    def compact(self) -> None:
        """Keep the waiting gradients in the form that takes less memory."""
        everyone = torch.arange(len(self.ids), device=self.device)
        for index, (position, gradients) in enumerate(self.pieces):
            compact = gradients.compact()
            # a copy: a layer's input may be a parameter that changes, or a buffer that the next batch is written into
            self.pieces[index] = position, gradients.select(everyone) if compact is gradients else compact

    def round(self) -> None:
        """Keep the waiting gradients in twelve bits a number."""
        seed = hash(tuple(self.ids.tolist())) & _SEEDS
        self.pieces = [(position, rounded(gradients, seed ^ position)) for position, gradients in self.pieces]

    def loss_derivatives(self, factor: float, like: Tensor) -> Tensor:
        """Return the loss derivatives as the optimizer saw them, nan if there are none, ``(batch,)``."""
        if self.derivatives is None:
            return like.new_full((len(self.ids),), float("nan"))
        return self.derivatives.to(like) * factor


@dataclass(frozen=True)
class RecordingSpec:
    """What is recorded, and in which dtype.

    Attributes:
        blocks: The recorded parameters.
        projection: How the rows are compressed.
        num_examples: How many rows there are.
        like: An empty tensor of the arithmetic's dtype and device.
        group: The processes that train.
        audited: The audited examples, if they are already chosen.
        scratch: Directory for rows that do not fit in memory; None for the system's temporary directory.
    """

    blocks: tuple[Block, ...]
    projection: Projection
    num_examples: int
    like: Tensor
    group: ProcessGroup = field(default_factory=ProcessGroup)
    audited: Tensor | None = None
    scratch: Path | None = None

    @property
    def size(self) -> int:
        """The number of parameters."""
        return sum(block.numel for block in self.blocks)

    @property
    def operator_dtype(self) -> torch.dtype:
        """Dtype in which a segment's vectors are stored, apart from its checkpoint."""
        return torch.float64 if self.like.dtype == torch.float64 else torch.bfloat16

    def stored_operator(self, operator: Tensor) -> Vector:
        """Round an operator, ``(parameters,)``, as it is stored."""
        if self._packs and bool((operator >= 0).all()):
            return pack(operator, logarithmic=True)
        return operator.to(self.operator_dtype, copy=True)

    def stored_line(self, line: Tensor, displacement: Tensor, seed: int) -> Vector:
        """Round one of the ledger's vectors as it is stored: in four bits if that misses little of Δθ.

        Args:
            line: The vector, ``(parameters,)``.
            displacement: Δθ, ``(parameters,)``.
            seed: Of the random numbers by which it is rounded.
        """
        if self._packs:
            packed = pack(line, seed=seed)
            if bool((packed.to(line) - line).norm() <= _MISSED * displacement.norm()):
                return packed
        return line.to(self.operator_dtype)

    @property
    def _packs(self) -> bool:
        """Whether those vectors may take fewer bits: not where they are to be exact, nor of a small model."""
        return not (self.size <= _UNPACKED or self.like.dtype == torch.float64 or self.projection.keeps_everything)

    @property
    def audit_dtype(self) -> torch.dtype:
        """Dtype of the audited examples' displacements: that of the arithmetic where rows are exact, too."""
        return self.like.dtype if self.projection.keeps_everything else self.operator_dtype

    @cached_property
    def coordinates(self) -> Coordinates:
        """Where the audited examples' displacements are kept."""
        return self.projection.audited_coordinates(self.blocks)

    @property
    def spans(self) -> dict[int, slice]:
        """Each block's slice of the flat vector."""
        return {position: block.span for position, block in enumerate(self.blocks)}

    def rows(self, columns: Mapping[int, slice], width: int) -> RowAccumulator:
        """Make an accumulator for the rows of this process."""
        mine = self.group.shard(self.num_examples)
        zeros = partial(zeros_on_disk, like=self.like, directory=self.scratch)
        return RowAccumulator(mine.stop - mine.start, columns, width, self.like, zeros)


class Audit:
    """A few examples whose displacements are also kept unprojected, to measure what the projection loses.

    Attributes:
        coordinates: Where they are kept.
        ids: Which examples, ``(audited,)``, on the CPU.
        rows: Their displacements, if they follow the blocks' factors.

    Args:
        spec: What is recorded, and in which dtype.
    """

    def __init__(self, spec: RecordingSpec) -> None:
        """Choose them, evenly spaced in the training set; which they are is asked on the CPU, where ids are."""
        count, device = spec.num_examples, torch.device("cpu")
        self.coordinates = spec.coordinates
        chosen = min(_AUDIT_EXAMPLES, count, _AUDIT_NUMBERS // max(1, len(self.coordinates)))
        evenly = torch.arange(chosen, device=device) * count // max(chosen, 1)
        self.ids = evenly if spec.audited is None else spec.audited.to(device)
        self._place = torch.full((count,), -1, device=device, dtype=torch.int64)
        self._place[self.ids] = torch.arange(len(self.ids), device=device)
        self.rows = RowAccumulator(len(self.ids), self.coordinates.spans, len(self.coordinates), spec.like)

    def positions(self, ids: Tensor) -> Tensor:
        """Find the audited examples in a batch, ``(chosen,)``."""
        return (self._place[ids] >= 0).nonzero()[:, 0]

    def places(self, ids: Tensor) -> Tensor:
        """Return the row of each audited example, ``(ids,)``."""
        return self._place[ids]


@dataclass(frozen=True)
class Totals:
    """The sums of a segment.

    Attributes:
        rows: Displacements in projection space of those of this process's examples that moved, ``(kept, columns)``.
        derivatives: Their loss derivatives, ``(kept,)``.
        ids: Whose they are, counted from the first of this process's examples, ``(kept,)``.
        audit_rows: The audited examples' displacements at the sampled coordinates, ``(audited, coordinates)``.
        examples: The sum of all displacements, without projection, ``(parameters,)``.
        projector: The segment's projection.
        balance: What each block's rate is multiplied by, because its operator is not the same for all coordinates.
        row_sum: What all rows should add up to, ``(columns,)``: the sum followed in full space, projected.
    """

    rows: Tensor
    derivatives: Tensor
    ids: Tensor
    audit_rows: Tensor
    examples: Tensor
    projector: Projector
    balance: Mapping[int, float]
    row_sum: Tensor
