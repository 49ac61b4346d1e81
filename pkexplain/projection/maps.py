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

__all__ = ["HashedMap", "IdentityMap", "Map", "Pieces", "Projector", "TwoSidedMap", "hashed", "random_signs"]

Pieces = Sequence[tuple[int, ExampleGradients]]
"""Captured gradients of one batch: block positions with their gradients."""


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

    def gradients(self, gradients: ExampleGradients) -> Tensor:
        """Map per-example gradients, ``(examples, columns)``."""
        if not isinstance(gradients, MatrixGradient):
            return self.vectors(gradients.dense())
        sides = [None if len(side) == side.shape[1] else side for side in (self.left, self.right)]  # square: identity
        return gradients.sketch(*sides).flatten(1)

    def vectors(self, vectors: Tensor) -> Tensor:
        """Map plain vectors ``(n, numel)`` to ``(n, columns)``."""
        rows, columns = self.left.shape[1], self.right.shape[1]
        if self.split:
            weight = vectors[:, : rows * (columns - 1)].reshape(-1, rows, columns - 1)
            matrix = torch.cat([weight, vectors[:, rows * (columns - 1) :, None]], dim=2)
        else:
            matrix = vectors.reshape(-1, rows, columns)
        return (self.left @ matrix @ self.right.T).flatten(1)


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
    """A projection bound to the blocks of a model.

    A displacement's row is P S⁻¹ D and a covector's is P S φ, with a diagonal preconditioner S that brings both to a
    similar scale if the optimizer moves some coordinates much further than others.

    Attributes:
        columns: k, the number of columns of a row.
        preconditioner: S, ``(parameters,)``; None for the identity.
    """

    def __init__(
        self, blocks: Sequence[Block], maps: Sequence[Map], like: Tensor, preconditioner: Tensor | None = None
    ) -> None:
        """Move the maps' tables to the device."""
        self.blocks, self.dtype, self.device = tuple(blocks), like.dtype, like.device
        self.maps = tuple(maps)
        self.columns = max(m.columns.stop for m in maps)
        self.preconditioner = None if preconditioner is None else preconditioner.to(like)
        for part in maps:
            for name, value in vars(part).items():
                if isinstance(value, Tensor):
                    setattr(part, name, value.to(like if value.is_floating_point() else like.device))

    def add(self, rows: Tensor, position: int, gradients: ExampleGradients) -> None:
        """Project one block's gradients and add them to ``rows``, ``(examples, columns)``, in place."""
        rows[:, self.maps[position].columns] += self.maps[position].gradients(gradients)

    def add_displacements(
        self, rows: Tensor, position: int, gradients: ExampleGradients, factors: Tensor | None = None
    ) -> None:
        """Multiply one block's gradients elementwise, precondition and project them, and add them to ``rows``.

        Args:
            rows: ``(examples, columns)``.
            position: Which block.
            gradients: Its gradients.
            factors: ``(numel,)``; None for ones.
        """
        if self.preconditioner is not None:
            preconditioner = self.preconditioner[self.blocks[position].span]
            factors = preconditioner.reciprocal() if factors is None else factors / preconditioner
        self.add(rows, position, gradients if factors is None else gradients.scaled(factors))

    def project(self, pieces: Pieces, examples: int) -> Tensor:
        """Project the captured gradients of a batch, without a preconditioner.

        Args:
            pieces: Block positions with gradients; a block may occur several times (they are added) or not at all.
            examples: The batch size.

        Returns:
            ``(examples, columns)``.
        """
        rows = torch.zeros(examples, self.columns, dtype=self.dtype, device=self.device)
        for piece in pieces:
            self.add(rows, *piece)
        return rows

    def project_displacements(self, vectors: Tensor) -> Tensor:
        """Compute P S⁻¹ D of plain vectors ``(n, parameters)``, ``(n, columns)``."""
        rows = vectors.new_zeros(len(vectors), self.columns)
        for block, part in zip(self.blocks, self.maps, strict=True):
            preconditioned = vectors[:, block.span]
            if self.preconditioner is not None:
                preconditioned = preconditioned / self.preconditioner[block.span]
            rows[:, part.columns] += part.vectors(preconditioned)
        return rows

    def add_covectors(self, rows: Tensor, position: int, gradients: ExampleGradients) -> None:
        """Precondition and project one block's output gradients, P S φ, and add them to ``rows``, in place."""
        if self.preconditioner is not None:
            gradients = gradients.scaled(self.preconditioner[self.blocks[position].span])
        self.add(rows, position, gradients)

    def tensors(self) -> dict[str, Tensor]:
        """Return what a seed cannot reproduce and must be stored: bases of two-sided maps, the preconditioner."""
        kept = {}
        for position, part in enumerate(self.maps):
            if isinstance(part, TwoSidedMap):
                kept[f"{position}.left"], kept[f"{position}.right"] = part.left, part.right
        if self.preconditioner is not None:
            kept["preconditioner"] = self.preconditioner
        return {name: value.detach().cpu().contiguous() for name, value in kept.items()}
