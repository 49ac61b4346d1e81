"""Linear maps of gradients to the columns of a row, block by block.

All random numbers are raw words of NumPy's counter-based Philox generator, drawn on the CPU from the seed and then
moved, so a seed gives the same map on any device and platform.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pkexplain.gradients.factors import ExampleGradients, MatrixGradient
from pkexplain.gradients.layers import Block
from pkexplain.gradients.matrices import as_matrix

__all__ = [
    "HashedMap",
    "IdentityMap",
    "Map",
    "Pieces",
    "Projector",
    "RowFactors",
    "TwoSidedMap",
    "geometric_sides",
    "hashed",
    "random_signs",
]

_TINY = 1e-30

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
    """G → L G Rᵀ, flattened."""

    columns: slice
    left: Tensor  # (k_rows, rows)
    right: Tensor  # (k_columns, columns)
    split: bool  # whether the last column is the bias, which follows the weight in a plain vector
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
        return found.flatten(1)

    def of_multiples(self, factors: RowFactors) -> TwoSidedMap:
        """Return the map that multiplies rows and columns first: it is two-sided, too."""
        u, v = factors
        return TwoSidedMap(self.columns, self.left * u, self.right * v, self.split, multiplies=True)

    def vectors(self, vectors: Tensor) -> Tensor:
        """Map plain vectors ``(n, numel)`` to ``(n, columns)``."""
        rows, columns = self.left.shape[1], self.right.shape[1]
        if self.split:
            weight = vectors[:, : rows * (columns - 1)].reshape(-1, rows, columns - 1)
            matrix = torch.cat([weight, vectors[:, rows * (columns - 1) :, None]], dim=2)
        else:
            matrix = vectors.reshape(-1, rows, columns)
        return (self.left @ matrix @ self.right.T).flatten(1)


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


def hashed(columns: slice, numel: int, nonzeros: int, seed: int, stream: int) -> HashedMap:
    """Make the sparse random signs that map ``numel`` coordinates to ``columns``."""
    k = columns.stop - columns.start
    nonzeros = min(nonzeros, k)
    words = torch.from_numpy(random_words(seed, stream, nonzeros * numel).astype(np.int64)).reshape(nonzeros, numel)
    edges = torch.linspace(0, k, nonzeros + 1, dtype=torch.float32, device="cpu").long()
    width = (edges[1:] - edges[:-1])[:, None]
    sign = (words & 1).double() * 2 - 1
    return HashedMap(columns, edges[:-1, None] + ((words >> 1) & (2**40 - 1)) % width, sign / math.sqrt(nonzeros))


class Projector:
    """A projection bound to the blocks of a model, in one segment.

    A covector's projection is P (Q ⊙ φ) and a displacement's row P (D / Q). Q is the optimizer's operator over the
    segment, less what the rows were multiplied by before they were projected.

    Attributes:
        columns: k, the number of columns of a row.
        operator: Q, ``(parameters,)``; None for ones.
    """

    def __init__(
        self, blocks: Sequence[Block], maps: Sequence[Map], like: Tensor, columns: int, operator: Tensor | None = None
    ) -> None:
        """Move the maps' tables to the device."""
        self.blocks, self.dtype, self.device, self.columns = tuple(blocks), like.dtype, like.device, columns
        self.maps = tuple(maps)
        self.operator = None if operator is None else operator.to(like)
        self._sides: dict[int, tuple[Tensor, Tensor]] = {}
        for part in maps:
            for name, value in vars(part).items():
                if isinstance(value, Tensor):
                    setattr(part, name, value.to(like if value.is_floating_point() else like.device))

    @property
    def spans(self) -> dict[int, slice]:
        """The columns of each block."""
        return {position: part.columns for position, part in enumerate(self.maps)}

    def with_operator(self, operator: Tensor) -> Projector:
        """Return the same projection with Q, ``(parameters,)``."""
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        return Projector(self.blocks, self.maps, like, self.columns, operator)

    def project(self, pieces: Pieces, examples: int) -> Tensor:
        """Project the captured gradients of a batch, P g.

        Args:
            pieces: Block positions with gradients; a block may occur several times (they are added) or not at all.
            examples: The batch size.

        Returns:
            ``(examples, columns)``.
        """
        rows = torch.zeros(examples, self.columns, dtype=self.dtype, device=self.device)
        for position, gradients in pieces:
            rows[:, self.maps[position].columns] += self.maps[position].gradients(gradients)
        return rows

    def project_plain(self, vectors: Tensor) -> Tensor:
        """Compute P D of plain vectors ``(n, parameters)``, ``(n, columns)``."""
        rows = vectors.new_zeros(len(vectors), self.columns)
        for block, part in zip(self.blocks, self.maps, strict=True):
            rows[:, part.columns] += part.vectors(vectors[:, block.span])
        return rows

    def project_displacements(self, vectors: Tensor) -> Tensor:
        """Compute P (D / Q) of plain vectors ``(n, parameters)``, ``(n, columns)``; 0 for D / 0."""
        if self.operator is not None:
            vectors = torch.where(self.operator == 0, 0.0, vectors / self.operator)
        return self.project_plain(vectors)

    def add_covectors(self, rows: Tensor, position: int, gradients: ExampleGradients) -> None:
        """Project one block's output gradients, P (Q ⊙ φ), and add them to ``rows``, in place."""
        if self.operator is not None:
            gradients = gradients.scaled(self.operator[self.blocks[position].span])
        rows[:, self.maps[position].columns] += self.maps[position].gradients(gradients)

    def project_covectors(self, vectors: Tensor) -> Tensor:
        """Compute P (Q ⊙ φ) of plain vectors ``(n, parameters)``, ``(n, columns)``."""
        return self.project_plain(vectors if self.operator is None else vectors * self.operator)

    def covectors_from(self, other: Projector, rows: Tensor) -> Tensor:
        """Turn covectors that lie in another segment's directions, P' (Q' ⊙ φ), into P (Q ⊙ φ), ``(n, columns)``.

        Q / Q' is taken by its rows and columns.
        """
        if self.operator is None and not any(isinstance(part, TwoSidedMap) for part in self.maps):
            return rows
        found = torch.zeros_like(rows)
        for position, (mine, its) in enumerate(zip(self.maps, other.maps, strict=True)):
            part = rows[:, its.columns]
            if isinstance(mine, TwoSidedMap) and isinstance(its, TwoSidedMap):
                left, right = its.left.T, its.right
                if self.operator is not None and other.operator is not None:
                    (u, v), (u_its, v_its) = self._sides_of(position), other._sides_of(position)
                    left, right = (u / u_its)[:, None] * left, right * (v / v_its)
                values = part.reshape(-1, len(its.left), len(its.right))
                part = (mine.left @ left @ values @ (right @ mine.right.T)).flatten(1)
            elif self.operator is not None and other.operator is not None:
                span = self.blocks[position].span
                ratio = self.operator[span] / other.operator[span]
                ratio = torch.where(torch.isfinite(ratio), ratio, 0.0)
                part = part * (ratio if isinstance(mine, IdentityMap) else ratio.mean())
            found[:, mine.columns] = part
        return found

    def _sides_of(self, position: int) -> tuple[Tensor, Tensor]:
        if position not in self._sides:
            assert self.operator is not None
            block = self.blocks[position]
            self._sides[position] = geometric_sides(self.operator[block.span], block)
        return self._sides[position]

    def tensors(self) -> dict[str, Tensor]:
        """Return the bases of two-sided maps, which a seed cannot reproduce and must be stored."""
        kept = {}
        for position, part in enumerate(self.maps):
            if isinstance(part, TwoSidedMap):
                kept[f"{position}.left"], kept[f"{position}.right"] = part.left, part.right
        return {name: value.detach().cpu().contiguous() for name, value in kept.items()}
