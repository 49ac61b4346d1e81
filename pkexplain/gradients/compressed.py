"""Gradients known only by their projection from both sides."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pkexplain.gradients.factors import MatrixGradient

__all__ = ["CompressedGradient"]


@dataclass(frozen=True)
class CompressedGradient(MatrixGradient):
    """G_i = Lᵀ X_i R: what is left of gradients of which only X_i, ``(examples, k_rows, k_columns)``, was kept."""

    output_gradients: Tensor  # X
    left: Tensor  # L, (k_rows, rows)
    right: Tensor  # R, (k_columns, columns)
    weight: bool
    bias: bool

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return self.left.shape[1], self.right.shape[1]

    def sketch(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        """Project from both sides, ``(examples, k_rows, k_columns)``."""
        before = self.left.T if left is None else left @ self.left.T
        after = self.right if right is None else self.right @ right.T
        return before @ self.output_gradients @ after

    def few_vectors(self, side: int, mixer: Tensor, weights: Tensor) -> Tensor:
        """Find few vectors with the second moments of all w_i G_i Ωᵀ (side 0) or w_i G_iᵀ Ωᵀ (side 1).

        All of them lie along the rows of L, or of R.

        Args:
            side: Whose vectors are wanted.
            mixer: Ω, ``(combinations, other side)``.
            weights: w, ``(examples,)``.

        Returns:
            ``(side, k_rows)`` or ``(side, k_columns)``.
        """
        values = self.output_gradients if side == 0 else self.output_gradients.transpose(1, 2)
        basis, other = (self.left, self.right) if side == 0 else (self.right, self.left)
        inside = values @ (other @ mixer.T) * weights.to(values)[:, None, None]
        inside = inside.transpose(0, 1).flatten(1).double()
        energies, turn = torch.linalg.eigh((inside @ inside.T).cpu())
        return basis.T @ (turn * energies.clamp_min(0).sqrt()).to(basis)

    def select(self, positions: Tensor | slice) -> CompressedGradient:
        """Keep the examples at ``positions``."""
        return replace(self, output_gradients=self.output_gradients[positions])

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        return self.output_gradients.nbytes + self.left.nbytes + self.right.nbytes

    @staticmethod
    def rebuilt(values: Tensor, left: Tensor, right: Tensor, bias: bool) -> CompressedGradient:
        """Make it from rows of a two-sided projection, ``(examples, k_rows · k_columns)``."""
        shape = (len(values), len(left), len(right))
        return CompressedGradient(torch.reshape(values, shape), left, right, weight=True, bias=bias)
