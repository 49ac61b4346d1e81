"""The layer before a BatchNorm: an example's share through its own normalised output, with the batch held fixed.

With a batch's statistics, z_j = W x_j + b becomes y_j = γ (z_j − μ) / σ + β, where μ and σ belong to the whole batch.
Example j's share of the gradient of W is the gradient of ⟨dy_j, y_j⟩, in which every example of the batch depends on W:

    G_j = Σ_p g_j,p ⊗ x_j,p − ḡ_j ⊗ x̄ − diag(s_j) C,    g = γ dy / σ,  ḡ_j = Σ_p g_j,p,  s_j = Σ_p g_j,p ẑ_j,p

with x̄ the mean of x, and C the mean of ẑ ⊗ x, over the batch; for b it is zero. Like the sum over the batch, it is
zero along directions that the BatchNorm removes. A split by the gradient of z_j is zero there only in the sum, and an
optimizer that divides by √v̂ would amplify the terms that cancel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pkexplain.gradients._layer_rules import (
    Parts,
    Rule,
    Use,
    batch_statistics,
    by_channel,
    convolution,
    linear,
    normalises_with_the_batch,
    over_space,
)
from pkexplain.gradients.factors import ExampleGradients, MatrixGradient
from pkexplain.gradients.matrices import as_matrix

__all__ = ["RowMixture", "before_norms", "is_before_norm"]


_ROUNDING = 1e3
"""Multiples of a dtype's ε up to which what is left of a gradient is rounding."""


@dataclass(frozen=True)
class RowMixture(MatrixGradient):
    """G_j = Σ_q diag(c_j,q) M_q: a few fixed matrices ``(q, rows, columns)``, their rows scaled example by example."""

    output_gradients: Tensor  # c, (examples, q, rows)
    matrices: Tensor
    weight: bool
    bias: bool

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return self.matrices.shape[1], self.matrices.shape[2]

    def sketch(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        """Project from both sides, ``(examples, k_rows, k_columns)``."""
        matrices = self.matrices if right is None else self.matrices @ right.T
        if left is None:
            return torch.einsum("jqm,qmn->jmn", self.output_gradients, matrices)
        scaled = self.output_gradients[:, None] * left[None, :, None]  # (examples, k_rows, q, rows)
        return scaled.flatten(2) @ matrices.flatten(0, 1)

    def scaled(self, factors: Tensor) -> RowMixture:
        """Multiply elementwise by ``factors``, ``(numel,)``: the matrices are."""
        return replace(self, matrices=self.matrices * as_matrix(factors, self.matrix[0], self.weight and self.bias))

    def total(self) -> Tensor:
        """Sum over the examples, ``(numel,)``."""
        return replace(self, output_gradients=self.output_gradients.sum(0, keepdim=True)).dense()[0]

    def gross(self) -> Tensor:
        """Bound the sum of the gradients' sizes, ``(numel,)``."""
        return replace(self, output_gradients=self.output_gradients.abs(), matrices=self.matrices.abs()).total()

    def select(self, positions: Tensor | slice) -> RowMixture:
        """Keep the examples at ``positions``."""
        return replace(self, output_gradients=self.output_gradients[positions])

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        return self.output_gradients.nbytes + self.matrices.nbytes


def is_before_norm(rule: Rule, z: Tensor, norm: Use) -> bool:
    """Whether a BatchNorm whose input is z, a layer's output, normalises its rows with the batch's statistics."""
    if type(norm.module).forward is not nn.modules.batchnorm._BatchNorm.forward:  # not if it has an activation in it
        return False
    by_row = rule is convolution or (rule is linear and z.ndim == 2)
    return by_row and normalises_with_the_batch(norm.module, norm.training)


def before_norms(rule: Rule, use: Use, norms: Sequence[Use], parts: Parts) -> list[Sequence[ExampleGradients]]:
    """Compute the gradients of a Linear or convolution whose output BatchNorms normalised.

    Args:
        rule: The layer's rule.
        use: Its use, with the gradient of its output z.
        norms: The uses of BatchNorms with input z, with the gradients of their outputs.
        parts: The blocks wanted.

    Returns:
        Several gradients for each block, which add up to the examples' shares.
    """
    elsewhere = use.gradient  # the gradient that did not come through a norm
    own, weights, bases = torch.zeros_like(elsewhere), [], []
    for norm in norms:
        z, dy = norm.input.to(own.dtype), norm.gradient.to(own.dtype)
        mean, deviation = batch_statistics(z, norm.module.eps)
        normed, g = (z - mean) / deviation, dy / deviation
        if norm.module.weight is not None:
            g = g * by_channel(norm.module.weight.detach(), z)
        axes, count = (0, *range(2, z.ndim)), z.numel() // z.shape[1]
        along = (g * normed).sum(axes, keepdim=True) / count
        elsewhere = elsewhere - (g - g.sum(axes, keepdim=True) / count - normed * along)
        own = own + g
        weights += [-over_space(g), -over_space(g * normed)]
        bases += [torch.ones_like(z) / count, normed / count]
    found: list[Sequence[ExampleGradients]] = [rule(_with(use, own), parts)]
    totals = [[g.total() for g in rule(_with(use, base), parts)] for base in bases]
    coefficients = torch.stack(weights, dim=1)
    mixtures: list[ExampleGradients] = []
    for names, flats in zip(parts, zip(*totals, strict=True), strict=True):
        weight, bias = "weight" in names, "bias" in names
        matrices = torch.stack([as_matrix(flat, coefficients.shape[2], weight and bias) for flat in flats])
        mixtures.append(RowMixture(coefficients, matrices, weight, bias))
    found.append(mixtures)
    if elsewhere.norm() > _ROUNDING * torch.finfo(own.dtype).eps * use.gradient.norm():
        found.append(rule(_with(use, elsewhere), parts))
    return found


def _with(use: Use, gradient: Tensor) -> Use:
    return replace(use, gradients=(gradient,))
