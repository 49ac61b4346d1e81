"""Displacements under an optimizer that divides by a second moment (Adam and its relatives).

How far a gradient moves each coordinate also depends on the v̂ of later steps, so a batch's gradients wait, in factored
form, until most of that is known. Then they are multiplied elementwise by what the steps did, and projected:

    row_i = P S⁻¹ (C_r ⊙ g_i),    C_r = gradient_step_r + gain_r Σ_{s ≥ r} momentum_{r+1} ⋯ momentum_s buffer_step_s

What a batch leaves in the momentum buffer after that is scaled by one factor for each block and step, the one that
best fits the sum of the batches. The error of that fit is computed exactly, in full space, and is on the ledger's
``optimizer`` line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pkexplain.gradients.batch_norm import RowMixture
from pkexplain.gradients.factors import ExampleGradients
from pkexplain.optimizers._adaptive_tail import Tail
from pkexplain.optimizers.base import (
    HELD_BYTES,
    CapturedBatch,
    DisplacementAccumulator,
    Factors,
    RecordingSpec,
    Target,
    Totals,
    add_to_rows,
)
from pkexplain.optimizers.displacement import Reach, look_back
from pkexplain.optimizers.rules import LinearStep, Number
from pkexplain.projection.maps import Projector

__all__ = ["AdaptiveAccumulator", "Lookahead", "Pending"]

_ROUNDING = 32
"""A sum smaller than this many ε of its terms (ε of the dtype) is taken for rounding error."""
_DAMPING = 0.1
"""Share of a block's mean √v̂ that is added to every coordinate in the preconditioner."""


@dataclass(frozen=True)
class Lookahead:
    """How long gradients wait before they are projected.

    Attributes:
        share: They wait until at most this share of them is left in the momentum buffer.
        share_at_end: At the end of a segment, gradients with more than this share left keep waiting into the next
            segment; they are projected twice.
        steps: The largest number of steps they wait.
        held_bytes: The most memory they may take.
    """

    share: float
    share_at_end: float
    steps: float = math.inf
    held_bytes: float = math.inf

    @classmethod
    def of(cls, lookahead: str | int, like: Tensor) -> Lookahead:
        """Read the recorder's argument: ``"auto"``, ``"exact"``, or a number of steps."""
        rounding = torch.finfo(like.dtype).eps
        if lookahead == "auto":
            return cls(0.02, 0.1, held_bytes=2 * HELD_BYTES)
        return cls(rounding, rounding) if lookahead == "exact" else cls(rounding, rounding, int(lookahead))


@dataclass
class Pending:
    """The waiting batches of one step, with its position in the list of steps; −1 once its segment is over."""

    position: int
    batches: Sequence[CapturedBatch]
    scale: Factors
    gradient: Tensor
    still: dict[int, Tensor]
    nbytes: int
    carried: dict[int, Number] | None = None  # what the momentum buffer holds of it, once its segment is over


@dataclass(frozen=True)
class _Visit:
    """A projected batch that waits for the end of the segment; what it passes on counts from a fold of the tail."""

    fold: int
    everywhere: int
    ids: Tensor
    rows: Tensor
    audited: Tensor
    audit_rows: Tensor
    derivatives: Tensor
    passed: Factors


class AdaptiveAccumulator(DisplacementAccumulator):
    """Accumulates displacements under optimizers with one number for each coordinate.

    Args:
        spec: What is recorded, and in which dtype.
        lookahead: How long gradients wait.
        projector: The projection, if it is already known.
    """

    def __init__(self, spec: RecordingSpec, lookahead: Lookahead, projector: Projector | None = None) -> None:
        """Begin the first segment."""
        super().__init__(spec, projector)
        self._lookahead, self._tail = lookahead, Tail(spec)
        self._pending: list[Pending] = []
        self._steps: list[Mapping[int, LinearStep]] = []
        self._visits: list[_Visit] = []

    def receive(self, batch: CapturedBatch, position: int, gradients: ExampleGradients) -> None:
        """Take one block's gradients as the backward pass reaches them."""
        batch.pieces.append((position, gradients))

    def step(
        self, batches: Sequence[CapturedBatch], numbers: Mapping[int, LinearStep], scale: Factors, gradient: Tensor
    ) -> None:
        """Follow one optimizer step."""
        self._steps.append(numbers)
        self._tail.step(numbers)
        held = [v for n in numbers.values() for v in vars(n).values() if isinstance(v, Tensor)] + [gradient]
        nbytes = sum(v.nbytes for v in held) + sum(batch.nbytes for batch in batches)
        still = self._still(batches, scale, gradient)
        self._pending.append(Pending(len(self._steps) - 1, batches, scale, gradient.clone(), still, nbytes))
        if self._target is None and self._warm(self._held()):
            self._bind()
        settled = 0 if self._target is None else self._settled()
        if self._target is not None and settled:
            self._tail.fold()
            self._finish(self._target.projector, self._pending[:settled], over=False)
            self._pending = self._pending[settled:]
            self._forget_steps()
            if sum(visit.everywhere for visit in self._visits) >= self._spec.num_examples:
                self._settle_visits(self._target)  # adding them up frees memory

    def _still(self, batches: Sequence[CapturedBatch], scale: Factors, gradient: Tensor) -> dict[int, Tensor]:
        """Find coordinates before a BatchNorm whose gradient is only the rounding error of terms that cancel.

        A bias there, or the weight of a constant input, has no gradient. Its √v̂ is rounding error too, and dividing by
        it would turn that into displacements. They belong to no example, so they go to the ``optimizer`` line.

        Returns:
            For each block before a BatchNorm, 0 for such coordinates and 1 for the others, ``(numel,)``.
        """
        pieces = [piece for batch in batches for piece in batch.pieces]
        still: dict[int, Tensor] = {}
        for b in sorted({position for position, piece in pieces if isinstance(piece, RowMixture)}):
            gross = sum((piece.gross() for position, piece in pieces if position == b), torch.zeros_like(gradient[:1]))
            gross = self._spec.group.all_reduce(gross)
            rounding = _ROUNDING * torch.finfo(gradient.dtype).eps * abs(scale[b]) * gross
            still[b] = (gradient[self._spec.blocks[b].span].abs() > rounding).to(gradient.dtype)
        return still

    def close(self) -> Totals:
        """End the segment and begin the next."""
        target = self._target or self._bind()
        self._tail.fold()
        self._finish(target.projector, self._pending, over=True)
        self._pending = [pending for pending in self._pending if pending.carried is not None]
        self._steps = []
        self._settle_visits(target)
        rows, derivatives = target.rows.close()
        audit_rows = self._spec.group.all_reduce(self._audit.rows.close()[0])
        return Totals(rows, derivatives, audit_rows, self._tail.close())

    def state_dict(self) -> dict[str, Any]:
        """Return the momentum buffer between two segments, and the gradients that keep waiting."""
        return super().state_dict() | {"tail": self._tail.state_dict, "pending": self._pending}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state)
        self._tail.load_state_dict(*state["tail"])
        self._pending = list(state["pending"])

    def _settle_visits(self, target: Target) -> None:
        """Add the projected batches to the rows, with what they passed on so far; the tail was just folded."""
        factors = self._tail.factors()
        for sums in (target.rows, self._audit.rows):
            sums.pass_on(*factors[0])
        for visit in self._visits:
            moved, buffered = factors[visit.fold]
            moved = {b: 1 + visit.passed[b] * moved[b] for b in moved}
            buffered = {b: visit.passed[b] * buffered[b] for b in buffered}
            add_to_rows(self._spec, target.rows, visit.ids, visit.rows, visit.derivatives, moved, buffered)
            if len(visit.audited):
                places = self._audit.places(visit.ids[visit.audited])
                self._audit.rows.add(places, visit.audit_rows, visit.derivatives[visit.audited], moved, buffered)
        self._visits = []

    def _held(self) -> list[CapturedBatch]:
        return [batch for pending in self._pending for batch in pending.batches]

    def _bind(self) -> Target:
        """Fix the preconditioner and the projection from the waiting gradients, as the last step would apply them.

        Not as the steps did apply them: the first steps divide by the v̂ of a single batch, and their few outliers
        would dominate the directions.
        """
        last, like = self._steps[-1], self._spec.like
        parts = [(n.gradient_step + n.gain * n.buffer_step, self._spec.blocks[b].numel) for b, n in last.items()]
        operator = torch.cat([_spread(number, numel, like) for number, numel in parts]).abs_()
        preconditioner = _preconditioner(operator, list(self._spec.spans.values()))
        ratio = operator / preconditioner
        spans = self._spec.spans
        seen = [
            [(b, g.scaled(ratio[spans[b]] * pending.still.get(b, 1.0))) for b, g in batch.pieces]
            for pending in self._pending
            for batch in pending.batches
        ]
        return self._fix(seen, preconditioner)

    def _settled(self) -> int:
        """Count the oldest steps that need not wait any longer; several at a time, as each time costs a pass back."""
        shares = self._shares()
        ready = sum(not self._waits(age, share, self._lookahead.share) for age, share in enumerate(reversed(shares)))
        if self._spec.group.all_reduce_max(sum(p.nbytes for p in self._pending)) > self._lookahead.held_bytes:
            ready = max(ready, -(-len(self._pending) // 4))
        return ready if 4 * ready >= len(self._pending) - ready else 0

    def _waits(self, age: int, share: float, most: float) -> bool:
        return share > most and age < self._lookahead.steps

    def _shares(self) -> list[float]:
        """Return the share of each waiting step's gradient that is still in the buffer, the largest of all blocks."""
        remains, by_position = 1.0, {}
        for position in range(len(self._steps) - 1, -1, -1):
            by_position[position] = remains
            remains *= max((_largest(n.momentum) for n in self._steps[position].values() if _moves(n)), default=1.0)
        return [by_position.get(pending.position, remains) for pending in self._pending]

    def _forget_steps(self) -> None:
        """Drop the steps before the oldest one that waits."""
        first = min((pending.position for pending in self._pending), default=len(self._steps))
        if first > 0:
            self._steps = self._steps[first:]
            for pending in self._pending:
                pending.position -= first

    def _finish(self, projector: Projector, pendings: Sequence[Pending], over: bool) -> None:
        """Project what some steps' batches have moved, block by block, and pass on what is left in the buffer.

        Args:
            projector: The projection.
            pendings: The steps.
            over: Whether the segment ends here; then those with much left in the momentum buffer keep waiting.
        """
        shares = self._shares()
        on = [
            over and self._waits(len(shares) - 1 - age, share, self._lookahead.share_at_end)
            for age, share in zip(range(len(pendings)), shares, strict=False)
        ]
        entries = [[self._entry(projector, batch) for batch in pending.batches] for pending in pendings]
        passed: list[dict[int, float]] = [{} for _ in pendings]
        left: list[dict[int, Number]] = [{} for _ in pendings]
        for b, block in enumerate(self._spec.blocks):
            reaches = {r.step: r for r in look_back([n[b] for n in self._steps], [p.position for p in pendings])}
            for i, pending in enumerate(pendings):
                moved, buffered = _of(reaches[pending.position], pending, b)
                moved = _spread(moved, block.numel, self._spec.like)
                if b in pending.still:
                    moved, buffered = moved * pending.still[b], buffered * pending.still[b]
                for batch, entry in zip(pending.batches, entries[i], strict=True):
                    self._project(projector, b, batch, entry, moved * pending.scale[b])
                gradient = pending.gradient[block.span]
                by_all = moved * gradient
                self._tail.examples[block.span] -= by_all
                passed[i][b], left[i][b] = 0.0, buffered
                if not on[i]:
                    passed[i][b] = self._tail.add(b, by_all, buffered * gradient, self._steps[-1][b].buffer_step)
        for i, pending in enumerate(pendings):
            for batch, entry in zip(pending.batches, entries[i], strict=True):
                derivatives = batch.loss_derivatives(next(iter(pending.scale.values())), self._spec.like)
                self._visits.append(
                    _Visit(len(self._tail.folds), batch.everywhere, batch.ids, *entry, derivatives, passed[i])
                )
            pending.position, pending.carried = -1, left[i] if on[i] else None

    def _entry(self, projector: Projector, batch: CapturedBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Allocate a batch's rows and its audited examples' rows; return them with the audited positions."""
        chosen = self._audit.positions(batch.ids)
        new = self._spec.like.new_zeros
        return new(len(batch.ids), projector.columns), chosen, new(len(chosen), self._spec.size)

    def _project(
        self,
        projector: Projector,
        b: int,
        batch: CapturedBatch,
        entry: tuple[Tensor, Tensor, Tensor],
        factors: Tensor,
    ) -> None:
        rows, chosen, audit_rows = entry
        for position, gradients in batch.pieces:
            if position == b:
                projector.add_displacements(rows, b, gradients, factors)
                if len(chosen):
                    audit_rows[:, self._spec.blocks[b].span] += gradients.select(chosen).dense() * factors


def _of(reach: Reach, pending: Pending, block: int) -> tuple[Number, Number]:
    if pending.carried is None:
        return reach.moved, reach.buffered
    return pending.carried[block] * reach.moved, pending.carried[block] * reach.buffered


def _moves(n: LinearStep) -> bool:
    return isinstance(n.gain, Tensor) or isinstance(n.gradient_step, Tensor) or bool(n.gain) or bool(n.gradient_step)


def _largest(number: Number) -> float:
    return float(number.max()) if isinstance(number, Tensor) else number


def _spread(number: Number, numel: int, like: Tensor) -> Tensor:
    return number if isinstance(number, Tensor) else like.new_full((numel,), number)


def _preconditioner(operator: Tensor, spans: Sequence[slice]) -> Tensor:
    """Choose S close to the root of the operator; a coordinate with hardly any gradient gets its block's mean.

    Args:
        operator: How far each coordinate's gradient moves it, ``(parameters,)``.
        spans: The blocks' slices of the flat vector.
    """
    preconditioner = torch.ones_like(operator)
    for span in spans:
        inverse = 1 / operator[span]
        usable = torch.isfinite(inverse)
        if usable.any():
            inverse = inverse + _DAMPING * inverse[usable].mean()
            preconditioner[span] = torch.where(usable, inverse.rsqrt(), inverse[usable].rsqrt().mean())
    return preconditioner
