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
from pkexplain.projection.kinds import Projection
from pkexplain.projection.maps import Projector
from pkexplain.store.scratch import zeros_on_disk

__all__ = ["HELD_BYTES", "Audit", "Book", "CapturedBatch", "Factors", "Setting", "Target", "Totals", "reached"]

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
        everywhere: Examples in the batch over all processes; by default those that are here.
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
        like: An empty tensor of the arithmetic's dtype and device.
        group: The processes that train.
        audited: The audited examples, where they are chosen already.
        scratch: Where rows are gathered that are too many for memory; None for the system's place for such files.
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
        """How many parameters there are."""
        return sum(block.numel for block in self.blocks)

    @property
    def spans(self) -> dict[int, slice]:
        """Where each block lies in the flat vector."""
        return {position: block.span for position, block in enumerate(self.blocks)}

    def rows(self, columns: Mapping[int, slice], width: int) -> RowAccumulator:
        """Make an accumulator for the rows that this process keeps."""
        mine = self.group.shard(self.num_examples)
        zeros = partial(zeros_on_disk, like=self.like, directory=self.scratch)
        return RowAccumulator(mine.stop - mine.start, columns, width, self.like, zeros)


class Audit:
    """The few examples whose displacements are also kept without projection.

    Args:
        setting: What is recorded.
    """

    def __init__(self, setting: Setting) -> None:
        """Choose them, evenly over the training set."""
        count, device = setting.num_examples, setting.like.device
        chosen = min(_AUDIT_EXAMPLES, count, _AUDIT_NUMBERS // setting.size)
        evenly = torch.arange(chosen, device=device) * count // max(chosen, 1)
        self.ids = evenly if setting.audited is None else setting.audited.to(device)
        self._place = torch.full((count,), -1, device=device)
        self._place[self.ids] = torch.arange(len(self.ids), device=device)
        self.rows = RowAccumulator(len(self.ids), setting.spans, setting.size, setting.like)

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
        rows: Displacements in projection space of those whose rows are kept here, ``(kept, columns)``.
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
    """Where rows go once the projection is fixed."""

    projector: Projector
    rows: RowAccumulator


def reached(
    setting: Setting,
    rows: RowAccumulator,
    ids: Tensor,
    gradients: Tensor,
    derivatives: Tensor,
    moved: Factors,
    kept: Factors,
) -> None:
    """Add a batch's gradients to the rows, each in the process that keeps it; see `RowAccumulator.add`."""
    ids, gradients, derivatives = setting.group.all_to_all(setting.num_examples, ids, gradients, derivatives)
    rows.add(ids, gradients, derivatives, moved, kept)


class Book(ABC):
    """Follows what the examples do, from the gradients of a step to the rows of a segment.

    Args:
        setting: What is recorded.
        projector: The projection, where it is known.
    """

    def __init__(self, setting: Setting, projector: Projector | None = None) -> None:
        """Begin the first segment."""
        self._setting, self._audit = setting, Audit(setting)
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

    def state_dict(self) -> dict[str, Any]:
        """Return what is in the moment between two segments: tensors, numbers and dataclasses of them."""
        rows = self._target.rows.moment if self._target else None
        return {"rows": rows, "audit": self._audit.rows.moment}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin with what was in the moment."""
        if self._target is not None:
            self._target.rows.load_state_dict(state["rows"])
        self._audit.rows.load_state_dict(state["audit"])

    def _warm(self, waiting: Sequence[CapturedBatch]) -> bool:
        """Whether enough gradients wait for the projection to be fixed."""
        examples = sum(batch.everywhere for batch in waiting)
        held = self._setting.group.all_reduce_max(sum(batch.nbytes for batch in waiting))
        return examples >= self._setting.projection.warm_up or held >= HELD_BYTES

    def _fix(
        self, seen: Sequence[Sequence[tuple[int, ExampleGradients]]], preconditioner: Tensor | None = None
    ) -> Target:
        """Fix the projection from the gradients that have been seen."""
        setting, group = self._setting, self._setting.group
        like = setting.like
        projector = setting.projection.bind(setting.blocks, like.dtype, like.device, seen, preconditioner, group)
        if group.world_size > 1:  # the same to the last bit
            kept = group.broadcast(projector.tensors())
            projector = setting.projection.restore(setting.blocks, like.dtype, like.device, kept)
        self._target = self._aim(projector)
        return self._target

    def _aim(self, projector: Projector) -> Target:
        columns = {position: part.columns for position, part in enumerate(projector.maps)}
        return Target(projector, self._setting.rows(columns, projector.columns))
