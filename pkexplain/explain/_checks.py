"""What can fail in an explanation, measured, with tolerances.

A corrected sum cannot fail, so it proves nothing; each of these can.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pkexplain.explain._correction import CorrectedCovectors
from pkexplain.explain.removal import FinalGradient
from pkexplain.results.explanation import Check
from pkexplain.store.trajectory import Trajectory

__all__ = ["checks_of", "removal_checks"]

_TOLERANCES = {
    "optimizer share": 1e-2,
    "displacement gap": 1e-2,
    "capture gap": 1e-2,
    "projection gap": 0.5,
    "audit error": 0.2,
    "completeness gap": 1e-4,
}
_MEANINGS = {
    "quadrature gap": "What the integral over training misses of f_T − f_0, in full space before any correction; its "
    "tolerance was {state}. Where it fails, give Explainer a Quadrature with a larger budget, or record more segments.",
    "optimizer share": "How much of f_T − f_0 no example and no weight decay explains: rounding, or a gradient changed "
    "between backward and step. Where it fails, look for a forgotten zero_grad(), clipping by value, a penalty in the "
    "loss, or parameters changed by hand; under Adam and its relatives, record with a longer lookahead; "
    "with an optimizer of your own, look at its update rule.",
    "displacement gap": "How far the stored rows are from adding up to what moved the parameters, relative to ‖Δθ‖, "
    "worst segment. Where it fails, look for a parameter used outside its layer, or a penalty that the loss gained "
    "after the first step.",
    "capture gap": "The largest share of a measured step's gradient that the per-example gradients did not sum to and "
    "that is not on the optimizer line. Where it fails, look as for the displacement gap.",
    "projection gap": "What the compressed rows missed of the examples' total before the completeness correction. "
    "Where it fails, contributions are rough: record with a larger k.",
    "audit error": "Relative error of the contributions of {audited} examples whose displacements were also kept "
    "without compression. Where it fails, record with a larger k.",
    "completeness gap": "What the contributions shown miss of the account. The correction closes it, so it tells only "
    "that the arithmetic was done; the other checks are the evidence.",
}

_AUDITED_GRADIENT = (
    "Relative error of the products of this output's gradient with the displacements of {audited} examples, which were "
    "also kept without compression, before the curvature comes in. Where it fails, record with a larger k."
)


def checks_of(
    trajectory: Trajectory, corrected: CorrectedCovectors, audited: Tensor | None, row: int, tolerance: float
) -> tuple[Check, ...]:
    """Measure everything that can fail for one query.

    Args:
        trajectory: The run.
        corrected: Covectors of a batch of queries.
        audited: Contributions of the audited examples from their stored rows, ``(queries, audited)``; None for none.
        row: Which query.
        tolerance: Allowed quadrature gap, relative to |f_T − f_0|.

    Returns:
        The checks; values are relative to |f_T − f_0| where nothing else is said.
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
    }
    tolerances = {"quadrature gap": tolerance, **_TOLERANCES}
    return tuple(
        Check(name, abs(values[name]), tolerances[name], meaning.format(**facts))
        for name, meaning in _MEANINGS.items()
        if name in values
    )


def removal_checks(trajectory: Trajectory, final: FinalGradient, row: int) -> tuple[Check, ...]:
    """Measure what can fail in the removal reading of one query: the rows, and their products with its gradient.

    Whether it predicts is no property of one explanation: `pkexplain.evaluation` measures that, by training again.

    Args:
        trajectory: The run.
        final: λ_T of a batch of queries.
        row: Which query.
    """
    values = {
        "displacement gap": max(summary.displacement_gap for summary in trajectory.summaries),
        "capture gap": max(summary.capture_gap for summary in trajectory.summaries),
    }
    audited = final.audit.shape[1]
    if audited:
        size = final.audit[row].norm().clamp_min(torch.finfo(final.audit.dtype).tiny)
        values["audit error"] = float((final.stored[row] - final.audit[row]).norm() / size)
    meanings = {**_MEANINGS, "audit error": _AUDITED_GRADIENT.format(audited=audited)}
    return tuple(Check(name, abs(value), _TOLERANCES[name], meanings[name]) for name, value in values.items())
