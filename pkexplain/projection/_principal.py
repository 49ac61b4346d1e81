"""Principal directions of gradient matrices, and how many of them each layer gets.

For a layer with gradients G_i, ``(rows, columns)``, the two-sided map L G Rᵀ keeps most of Σ_i ‖G_i‖² if L and R
hold the leading eigenvectors of Σ_i G_i G_iᵀ and Σ_i G_iᵀ G_i (the higher-order SVD). Both are estimated without
forming G_i: for random signs Ω with E[Ω Ωᵀ] = I, (G_i Ω)(G_i Ω)ᵀ has expectation G_i G_iᵀ.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pkexplain.distributed import ProcessGroup
from pkexplain.gradients.factors import MatrixGradient
from pkexplain.gradients.layers import Block
from pkexplain.projection.maps import Pieces, RowFactors, random_signs

_WIDEST = 4096
"""The widest side whose principal directions are computed; a wider one (a vocabulary) gets random signs."""
_LEADING = 256
"""The number of directions computed for a wide side; no layer gets more."""
_MOST_SKETCHES = 16
_SAMPLES = 1
"""Vectors from which a covariance is estimated, for each of its rows: examples times random combinations."""
_ENOUGH = 2048
"""Examples that suffice to estimate a narrow covariance; with more, only every second or third batch is used."""
_RANDOM_WIDTH = 32
"""Random directions for a side that is too wide; also the most for a layer whose gradients were not seen."""
_NORM_SKETCH = 8
"""Random combinations of rows, and of columns, from which the norm of an example's gradient is estimated."""
_HELD_BACK = 0.5
"""An example whose gradient has norm n counts with n^(1 − this) when directions are chosen: a few examples can hold
nearly all of the energy, and directions chosen by energy would be theirs alone."""


@dataclass
class _Side:
    """One side of a layer: an orthonormal basis, best direction first, and the share of energy its first n hold."""

    basis: Tensor  # (directions, side)
    shares: list[float]  # shares[n - 1]: energy in the first n directions

    @classmethod
    def principal(cls, gram: Tensor, seed: int) -> _Side:
        gram = gram.double().cpu()
        energies, vectors = _leading(gram, seed) if len(gram) > 2 * _LEADING else torch.linalg.eigh(gram)
        energies, total = energies.flip(0).clamp_min(0), gram.trace()
        shares = (
            energies.cumsum(0) / total
            if total > 0
            else torch.arange(1, len(energies) + 1, device="cpu") / len(energies)
        )
        return cls(vectors.flip(1).T.contiguous(), shares.tolist())

    @classmethod
    def random(cls, side: int, most: int, seed: int, stream: int) -> _Side:
        width = _RANDOM_WIDTH if side > _WIDEST else min(_RANDOM_WIDTH, side, most)
        return cls(random_signs(seed, stream, (width, side)), [])

    def first(self, n: int) -> Tensor:
        """Return the first n directions; for all of them the identity, which costs nothing and is as good."""
        side = self.basis.shape[1]
        return torch.eye(side, dtype=self.basis.dtype, device="cpu") if n == side else self.basis[:n]


def _leading(gram: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Find the `_LEADING` largest eigenvalues, ascending, and eigenvectors of a wide matrix by subspace iteration."""
    block = random_signs(seed, len(gram), (_LEADING, len(gram))).T
    for _ in range(3):
        block = torch.linalg.qr(gram @ block)[0]
    energies, turn = torch.linalg.eigh(block.T @ gram @ block)
    return energies, block @ turn


@dataclass(frozen=True)
class Seen:
    """The gradients from which directions are chosen.

    Attributes:
        batches: Batches of captured gradients.
        factors: What rows are multiplied by before they are projected, for each block; none for ones.
        seed: Seed of the random combinations.
        group: The processes, each with its own batches.
        weights: The weight of each example of each batch.
    """

    batches: Sequence[Pieces]
    factors: Mapping[int, RowFactors]
    seed: int
    group: ProcessGroup
    weights: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Hold back examples with large gradients."""
        for pieces in self.batches:
            squares = sum(self._squared_norms(p, g) for p, g in pieces if isinstance(g, MatrixGradient))
            weights = torch.as_tensor(squares, device="cpu").double().clamp_min(1e-60) ** (-_HELD_BACK / 2)
            self.weights.append(weights)

    def _squared_norms(self, position: int, gradients: MatrixGradient) -> Tensor:
        mixers = []
        for side, width in enumerate(gradients.matrix):
            signs = random_signs(self.seed, (1 << 32) + 2 * position + side, (min(_NORM_SKETCH, width), width))
            mixers.append(self.multiplied(signs.to(gradients.output_gradients), position, side))
        return gradients.sketch(*mixers).flatten(1).double().square().sum(1).cpu()

    def multiplied(self, mixer: Tensor, position: int, side: int) -> Tensor:
        """Multiply combinations of a block's rows (side 0) or columns (side 1) by its factors."""
        factors = self.factors.get(position)
        return mixer if factors is None or isinstance(factors, Tensor) else mixer * factors[side].to(mixer)

    def of(self, position: int) -> list[tuple[MatrixGradient, Tensor]]:
        """Return one block's gradients, with the weights of their examples."""
        return [
            (g, weights)
            for pieces, weights in zip(self.batches, self.weights, strict=True)
            for p, g in pieces
            if p == position and isinstance(g, MatrixGradient)
        ]


def _gram(seen: Seen, position: int, side: int, stream: int) -> Tensor:
    """Estimate Σ_i w_i² G_i G_iᵀ (side 0) or Σ_i w_i² G_iᵀ G_i (side 1) of one block."""
    mine, group = seen.of(position), seen.group
    shape: tuple[int, int] = mine[0][0].matrix
    enough = max(_ENOUGH, _SAMPLES * shape[side])
    mine = mine[:: max(1, group.all_reduce_int(sum(len(g) for g, _ in mine)) // enough)]
    examples = group.all_reduce_int(sum(len(g) for g, _ in mine))
    combinations = min(_MOST_SKETCHES, -(-_SAMPLES * shape[side] // examples))
    like = mine[0][0].output_gradients
    mixer = random_signs(seen.seed, stream, (combinations, shape[1 - side])).to(like.device, like.dtype)
    mixer = seen.multiplied(mixer, position, 1 - side)
    own = seen.multiplied(like.new_ones(1, shape[side]), position, side).T
    gram = like.new_zeros(shape[side], shape[side])
    waiting: list[Tensor] = []
    for at, (gradients, weights) in enumerate(mine):
        mixed = gradients.sketch(None, mixer) if side == 0 else gradients.sketch(mixer, None).transpose(1, 2)
        mixed = mixed * own * weights.to(mixed)[:, None, None]
        waiting.append(mixed.transpose(0, 1).flatten(1))
        if at == len(mine) - 1 or sum([part.shape[1] for part in waiting]) >= shape[side]:
            vectors = torch.cat(waiting, dim=1)
            gram.addmm_(vectors, vectors.T)
            waiting = []
    return group.all_reduce(gram)


def _share_out(sides: dict[int, tuple[_Side, _Side]], weights: dict[int, float], k: int) -> dict[int, tuple[int, int]]:
    """Give each layer (n_rows, n_columns) directions, Σ n_rows·n_columns ≤ k, adding the best gain per cost first."""
    sizes: dict[int, tuple[int, int]] = {}
    for position, pair in sides.items():
        sizes[position] = tuple(1 if side.shares else len(side.basis) for side in pair)  # pyright: ignore
    left = k - sum(a * b for a, b in sizes.values())

    def held(position: int, size: tuple[int, int]) -> float:
        shares = [side.shares[n - 1] if side.shares else 1.0 for side, n in zip(sides[position], size, strict=True)]
        return weights[position] * shares[0] * shares[1]

    def options(position: int) -> list[tuple[float, int, tuple[int, int], tuple[int, int]]]:
        a, b = size = sizes[position]
        first, second = sides[position]
        grown = [((a + 1, b), b)] if first.shares and a < len(first.basis) else []
        grown += [((a, b + 1), a)] if second.shares and b < len(second.basis) else []
        now = held(position, size)
        return [(-(held(position, new) - now) / cost, position, size, new) for new, cost in grown]

    heap = [option for position in sides for option in options(position)]
    heapq.heapify(heap)
    while heap:
        _, position, old, new = heapq.heappop(heap)
        cost = new[0] * new[1] - old[0] * old[1]
        if old != sizes[position] or cost > left:
            continue
        sizes[position], left = new, left - cost
        for option in options(position):
            heapq.heappush(heap, option)
    return sizes


def fewest_columns(block: Block) -> int:
    """Count the columns that a matrix block gets at least: one for each pair of directions, random ones included."""
    assert block.matrix is not None
    return math.prod(_RANDOM_WIDTH if width > _WIDEST else 1 for width in block.matrix)


def principal_bases(blocks: Sequence[Block], seen: Seen, k: int) -> dict[int, tuple[Tensor, Tensor]]:
    """Find the bases L and R of every matrix block.

    A layer's energy is weighted by its square root, so that a layer with small gradients at first is not starved.

    Args:
        blocks: The model's blocks.
        seen: Captured gradients.
        k: Columns for all blocks together; each block gets at least `fewest_columns`.

    Returns:
        For each matrix block's position, L ``(n_rows, rows)`` and R ``(n_columns, columns)``, rows orthonormal.
    """
    sides: dict[int, tuple[_Side, _Side]] = {}
    weights: dict[int, float] = {}
    most = max(1, math.isqrt(max(k, 0) // (2 * len(blocks))))  # a layer without gradients gets half an even share
    for position, block in enumerate(blocks):
        if block.matrix is None:
            continue
        mine = seen.of(position)
        pair, energy = [], 1.0
        few = 1 if max(block.matrix) > _WIDEST else most
        for side, width in enumerate(block.matrix):
            stream = 4 * position + side
            if mine and width <= _WIDEST:
                gram = _gram(seen, position, side, stream)
                pair.append(_Side.principal(gram, seen.seed))
                energy = float(gram.trace())
            else:
                pair.append(_Side.random(width, few, seen.seed, stream + 2))
        sides[position] = (pair[0], pair[1])
        weights[position] = energy**0.5
    sizes = _share_out(sides, weights, k)
    return {p: (sides[p][0].first(a), sides[p][1].first(b)) for p, (a, b) in sizes.items()}
