"""What an optimizer that divides by a second moment takes back: a larger gradient also makes the divisor larger.

Adam's first step is the sign of the gradient, whatever its size: with v as recorded, the examples seem to have moved
the parameters by D_i, but leaving one out, or counting it twice, moves nothing. With c_s,r the share that the gradient
of step r has in v̂_s, the step's derivative by example i's gradient there is, coordinate by coordinate,

    g_i,r / √v̂_s · (its share in m̂_s − m̂_s c_s,r g_r / v̂_s)

Taking m̂_s / √v̂_s and g_r / √v̂ for their means over the segment, ρ = Δθ / Σ learning rates, a segment's displacements
count 1 − C ρ², where C is the sum of c_s,r over its steps s from r on, averaged over r. It is 0 where a coordinate has
moved the same way at every one of the first steps, and 1 where gradients are noise. What a gradient does to v in later
segments, and what an example's own noise does to it, is left out; the replay reading has both.

The path reading is not concerned: it says what moved the parameters, and adds up with v as recorded.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from pkexplain.explain._trajectory_model import TrajectoryModel
from pkexplain.projection.packed import MultipliedVector
from pkexplain.projection.projector import Projector
from pkexplain.store.trajectory import Trajectory

_KINDS = {"Adam", "AdamW", "NAdam"}


def credited(trajectory: Trajectory, model: TrajectoryModel, projectors: Sequence[Projector]) -> list[Projector]:
    """Let every segment's covectors, those of the curvature too, count 1 − C ρ²; as they are with another optimizer.

    Args:
        trajectory: The run.
        model: Reads how far the gradients moved the parameters.
        projectors: The projection of every segment.
    """
    if not set(trajectory.manifest.optimizer.kind.split(" + ")) <= _KINDS:
        return list(projectors)
    kept = functools.lru_cache(maxsize=2)(functools.partial(credit, trajectory, model))
    return [
        projector.with_operator(MultipliedVector(projector.operator, functools.partial(kept, t)))
        for t, projector in enumerate(projectors)
    ]


def credit(trajectory: Trajectory, model: TrajectoryModel, t: int) -> Tensor:
    """Compute 1 − C ρ² of a segment, ``(parameters,)``.

    Args:
        trajectory: The run.
        model: Reads how far the gradients moved the parameters.
        t: The segment.
    """
    begin, end = trajectory.boundaries[t], trajectory.boundaries[t + 1]
    rates = trajectory.summaries[t].learning_rate_sum
    shares = [_share_in_divisor(begin, end, _beta2(group)) for group in trajectory.manifest.optimizer.groups]
    moved = model.moved_by_gradients(t)
    factors = torch.ones_like(moved)
    for block in trajectory.fingerprint.blocks:
        if rates[block.group] > 0:
            mean = (moved[block.span] / rates[block.group]).clamp(-1.0, 1.0)
            factors[block.span] -= shares[block.group] * mean.square()
    return factors


def _beta2(group: dict[str, bool | int | float | str]) -> float:
    return float(ast.literal_eval(str(group["betas"]))[1])


def _share_in_divisor(begin: int, end: int, beta2: float) -> float:
    """Compute C: Σ_s c_s,r over a segment's steps s ≥ r, averaged over its steps r; c_s,r is r's share in v̂_s.

    Σ over r ≤ s of (1 − β) β^(s − r) / (1 − β^s) is (1 − β^(s − begin)) / (1 − β^s).
    """
    steps = torch.arange(begin + 1, end + 1, dtype=torch.float64, device="cpu")
    if beta2 <= 0:
        return 1.0
    return float(((1 - beta2 ** (steps - begin)) / (1 - beta2**steps)).sum() / len(steps))
