"""What can go wrong in an explanation, measured, with tolerances.

A corrected sum closes by construction, so it proves nothing; each of these checks can fail.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pkexplain.explain._completeness import CorrectedCovectors
from pkexplain.explain.removal import FinalGradient
from pkexplain.results.explanation import Check
from pkexplain.store.manifest import SplitSummary
from pkexplain.store.trajectory import Trajectory

_TOLERANCES = {
    "optimizer share": 1e-2,
    "displacement gap": 1e-2,
    "capture gap": 1e-2,
    "split gap": 1e-4,
    "projection gap": 0.5,
    "audit error": 0.2,
    "completeness gap": 1e-4,
}
_MEANINGS = {
    "quadrature gap": "The part of f_T − f_0 that the integral over training misses, in full space, before any "
    "correction; its tolerance was {state}. If it fails, pass Explainer a Quadrature with a larger budget, or record "
    "more segments.",
    "optimizer share": "The part of f_T − f_0 that neither examples nor weight decay explain: rounding error, or a "
    "gradient that was changed between backward and step. If it fails, look for a forgotten zero_grad(), clipping by "
    "value, a penalty in the loss, or parameters changed by hand; under Adam and its relatives, record shorter "
    "segments: Recorder(segments=…); with an optimizer of your own, check its update rule.",
    "displacement gap": "How far the stored rows are from adding up to the parameters' displacement, relative to "
    "‖Δθ‖, in the worst segment. If it fails, look for a parameter used outside its layer, or a penalty that was "
    "added to the loss after the first step.",
    "capture gap": "The largest share of a checked step's gradient that is neither in the per-example gradients nor "
    "on the optimizer line. If it fails, look for the causes given for the displacement gap.",
    "split gap": "How far the gradients, as they were split among the examples, are from a coded pass through the "
    "real graph, in the worst checked layer{interacting}. If it fails, a layer is shared by the examples in a way that "
    "recording did not see: pkexplain.verify_recording(model, batch, loss) shows which.",
    "projection gap": "The part of the examples' total that the compressed rows missed before the completeness "
    "correction. If it fails, contributions are rough: record wider rows: Recorder(projection=pk.Kronecker(wide=…)).",
    "audit error": "Relative error of the contributions of {audited} examples whose displacements were also kept "
    "uncompressed{sampled}. If it fails, record wider rows: Recorder(projection=pk.Kronecker(wide=…)).",
    "completeness gap": "The part of the total that the contributions miss. Closes by construction: an arithmetic "
    "check only; the other checks are the evidence.",
}

_AUDITED_GRADIENT = (
    "Relative error of the products of this output's gradient with the displacements of {audited} examples, which were "
    "also kept uncompressed{sampled}, before the curvature is applied. If it fails, record wider rows: "
    "Recorder(projection=pk.Kronecker(wide=…))."
)


_INTERACTING = (
    "; in this model examples act on one another within a batch (as in a BatchNorm), so a row is credited to the "
    "example at whose place it was computed, which is checked layer by layer"
)


def _split(trajectory: Trajectory) -> SplitSummary:
    """The split of the segment that comes closest to its tolerance."""
    return max((summary.split for summary in trajectory.summaries), key=lambda split: split.gap / split.tolerance)


def _sampled(trajectory: Trajectory) -> str:
    """Say from how much of it an audited displacement's product is estimated."""
    kept, size = len(trajectory.coordinates), sum(block.numel for block in trajectory.fingerprint.blocks)
    return "" if kept == size else f", at {kept:,} of {size:,} coordinates: the error of this sample counts, too"


def checks_of(
    trajectory: Trajectory, corrected: CorrectedCovectors, audited: Tensor | None, row: int, tolerance: float
) -> tuple[Check, ...]:
    """Measure everything that can go wrong for one query.

    Args:
        trajectory: The run.
        corrected: Covectors of a batch of queries.
        audited: Contributions of the audited examples from their stored rows, ``(queries, audited)``; None without any.
        row: Which query.
        tolerance: Allowed quadrature gap, relative to |f_T − f_0|.

    Returns:
        The checks; values are relative to |f_T − f_0| unless stated otherwise.
    """
    covectors = corrected.covectors
    changes = covectors.outputs[row].diff()
    change = abs(float(changes.sum())) or float("nan")
    explained = corrected.explained[row]
    values = {
        "quadrature gap": float((changes - covectors.displacement[row] - covectors.buffers[row]).sum()) / change,
        "optimizer share": float(covectors.optimizer[row].sum()) / change,
        "displacement gap": max(summary.displacement_gap for summary in trajectory.summaries),
        "capture gap": max(summary.capture_gap for summary in trajectory.summaries),
        "split gap": _split(trajectory).gap,
        "projection gap": float((explained - corrected.uncorrected[row]).sum()) / change,
        "completeness gap": float((explained - corrected.corrected[row]).sum()) / change,
    }
    if audited is not None:
        exact = covectors.audit[row].sum(0)
        size = exact.norm().clamp_min(torch.finfo(exact.dtype).tiny)
        values["audit error"] = float((audited[row] - exact).norm() / size)
    facts = {
        "state": "met" if covectors.settled[row] else "not met within the budget",
        "audited": 0 if audited is None else audited.shape[1],
        "sampled": _sampled(trajectory),
        "interacting": _INTERACTING if any(s.split.interacting for s in trajectory.summaries) else "",
    }
    tolerances = {"quadrature gap": tolerance, **_TOLERANCES, "split gap": _split(trajectory).tolerance}
    return tuple(
        Check(name, abs(values[name]), tolerances[name], meaning.format(**facts))
        for name, meaning in _MEANINGS.items()
        if name in values
    )


def removal_checks(trajectory: Trajectory, final: FinalGradient, row: int) -> tuple[Check, ...]:
    """Measure what can go wrong in the removal reading of one query: the rows, and their products with its gradient.

    How well it predicts is not a property of one explanation: `pkexplain.evaluation` measures that by retraining.

    Args:
        trajectory: The run.
        final: λ_T of a batch of queries.
        row: Which query.
    """
    values = {
        "displacement gap": max(summary.displacement_gap for summary in trajectory.summaries),
        "capture gap": max(summary.capture_gap for summary in trajectory.summaries),
        "split gap": _split(trajectory).gap,
    }
    audited = final.audit.shape[1]
    if audited:
        size = final.audit[row].norm().clamp_min(torch.finfo(final.audit.dtype).tiny)
        values["audit error"] = float((final.stored[row] - final.audit[row]).norm() / size)
    mixed = _INTERACTING if any(s.split.interacting for s in trajectory.summaries) else ""
    meanings = {**_MEANINGS, "audit error": _AUDITED_GRADIENT.format(audited=audited, sampled=_sampled(trajectory))}
    meanings["split gap"] = meanings["split gap"].format(interacting=mixed)
    tolerances = {**_TOLERANCES, "split gap": _split(trajectory).tolerance}
    return tuple(Check(name, abs(value), tolerances[name], meanings[name]) for name, value in values.items())
