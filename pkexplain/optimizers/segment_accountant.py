"""One segment while it is recorded: what was captured, what the optimizer applied, and what neither explains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from pkexplain.gradients import devices
from pkexplain.gradients.devices import fetch
from pkexplain.gradients.factors import ExampleGradients
from pkexplain.optimizers._learning_rates import RateSums
from pkexplain.optimizers.accumulator import DisplacementAccumulator
from pkexplain.optimizers.base import CapturedBatch, RecordingSpec, Totals
from pkexplain.optimizers.displacement import MomentumBuffer
from pkexplain.optimizers.rules import LinearStep
from pkexplain.projection.packed import Vector
from pkexplain.projection.projector import Projector
from pkexplain.store.manifest import SegmentSummary, SplitSummary
from pkexplain.store.rows import Rows
from pkexplain.store.scratch import empty_on_disk, zeros_on_disk
from pkexplain.store.trajectory import Segment

__all__ = ["AppliedStep", "SegmentAccountant"]

_ROWS_AT_ONCE = 4096
_CHECKED_STEP = 16
"""Captured gradients are compared with the gradient at a segment's first step and every this many steps."""


@dataclass(frozen=True)
class AppliedStep:
    """One step that the optimizer has taken.

    Attributes:
        batches: The batches whose gradients it applied.
        captured: The gradient that their backward passes computed, ``(parameters,)``.
        attributed: The share of it that belongs to examples, ``(parameters,)``; the same vector if that is all of it.
        numbers: The step's numbers for each block.
        parameters: θ before the step, ``(parameters,)``.
        factors: What `SegmentAccountant.compare` found.
        unsplit: The part of the captured gradient that was not split among examples, ``(parameters,)``; None if there
            is none.
    """

    batches: Sequence[CapturedBatch]
    captured: Tensor
    attributed: Tensor
    numbers: Mapping[int, LinearStep]
    parameters: Tensor
    factors: Sequence[Sequence[float]]
    unsplit: Tensor | None = None


class SegmentAccountant:
    """Follows the optimizer's steps and closes segments.

    Args:
        spec: What is recorded.
        projector: The projection of the segment before, if there was one.
        steps: Optimizer steps taken before.
    """

    def __init__(self, spec: RecordingSpec, projector: Projector | None = None, steps: int = 0) -> None:
        """Begin a segment."""
        self._spec, self._projector = spec, projector
        self._accumulator: DisplacementAccumulator | None = None  # the first step decides which one
        self._decay = MomentumBuffer(spec.spans, spec.like.new_zeros(spec.size))
        self._unsplit: MomentumBuffer | None = None  # until there is something
        self._rate_sums = RateSums(spec.spans)
        groups: dict[int, slice] = {}
        for block in spec.blocks:
            groups[block.group] = slice(groups.get(block.group, block.span).start, block.span.stop)
        self._groups = groups
        self._first_of = {block.group: position for position, block in reversed(list(enumerate(spec.blocks)))}
        self.total_steps = steps
        self._begin()

    def _begin(self) -> None:
        self.steps, self.visits, self.skipped = 0, 0, 0
        self._rates = dict.fromkeys(self._groups, 0.0)
        self.capture_gap, self.bend, self._smallest, self._largest = 0.0, 0.0, 1.0, 1.0

    @property
    def elementwise(self) -> bool:
        """Whether the optimizer has numbers for each coordinate."""
        return self._accumulator is not None and self._accumulator.elementwise

    def receive(self, batch: CapturedBatch, position: int, gradients: ExampleGradients) -> None:
        """Take one block's gradients when the backward pass reaches it."""
        if self._accumulator is None:
            batch.pieces.append((position, gradients))
        else:
            self._accumulator.receive(batch, position, gradients)

    def compare(self, captured: Tensor, applied: Tensor) -> list[Tensor]:
        """Find the factor between two gradients in each parameter group (clipping, loss scaling), by least squares.

        Args:
            captured: The gradient that the backward passes computed, ``(parameters,)``.
            applied: The gradient that the optimizer is given, ``(parameters,)``.

        Returns:
            For each group the factor, and the share of the applied gradient that is not a multiple of the captured
            one, ``(2,)`` each: not waited for.
        """
        return [_factor(captured[span], applied[span]) for span in self._groups.values()]

    def step(self, step: AppliedStep) -> None:
        """Follow one optimizer step."""
        batches, numbers, attributed = step.batches, step.numbers, step.attributed
        if self._accumulator is None:
            self._accumulator = self._open(elementwise=any(n.elementwise for n in numbers.values()))
        found = {group: factor for group, (factor, _) in zip(self._groups, step.factors, strict=True)}
        self.bend = max(self.bend, *(bend for _, bend in step.factors))
        scale = {position: found[block.group] for position, block in enumerate(self._spec.blocks)}
        rescaled = [factor * self._spec.group.world_size for factor in scale.values()]  # several processes are averaged
        self._smallest, self._largest = min(self._smallest, *rescaled), max(self._largest, *rescaled)
        for group, position in self._first_of.items():
            self._rates[group] += numbers[position].learning_rate
        self.visits += sum(batch.everywhere for batch in batches)
        self.steps += 1
        self.total_steps += 1
        checked = self.steps % _CHECKED_STEP == 1
        if checked:
            self._check_capture(self._accumulator, batches, attributed)
        scaled = self._scaled(attributed, scale)
        self._accumulator.step(batches, numbers, scale, scaled)
        self._sum_rates(self._accumulator, scaled)
        self._follow_unsplit(numbers, step.unsplit, scale)
        self._follow_decay(numbers, step.parameters)

    def _sum_rates(self, accumulator: DisplacementAccumulator, gradient: Tensor) -> None:
        """Sum learning rates, as far as they are known."""
        for numbers in accumulator.arrived:
            self._rate_sums.step(numbers, gradient)
        accumulator.arrived = []

    def _open(self, elementwise: bool) -> DisplacementAccumulator:
        return DisplacementAccumulator(self._spec, elementwise, self._projector)

    def _check_capture(
        self, accumulator: DisplacementAccumulator, batches: Sequence[CapturedBatch], attributed: Tensor
    ) -> None:
        """Compare what was captured with the gradient: the rows if they are projected already, or else everything."""
        rows = accumulator.projected_total(batches, attributed)
        if rows is None:
            self.note_capture_gap(_gap(self._total(batches), attributed))
        else:
            self.note_capture_gap(_gap(self._spec.group.all_reduce(rows[0]), rows[1]))

    def state_dict(self) -> dict[str, Any]:
        """Return what the next segments need from those before: the momentum buffers."""
        return {
            "weight_decay": (self._decay.buffer, self._decay.blocks),
            "unsplit": (self._unsplit.buffer, self._unsplit.blocks) if self._unsplit else None,
            "rates": self._rate_sums.buffer,
            "elementwise": self.elementwise,
            "accumulator": self._accumulator.state_dict() if self._accumulator else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._decay.load_state_dict(*state["weight_decay"])
        if state["unsplit"] is not None:
            self._unsplit = self._new_unsplit()
            self._unsplit.load_state_dict(*state["unsplit"])
        self._rate_sums.load_state_dict(state["rates"])
        if state["accumulator"] is not None:
            self._accumulator = self._open(state["elementwise"])
            self._accumulator.load_state_dict(state["accumulator"])

    def skip(self, batches: Sequence[CapturedBatch]) -> None:
        """Count a step that was not taken."""
        self.visits += sum(batch.everywhere for batch in batches)
        self.skipped += 1

    def _total(self, batches: Sequence[CapturedBatch]) -> Tensor:
        """Sum the waiting gradients, ``(parameters,)``."""
        total = self._spec.like.new_zeros(self._spec.size)
        for batch in batches:
            for position, gradients in batch.pieces:
                total[self._spec.blocks[position].span] += gradients.total()
        return self._spec.group.all_reduce(total)

    def _scaled(self, vector: Tensor, scale: Mapping[int, float]) -> Tensor:
        factors = {*scale.values()}
        if len(factors) == 1:
            return vector if factors == {1.0} else vector * factors.pop()
        scaled = vector.clone()
        for block, span in self._spec.spans.items():
            scaled[span] *= scale[block]
        return scaled

    def _follow_unsplit(
        self, numbers: Mapping[int, LinearStep], gradient: Tensor | None, scale: Mapping[int, float]
    ) -> None:
        if gradient is not None and self._unsplit is None:
            self._unsplit = self._new_unsplit()
        if self._unsplit is not None:
            self._unsplit.step(numbers, None if gradient is None else self._scaled(gradient, scale))

    def _new_unsplit(self) -> MomentumBuffer:
        return MomentumBuffer(self._spec.spans, self._spec.like.new_zeros(self._spec.size))

    def _follow_decay(self, numbers: Mapping[int, LinearStep], parameters: Tensor) -> None:
        self._decay.step(numbers, parameters, lambda n: n.weight_decay)
        self._decay.shrink(numbers, parameters)

    def close(self, displacement: Tensor, split: SplitSummary) -> tuple[Segment, SegmentSummary]:
        """End the segment and begin the next.

        Args:
            displacement: Δθ, ``(parameters,)``.
            split: How well its gradients were split.

        Returns:
            The segment as it will be stored, with the rows of this process, and its summary.
        """
        accumulator = self._accumulator = self._accumulator or self._open(elementwise=False)
        dtype = self._spec.operator_dtype
        totals = accumulator.close()
        decay = self._spec.stored_line(self._decay.close(), displacement, self.total_steps)
        self._sum_rates(accumulator, displacement)  # their sizes are known: no gradient is needed any more
        rate_sums = self._rate_sums.close(totals.balance)
        totals = self._shortened(totals, rate_sums)
        projector = totals.projector
        operator = cast("Vector | None", projector.operator)  # in a recording, never one that is computed when read
        unsplit = (self._unsplit.close() if self._unsplit else displacement[:0]).to(dtype)
        remainder = displacement - totals.examples - decay.to(displacement)
        if len(unsplit):
            remainder -= unsplit
        row_dtype = self._spec.projection.row_dtype(self._spec.like.dtype)
        empty = partial(empty_on_disk, directory=self._spec.scratch) if totals.rows.device.type == "cpu" else None
        mine = self._spec.group.shard(self._spec.num_examples)
        rows = Rows.pack(totals.rows, totals.derivatives, row_dtype, empty, totals.ids, mine.stop - mine.start)
        segment = Segment(
            shards=(rows,),
            row_sum=self._spec.group.all_reduce(rows.sum().to(remainder.device)),
            weight_decay=decay,
            unsplit=unsplit,
            optimizer=self._spec.stored_line(remainder, displacement, self.total_steps + 1),
            audit_ids=accumulator.audit_ids,
            audit_rows=totals.audit_rows.to(self._spec.audit_dtype),
            withdrawn=torch.zeros(totals.rows.shape[1], dtype=torch.float64, device="cpu"),
            rate_sums=rate_sums,
            operator=displacement[:0].to(dtype) if operator is None else operator,
            directions=projector.tensors(),
        )
        expected, size = totals.row_sum.double(), totals.row_sum.double().norm()
        if operator is None:
            size = projector.short_rows(projector.project_plain(displacement[None])).double().norm()
        gap = (expected - segment.row_sum).norm() / torch.maximum(size, segment.row_sum.norm()).clamp_min(1e-300)
        summary = SegmentSummary(
            last_step=self.total_steps,
            visits=self.visits,
            learning_rate_sum=tuple(self._rates.values()),
            displacement_gap=float(gap),
            optimizer_share=float(remainder.norm() / displacement.norm().clamp_min(1e-30)),
            capture_gap=self.capture_gap,
            rescaled=(self._smallest, self._largest),
            bent=self.bend,
            skipped_steps=self.skipped,
            split=split,
        )
        self._begin()
        return segment, summary

    def _shortened(self, totals: Totals, rate_sums: Tensor) -> Totals:
        """Make a segment's wide rows as short as they are stored."""
        spec, wide = self._spec, totals.rows
        stage = spec.projection.second_stage(totals.projector, wide, totals.row_sum, rate_sums, spec.group)
        if stage is None:
            return totals
        projector = totals.projector.with_second_stage(stage)
        rows = zeros_on_disk(len(wide), projector.columns, like=spec.like, directory=spec.scratch)
        for at in range(0, len(wide), _ROWS_AT_ONCE):
            rows[at : at + _ROWS_AT_ONCE] = projector.short_rows(wide[at : at + _ROWS_AT_ONCE])
        return replace(totals, rows=rows, projector=projector, row_sum=projector.short_rows(totals.row_sum[None])[0])

    def note_capture_gap(self, gap: float) -> None:
        """Note a gap between what was captured and what it should sum to; the segment's largest is kept."""
        self.capture_gap = max(self.capture_gap, gap)


def _gap(found: Tensor, true: Tensor) -> float:
    (miss,), (size,) = fetch([(found - true).norm(), true.norm()])
    return miss / max(size, 1e-300)


def _factor(captured: Tensor, applied: Tensor) -> Tensor:
    if not devices.accelerated(captured.device) and torch.equal(captured, applied):
        return torch.tensor([1.0, 0.0], dtype=torch.float64, device="cpu")
    before, after = captured.double(), applied.double()
    size, whole = (before * before).sum(), after.norm()
    factor = torch.where(size > 0, (before * after).sum() / size, 1.0)
    rest = torch.where(whole > 0, (after - factor * before).norm() / whole, 0.0)
    return torch.stack([factor, rest])
