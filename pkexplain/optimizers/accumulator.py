"""Displacements of all examples over a segment, from the gradients of each step to the rows that are stored.

A step only touches its own batch, whose gradients are projected in the backward pass, in factors. How far they have
moved the parameters is a number for each block, known when the segment closes; what differs from coordinate to
coordinate is one operator for the segment, which multiplies the query (`pkexplain.optimizers.operator_fit`). Only the
first batches of a segment wait, until its directions are chosen from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pkexplain.gradients.devices import place
from pkexplain.gradients.factors import ExampleGradients
from pkexplain.optimizers.base import Audit, CapturedBatch, Factors, RecordingSpec, Totals
from pkexplain.optimizers.displacement import MomentumBuffer, Reach, look_back
from pkexplain.optimizers.exact_audit import ExactAudit
from pkexplain.optimizers.levels import Levels, LevelSampler
from pkexplain.optimizers.operator_fit import OperatorFit
from pkexplain.optimizers.row_target import (
    Carry,
    Target,
    check_factors,
    check_shape,
    choose_factors,
    moving_coordinates,
    spread_all,
)
from pkexplain.optimizers.rules import LinearStep
from pkexplain.projection.base import WarmUp
from pkexplain.projection.projector import Projector
from pkexplain.store.scratch import MEMORY_BYTES

__all__ = ["DisplacementAccumulator"]


class DisplacementAccumulator:
    """Accumulates the examples' displacements.

    Attributes:
        arrived: The numbers by which rows move, of the steps since this was last emptied, as far as they are known.
        elementwise: Whether the optimizer has numbers for each coordinate, whatever the projection.

    Args:
        spec: What is recorded, and in which dtype.
        elementwise: Whether the optimizer has numbers for each coordinate.
        before: The projection of the segment before, if there was one.
    """

    def __init__(self, spec: RecordingSpec, elementwise: bool, before: Projector | None = None) -> None:
        """Begin a segment."""
        self._spec, self._audit, self.elementwise = spec, Audit(spec), elementwise
        fits = elementwise and not spec.projection.keeps_everything
        self._fit = OperatorFit(spec.spans, spec.like.new_zeros(spec.size)) if fits else None
        self._sampler = LevelSampler(spec.spans, spec.like)
        self._exactly = ExactAudit(len(self._audit.ids), self._audit.coordinates, spec.like) if fits else None
        self._full = MomentumBuffer(spec.spans, spec.like.new_zeros(0 if fits else spec.size))
        self._target: Target | None = None
        self._earlier = None if before is None else Target.of(spec, before, {})
        self._held: list[tuple[int, CapturedBatch, Factors]] = []
        self._visits: list[tuple[int, CapturedBatch, Tensor]] = []
        self._steps: list[Mapping[int, LinearStep]] = []
        self._levels: list[Levels] = []  # of the same steps, if an operator is fitted
        self.arrived: list[Mapping[int, LinearStep]] = []
        self._last: Mapping[int, LinearStep] = {}
        self._still: dict[int, Tensor] = {}
        self._waiting = 0
        self._carry = Carry(spec)

    @property
    def audit_ids(self) -> Tensor:
        """The audited examples."""
        return self._audit.ids

    def receive(self, batch: CapturedBatch, position: int, gradients: ExampleGradients) -> None:
        """Take one block's gradients when the backward pass reaches it: project them, or keep them for later."""
        if self._target is None:
            batch.pieces.append((position, gradients))
        else:
            self._project(self._target, batch, position, gradients)

    def step(
        self, batches: Sequence[CapturedBatch], numbers: Mapping[int, LinearStep], scale: Factors, gradient: Tensor
    ) -> None:
        """Follow one optimizer step.

        Args:
            batches: The batches whose gradients the step applies.
            numbers: The step's numbers for each block.
            scale: The factor between captured and applied gradients, for each block.
            gradient: The sum of the examples' gradients, scaled, ``(parameters,)``.
        """
        self._last = numbers
        position = len(self._levels) + len(self._steps)
        if self._fit is not None:
            levels = self._sampler.levels(numbers)
            self._fit.step(numbers, levels, gradient)
            self._levels.append(levels)
        else:
            self._full.step(numbers, gradient)
            self._steps.append(numbers)
            self.arrived.append(numbers)
        self._held += [(position, batch, scale) for batch in batches]
        if self._exactly is not None:  # before anything is rounded
            self._exactly.step(numbers, [self._audited(batch, scale) for batch in batches])
        if self._target is None and self._warm():
            self._bind()
        if self._target is not None:
            self._enter_held(self._target)
            if self._waiting >= self._spec.num_examples:
                self._fold(self._target)  # as many gradients wait as there are rows: folding frees memory

    def _known_steps(self) -> list[Mapping[int, LinearStep]]:
        """The numbers by which rows move, of the steps since the last fold; on an accelerator this waits for them."""
        return [*Levels.known(self._levels)] if self._fit is not None else self._steps

    def projected_total(self, batches: Sequence[CapturedBatch], vector: Tensor) -> tuple[Tensor, Tensor] | None:
        """Sum the batches' rows as they were captured; None if they wait, with all their gradients.

        Args:
            batches: The batches of the step that comes next.
            vector: A vector to project like them, ``(parameters,)``.

        Returns:
            The sum, and the projected vector, ``(columns,)`` each.
        """
        if self._target is None or any(batch.pieces for batch in batches):
            return None
        total = self._spec.like.new_zeros(self._target.projector.width)
        for batch in batches:
            total += self._rows_of(self._target, batch).sum(0)
        return total, self._target.project(vector, self._spec)

    def close(self) -> Totals:
        """End the segment and begin the next."""
        target = self._target or self._bind(over=True)
        self._enter_held(target)
        self._fold(target)
        carried = self._carry.close(target.projector.spans, self._fit.buffer if self._fit else self._full.buffer)
        rows, derivatives, ids = target.rows.close()
        audited, _, at = self._audit.rows.close()
        audit_rows, balance, projector = (
            self._spec.like.new_zeros(len(self._audit.ids), len(self._audit.coordinates)),
            {},
            target.projector,
        )
        audit_rows[at] = audited
        if self._fit is None or self._exactly is None:
            examples = self._full.close()
            expected = -examples
        else:
            fitted, factors = self._fit.close(), spread_all(self._spec, target.factors)
            operator = fitted.operator
            for block, moves in self._still.items():
                operator[self._spec.spans[block]] *= moves
            # The rounding of what is stored is on the optimizer line.
            stored = self._spec.stored_operator(operator.div_(factors))
            projector, operator = projector.with_operator(stored), operator.copy_(stored.to(operator)).mul_(factors)
            examples, audit_rows = (operator * fitted.moved).neg_(), self._exactly.close()
            expected = factors * fitted.moved
            carried = factors[: len(carried[0])] * carried[0], carried[1]
            for block, span in self._spec.spans.items():
                energy, own = fitted.energy[span], factors[span]
                size = float((operator[span] * energy).sum(dtype=torch.float64))
                balance[block] = float((own * energy * own).sum(dtype=torch.float64)) / size if size > 0 else 1.0
        audit_rows = self._spec.group.all_reduce(audit_rows)
        if self._spec.projection.follows_gradients:
            self._earlier, self._target = target, None
        if len(carried[0]):
            expected = expected - carried[0]
        row_sum = -projector.project_plain(expected[None])[0]
        if len(carried[1]):
            row_sum += carried[1]
        return Totals(rows, derivatives, ids, audit_rows, examples, projector, balance, row_sum)

    def state_dict(self) -> dict[str, Any]:
        """Return the state between two segments: tensors, numbers and dataclasses of them."""
        target = self._target or self._earlier
        return {
            "rows": target.rows.buffer if target else None,
            "factors": dict(target.factors) if target else {},
            "audit": self._audit.rows.buffer,
            "still": self._still,
            "full": None if self._fit else (self._full.buffer, self._full.blocks),
            "fit": self._fit.state_dict if self._fit else None,
            "exactly": self._exactly.state_dict if self._exactly else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._audit.rows.load_state_dict(state["audit"])
        self._still = {b: check_shape(m, (self._spec.blocks[b].numel,)) for b, m in state["still"].items()}
        if self._fit is None or self._exactly is None:
            self._full.load_state_dict(*state["full"])
        else:
            self._fit.load_state_dict(*state["fit"])
            self._exactly.load_state_dict(state["exactly"])
        self._carry.start = (self._fit.buffer if self._fit else self._full.buffer).clone()
        if self._earlier is not None:
            factors = {b: check_factors(f, self._spec.blocks[b]) for b, f in state["factors"].items()}
            target = Target.of(self._spec, self._earlier.projector, factors)
            target.rows.load_state_dict(state["rows"])
            follows = self._spec.projection.follows_gradients
            self._earlier, self._target = (target, None) if follows else (None, target)

    def _warm(self) -> bool:
        """Whether enough gradients wait to fix the projection; where they are too few for their memory, round them."""
        projection, examples = self._spec.projection, sum(batch.everywhere for _, batch, _ in self._held)
        if examples >= projection.warm_up:
            return True
        full = self._bytes_held() >= projection.warm_up_bytes(examples)
        if full and examples < projection.choosing:
            for _, batch, _ in self._held:
                batch.round()
            full = self._bytes_held() >= projection.warm_up_bytes(examples)
        return full

    def _bytes_held(self) -> float:
        return self._spec.group.all_reduce_max(sum(batch.nbytes for _, batch, _ in self._held))

    def _bind(self, over: bool = False) -> Target:
        """Fix the projection from the waiting gradients, and from what is left of earlier ones.

        Args:
            over: Whether the segment is over, so that no more gradients come.
        """
        spec, group, earlier = self._spec, self._spec.group, self._earlier
        seen = [batch.pieces for _, batch, _ in self._held]
        steps = self._known_steps()
        sizes = [_entering(steps[at], scale) for at, _, scale in self._held]
        factors = choose_factors(spec, self._last, earlier.factors if earlier else {}) if self._fit else {}
        left = earlier.left_over(spec) if earlier else []
        total, room = None, MEMORY_BYTES * group.world_size // (spec.like.element_size() * spec.num_examples)
        if over:
            total = self._fit.moved * spread_all(spec, factors) if self._fit else self._full.moved
        projector = spec.projection.bind(
            spec.blocks, spec.like, WarmUp([*seen, *left], [*sizes, *[1.0] * len(left)], factors, total, room, group)
        )
        if group.world_size > 1:  # identical to the last bit in every process
            projector = spec.projection.restore(spec.blocks, spec.like, group.broadcast(projector.tensors()))
        self._target = Target.of(spec, projector, factors)
        if earlier is not None:
            self._target.take_over(earlier, spec)
            self._carry.rows = group.all_reduce(self._target.rows.buffer_sum())
        self._earlier = None
        if self._fit is not None:
            self._still |= moving_coordinates(spec, [(at, batch.pieces) for at, batch, _ in self._held])
        return self._target

    def _enter_held(self, target: Target) -> None:
        """Project the waiting batches."""
        like = self._spec.like
        for position, batch, scale in self._held:
            for piece in batch.pieces:
                self._project(target, batch, *piece)
            rows, batch.pieces = self._rows_of(target, batch), []
            _scale(rows, target.projector.spans, scale)
            if self._exactly is not None:
                batch.audited = batch.audit_rows = None  # they were followed already
            elif batch.audit_rows is not None:
                _scale(batch.audit_rows, self._audit.coordinates.spans, scale)
            factor = float(next(iter(scale.values())))
            self._visits.append((position, batch, batch.loss_derivatives(factor, like)))
            self._waiting += batch.everywhere
        self._held = []

    def _fold(self, target: Target) -> None:
        """Turn the waiting gradients into displacements so far and momentum buffers."""
        steps = self._known_steps()
        if not steps:
            return
        if self._fit is not None:
            self.arrived += steps
        reaches = {block: {r.step: r for r in look_back([s[block] for s in steps])} for block in steps[0]}
        earlier = _factors(reaches, -1)
        self._carry.pass_on(*earlier)
        for rows in (target.rows, self._audit.rows):
            rows.pass_on(*earlier)
        spec, group = self._spec, self._spec.group
        for position, batch, derivatives in self._visits:
            factors = _factors(reaches, position)
            values = self._rows_of(target, batch), derivatives
            ids, rows, mean = group.all_to_all(spec.num_examples, batch.ids, *values)
            target.rows.add(ids, rows, mean, *factors)
            if batch.audited is not None and batch.audit_rows is not None:
                places = self._audit.places(batch.ids[batch.audited])
                chosen = place(batch.audited, derivatives.device)
                self._audit.rows.add(places, batch.audit_rows, derivatives[chosen], *factors)
        self._visits, self._steps, self._levels, self._waiting = [], [], [], 0

    def _audited(self, batch: CapturedBatch, scale: Factors) -> tuple[Tensor, Tensor]:
        """Return a batch's audited examples and their gradients as applied, at the sampled coordinates."""
        chosen, coordinates = self._audit.positions(batch.ids), self._audit.coordinates
        gradients = self._spec.like.new_zeros(len(chosen), len(coordinates))
        if len(chosen) and batch.audit_rows is not None:
            gradients = batch.audit_rows.clone()
            _scale(gradients, coordinates.spans, scale)
        elif len(chosen):
            for position, piece in batch.pieces:
                found = coordinates.gradients(position, piece.select(place(chosen, batch.device)))
                gradients[:, coordinates.spans[position]] += found * scale[position]
        return self._audit.places(batch.ids[chosen]), gradients

    def _project(self, target: Target, batch: CapturedBatch, position: int, gradients: ExampleGradients) -> None:
        """Add one block's gradients to a batch's rows, and to those of its audited examples."""
        part = target.maps[position]
        self._rows_of(target, batch)[:, part.columns].add_(part.gradients(gradients))
        if batch.audited is not None and batch.audit_rows is not None:
            coordinates, theirs = self._audit.coordinates, gradients.select(place(batch.audited, batch.device))
            batch.audit_rows[:, coordinates.spans[position]].add_(coordinates.gradients(position, theirs))

    def _rows_of(self, target: Target, batch: CapturedBatch) -> Tensor:
        """Return a batch's rows in projection space, zero before the first block arrives."""
        if batch.rows is None:
            like = self._spec.like
            batch.rows = like.new_zeros(len(batch.ids), target.projector.width)
            chosen = self._audit.positions(batch.ids)
            if len(chosen):
                sampled = like.new_zeros(len(chosen), len(self._audit.coordinates))
                batch.audited, batch.audit_rows = chosen, sampled
        return batch.rows


def _factors(reaches: dict[int, dict[int, Reach]], position: int) -> tuple[Factors, Factors]:
    moved = {block: by_step[position].moved for block, by_step in reaches.items()}
    return moved, {block: by_step[position].buffered for block, by_step in reaches.items()}


def _entering(step: Mapping[int, LinearStep], scale: Factors) -> float:
    """What a step's captured gradients are multiplied by, on the whole, when they enter the momentum buffer."""
    gains = [
        abs(float(scale[b])) * abs(float(n.gain) or 1.0) for b, n in step.items() if not isinstance(n.gain, Tensor)
    ]
    return max(gains, default=1.0)


def _scale(rows: Tensor, columns: Mapping[int, slice], scale: Factors) -> None:
    values = {*scale.values()}
    if len(values) == 1:
        rows *= values.pop()
        return
    for block, factor in scale.items():
        rows[:, columns[block]] *= factor
