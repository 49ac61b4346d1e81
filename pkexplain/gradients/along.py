"""Inner products of per-example gradients with one vector, from their factors."""

from __future__ import annotations

import torch
from torch import Tensor

from pkexplain.gradients._embedding import EmbeddingGradient
from pkexplain.gradients.compressed import CompressedGradient
from pkexplain.gradients.devices import at_once
from pkexplain.gradients.factors import ExampleGradients, LinearGradient
from pkexplain.gradients.matrices import as_matrix
from pkexplain.gradients.rounded import RoundedGradient

__all__ = ["along"]

_NUMBERS_AT_ONCE = 1 << 24


def along(gradients: ExampleGradients, direction: Tensor) -> Tensor:
    """Compute ⟨g_i, d⟩ of every example, ``(examples,)``.

    With factors, Σ_t ⟨δ_t, D x_t⟩ is one product of matrices for all examples: forming δ_t x_tᵀ takes several times as
    long, and for a vocabulary a hundred times.

    Args:
        gradients: The gradients.
        direction: d, ``(numel,)``.
    """
    if isinstance(gradients, RoundedGradient):
        gradients = gradients.unpacked()
    if isinstance(gradients, CompressedGradient):
        matrix = as_matrix(direction, gradients.matrix[0], gradients.weight and gradients.bias)
        return gradients.output_gradients.flatten(1) @ (gradients.left @ matrix @ gradients.right.T).flatten()
    if isinstance(gradients, EmbeddingGradient):
        rows = direction.view(*gradients.matrix)[gradients.tokens]
        return (rows * gradients.output_gradients).sum((1, 2))
    if isinstance(gradients, LinearGradient):
        x, g = gradients.inputs, gradients.output_gradients
        found = g.new_zeros(len(g))
        weights = g.shape[-1] * x.shape[-1] * gradients.weight
        if gradients.weight:
            matrix = direction[:weights].view(g.shape[-1], x.shape[-1])
            wide = g.shape[-1] > x.shape[-1]
            found += (((g @ matrix) * x) if wide else ((x @ matrix.T) * g)).sum((1, 2))
        if gradients.bias:
            found += g.sum(1) @ direction[weights:]
        return found
    some = max(1, at_once(_NUMBERS_AT_ONCE, direction.device) // len(direction))
    return torch.cat(
        [gradients.select(slice(at, at + some)).dense() @ direction for at in range(0, len(gradients), some)]
    )
