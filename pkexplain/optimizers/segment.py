"""The account of a segment while it is recorded: what was captured, what the optimizer applied, what is left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pkexplain.gradients.factors import ExampleGradients
from pkexplain.optimizers._learning_rates import RateSums
from pkexplain.optimizers.adaptive import Lookahead, LookaheadBook
from pkexplain.optimizers.base import Book, CapturedBatch, Setting
from pkexplain.optimizers.displacement import MomentumAccount
from pkexplain.optimizers.rules import LinearStep
from pkexplain.optimizers.scalar import VisitBook
from pkexplain.projection.maps import Projector
from pkexplain.store.manifest import SegmentSummary
from pkexplain.store.rows import Rows
from pkexplain.store.scratch import empty_on_disk
from pkexplain.store.trajectory import Segment

__all__ = ["AppliedStep", "SegmentAccountant"]

_CHECKED_STEP = 16
"""At the first step of a segment, and every so many steps, the captured gradients are compared with the gradient."""


@dataclass(frozen=True)
class AppliedStep:
    """One step that the optimizer has taken.

    Attributes:
        batches: The batches whose gradients it applied.
        captured: The gradient that their backward passes made, ``(parameters,)``.
        attributed: The part of it that the examples gave, ``(parameters,)``; the same vector where it is the whole.
        applied: The gradient that the optimizer was given, ``(parameters,)``.
        numbers: The step's numbers for each block.
        parameters: θ before the step, ``(parameters,)``.
    """

    batches: Sequence[CapturedBatch]
    captured: Tensor
    attributed: Tensor
    applied: Tensor
    numbers: Mapping[int, LinearStep]
    parameters: Tensor


class SegmentAccountant:
    """Follows the optimizer's steps and closes segments.

    Args:
        setting: What is recorded.
        lookahead: How long gradients wait where the optimizer divides by a second moment.
        projector: The projection, where it is known from earlier segments.
        steps: Optimizer steps done before.
    """

    def __init__(
        self, setting: Setting, lookahead: Lookahead, projector: Projector | None = None, steps: int = 0
    ) -> None:
        """Begin a segment."""
        self._setting, self._lookahead, self._projector = setting, lookahead, projector
        self._book: Book | None = None  # which one, the first step tells
        self._decay = MomentumAccount(setting.spans, setting.like.new_zeros(setting.size))
        self._rate_sums = RateSums(setting.spans)
        groups: dict[int, slice] = {}
        for block in setting.blocks:
            groups[block.group] = slice(groups.get(block.group, block.span).start, block.span.stop)
        self._groups = groups
        self._first_of = {block.group: position for position, block in reversed(list(enumerate(setting.blocks)))}
        self.total_steps = steps
        self._begin()

    def _begin(self) -> None:
        self.steps, self.visits, self.skipped = 0, 0, 0
        self._rates = dict.fromkeys(self._groups, 0.0)
        self.capture_gap, self.bend, self._smallest, self._largest = 0.0, 0.0, 1.0, 1.0

    @property
    def projector(self) -> Projector | None:
        """The projection, once it is fixed."""
        return self._book.projector if self._book else self._projector

    def receive(self, batch: CapturedBatch, position: int, gradients: ExampleGradients) -> None:
        """Take one block's gradients as the backward pass reaches them."""
        if self._book is None:
            batch.pieces.append((position, gradients))
        else:
            self._book.receive(batch, position, gradients)

    def step(self, step: AppliedStep) -> None:
        """Follow one optimizer step."""
        batches, numbers, captured, applied = step.batches, step.numbers, step.captured, step.applied
        attributed = step.attributed
        if self._book is None:
            self._book = self._open(elementwise=any(n.elementwise for n in numbers.values()))
        found = {group: _factor(captured[span], applied[span]) for group, span in self._groups.items()}
        self.bend = max(self.bend, *(bend for _, bend in found.values()))
        scale = {position: found[block.group][0] for position, block in enumerate(self._setting.blocks)}
        rescaled = [
            factor * self._setting.group.world_size for factor in scale.values()
        ]  # several processes are averaged
        self._smallest, self._largest = min(self._smallest, *rescaled), max(self._largest, *rescaled)
        for group, position in self._first_of.items():
            self._rates[group] += numbers[position].learning_rate
        self.visits += sum(batch.everywhere for batch in batches)
        self.steps += 1
        self.total_steps += 1
        checked = self.steps % _CHECKED_STEP == 1
        if checked and isinstance(self._book, LookaheadBook):
            self.note_capture_gap(_gap(self._total(batches), attributed))
        scaled = attributed if set(scale.values()) == {1.0} else self._scaled(attributed, scale)
        rows = self._book.step(batches, numbers, scale, scaled)
        if checked and rows is not None and self.projector is not None:
            rows = self._setting.group.all_reduce(rows)
            self.note_capture_gap(_gap(rows, self.projector.project_displacements(attributed[None])[0]))
        self._rate_sums.step(numbers, scaled)
        self._follow_decay(numbers, step.parameters)

    def _open(self, elementwise: bool) -> Book:
        if elementwise:
            return LookaheadBook(self._setting, self._lookahead, self._projector)
        return VisitBook(self._setting, self._projector)

    def state_dict(self) -> dict[str, Any]:
        """Return what the next segments need of those before: what is in the optimizer's moment."""
        return {
            "weight_decay": (self._decay.moment, self._decay.blocks),
            "rates": self._rate_sums.moment,
            "elementwise": isinstance(self._book, LookaheadBook),
            "book": self._book.state_dict() if self._book else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin with what was in the optimizer's moment."""
        self._decay.load_state_dict(*state["weight_decay"])
        self._rate_sums.load_state_dict(state["rates"])
        if state["book"] is not None:
            self._book = self._open(state["elementwise"])
            self._book.load_state_dict(state["book"])

    def skip(self, batches: Sequence[CapturedBatch]) -> None:
        """Count a step that was not taken."""
        self.visits += sum(batch.everywhere for batch in batches)
        self.skipped += 1

    def _total(self, batches: Sequence[CapturedBatch]) -> Tensor:
        """Sum the gradients that wait, ``(parameters,)``."""
        total = self._setting.like.new_zeros(self._setting.size)
        for batch in batches:
            for position, gradients in batch.pieces:
                total[self._setting.blocks[position].span] += gradients.total()
        return self._setting.group.all_reduce(total)

    def _scaled(self, vector: Tensor, scale: dict[int, float]) -> Tensor:
        scaled = vector.clone()
        for block, span in self._setting.spans.items():
            scaled[span] *= scale[block]
        return scaled

    def _follow_decay(self, numbers: Mapping[int, LinearStep], parameters: Tensor) -> None:
        coupled = {
            b: n.weight_decay * parameters[self._setting.blocks[b].span]
            for b, n in numbers.items()
            if isinstance(n.weight_decay, Tensor) or n.weight_decay
        }
        self._decay.step(numbers, coupled)
        self._decay.shrink(numbers, parameters)

    def close(self, displacement: Tensor) -> tuple[Segment, SegmentSummary]:
        """End the segment and begin the next.

        Args:
            displacement: Δθ, ``(parameters,)``.

        Returns:
            The segment as it will be stored, with the rows that are kept here, and its summary.
        """
        book = self._book = self._book or self._open(elementwise=False)
        totals, decay = book.close(), self._decay.close()
        left = displacement - totals.examples - decay
        row_dtype = self._setting.projection.row_dtype(self._setting.like.dtype)
        empty = partial(empty_on_disk, directory=self._setting.scratch) if totals.rows.device.type == "cpu" else None
        rows = Rows.pack(totals.rows, totals.derivatives, row_dtype, empty)
        segment = Segment(
            shards=(rows,),
            row_sum=self._setting.group.all_reduce(rows.sum().to(left.device)),
            weight_decay=decay,
            optimizer=left,
            audit_ids=book.audit_ids,
            audit_rows=totals.audit_rows,
            withdrawn=torch.zeros(totals.rows.shape[1], dtype=torch.float64),
            rate_sums=self._rate_sums.close(None if book.projector is None else book.projector.preconditioner),
        )
        both = torch.stack([displacement, displacement - decay - left])
        projector = book.projector
        whole, explained = both if projector is None else projector.project_displacements(both)
        gap = (explained.double() - segment.row_sum).norm() / whole.double().norm().clamp_min(1e-300)
        summary = SegmentSummary(
            last_step=self.total_steps,
            visits=self.visits,
            learning_rate_sum=tuple(self._rates.values()),
            displacement_gap=float(gap),
            optimizer_share=float(left.norm() / displacement.norm().clamp_min(1e-30)),
            capture_gap=self.capture_gap,
            rescaled=(self._smallest, self._largest),
            bent=self.bend,
            skipped_steps=self.skipped,
        )
        self._begin()
        return segment, summary

    def note_capture_gap(self, gap: float) -> None:
        """Count a gap between what was captured and what it should sum to, where it is the segment's largest."""
        self.capture_gap = max(self.capture_gap, gap)


def _gap(found: Tensor, true: Tensor) -> float:
    return float((found - true).norm() / true.norm().clamp_min(1e-300))


def _factor(captured: Tensor, applied: Tensor) -> tuple[float, float]:
    """Find the factor between the captured and the applied gradient (clipping, loss scaling), by least squares.

    Returns:
        The factor, and the share of the applied gradient that is no multiple of the captured one.
    """
    if torch.equal(captured, applied):
        return 1.0, 0.0
    size, whole = captured.double().square().sum(), applied.double().norm()
    factor = float(captured.double() @ applied.double() / size) if size > 0 else 1.0
    return factor, float((applied - factor * captured).norm() / whole) if whole > 0 else 0.0
