"""How far gradients that were split are from a coded pass."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pkexplain.gradients.layers import Block


def scale_share(tolerance: float) -> float:
    """Share of the average gradient below which a block's own size no longer sets the scale of its gap.

    A gradient that is zero but for rounding (of a bias before a BatchNorm, of the keys' bias in attention) is hundreds
    of ε of the average one. The tolerance times this share has to be larger, in every dtype.
    """
    if tolerance <= 1e-6:  # float64
        return 1e-3
    return 0.3 if tolerance <= 1e-3 else 1.0  # float32, half precision


def relative_gap(
    blocks: Sequence[Block],
    found: Mapping[int, Tensor],
    true: Mapping[str, Tensor],
    without: set[str],
    tolerance: float,
) -> dict[int, float]:
    """Compare Σ_i c_i g_i of each block with a coded pass.

    Args:
        blocks: The blocks.
        found: Σ_i c_i g_i, for each block's position.
        true: The coded gradients, by parameter.
        without: Parameters that are not split.
        tolerance: The gap that is allowed.

    Returns:
        The relative difference of each block.
    """
    whole = math.sqrt(sum(float(g.double().square().sum()) for g in true.values()))
    scale = whole / math.sqrt(max(1, sum(block.numel for block in blocks)))
    gaps = {}
    for position, block in enumerate(blocks):
        if without.intersection(block.parameters) or not any(name in true for name in block.parameters):
            continue
        truth = flat_block(block, true)
        mine = found.get(position, torch.zeros_like(truth)).double()
        size = max(float(truth.norm()), scale_share(tolerance) * scale * math.sqrt(len(truth)))
        gap = float((mine - truth).norm()) / size if size > 0 else 0.0
        gaps[position] = math.inf if math.isnan(gap) else gap
    return gaps


def flat_block(block: Block, named: Mapping[str, Tensor]) -> Tensor:
    """One block's gradient in float64, zero where a parameter has none, ``(numel,)``."""
    some = next(iter(named.values()), torch.empty(0, dtype=torch.float32, device="cpu"))
    return torch.cat(
        [
            named[name].detach().flatten().double()
            if name in named
            else torch.zeros(math.prod(shape), dtype=torch.float64, device=some.device)
            for name, shape in zip(block.parameters, block.shapes, strict=True)
        ]
    )
