"""Per-example gradients of an embedding table: each token's row receives its positions' output gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pkexplain.gradients.factors import MatrixGradient


@dataclass(frozen=True)
class EmbeddingGradient(MatrixGradient):
    """G_i = Σ_t onehot(token_i,t) ⊗ g_i,t; tokens ``(examples, t)``, output gradients ``(examples, t, columns)``."""

    tokens: Tensor
    output_gradients: Tensor
    vocabulary: int
    weight: bool = True
    bias: bool = False

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return self.vocabulary, self.output_gradients.shape[-1]

    def sketch(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        """Project from both sides, ``(examples, k_rows, k_columns)``."""
        g = self.output_gradients if right is None else self.output_gradients @ right.T
        if left is None:
            full = g.new_zeros(len(g), self.vocabulary, g.shape[2])
            return full.scatter_add_(1, self.tokens[:, :, None].expand_as(g), g)
        return torch.bmm(left.T[self.tokens].transpose(1, 2), g)

    def total(self) -> Tensor:
        """Sum over the examples, ``(numel,)``, as one long example."""
        if len(self.tokens) == 1:
            return self.dense()[0]
        tokens, g = self.tokens.flatten()[None], self.output_gradients.flatten(0, 1)[None]
        return replace(self, tokens=tokens, output_gradients=g).total()

    def select(self, positions: Tensor | slice) -> EmbeddingGradient:
        """Keep the examples at ``positions``."""
        return replace(self, tokens=self.tokens[positions], output_gradients=self.output_gradients[positions])

    def scaled(self, factors: Tensor) -> EmbeddingGradient:
        """Multiply elementwise by ``factors``, ``(numel,)``: a token's row of factors falls on its output gradients."""
        table = factors.view(self.matrix)
        return replace(self, output_gradients=self.output_gradients * table[self.tokens])

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        return self.tokens.nbytes + self.output_gradients.nbytes
