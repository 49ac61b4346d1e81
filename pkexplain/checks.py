"""What can fail in an explanation, measured, with tolerances.

A corrected sum cannot fail, so it proves nothing; each of these can.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pkexplain.correction import CorrectedCovectors
from pkexplain.explanation import Check
from pkexplain.trajectory import Trajectory

__all__ = ["checks_of"]

DISPLACEMENT_TOLERANCE = 1e-2
OPTIMIZER_TOLERANCE = 1e-2
PROJECTION_TOLERANCE = 0.5
AUDIT_TOLERANCE = 0.2
COMPLETENESS_TOLERANCE = 1e-4


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
    quadrature = float((changes - covectors.displacement[row]).sum()) / change
    optimizer = float(covectors.optimizer[row].sum()) / change
    projection = float((corrected.explained[row] - corrected.uncorrected[row]).sum()) / change
    completeness = float((corrected.explained[row] - corrected.corrected[row]).sum()) / change
    displacement = max(summary.displacement_gap for summary in trajectory.summaries)
    capture = max(summary.capture_gap for summary in trajectory.summaries)
    state = "met" if covectors.settled[row] else "not met within the budget"
    checks = [
        Check(
            "quadrature gap",
            abs(quadrature),
            tolerance,
            "What the integral over training misses of f_T − f_0, in full space before any correction; its tolerance "
            f"was {state}. Where it fails, give Explainer a Quadrature with a larger budget, or record more segments.",
        ),
        Check(
            "optimizer share",
            abs(optimizer),
            OPTIMIZER_TOLERANCE,
            "How much of f_T − f_0 no example and no weight decay explains: rounding, or a gradient changed between "
            "backward and step. Where it fails, look for a forgotten zero_grad(), clipping by value, a penalty in the "
            "loss, or parameters changed by hand.",
        ),
        Check(
            "displacement gap",
            displacement,
            DISPLACEMENT_TOLERANCE,
            "How far the stored rows are from adding up to what moved the parameters, relative to ‖Δθ‖, worst segment. "
            "Where it fails, a parameter was used outside its layer or changed outside optimizer.step().",
        ),
        Check(
            "capture gap",
            capture,
            DISPLACEMENT_TOLERANCE,
            "The largest share of a step's gradient that the per-example gradients did not sum to.",
        ),
        Check(
            "projection gap",
            abs(projection),
            PROJECTION_TOLERANCE,
            "What the compressed rows missed of the examples' total before the completeness correction. Where it "
            "fails, contributions are rough: record with a larger k.",
        ),
    ]
    if audited is not None:
        exact = covectors.audit[row].sum(0)
        error = float((audited[row] - exact).norm() / exact.norm().clamp_min(torch.finfo(exact.dtype).tiny))
        checks.append(
            Check(
                "audit error",
                error,
                AUDIT_TOLERANCE,
                f"Relative error of the contributions of {len(exact)} examples whose displacements were also kept "
                "without compression. Where it fails, record with a larger k.",
            )
        )
    checks.append(
        Check(
            "completeness gap",
            abs(completeness),
            COMPLETENESS_TOLERANCE,
            "What the contributions shown miss of the account. The correction closes it, so it tells only that the "
            "arithmetic was done; the other checks are the evidence.",
        )
    )
    return tuple(checks)
