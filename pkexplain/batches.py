"""What a backward pass leaves behind, and where its gradients go."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pkexplain.displacement import RowAccumulator
from pkexplain.gradients import ExampleGradients
from pkexplain.layers import Block
from pkexplain.projection import Projection
from pkexplain.projector import Projector
from pkexplain.update_rules import LinearStep

__all__ = ["HELD_BYTES", "Audit", "Book", "CapturedBatch", "Factors", "Setting", "Totals"]

HELD_BYTES = 1 << 30
"""Most memory for gradients that wait for the projection to be fixed."""

_AUDIT_EXAMPLES = 16
_AUDIT_NUMBERS = 1 << 23
"""Most numbers a segment keeps without projection: 32 MiB in float32."""


Factors = Mapping[int, float]
"""A factor for each block."""


@dataclass
class CapturedBatch:
    """What one backward pass left behind.

    Attributes:
        ids: Row numbers in the training set, ``(batch,)``.
        pieces: Block positions with per-example gradients, as long as they wait to be projected.
        rows: Their sum in projection space, ``(batch, columns)``, where it is.
        audited: Where the audited examples are in the batch, ``(chosen,)``.
        audit_rows: Their gradients without projection, ``(chosen, parameters)``.
        derivatives: Loss derivatives, ``(batch,)``, or None where the model's output was not seen.
        summed: Parameters whose gradient has arrived.
    """

    ids: Tensor
    pieces: list[tuple[int, ExampleGradients]] = field(default_factory=list)
    rows: Tensor | None = None
    audited: Tensor | None = None
    audit_rows: Tensor | None = None
    derivatives: Tensor | None = None
    summed: set[int] = field(default_factory=set)

    @property
    def nbytes(self) -> int:
        """Bytes of the gradients that wait."""
        return sum(gradients.nbytes for _, gradients in self.pieces)

    def compact(self) -> None:
        """Keep what waits in the form that holds less memory."""
        everyone = torch.arange(len(self.ids), device=self.ids.device)
        for place, (position, gradients) in enumerate(self.pieces):
            compact = gradients.compact()
            # a copy, as a layer's input may be a parameter that moves, or a buffer that the next batch is written into
            self.pieces[place] = position, gradients.select(everyone) if compact is gradients else compact

    def loss_derivatives(self, factor: float, like: Tensor) -> Tensor:
        """Return the loss derivatives as the optimizer saw them, nan where there are none, ``(batch,)``."""
        if self.derivatives is None:
            return like.new_full((len(self.ids),), float("nan"))
        return self.derivatives.to(like) * factor


@dataclass(frozen=True)
class Setting:
    """What is recorded, and in which numbers.

    Attributes:
        blocks: The recorded parameters.
        projection: How rows are compressed.
        num_examples: How many rows there are.
        like: An empty tensor of the arithmetic's number format and device.
    """

    blocks: tuple[Block, ...]
    projection: Projection
    num_examples: int
    like: Tensor

    @property
    def size(self) -> int:
        """How many parameters there are."""
        return sum(block.numel for block in self.blocks)

    @property
    def spans(self) -> dict[int, slice]:
        """Where each block lies in the flat vector."""
        return {position: block.span for position, block in enumerate(self.blocks)}


class Audit:
    """The few examples whose displacements are also kept without projection.

    Args:
        setting: What is recorded.
    """

    def __init__(self, setting: Setting) -> None:
        """Choose them, evenly over the training set."""
        count, device = setting.num_examples, setting.like.device
        chosen = min(_AUDIT_EXAMPLES, count, _AUDIT_NUMBERS // setting.size)
        self.ids = torch.arange(chosen, device=device) * count // max(chosen, 1)
        self._place = torch.full((count,), -1, device=device)
        self._place[self.ids] = torch.arange(chosen, device=device)
        self.rows = RowAccumulator(chosen, setting.spans, setting.size, setting.like)

    def positions(self, ids: Tensor) -> Tensor:
        """Find the audited examples in a batch, ``(chosen,)``."""
        return (self._place[ids] >= 0).nonzero()[:, 0]

    def places(self, ids: Tensor) -> Tensor:
        """Return the row of each audited example, ``(ids,)``."""
        return self._place[ids]


@dataclass(frozen=True)
class Totals:
    """What the examples did in a segment.

    Attributes:
        rows: Their displacements in projection space, ``(num_examples, columns)``.
        derivatives: Their loss derivatives, ``(num_examples,)``.
        audit_rows: The audited examples' displacements, ``(audited, parameters)``.
        examples: The sum of all displacements, without projection, ``(parameters,)``.
    """

    rows: Tensor
    derivatives: Tensor
    audit_rows: Tensor
    examples: Tensor


@dataclass(frozen=True)
class Target:
    """Where rows go once the projection is fixed."""

    projector: Projector
    rows: RowAccumulator


class Book(ABC):
    """Follows what the examples do, from the gradients of a step to the rows of a segment.

    Args:
        setting: What is recorded.
    """

    def __init__(self, setting: Setting) -> None:
        """Begin the first segment."""
        self._setting, self._audit = setting, Audit(setting)
        self._target: Target | None = None

    @property
    def projector(self) -> Projector | None:
        """The projection, once it is fixed."""
        return self._target.projector if self._target else None

    @property
    def audit_ids(self) -> Tensor:
        """The audited examples."""
        return self._audit.ids

    @abstractmethod
    def receive(self, batch: CapturedBatch, position: int, gradients: ExampleGradients) -> None:
        """Take one block's gradients as the backward pass reaches them."""

    @abstractmethod
    def step(
        self, batches: Sequence[CapturedBatch], numbers: Mapping[int, LinearStep], scale: Factors, gradient: Tensor
    ) -> Tensor | None:
        """Follow one optimizer step.

        Args:
            batches: The batches whose gradients it applies.
            numbers: The step's numbers for each block.
            scale: What the captured gradients were multiplied with before the step, for each block.
            gradient: Their sum, scaled, ``(parameters,)``.

        Returns:
            The sum of the batches' rows as captured, ``(columns,)``; None where they are not projected yet.
        """

    @abstractmethod
    def close(self) -> Totals:
        """End the segment and begin the next."""

    def _warm(self, waiting: Sequence[CapturedBatch]) -> bool:
        """Whether enough gradients wait for the projection to be fixed."""
        examples = sum(len(batch.ids) for batch in waiting)
        return examples >= self._setting.projection.warm_up or sum(batch.nbytes for batch in waiting) >= HELD_BYTES

    def _fix(self, seen: Sequence[Sequence[tuple[int, ExampleGradients]]], balance: Tensor | None = None) -> Target:
        """Fix the projection from the gradients that have been seen."""
        setting = self._setting
        like = setting.like
        projector = setting.projection.bind(setting.blocks, like.dtype, like.device, seen, balance)
        columns = {position: part.columns for position, part in enumerate(projector.maps)}
        self._target = Target(projector, RowAccumulator(setting.num_examples, columns, projector.columns, like))
        return self._target
