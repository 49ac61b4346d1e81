"""Warnings, each given once, about what a recorded segment could not attribute to examples."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pkexplain.errors import warn
from pkexplain.optimizers.base import CapturedBatch
from pkexplain.record._gradient_check import CAPTURE_TOLERANCE
from pkexplain.store.manifest import SegmentSummary
from pkexplain.store.trajectory import Segment

_UNEXPLAINED = 0.2
"""The largest share of a parameter's displacement that may be on the optimizer line without a warning."""
_UNEXPLAINED_ELEMENTWISE = 0.5
"""The same if one operator stands for all steps of a segment, whose misfit is on that line, too."""
_MATTERS = 0.01
"""The share of the model's displacement below which a parameter's own does not matter.

Where gradients are rounded, as in bfloat16, it is the whole: there, rounding is most of what moves some biases, and a
third of what moves some weights in Adam's first step."""
_BEND = 1e-3
"""The largest share of the applied gradient, not a multiple of the captured one, that passes for rounding error."""


class SegmentWarnings:
    """Warns about what a recording finds, once for each kind.

    Args:
        names: Names of the parameters, in the order of the flat vector.
        sizes: Their sizes.
    """

    def __init__(self, names: Sequence[str], sizes: Sequence[int]) -> None:
        """Start without a warning given."""
        self._names, self._sizes = names, list(sizes)
        self._warned, self._named = False, False

    def of(
        self, position: int, segment: Segment, summary: SegmentSummary, moved: Tensor, *, apart: bool, missing: bool
    ) -> None:
        """Warn about what a finished segment could not attribute to examples, and why.

        Args:
            position: Which segment.
            segment: The segment.
            summary: Its numbers.
            moved: Δθ, ``(parameters,)``.
            apart: Whether examples account for only a share of the gradients, if only because of rounding.
            missing: Whether a penalty in the loss is known; there was a warning about it already.
        """
        if not self._warned and not missing and summary.bent <= _BEND:
            most = _UNEXPLAINED_ELEMENTWISE if len(segment.operator) else _UNEXPLAINED
            self._of_unexplained(position, segment.optimizer.to(moved), moved, most, floor=1.0 if apart else _MATTERS)
        if summary.bent > _BEND and not self._warned:
            self._warned = True
            warn(
                f"pkexplain: in segment {position} the gradient that the optimizer was given is not a multiple of the "
                f"one that backward computed, by up to {summary.bent:.1%}. Clipping by value, gradient noise and a "
                "forgotten zero_grad() do that: they change each coordinate separately, which belongs to no single "
                "example, so the difference goes to the ledger's optimizer line. Clipping by norm "
                "(clip_grad_norm_) is exact."
            )
        if summary.capture_gap > CAPTURE_TOLERANCE:
            warn(
                f"pkexplain: in segment {position} the captured gradients missed up to {summary.capture_gap:.0%} of a "
                "step's gradient: the loss gained a penalty, or a weight was used outside its module's forward. "
                "From the step where this was found, what is missing goes to the ledger's optimizer line; before that, "
                "the displacement gap shows it."
            )

    def _of_unexplained(self, segment: int, remainder: Tensor, moved: Tensor, most: float, floor: float) -> None:
        floor *= float(moved.norm())
        pairs = zip(remainder.split(self._sizes), moved.split(self._sizes), strict=True)
        sizes = [(float(a.norm()), float(b.norm())) for a, b in pairs]
        shares = [left / max(whole, floor, 1e-30) for left, whole in sizes]
        if max(shares) > most:
            at = shares.index(max(shares))
            share, self._warned, parameter = sizes[at][0] / max(sizes[at][1], 1e-30), True, self._names[at]
            warn(
                f"pkexplain: {share:.0%} of what moved {parameter} in segment {segment} came from no "
                "example and no weight decay; it is on the ledger's optimizer line. Was the parameter changed "
                "outside optimizer.step(), by a second optimizer, say, or is an update rule of your own wrong? A bias "
                "before a BatchNorm is moved by rounding error alone (use bias=False). Otherwise, record shorter "
                "segments: Recorder(segments=…)."
            )

    def of_skipped(self, batches: Sequence[CapturedBatch]) -> None:
        """Name single examples with a nan loss in a skipped step; an overflow makes whole batches nan."""
        seen = [(batch.ids, batch.derivatives.isnan().cpu()) for batch in batches if batch.derivatives is not None]
        ids = [int(i) for examples, odd in seen if not odd.all() for i in examples[odd]]
        if ids and not self._named:
            self._named = True
            warn(
                "pkexplain: the loss scaler skipped a step in which the loss derivative of only some examples is nan: "
                f"{', '.join(map(str, ids[:8]))}. Scaling overflows for whole batches, so look at these."
            )
