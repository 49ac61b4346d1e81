"""Displacements under an optimizer whose numbers are scalars (SGD): a batch is projected once, in its backward pass.

A step only touches its own batch; how far the batch's gradients have moved the parameters is a single number for each
block, known when the segment closes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from pkexplain.gradients.factors import ExampleGradients
from pkexplain.optimizers.base import (
    CapturedBatch,
    DisplacementAccumulator,
    Factors,
    RecordingSpec,
    Target,
    Totals,
    add_to_rows,
)
from pkexplain.optimizers.displacement import MomentumBuffer, Reach, look_back
from pkexplain.optimizers.rules import LinearStep
from pkexplain.projection.maps import Projector

__all__ = ["ScalarAccumulator"]


class ScalarAccumulator(DisplacementAccumulator):
    """Accumulates displacements under optimizers whose numbers are scalars.

    Args:
        spec: What is recorded, and in which dtype.
        projector: The projection, if it is already known.
    """

    def __init__(self, spec: RecordingSpec, projector: Projector | None = None) -> None:
        """Begin the first segment."""
        super().__init__(spec, projector)
        self._full = MomentumBuffer(spec.spans, spec.like.new_zeros(spec.size))
        self._held: list[tuple[int, CapturedBatch, Factors]] = []
        self._visits: list[tuple[int, CapturedBatch, Tensor]] = []
        self._steps: list[Mapping[int, LinearStep]] = []
        self._waiting = 0

    def receive(self, batch: CapturedBatch, position: int, gradients: ExampleGradients) -> None:
        """Take one block's gradients when the backward pass reaches it: project them, or keep them for later."""
        if self._target is None:
            batch.pieces.append((position, gradients))
        else:
            self._project(self._target.projector, batch, position, gradients)

    def step(
        self, batches: Sequence[CapturedBatch], numbers: Mapping[int, LinearStep], scale: Factors, gradient: Tensor
    ) -> Tensor | None:
        """Follow one optimizer step."""
        self._steps.append(numbers)
        position, waited = len(self._steps) - 1, bool(self._held)
        self._held += [(position, batch, scale) for batch in batches]
        waiting = [batch for _, batch, _ in self._held]
        if self._target is None and self._warm(waiting):
            self._fix([batch.pieces for batch in waiting])
        total = self._enter_held(self._target) if self._target is not None else None
        self._full.step(numbers, {block: gradient[span] for block, span in self._spec.spans.items()})
        if self._target is not None and self._waiting >= self._spec.num_examples:
            self._fold(self._target)  # as many gradients wait as there are rows: folding frees memory
        return None if waited else total

    def close(self) -> Totals:
        """End the segment and begin the next."""
        target = self._target or self._fix([batch.pieces for _, batch, _ in self._held])
        self._enter_held(target)
        self._fold(target)
        rows, derivatives = target.rows.close()
        audit_rows = self._spec.group.all_reduce(self._audit.rows.close()[0])
        return Totals(rows, derivatives, audit_rows, self._full.close())

    def state_dict(self) -> dict[str, Any]:
        """Return the state between two segments."""
        return super().state_dict() | {"buffer": self._full.buffer, "blocks": self._full.blocks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state)
        self._full.load_state_dict(state["buffer"], state["blocks"])

    def _enter_held(self, target: Target) -> Tensor:
        """Project the waiting batches; return the sum of their rows as captured, ``(columns,)``."""
        like = self._spec.like
        total = like.new_zeros(target.projector.columns)
        for position, batch, scale in self._held:
            for piece in batch.pieces:
                self._project(target.projector, batch, *piece)
            rows, batch.pieces = self._rows_of(target.projector, batch), []
            total += rows.sum(0)
            columns = {position: part.columns for position, part in enumerate(target.projector.maps)}
            _scale(rows, columns, scale)
            if batch.audit_rows is not None:
                _scale(batch.audit_rows, self._spec.spans, scale)
            self._visits.append((position, batch, batch.loss_derivatives(next(iter(scale.values())), like)))
            self._waiting += batch.everywhere
        self._held = []
        return total

    def _fold(self, target: Target) -> None:
        """Turn the waiting gradients into displacements so far and momentum buffers."""
        if not self._steps:
            return
        reaches = {block: {r.step: r for r in look_back([s[block] for s in self._steps])} for block in self._steps[0]}
        earlier = _factors(reaches, -1)
        for rows in (target.rows, self._audit.rows):
            rows.pass_on(*earlier)
        for position, batch, derivatives in self._visits:
            factors = _factors(reaches, position)
            add_to_rows(
                self._spec, target.rows, batch.ids, self._rows_of(target.projector, batch), derivatives, *factors
            )
            if batch.audited is not None and batch.audit_rows is not None:
                places = self._audit.places(batch.ids[batch.audited])
                self._audit.rows.add(places, batch.audit_rows, derivatives[batch.audited], *factors)
        self._visits, self._steps, self._waiting = [], [], 0

    def _project(self, projector: Projector, batch: CapturedBatch, position: int, gradients: ExampleGradients) -> None:
        """Add one block's gradients to a batch's rows, and to those of its audited examples."""
        projector.add_displacements(self._rows_of(projector, batch), position, gradients)
        if batch.audited is not None and batch.audit_rows is not None:
            span = self._spec.blocks[position].span
            batch.audit_rows[:, span] += gradients.select(batch.audited).dense()

    def _rows_of(self, projector: Projector, batch: CapturedBatch) -> Tensor:
        """Return a batch's rows in projection space, zero before the first block arrives."""
        if batch.rows is None:
            like = self._spec.like
            batch.rows = like.new_zeros(len(batch.ids), projector.columns)
            chosen = self._audit.positions(batch.ids)
            if len(chosen):
                batch.audited, batch.audit_rows = chosen, like.new_zeros(len(chosen), self._spec.size)
        return batch.rows


def _factors(reaches: dict[int, dict[int, Reach]], position: int) -> tuple[Factors, Factors]:
    moved = {block: float(by_step[position].moved) for block, by_step in reaches.items()}
    return moved, {block: float(by_step[position].buffered) for block, by_step in reaches.items()}


def _scale(rows: Tensor, columns: dict[int, slice], scale: Factors) -> None:
    values = set(scale.values())
    if len(values) == 1:
        rows *= values.pop()
        return
    for block, factor in scale.items():
        rows[:, columns[block]] *= factor
