"""What a backward pass leaves behind, and where its gradients go."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pkexplain.distributed import ProcessGroup
from pkexplain.gradients.factors import ExampleGradients
from pkexplain.gradients.layers import Block
from pkexplain.optimizers.displacement import RowAccumulator
from pkexplain.optimizers.rules import LinearStep
from pkexplain.projection.kinds import Projection, WarmUp
from pkexplain.projection.maps import Projector
from pkexplain.store.scratch import zeros_on_disk

__all__ = [
    "HELD_BYTES",
    "Audit",
    "CapturedBatch",
    "DisplacementAccumulator",
    "Factors",
    "RecordingSpec",
    "Target",
    "Totals",
    "add_to_rows",
]

HELD_BYTES = 1 << 30
"""The most memory for gradients that wait for the projection to be fixed."""

_AUDIT_EXAMPLES = 16
_AUDIT_NUMBERS = 1 << 23
"""The most numbers that a segment keeps unprojected: 32 MiB in float32."""


Factors = Mapping[int, float]
"""A factor for each block."""


@dataclass
class CapturedBatch:
    """What one backward pass produced.

    Attributes:
        ids: Row numbers in the training set, ``(batch,)``.
        pieces: Block positions and their per-example gradients, while they wait to be projected.
        rows: Their sum in projection space, ``(batch, columns)``, once they are projected.
        audited: Positions of the audited examples in the batch, ``(chosen,)``.
        audit_rows: Their gradients without projection, ``(chosen, parameters)``.
        derivatives: Loss derivatives, ``(batch,)``; None if the model's output was not seen.
        summed: Parameters whose gradient has arrived.
        everywhere: Examples in the batch over all processes; by default those of this process.
    """

    ids: Tensor
    pieces: list[tuple[int, ExampleGradients]] = field(default_factory=list)
    rows: Tensor | None = None
    audited: Tensor | None = None
    audit_rows: Tensor | None = None
    derivatives: Tensor | None = None
    summed: set[int] = field(default_factory=set)
    everywhere: int = 0

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
        everyone = torch.arange(len(self.ids), device=self.ids.device)
        for index, (position, gradients) in enumerate(self.pieces):
            compact = gradients.compact()
            # a copy: a layer's input may be a parameter that changes, or a buffer that the next batch is written into
            self.pieces[index] = position, gradients.select(everyone) if compact is gradients else compact

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

    Args:
        spec: What is recorded, and in which dtype.
    """

    def __init__(self, spec: RecordingSpec) -> None:
        """Choose them, evenly spaced in the training set."""
        count, device = spec.num_examples, spec.like.device
        chosen = min(_AUDIT_EXAMPLES, count, _AUDIT_NUMBERS // spec.size)
        evenly = torch.arange(chosen, device=device) * count // max(chosen, 1)
        self.ids = evenly if spec.audited is None else spec.audited.to(device)
        self._place = torch.full((count,), -1, device=device, dtype=torch.int64)
        self._place[self.ids] = torch.arange(len(self.ids), device=device)
        self.rows = RowAccumulator(len(self.ids), spec.spans, spec.size, spec.like)

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
        rows: Displacements in projection space of this process's examples, ``(kept, columns)``.
        derivatives: Their loss derivatives, ``(kept,)``.
        audit_rows: The audited examples' displacements, ``(audited, parameters)``.
        examples: The sum of all displacements, without projection, ``(parameters,)``.
    """

    rows: Tensor
    derivatives: Tensor
    audit_rows: Tensor
    examples: Tensor


@dataclass(frozen=True)
class Target:
    """The projection, once it is fixed, and the rows that it fills."""

    projector: Projector
    rows: RowAccumulator


def add_to_rows(
    spec: RecordingSpec,
    rows: RowAccumulator,
    ids: Tensor,
    gradients: Tensor,
    derivatives: Tensor,
    moved: Factors,
    buffered: Factors,
) -> None:
    """Add a batch's gradients to the rows, each in the process that holds its row; see `RowAccumulator.add`."""
    ids, gradients, derivatives = spec.group.all_to_all(spec.num_examples, ids, gradients, derivatives)
    rows.add(ids, gradients, derivatives, moved, buffered)


class DisplacementAccumulator(ABC):
    """Accumulates the examples' displacements, from the gradients of each step to the rows of a segment.

    Args:
        spec: What is recorded, and in which dtype.
        projector: The projection, if it is already known.
    """

    def __init__(self, spec: RecordingSpec, projector: Projector | None = None) -> None:
        """Begin the first segment."""
        self._spec, self._audit = spec, Audit(spec)
        self._target = None if projector is None else self._aim(projector)

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
        """Take one block's gradients when the backward pass reaches it."""

    @abstractmethod
    def step(
        self, batches: Sequence[CapturedBatch], numbers: Mapping[int, LinearStep], scale: Factors, gradient: Tensor
    ) -> Tensor | None:
        """Follow one optimizer step.

        Args:
            batches: The batches whose gradients the step applies.
            numbers: The step's numbers for each block.
            scale: The factor between captured and applied gradients, for each block.
            gradient: Their sum, scaled, ``(parameters,)``.

        Returns:
            The sum of the batches' rows as captured, ``(columns,)``; None if they are not projected yet.
        """

    @abstractmethod
    def close(self) -> Totals:
        """End the segment and begin the next."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state between two segments: tensors, numbers and dataclasses of them."""
        rows = self._target.rows.buffer if self._target else None
        return {"rows": rows, "audit": self._audit.rows.buffer}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        if self._target is not None:
            self._target.rows.load_state_dict(state["rows"])
        self._audit.rows.load_state_dict(state["audit"])

    def _warm(self, waiting: Sequence[CapturedBatch]) -> bool:
        """Whether enough gradients wait to fix the projection."""
        examples = sum(batch.everywhere for batch in waiting)
        held = self._spec.group.all_reduce_max(sum(batch.nbytes for batch in waiting))
        return examples >= self._spec.projection.warm_up or held >= HELD_BYTES

    def _fix(
        self, seen: Sequence[Sequence[tuple[int, ExampleGradients]]], preconditioner: Tensor | None = None
    ) -> Target:
        """Fix the projection from the gradients seen so far."""
        spec, group = self._spec, self._spec.group
        projector = spec.projection.bind(spec.blocks, spec.like, WarmUp(seen, preconditioner, group))
        if group.world_size > 1:  # identical to the last bit in every process
            projector = spec.projection.restore(spec.blocks, spec.like, group.broadcast(projector.tensors()))
        self._target = self._aim(projector)
        return self._target

    def _aim(self, projector: Projector) -> Target:
        columns = {position: part.columns for position, part in enumerate(projector.maps)}
        return Target(projector, self._spec.rows(columns, projector.columns))
