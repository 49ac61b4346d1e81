"""Linear maps of gradients to the columns of a row, block by block.

All random numbers are raw words of NumPy's counter-based Philox generator, drawn on the CPU from the seed and then
moved, so a seed gives the same map on any device and platform.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pkexplain.gradients.along import along
from pkexplain.gradients.factors import ExampleGradients, MatrixGradient
from pkexplain.gradients.layers import Block
from pkexplain.gradients.matrices import as_matrix

__all__ = [
    "HashedMap",
    "IdentityMap",
    "Map",
    "Pieces",
    "RowFactors",
    "TwoSidedMap",
    "flat_product",
    "geometric_sides",
    "hashed",
    "random_signs",
    "rounded",
]

_TINY = 1e-30
RANDOM_WIDTH = 32
"""The most random directions of a side."""
_ORTHONORMAL = 1e-2
"""By how much products of directions, which may be rounded to 16 bits, may differ from 0 and 1."""
_NOTHING = 1e-4
"""The share of a sum outside of a map's directions that needs no direction of its own."""

Pieces = Sequence[tuple[int, ExampleGradients]]
"""Captured gradients of one batch: block positions with their gradients."""

RowFactors = Tensor | tuple[Tensor, Tensor]
"""What one block's gradients are multiplied by before they are projected: a number for each coordinate, ``(numel,)``,
or for a matrix one for each row and one for each column, the bias being the last column."""


def random_words(seed: int, stream: int, count: int) -> np.ndarray:
    """Draw ``count`` raw 64-bit words of the Philox generator numbered ``stream``."""
    return np.random.Philox(key=[seed, stream]).random_raw(count)


def random_signs(seed: int, stream: int, shape: tuple[int, int]) -> Tensor:
    """Draw a matrix of ±1/√rows, so that its Gram matrix is the identity in expectation."""
    bits = random_words(seed, stream, math.prod(shape)) >> np.uint64(63)
    signs = torch.from_numpy(bits.astype(np.float64)) * 2 - 1
    return signs.reshape(shape) / math.sqrt(shape[0])


class Map(ABC):
    """A linear map of one block's gradients to some of the columns."""

    columns: slice

    @abstractmethod
    def gradients(self, gradients: ExampleGradients) -> Tensor:
        """Map per-example gradients, ``(examples, columns)``."""

    @abstractmethod
    def vectors(self, vectors: Tensor) -> Tensor:
        """Map plain vectors ``(n, numel)`` to ``(n, columns)``."""

    def of_multiples(self, factors: RowFactors) -> Map:
        """Return the map that multiplies elementwise first."""
        if not isinstance(factors, Tensor):
            raise TypeError("only a two-sided map takes one factor for each row and column")
        return _MultipliedMap(self.columns, self, factors)


@dataclass
class _MultipliedMap(Map):
    """Multiply elementwise, then map."""

    columns: slice
    map: Map
    factors: Tensor

    def gradients(self, gradients: ExampleGradients) -> Tensor:
        """Map per-example gradients, ``(examples, columns)``."""
        return self.map.gradients(gradients.scaled(self.factors))

    def vectors(self, vectors: Tensor) -> Tensor:
        """Map plain vectors ``(n, numel)`` to ``(n, columns)``."""
        return self.map.vectors(vectors * self.factors)


@dataclass
class IdentityMap(Map):
    """Keep every coordinate."""

    columns: slice

    def gradients(self, gradients: ExampleGradients) -> Tensor:
        """Return the gradients as they are."""
        return gradients.dense()

    def vectors(self, vectors: Tensor) -> Tensor:
        """Return the vectors as they are."""
        return vectors


@dataclass
class HashedMap(Map):
    """Add each coordinate, with a sign, to a few of the columns (Kane & Nelson 2014, block construction)."""

    columns: slice
    index: Tensor  # (nonzeros, numel)
    sign: Tensor  # (nonzeros, numel), ±1/√nonzeros

    def gradients(self, gradients: ExampleGradients) -> Tensor:
        """Map per-example gradients, ``(examples, columns)``."""
        return self.vectors(gradients.dense())

    def vectors(self, vectors: Tensor) -> Tensor:
        """Map plain vectors ``(n, numel)`` to ``(n, columns)``."""
        out = vectors.new_zeros(len(vectors), self.columns.stop - self.columns.start)
        for index, sign in zip(self.index, self.sign, strict=True):
            out.index_add_(1, index, vectors * sign)
        return out


@dataclass
class TwoSidedMap(Map):
    """G → L G Rᵀ, flattened, and the product with one more direction if there is one."""

    columns: slice
    left: Tensor  # (k_rows, rows)
    right: Tensor  # (k_columns, columns)
    split: bool  # whether the last column is the bias, which follows the weight in a plain vector
    beside: Tensor | None = None  # the direction, (numel,), outside of what L and R span
    multiplies: bool = False  # whether a side that keeps everything multiplies it

    def gradients(self, gradients: ExampleGradients) -> Tensor:
        """Map per-example gradients, ``(examples, columns)``."""
        if not isinstance(gradients, MatrixGradient):
            return self.vectors(gradients.dense())
        sides = [None if len(side) == side.shape[1] else side for side in (self.left, self.right)]  # square: diagonal
        found = gradients.sketch(*sides)
        if self.multiplies and sides[0] is None:
            found = found * self.left.diagonal()[:, None]
        if self.multiplies and sides[1] is None:
            found = found * self.right.diagonal()
        if self.beside is None:
            return found.flatten(1)
        return torch.cat([found.flatten(1), along(gradients, self.beside)[:, None]], dim=1)

    def of_multiples(self, factors: RowFactors) -> TwoSidedMap:
        """Return the map that multiplies rows and columns first: it is two-sided, too."""
        u, v = factors
        beside = None if self.beside is None else self.beside * flat_product(u, v, self.split)
        return TwoSidedMap(self.columns, self.left * u, self.right * v, self.split, beside, multiplies=True)

    def vectors(self, vectors: Tensor) -> Tensor:
        """Map plain vectors ``(n, numel)`` to ``(n, columns)``."""
        rows, columns = self.left.shape[1], self.right.shape[1]
        if self.split:
            weight = vectors[:, : rows * (columns - 1)].reshape(-1, rows, columns - 1)
            matrix = torch.cat([weight, vectors[:, rows * (columns - 1) :, None]], dim=2)
        else:
            matrix = vectors.reshape(-1, rows, columns)
        found = (self.left @ matrix @ self.right.T).flatten(1)
        return found if self.beside is None else torch.cat([found, (vectors @ self.beside)[:, None]], dim=1)

    def from_columns_of(self, other: TwoSidedMap, columns: Tensor) -> Tensor:
        """Map vectors that lie in the directions of another map, in whose columns they are given, ``(n, columns)``."""
        values = columns[:, : len(other.left) * len(other.right)].reshape(-1, len(other.left), len(other.right))
        found = ((self.left @ other.left.T) @ values @ (other.right @ self.right.T)).flatten(1)
        if self.beside is not None:
            along = (other.left @ as_matrix(self.beside, self.left.shape[1], self.split) @ other.right.T).flatten()
            found = torch.cat([found, values.flatten(1) @ along[:, None]], dim=1)
        return found if other.beside is None else found + columns[:, -1:] * self.vectors(other.beside[None])

    def backwards(self) -> TwoSidedMap:
        """Return the map whose transpose undoes this one as far as its directions go: itself if they are orthonormal.

        Random signs are not: L Lᵀ X would be side / width times X, so that what is carried over would grow.
        """
        return replace(self, left=_dual(self.left), right=_dual(self.right))

    def direction_of(self, total: Tensor) -> Tensor:
        """Find the direction of what L and R leave of a sum, ``(numel,)``; 0 if that is hardly anything."""
        direction = self.left_of(self.left_of(total))  # twice, against rounding
        size = direction.norm()
        return rounded(direction / torch.where(size > _NOTHING * total.norm(), size, torch.inf))

    def left_of(self, vector: Tensor) -> Tensor:
        """Return what L and R, with orthonormal rows, leave of a plain vector, ``(numel,)``."""
        values = self.vectors(vector[None]).view(len(self.left), len(self.right))
        back = self.backwards()
        return vector - flat_matrix(back.left.T @ values @ back.right, self.split)


def _dual(side: Tensor) -> Tensor:
    """Compute (L Lᵀ)⁻¹ L, the transposed pseudo-inverse; L itself if its rows are orthonormal, as they are if many."""
    if len(side) > RANDOM_WIDTH:
        return side
    gram = side.double() @ side.double().T
    eye = torch.eye(len(side), dtype=gram.dtype, device=gram.device)
    if float((gram - eye).abs().max()) < _ORTHONORMAL:
        return side
    return (torch.linalg.pinv(gram, hermitian=True) @ side.double()).to(side)


def geometric_sides(values: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """Approximate positive numbers of a matrix, ``(numel,)``, by one for each row times one for each column.

    By row and column means of the logarithms: a few coordinates with hardly any gradient would ruin least squares.

    Returns:
        ``(rows,)`` and ``(columns,)``, the bias being the last column.
    """
    assert block.matrix is not None
    positive = values > 0
    log = torch.where(positive, values, values.sum() / positive.sum().clamp_min(1)).clamp_min(_TINY).log()
    matrix = as_matrix(log, block.matrix[0], len(block.parameters) > 1)
    half = matrix.mean() / 2
    return (matrix.mean(1) - half).exp(), (matrix.mean(0) - half).exp()


def rounded(direction: Tensor) -> Tensor:
    """Round a direction to the dtype in which it is stored; one that was stored stays as it is."""
    return direction if direction.dtype == torch.float64 else direction.to(torch.bfloat16)


def flat_matrix(matrix: Tensor, split: bool) -> Tensor:
    """Put a matrix in its block's parameter order, ``(numel,)``; if ``split``, its last column is the bias."""
    return torch.cat([matrix[:, :-1].flatten(), matrix[:, -1]]) if split else matrix.flatten()


def flat_product(u: Tensor, v: Tensor, split: bool) -> Tensor:
    """Multiply one number for each row and one for each column, in the block's parameter order, ``(numel,)``."""
    return flat_matrix(u[:, None] * v, split)


def hashed(columns: slice, numel: int, nonzeros: int, seed: int, stream: int) -> HashedMap:
    """Make the sparse random signs that map ``numel`` coordinates to ``columns``."""
    k = columns.stop - columns.start
    nonzeros = min(nonzeros, k)
    words = torch.from_numpy(random_words(seed, stream, nonzeros * numel).astype(np.int64)).reshape(nonzeros, numel)
    edges = torch.linspace(0, k, nonzeros + 1, dtype=torch.float32, device="cpu").long()
    width = (edges[1:] - edges[:-1])[:, None]
    sign = (words & 1).double() * 2 - 1
    return HashedMap(columns, edges[:-1, None] + ((words >> 1) & (2**40 - 1)) % width, sign / math.sqrt(nonzeros))
