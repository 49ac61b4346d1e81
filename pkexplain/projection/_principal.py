"""Principal directions of gradient matrices, and how many of them each layer gets.

For a layer with gradients G_i, ``(rows, columns)``, the two-sided map L G Rᵀ keeps most of Σ_i ‖G_i‖² if L and R
hold the leading eigenvectors of Σ_i G_i G_iᵀ and Σ_i G_iᵀ G_i (the higher-order SVD). Both are estimated without
forming G_i: for random signs Ω with E[Ω Ωᵀ] = I, (G_i Ω)(G_i Ω)ᵀ has expectation G_i G_iᵀ.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pkexplain.distributed import ProcessGroup
from pkexplain.gradients.compressed import CompressedGradient
from pkexplain.gradients.factors import LinearGradient, MatrixGradient
from pkexplain.gradients.layers import Block
from pkexplain.gradients.rounded import RoundedGradient
from pkexplain.projection._subspace import leading_eigenvectors
from pkexplain.projection.maps import RANDOM_WIDTH, Pieces, RowFactors, random_signs

_WIDEST = 4096
"""A wider side is a vocabulary: it has fewer directions, from fewer examples, as they take much memory."""
_NUMBERS_WIDEST = 1 << 23
"""The most numbers in the vectors from which the directions of a vocabulary are computed."""
_LEADING = 128
"""The number of directions computed for a side wider than twice as many; no layer gets more."""
_NARROW = 512
"""The widest side whose covariance is formed."""
_FEW = 2
"""All directions of it are computed, unless it has more than this many times those that are wanted."""
_COMBINATIONS = 16
"""The most random combinations of each example's columns, or rows, from which the first directions are estimated."""
_REFINED = 64
"""Directions of one side along which those of the other are then computed."""
_VECTORS = 64
"""Vectors for each row of a covariance from which it is estimated at first."""
_WORK = 1 << 30
"""About how many multiplications a covariance that is formed takes."""
_VECTORS_WIDE = 2048
"""About how many vectors the directions of a wide side are computed from."""
_WORK_SHARE = 0.3
"""The share of the training's work at which projecting weighs as much as storing the rows."""
_SHARPENED = 2
"""The power of the energies of directions of the output side, if a gradient has one position (`_Side.sharpened`)."""
_NORM_SKETCH = 8
"""Random combinations of rows, and of columns, from which the norm of an example's gradient is estimated."""
HELD_BACK = 0.5
"""An example whose gradient has norm n counts with n^(1 − this) when directions are chosen: a few examples can hold
nearly all of the energy, and directions chosen by energy would be theirs alone."""


@dataclass
class _Side:
    """One side of a layer: an orthonormal basis, best direction first, and the share of energy its first n hold."""

    basis: Tensor  # (directions, side)
    shares: list[float]  # shares[n - 1]: energy in the first n directions

    @classmethod
    def principal(cls, vectors: Sequence[Tensor], most: int, seed: int, group: ProcessGroup) -> _Side:
        """Find the leading directions of some vectors, ``(side, n)`` each, of which every process has its own."""
        side = len(vectors[0])
        if side > _NARROW:
            everything = torch.cat(list(vectors), dim=1)
            total = float(group.all_reduce(everything.square().sum()))
            product = lambda block: group.all_reduce(everything @ (everything.T @ block))  # noqa: E731
            rank = group.all_reduce_int(everything.shape[1])
            energies, directions = leading_eigenvectors(product, side, rank, most, everything, seed)
        else:
            gram = vectors[0].new_zeros(side, side)
            for some in vectors:
                gram.addmm_(some, some.T)
            gram = group.all_reduce(gram).double()
            total = float(gram.trace())
            if side > _FEW * most:
                energies, directions = leading_eigenvectors(lambda block: gram @ block, side, side, most, gram, seed)
            else:
                energies, directions = torch.linalg.eigh(gram.cpu())
        energies = energies.flip(0).clamp_min(0)
        even = torch.arange(1, len(energies) + 1, device="cpu") / len(energies)
        shares = energies.cumsum(0) / total if total > 0 else even
        return cls(directions.flip(1).T.contiguous(), shares.tolist())

    @classmethod
    def random(cls, side: int, most: int, seed: int, stream: int) -> _Side:
        width = RANDOM_WIDTH if side > _WIDEST else min(RANDOM_WIDTH, side, most)
        return cls(random_signs(seed, stream, (width, side)), [])

    def sharpened(self) -> _Side:
        """Count less on small directions of the output side of gradients δxᵀ.

        x comes back with its example. δ's small directions do not: parameters and dropout have changed, and over an
        example's visits they cancel (docs/mathematics.md, Limits).
        """
        energies = torch.tensor([0.0, *self.shares], dtype=torch.float64, device="cpu").diff().clamp_min(0)
        unseen = self.basis.shape[1] - len(energies)
        rest = unseen * (max(0.0, 1 - self.shares[-1]) / max(unseen, 1)) ** _SHARPENED
        powers = energies**_SHARPENED
        return _Side(self.basis, (powers.cumsum(0) / (powers.sum() + rest)).tolist())

    def first(self, n: int) -> Tensor:
        """Return the first n directions; for all of them the identity, which costs nothing and is as good."""
        side = self.basis.shape[1]
        return torch.eye(side, dtype=self.basis.dtype, device="cpu") if n == side else self.basis[:n]


@dataclass(frozen=True)
class Seen:
    """The gradients from which directions are chosen.

    Attributes:
        batches: Batches of captured gradients.
        sizes: What each batch's gradients are multiplied by.
        factors: What rows are multiplied by before they are projected, for each block; none for ones.
        seed: Seed of the random combinations.
        group: The processes, each with its own batches.
        weights: The weight of each example of each batch.
    """

    batches: Sequence[Pieces]
    sizes: Sequence[float]
    factors: Mapping[int, RowFactors]
    seed: int
    group: ProcessGroup
    weights: list[Tensor] = field(default_factory=list)
    _unpacked: dict[int, list[tuple[MatrixGradient, Tensor]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Hold back examples with large gradients."""
        for pieces, size in zip(self.batches, self.sizes, strict=True):
            squares = sum(self._squared_norms(p, g) for p, g in pieces if isinstance(g, MatrixGradient))
            norms = size * torch.as_tensor(squares, device="cpu").double().sqrt()
            self.weights.append(size * norms.clamp_min(1e-30) ** -HELD_BACK)

    def _squared_norms(self, position: int, gradients: MatrixGradient) -> Tensor:
        mixers = []
        for side, width in enumerate(gradients.matrix):
            signs = random_signs(self.seed, (1 << 32) + 2 * position + side, (min(_NORM_SKETCH, width), width))
            mixers.append(self.multiplied(signs.to(gradients.like), position, side))
        return gradients.sketch(*mixers).flatten(1).double().square().sum(1).cpu()

    def multiplied(self, mixer: Tensor, position: int, side: int) -> Tensor:
        """Multiply combinations of a block's rows (side 0) or columns (side 1) by its factors."""
        factors = self.factors.get(position)
        return mixer if factors is None or isinstance(factors, Tensor) else mixer * factors[side].to(mixer)

    def energy(self, position: int) -> float:
        """Estimate Σ_i w_i² ‖G_i‖² of one block."""
        own = [(self._squared_norms(position, g) * w.square()).sum() for g, w in self.of(position)]
        return float(self.group.all_reduce(torch.stack(own).sum()))

    def of(self, position: int) -> list[tuple[MatrixGradient, Tensor]]:
        """Return one block's gradients, with the weights of their examples; those of the last block asked for stay."""
        if position not in self._unpacked:
            self._unpacked.clear()
            self._unpacked[position] = [
                (g.unpacked() if isinstance(g, RoundedGradient) else g, weights)
                for pieces, weights in zip(self.batches, self.weights, strict=True)
                for p, g in pieces
                if p == position and isinstance(g, MatrixGradient)
            ]
        return self._unpacked[position]


def _vectors(seen: Seen, position: int, side: int, mixer: Tensor) -> list[Tensor]:
    """Compute w_i G_i Ωᵀ (side 0) or w_i G_iᵀ Ωᵀ (side 1) of one block's examples, ``(side, n)`` each.

    Args:
        seen: Captured gradients.
        position: The block.
        side: Whose directions are wanted.
        mixer: Ω, combinations of the other side, ``(combinations, other side)``.
    """
    mine, group = seen.of(position), seen.group
    width = mine[0][0].matrix[side]
    examples = group.all_reduce_int(sum(len(g) for g, _ in mine))
    vectors = _WORK // width**2 if width <= _NARROW else _VECTORS_WIDE
    vectors = max(_REFINED, min(vectors, _NUMBERS_WIDEST // width)) if width > _WIDEST else vectors
    every = -(-examples // vectors)  # one in so many examples counts, as much as all of them
    if (few := max(1, vectors // examples)) < len(mixer):  # all examples count, with fewer combinations each
        mixer = random_signs(seen.seed, (1 << 33) + 2 * position + side, (few, len(mixer))).to(mixer) @ mixer
    like = mine[0][0].like
    mixer = seen.multiplied(mixer.to(like), position, 1 - side)
    own = seen.multiplied(like.new_ones(1, width), position, side).T
    found: list[Tensor] = []
    for gradients, weights in mine:
        if isinstance(gradients, CompressedGradient):
            found.append(own * gradients.few_vectors(side, mixer, weights))
            continue
        gradients, weights = gradients.select(slice(None, None, every)), weights[::every] * every**0.5
        mixed = gradients.sketch(None, mixer) if side == 0 else gradients.sketch(mixer, None).transpose(1, 2)
        found.append((mixed * own * weights.to(mixed)[:, None, None]).transpose(0, 1).flatten(1))
    return found


def _both_sides(seen: Seen, position: int, shape: tuple[int, int]) -> tuple[_Side, _Side]:
    """Find the directions of both sides: from random combinations of the other side, then from its leading directions.

    A random combination of columns has an expectation of G Gᵀ, but its noise takes most of the small directions.
    """
    narrow = min((0, 1), key=lambda side: shape[side])
    if shape[narrow] <= _REFINED:
        everything = torch.eye(shape[narrow], dtype=torch.float64, device="cpu")
        first = _side(seen, position, 1 - narrow, shape, everything)
        second = _side(seen, position, narrow, shape, first.basis[:_REFINED])
        return (second, first) if narrow == 0 else (first, second)
    examples = seen.group.all_reduce_int(sum(len(g) for g, _ in seen.of(position)))
    mixers: list[Tensor] = []
    for side, width in enumerate(shape):
        count = min(_COMBINATIONS, max(1, -(-_VECTORS * width // examples)))
        random = random_signs(seen.seed, 4 * position + side, (count, shape[1 - side]))
        mixers.append(_side(seen, position, side, shape, random, _REFINED).basis[:_REFINED])
    return _side(seen, position, 0, shape, mixers[1]), _side(seen, position, 1, shape, mixers[0])


def _side(seen: Seen, position: int, side: int, shape: tuple[int, int], mixer: Tensor, most: int = _LEADING) -> _Side:
    """Find the leading directions of one side from combinations of the other."""
    most = min(most, _REFINED) if shape[side] > _WIDEST else most
    return _Side.principal(_vectors(seen, position, side, mixer), most, seen.seed, seen.group)


@dataclass(frozen=True)
class _Layer:
    """A layer that gets some of the columns.

    Attributes:
        sides: Its sides.
        weight: The root of its gradients' energy.
        positions: Terms in the sum that an example's gradient is: the tokens of a sequence, the places of an image.
    """

    sides: tuple[_Side, _Side]
    weight: float
    positions: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of its matrix."""
        return self.sides[0].basis.shape[1], self.sides[1].basis.shape[1]

    def held(self, size: tuple[int, int]) -> float:
        """The root of the energy that so many directions hold."""
        shares = [side.shares[n - 1] if side.shares else 1.0 for side, n in zip(self.sides, size, strict=True)]
        return self.weight * shares[0] * shares[1]

    def work(self, size: tuple[int, int]) -> int:
        """Multiplications to project an example's gradient; a side that keeps everything costs nothing."""
        (rows, columns), (a, b) = self.shape, size
        return self.positions * ((a < rows) * a * rows + (b < columns) * b * columns + a * b)

    def training(self) -> int:
        """Multiplications of a forward and a backward pass."""
        return 3 * self.positions * math.prod(self.shape)


def _share_out(layers: Mapping[int, _Layer], k: int) -> dict[int, tuple[int, int]]:
    """Give each layer (n_rows, n_columns) directions, Σ n_rows·n_columns ≤ k, adding the best gain per price first.

    The price of directions is the share that they take of k, plus the share that their projection takes of three
    tenths of the training's work.
    """
    sizes: dict[int, tuple[int, int]] = {}
    for position, layer in layers.items():
        sizes[position] = tuple(1 if side.shares else len(side.basis) for side in layer.sides)  # pyright: ignore
    left = k - sum(a * b for a, b in sizes.values())
    work = max(1.0, _WORK_SHARE * sum(layer.training() for layer in layers.values()))

    def options(position: int) -> list[tuple[float, int, tuple[int, int], tuple[int, int]]]:
        layer, (a, b) = layers[position], sizes[position]
        now, (first, second) = (a, b), layer.sides
        grown = [(a + 1, b)] if first.shares and a < len(first.basis) else []
        grown += [(a, b + 1)] if second.shares and b < len(second.basis) else []
        found = []
        for new in grown:
            price = (math.prod(new) - a * b) / max(k, 1) + max(0, layer.work(new) - layer.work(now)) / work
            found.append((-(layer.held(new) - layer.held(now)) / price, position, now, new))
        return found

    heap = [option for position in layers for option in options(position)]
    heapq.heapify(heap)
    while heap:
        _, position, old, new = heapq.heappop(heap)
        cost = math.prod(new) - math.prod(old)
        if old != sizes[position] or cost > left:
            continue
        sizes[position], left = new, left - cost
        for option in options(position):
            heapq.heappush(heap, option)
    return sizes


def fewest_columns(block: Block) -> int:
    """Count the columns that a matrix block gets at least: one for each pair of directions, random ones included."""
    assert block.matrix is not None
    return math.prod(RANDOM_WIDTH if width > _WIDEST else 1 for width in block.matrix)


def principal_bases(
    blocks: Sequence[Block], seen: Seen, columns: Callable[[float], int]
) -> dict[int, tuple[Tensor, Tensor]]:
    """Find the bases L and R of every matrix block.

    A layer's energy is weighted by its square root, so that a layer with small gradients at first is not starved.

    Args:
        blocks: The model's blocks.
        seen: Captured gradients.
        columns: Says how many columns all blocks get together, from the multiplications of an example's forward and
            backward passes; each block gets at least `fewest_columns`.

    Returns:
        For each matrix block's position, L ``(n_rows, rows)`` and R ``(n_columns, columns)``, rows orthonormal.
    """
    layers: dict[int, _Layer] = {}
    most = max(1, math.isqrt(max(columns(0), 0) // (2 * len(blocks))))  # half an even share without gradients
    for position, block in enumerate(blocks):
        if block.matrix is None:
            continue
        if mine := seen.of(position):
            (output, inputs), positions = _both_sides(seen, position, block.matrix), max(g.positions for g, _ in mine)
            if positions == 1 and output.shares and isinstance(mine[0][0], LinearGradient):
                output = output.sharpened()
            layers[position] = _Layer((output, inputs), seen.energy(position) ** 0.5, positions)
            continue
        few, (height, width) = 1 if max(block.matrix) > _WIDEST else most, block.matrix
        left = _Side.random(height, few, seen.seed, 4 * position + 2)
        layers[position] = _Layer((left, _Side.random(width, few, seen.seed, 4 * position + 3)), 1.0, 1)
    training = seen.group.all_reduce_max(float(sum(layer.training() for layer in layers.values())))
    sizes = _share_out(layers, columns(training))
    return {p: (layers[p].sides[0].first(a), layers[p].sides[1].first(b)) for p, (a, b) in sizes.items()}
