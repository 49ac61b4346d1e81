"""Products and shapes of the matrices that gradients are."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["as_matrix", "outer_product"]


def as_matrix(flat: Tensor, rows: int, both: bool) -> Tensor:
    """Reshape numbers in a block's parameter order, ``(numel,)``, to ``(rows, columns)``, a bias as the last column."""
    if not both:
        return flat.view(rows, -1)
    return torch.cat([flat[:-rows].view(rows, -1), flat[-rows:, None]], dim=1)


def outer_product(left: Tensor | None, g: Tensor, x: Tensor) -> Tensor:
    """Compute L Σ_t g_t ⊗ x_t from g ``(n, rows, t)`` and x ``(n, columns, t)``, the cheaper product first."""
    (_, rows, t), columns = g.shape, x.shape[1]
    if left is None and t == 1:
        return g * x.transpose(1, 2)
    if left is not None and len(left) * t * (rows + columns) < rows * columns * (t + len(left)):
        return torch.bmm(left @ g, x.transpose(1, 2))
    outer = torch.bmm(x, g.transpose(1, 2)).transpose(1, 2)  # this order is twice as fast
    return outer if left is None else left @ outer
