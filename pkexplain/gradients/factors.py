"""The per-example gradients of a block of parameters, in factored form if the layer allows it.

If a layer is a matrix acting on vectors (Linear, Conv, Embedding) the gradient of example i is a sum over positions
t of output gradient times input,

    G_i = Σ_t g_i,t ⊗ x_i,t        (parameter units)

so that a two-sided projection L G_i Rᵀ = Σ_t (L g_i,t) ⊗ (R x_i,t) never forms G_i.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pkexplain.gradients.devices import at_once
from pkexplain.gradients.matrices import as_matrix, outer_product

__all__ = ["DenseGradient", "ExampleGradients", "FormedGradient", "LinearGradient", "MatrixGradient", "ScaledGradient"]

_NUMBERS_AT_ONCE = 1 << 19
"""The most numbers formed at a time; gradients that stay in a core's cache are several times faster."""


class ExampleGradients(ABC):
    """The gradients of one block of parameters for every example of a batch, in parameter units."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of examples."""

    @abstractmethod
    def dense(self) -> Tensor:
        """Form the gradients, ``(examples, numel)``, in the block's parameter order."""

    def parts(self) -> list[Tensor]:
        """Form the gradients in parts that follow one another, ``(examples, …)`` each."""
        return [self.dense()]

    def total(self) -> Tensor:
        """Sum over the examples, ``(numel,)``."""
        return self.dense().sum(0)

    def gross(self) -> Tensor:
        """Bound the sum of the gradients' absolute values, ``(numel,)``: what may cancel in `total`."""
        return self.dense().abs().sum(0)

    @abstractmethod
    def weighted(self, weights: Tensor) -> Tensor:
        """Sum over the examples, each times its weight ``(examples,)``: ``(numel,)``."""

    @abstractmethod
    def select(self, positions: Tensor | slice) -> ExampleGradients:
        """Keep the examples at ``positions`` of the batch."""

    @abstractmethod
    def scaled(self, factors: Tensor) -> ExampleGradients:
        """Multiply every example's gradient elementwise by ``factors``, ``(numel,)`` in the block's parameter order."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of memory held."""

    def compact(self) -> ExampleGradients:
        """Return the same gradients in the form that takes less memory."""
        return self


@dataclass(frozen=True)
class DenseGradient(ExampleGradients):
    """Gradients without structure, ``(examples, numel)``."""

    values: Tensor

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.values)

    def dense(self) -> Tensor:
        """Return the gradients, ``(examples, numel)``."""
        return self.values

    def weighted(self, weights: Tensor) -> Tensor:
        """Sum over the examples, each times its weight."""
        return weights.to(self.values) @ self.values

    def select(self, positions: Tensor | slice) -> DenseGradient:
        """Keep the examples at ``positions``."""
        return DenseGradient(self.values[positions])

    def scaled(self, factors: Tensor) -> DenseGradient:
        """Multiply elementwise by ``factors``, ``(numel,)``."""
        return DenseGradient(self.values * factors)

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        return self.values.nbytes


class MatrixGradient(ExampleGradients):
    """Gradients of a matrix ``(rows, columns)`` whose last column is the bias, if there is one."""

    weight: bool
    bias: bool
    output_gradients: Tensor
    forms_anew: ClassVar[bool] = False  # whether the tensors of `formed` are new, and may be overwritten

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.output_gradients)

    @property
    def like(self) -> Tensor:
        """An empty tensor of their dtype and device."""
        return self.output_gradients[:0]

    def weighted(self, weights: Tensor) -> Tensor:
        """Sum over the examples, each times its weight: every form is linear in its output gradients."""
        g = self.output_gradients
        return self.with_output_gradients(g * weights.to(g).view(-1, *[1] * (g.ndim - 1))).total()

    def with_output_gradients(self, gradients: Tensor) -> MatrixGradient:
        """Return the gradients for other output gradients."""
        made: Any = self
        return replace(made, output_gradients=gradients)

    @abstractmethod
    def select(self, positions: Tensor | slice) -> MatrixGradient:
        """Keep the examples at ``positions`` of the batch."""

    @abstractmethod
    def sketch(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        """Project from both sides without forming the gradient: L G_i Rᵀ.

        Args:
            left: L, ``(k_rows, rows)``; None for the identity.
            right: R, ``(k_columns, columns)``; None for the identity.

        Returns:
            ``(examples, k_rows, k_columns)``.
        """

    def formed(self) -> tuple[Tensor | None, Tensor | None]:
        """Form the weight's gradients, ``(examples, rows, columns)``, and the bias's, ``(examples, rows)``."""
        full = self.sketch(None, None)
        if not self.bias:
            return full, None
        return (full[:, :, :-1] if self.weight else None), full[:, :, -1]

    def dense(self) -> Tensor:
        """Form the gradients, ``(examples, numel)``: the weight row by row, then the bias."""
        full = self.sketch(None, None)
        if not (self.weight and self.bias):
            return full.flatten(1)
        return torch.cat([full[:, :, :-1].flatten(1), full[:, :, -1]], dim=1)

    def parts(self) -> list[Tensor]:
        """Form the weight's gradients and the bias's: to join them would copy both."""
        return [part.flatten(1) for part in self.formed() if part is not None]

    def scaled(self, factors: Tensor) -> MatrixGradient:
        """Multiply elementwise by ``factors``, ``(numel,)``: the product has no factors and is formed when needed."""
        matrix = as_matrix(factors, self.matrix[0], self.weight and self.bias)
        return ScaledGradient(self, matrix, self.output_gradients, self.weight, self.bias)

    def compact(self) -> MatrixGradient:
        """Return the same gradients in the form that takes less memory: factored, or formed."""
        g, (rows, columns) = self.output_gradients, self.matrix
        if self.nbytes <= len(g) * rows * columns * g.element_size():
            return self
        return FormedGradient(self.sketch(None, None), self.weight, self.bias, self.positions)

    @property
    @abstractmethod
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the matrix, the bias counted as a column."""

    @property
    def positions(self) -> int:
        """Terms in the sum that one example's gradient is."""
        return 1

    def _split(self, right: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Split R into the columns for the weight and the column for the bias."""
        if right is None:
            return None, None
        return (right[:, :-1] if self.bias else right) if self.weight else None, right[:, -1] if self.bias else None


@dataclass(frozen=True)
class FormedGradient(MatrixGradient):
    """G_i itself, ``(examples, rows, columns)``."""

    output_gradients: Tensor
    weight: bool
    bias: bool
    terms: int = 1

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return self.output_gradients.shape[1], self.output_gradients.shape[2]

    @property
    def positions(self) -> int:
        """Terms in the sum from which it was formed."""
        return self.terms

    def sketch(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        """Project from both sides, ``(examples, k_rows, k_columns)``."""
        part = self.output_gradients if left is None else left @ self.output_gradients
        return part if right is None else part @ right.T

    def select(self, positions: Tensor | slice) -> FormedGradient:
        """Keep the examples at ``positions``."""
        return replace(self, output_gradients=self.output_gradients[positions])

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        return self.output_gradients.nbytes


@dataclass(frozen=True)
class ScaledGradient(MatrixGradient):
    """F ⊙ G_i for a fixed F ``(rows, columns)``, formed a few examples at a time."""

    inner: MatrixGradient
    factors: Tensor
    output_gradients: Tensor
    weight: bool
    bias: bool

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return self.inner.matrix

    def sketch(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        """Project from both sides, ``(examples, k_rows, k_columns)``."""
        some = max(1, at_once(_NUMBERS_AT_ONCE, self.factors.device) // self.factors.numel())
        starts = range(0, len(self), some)
        return torch.cat([self._some(self.inner.select(slice(at, at + some)), left, right) for at in starts])

    def _some(self, inner: MatrixGradient, left: Tensor | None, right: Tensor | None) -> Tensor:
        """Form and project a few examples; the bias separately, as joining it to the weight would copy both."""
        for_weight, for_bias = self._split(right)
        weight, bias = inner.formed()
        parts: list[Tensor] = []
        if weight is not None:
            factors = self.factors[:, :-1] if self.bias else self.factors
            part = weight.mul_(factors) if inner.forms_anew else weight * factors
            part = part if left is None else left @ part
            parts.append(part if for_weight is None else part @ for_weight.T)
        if bias is not None:
            part = (bias * self.factors[:, -1])[:, :, None]
            part = part if left is None else left @ part
            parts.append(part if for_bias is None else part * for_bias)
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts, dim=2) if right is None else parts[0] + parts[1]

    def total(self) -> Tensor:
        """Sum over the examples, ``(numel,)``."""
        flat = self.factors
        if self.weight and self.bias:
            flat = torch.cat([flat[:, :-1].flatten(), flat[:, -1]])
        return self.inner.total() * flat.flatten()

    def weighted(self, weights: Tensor) -> Tensor:
        """Sum over the examples, each times its weight."""
        inner = self.inner
        g = inner.output_gradients
        scaled = inner.with_output_gradients(g * weights.to(g).view(-1, *[1] * (g.ndim - 1)))
        return replace(self, inner=scaled).total()

    def select(self, positions: Tensor | slice) -> ScaledGradient:
        """Keep the examples at ``positions``."""
        inner = self.inner.select(positions)
        return replace(self, inner=inner, output_gradients=inner.output_gradients)

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        return self.inner.nbytes + self.factors.nbytes


@dataclass(frozen=True)
class LinearGradient(MatrixGradient):
    """G_i = Σ_t g_i,t ⊗ [x_i,t, 1] with inputs ``(examples, t, columns)``, output gradients ``(examples, t, rows)``."""

    inputs: Tensor
    output_gradients: Tensor
    weight: bool
    bias: bool
    forms_anew: ClassVar[bool] = True

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return self.output_gradients.shape[-1], self.weight * self.inputs.shape[-1] + self.bias

    @property
    def positions(self) -> int:
        """Terms in the sum that one example's gradient is."""
        return self.inputs.shape[1]

    def sketch(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        """Project from both sides, ``(examples, k_rows, k_columns)``."""
        x = self.inputs
        for_weight, for_bias = self._split(right)
        if right is None:
            ones = [x.new_ones(*x.shape[:2], 1)] if self.bias else []
            x = torch.cat([x, *ones], dim=-1) if self.weight else ones[0]
        elif for_weight is None:
            x = right[:, -1].expand(*x.shape[:2], -1)  # only the bias is trained
        else:
            x = nn.functional.linear(x, for_weight, for_bias)
        return outer_product(left, self.output_gradients.transpose(1, 2), x.transpose(1, 2))

    def formed(self) -> tuple[Tensor | None, Tensor | None]:
        """Form the weight's gradients, ``(examples, rows, columns)``, and the bias's, ``(examples, rows)``."""
        weight = outer_product(None, self.output_gradients.transpose(1, 2), self.inputs.transpose(1, 2))
        return weight if self.weight else None, self.output_gradients.sum(1) if self.bias else None

    def gross(self) -> Tensor:
        """Bound the sum of the gradients' absolute values, ``(numel,)``."""
        return replace(self, inputs=self.inputs.abs(), output_gradients=self.output_gradients.abs()).total()

    def total(self) -> Tensor:
        """Sum over the examples, ``(numel,)``, as one long example."""
        if len(self.inputs) == 1:
            return self.dense()[0]
        x, g = self.inputs.flatten(0, 1)[None], self.output_gradients.flatten(0, 1)[None]
        return replace(self, inputs=x, output_gradients=g).total()

    def select(self, positions: Tensor | slice) -> LinearGradient:
        """Keep the examples at ``positions``."""
        return replace(self, inputs=self.inputs[positions], output_gradients=self.output_gradients[positions])

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        return self.inputs.nbytes + self.output_gradients.nbytes
