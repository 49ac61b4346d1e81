"""The account of a segment while it is recorded: what was captured, what the optimizer applied, what is left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pkexplain.displacement import FullSpaceAccount, RowAccumulator
from pkexplain.gradients import ExampleGradients
from pkexplain.layers import Block
from pkexplain.projection import Projection
from pkexplain.projector import Projector
from pkexplain.trajectory import Segment, SegmentSummary
from pkexplain.update_rules import LinearStep

__all__ = ["CapturedBatch", "SegmentAccountant"]

_AUDIT_EXAMPLES = 16
_AUDIT_NUMBERS = 1 << 23
"""Most numbers a segment keeps without projection: 32 MiB in float32."""
_CHECKED_STEP = 16
"""At the first step of a segment, and every so many steps, the captured gradients are compared with the gradient."""
_HELD_BYTES = 1 << 30
"""Most memory for gradients that wait for the projection to be fixed."""


@dataclass
class CapturedBatch:
    """What one backward pass left behind.

    Attributes:
        ids: Row numbers in the training set, ``(batch,)``.
        pieces: Block positions with per-example gradients, as long as they wait for the projection to be fixed.
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


@dataclass(frozen=True)
class _Target:
    """Where rows go once the projection is fixed."""

    projector: Projector
    rows: RowAccumulator


class SegmentAccountant:
    """Follows the optimizer's steps and closes segments.

    Args:
        blocks: The recorded parameters.
        projection: How rows are compressed.
        num_examples: How many rows there are.
        dtype: Number format of the arithmetic.
        device: Where it happens.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        projection: Projection,
        num_examples: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Begin the first segment."""
        self._blocks, self._projection, self._num_examples = tuple(blocks), projection, num_examples
        self._dtype, self._device = dtype, device
        self._spans: dict[int, slice] = {}
        for block in blocks:
            self._spans[block.group] = slice(self._spans.get(block.group, block.span).start, block.span.stop)
        size = sum(block.numel for block in blocks)
        audited = min(_AUDIT_EXAMPLES, num_examples, _AUDIT_NUMBERS // size)
        self._audit_ids = torch.arange(audited, device=device) * num_examples // max(audited, 1)
        self._audit_place = torch.full((num_examples,), -1, device=device)
        self._audit_place[self._audit_ids] = torch.arange(audited, device=device)
        self._audit = RowAccumulator(audited, self._spans, size, dtype, device)
        self._full = FullSpaceAccount(self._spans, torch.zeros(size, dtype=dtype, device=device))
        self._held: list[tuple[int, CapturedBatch, dict[int, float]]] = []
        self._target: _Target | None = None
        self.total_steps = 0
        self._begin()

    def _begin(self) -> None:
        self.steps, self.visits = 0, 0
        self._unfolded: list[Mapping[int, LinearStep]] = []
        self._rates = dict.fromkeys(self._spans, 0.0)
        self.capture_gap, self._smallest, self._largest = 0.0, 1.0, 1.0

    @property
    def projector(self) -> Projector | None:
        """The projection, once it is fixed."""
        return self._target.projector if self._target else None

    def receive(self, batch: CapturedBatch, position: int, gradients: ExampleGradients) -> None:
        """Take one block's gradients as the backward pass reaches them: project them, or keep them until it can."""
        if self._target is None:
            batch.pieces.append((position, gradients))
        else:
            self._project(self._target.projector, batch, position, gradients)

    def step(
        self,
        batches: Sequence[CapturedBatch],
        captured: Tensor,
        attributed: Tensor,
        applied: Tensor,
        numbers: Mapping[int, LinearStep],
        parameters: Tensor,
    ) -> None:
        """Follow one optimizer step.

        Args:
            batches: The batches whose gradients it applies.
            captured: The gradient that their backward passes made, ``(parameters,)``.
            attributed: The part of it that the examples gave, ``(parameters,)``; the same vector where it is the whole.
            applied: The gradient that the optimizer was given, ``(parameters,)``.
            numbers: The step's numbers for each parameter group.
            parameters: θ before the step, ``(parameters,)``.
        """
        scale = {group: _factor(captured[span], applied[span]) for group, span in self._spans.items()}
        self._smallest, self._largest = min(self._smallest, *scale.values()), max(self._largest, *scale.values())
        self._unfolded.append(numbers)
        place = len(self._unfolded) - 1
        for batch in batches:
            self._held.append((place, batch, scale))
            self.visits += len(batch.ids)
        self.steps += 1
        self.total_steps += 1
        if self._target is None:
            self._compact(batches)
            self._target = self._bind() if self._warm() else None
        if self._target is not None:
            waited = len(self._held) > len(batches)
            total = self._enter_held(self._target)
            if self.steps % _CHECKED_STEP == 1 and not waited:
                self._compare(self._target.projector, total, attributed)
        scaled = attributed if set(scale.values()) == {1.0} else attributed.clone()
        for group, span in self._spans.items():
            self._rates[group] += numbers[group].learning_rate
            if scale[group] != 1.0:
                scaled[span] *= scale[group]
        self._full.step(numbers, scaled, parameters)
        if self._target is not None and self._target.rows.full:
            for rows in (self._target.rows, self._audit):
                rows.fold(self._unfolded)
            self._unfolded = []

    def close(self, displacement: Tensor) -> tuple[Segment, SegmentSummary]:
        """End the segment and begin the next.

        Args:
            displacement: Δθ, ``(parameters,)``.

        Returns:
            The segment as it will be stored, and its summary.
        """
        target = self._target = self._target or self._bind()
        self._enter_held(target)
        rows, derivatives = target.rows.close(self._unfolded)
        audit_rows, _ = self._audit.close(self._unfolded)
        examples, decay = self._full.close()
        left = displacement - examples - decay
        segment = Segment.pack(
            rows,
            self._projection.row_dtype(self._dtype),
            loss_derivatives=derivatives,
            decay=decay,
            optimizer=left,
            audit_ids=self._audit_ids,
            audit_rows=audit_rows,
        )
        whole, explained = target.projector.project_vectors(torch.stack([displacement, displacement - decay - left]))
        gap = (explained.double() - segment.row_sum).norm() / whole.double().norm().clamp_min(1e-300)
        summary = SegmentSummary(
            last_step=self.total_steps,
            visits=self.visits,
            learning_rate_sum=tuple(self._rates.values()),
            displacement_gap=float(gap),
            optimizer_share=float(left.norm() / displacement.norm().clamp_min(1e-30)),
            capture_gap=self.capture_gap,
            rescaled=(self._smallest, self._largest),
        )
        self._begin()
        return segment, summary

    def note_capture_gap(self, gap: float) -> None:
        """Count a gap between what was captured and what it should sum to, where it is the segment's largest."""
        self.capture_gap = max(self.capture_gap, gap)

    def _compare(self, projector: Projector, captured: Tensor, gradient: Tensor) -> None:
        """Hold the sum of a step's projected gradients, ``(columns,)``, against its gradient, ``(parameters,)``."""
        whole = projector.project_vectors(gradient[None])[0]
        self.note_capture_gap(float((captured - whole).norm() / whole.norm().clamp_min(1e-300)))

    def _warm(self) -> bool:
        examples = sum(len(batch.ids) for _, batch, _ in self._held)
        held = sum(gradients.nbytes for _, batch, _ in self._held for _, gradients in batch.pieces)
        return examples >= self._projection.warm_up or held >= _HELD_BYTES

    @staticmethod
    def _compact(batches: Sequence[CapturedBatch]) -> None:
        for batch in batches:
            everyone = torch.arange(len(batch.ids), device=batch.ids.device)
            for place, (position, gradients) in enumerate(batch.pieces):
                compact = gradients.compact()
                # a copy, as a layer's input may be a parameter, or a buffer that the next batch is written into
                batch.pieces[place] = position, gradients.select(everyone) if compact is gradients else compact

    def _bind(self) -> _Target:
        seen = [batch.pieces for _, batch, _ in self._held]
        projector = self._projection.bind(self._blocks, self._dtype, self._device, seen)
        columns, groups = projector.columns, projector.group_columns
        return _Target(projector, RowAccumulator(self._num_examples, groups, columns, self._dtype, self._device))

    def _enter_held(self, target: _Target) -> Tensor:
        """Note the rows of the batches that wait; return their sum as captured, ``(columns,)``."""
        total = torch.zeros(target.projector.columns, dtype=self._dtype, device=self._device)
        for place, batch, scale in self._held:
            total += self._enter(target, place, batch, scale)
        self._held = []
        return total

    def _enter(self, target: _Target, place: int, batch: CapturedBatch, scale: Mapping[int, float]) -> Tensor:
        for piece in batch.pieces:
            self._project(target.projector, batch, *piece)
        rows, batch.pieces = self._rows_of(target.projector, batch), []
        total = rows.sum(0)
        derivatives = batch.derivatives
        if derivatives is None:
            derivatives = torch.full((len(batch.ids),), float("nan"), device=self._device)
        derivatives = derivatives.to(self._dtype) * next(iter(scale.values()))
        _scale(rows, target.projector.group_columns, scale)
        target.rows.add(place, batch.ids, rows, derivatives)
        if batch.audited is not None and batch.audit_rows is not None:
            _scale(batch.audit_rows, self._spans, scale)
            places = self._audit_place[batch.ids[batch.audited]]
            self._audit.add(place, places, batch.audit_rows, derivatives[batch.audited])
        return total

    def _project(self, projector: Projector, batch: CapturedBatch, position: int, gradients: ExampleGradients) -> None:
        """Add one block's gradients to a batch's rows, and to those of its audited examples."""
        projector.add(self._rows_of(projector, batch), position, gradients)
        if batch.audited is not None and batch.audit_rows is not None:
            span = self._blocks[position].span
            batch.audit_rows[:, span] += gradients.select(batch.audited).dense()

    def _rows_of(self, projector: Projector, batch: CapturedBatch) -> Tensor:
        """Return a batch's rows in projection space, zero before the first block has come."""
        if batch.rows is None:
            batch.rows = torch.zeros(len(batch.ids), projector.columns, dtype=self._dtype, device=self._device)
            chosen = (self._audit_place[batch.ids] >= 0).nonzero()[:, 0]
            if len(chosen):
                size = (len(chosen), self._audit.columns)
                batch.audited = chosen
                batch.audit_rows = torch.zeros(size, dtype=self._dtype, device=self._device)
        return batch.rows


def _scale(rows: Tensor, columns: Mapping[int, slice], scale: Mapping[int, float]) -> None:
    for group, factor in scale.items():
        if factor != 1.0:
            rows[:, columns[group]] *= factor


def _factor(captured: Tensor, applied: Tensor) -> float:
    """Find the factor between the captured and the applied gradient (clipping, loss scaling), by least squares."""
    if torch.equal(captured, applied):
        return 1.0
    size = captured.double().square().sum()
    return float(captured.double() @ applied.double() / size) if size > 0 else 1.0
