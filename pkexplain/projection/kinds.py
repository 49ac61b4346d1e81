"""Seeded linear maps P: R^D → R^k that compress gradients, the same on every device.

A projection is a small frozen description; bound to a model's blocks it is a `pkexplain.projection.maps.Projector`.
What is random comes from a seed (NumPy's Philox, drawn on the CPU); what depends on data (the principal directions of
`Kronecker`) is stored with the run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pkexplain.distributed import ProcessGroup
from pkexplain.errors import ConfigurationError
from pkexplain.gradients.layers import Block
from pkexplain.projection._leading import leading_directions
from pkexplain.projection._principal import Seen, fewest_columns, principal_bases
from pkexplain.projection.base import Projection, WarmUp
from pkexplain.projection.maps import IdentityMap, Map, TwoSidedMap, hashed
from pkexplain.projection.projector import Projector, SecondStage

__all__ = ["Identity", "Kronecker", "SparseSign", "projection_from_description"]

_CHOOSING = 512
"""About how many of the waiting examples directions are computed from."""
_ENOUGH_BYTES = 192 << 20
"""Memory for waiting gradients once as many examples wait as choose."""
_SECOND_STAGE_SHARE = 0.1
"""The share of the training's work for which rows are gathered wider."""
_PRODUCTS = 3
"""Products of a wide row with as many directions as are stored, in a second stage."""
_TIMES_AS_WIDE = (2, 4, 8)
_MOST_NONZEROS = 256
"""Adding a coordinate to more columns than this makes the table larger and the projection no better."""


@dataclass(frozen=True)
class Identity(Projection):
    """Keep every coordinate: exact, and as large as the model; for small models and for checking other projections."""

    kind: ClassVar[str] = "Identity"
    keeps_everything: ClassVar[bool] = True

    def row_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the recorder's dtype: an exact row is not rounded."""
        return dtype

    def bind(self, blocks: Sequence[Block], like: Tensor, warm_up: WarmUp) -> Projector:
        """Make the map for a model's blocks; it depends on no gradients."""
        return Projector(blocks, [IdentityMap(block.span) for block in blocks], like, self.columns(blocks))

    def columns(self, blocks: Sequence[Block]) -> int:
        """Count the columns: one for each number."""
        return sum(block.numel for block in blocks)

    def restore(self, blocks: Sequence[Block], like: Tensor, kept: Mapping[str, Tensor]) -> Projector:
        """Rebuild the same map."""
        return self.bind(blocks, like, WarmUp())


@dataclass(frozen=True)
class SparseSign(Projection):
    """Sparse random signs (SJLT, Kane & Nelson 2014): unbiased inner products for any data, ⟨Pu, Pv⟩ ≈ ⟨u, v⟩.

    Args:
        k: Numbers in a row, for each segment.
        nonzeros: Columns to which each coordinate is added.
        seed: Seed of the signs and positions.
    """

    k: int = 4096
    nonzeros: int = 8
    seed: int = 0
    kind: ClassVar[str] = "SparseSign"

    def __post_init__(self) -> None:
        """Refuse invalid sizes."""
        _check(self, self.seed, k=self.k, nonzeros=self.nonzeros)
        if self.nonzeros > _MOST_NONZEROS:
            raise _no_map(self, "nonzeros", self.nonzeros, f"at most {_MOST_NONZEROS}")

    def bind(self, blocks: Sequence[Block], like: Tensor, warm_up: WarmUp) -> Projector:
        """Make the map for a model's blocks; a block's columns grow with the root of its size, up to its size."""
        maps: list[Map] = []
        start = 0
        for position, (block, width) in enumerate(zip(blocks, self._widths(blocks), strict=True)):
            columns = slice(start, start + width)
            whole = width == block.numel
            maps.append(
                IdentityMap(columns) if whole else hashed(columns, block.numel, self.nonzeros, self.seed, position)
            )
            start += width
        return Projector(blocks, maps, like, start)

    def _widths(self, blocks: Sequence[Block]) -> list[int]:
        """Divide k among the blocks, small blocks first: what they leave of their share goes to the others."""
        widths, left = [0] * len(blocks), self.k
        rest = sum(math.sqrt(block.numel) for block in blocks)
        for position in sorted(range(len(blocks)), key=lambda p: blocks[p].numel):
            root = math.sqrt(blocks[position].numel)
            widths[position] = min(blocks[position].numel, max(1, int(left * root / rest)))
            left, rest = left - widths[position], rest - root
        return widths

    def columns(self, blocks: Sequence[Block]) -> int:
        """Count the columns."""
        return sum(self._widths(blocks))

    def restore(self, blocks: Sequence[Block], like: Tensor, kept: Mapping[str, Tensor]) -> Projector:
        """Rebuild the same map."""
        return self.bind(blocks, like, WarmUp())


@dataclass(frozen=True)
class Kronecker(Projection):
    """Two-sided maps L G Rᵀ, one for each layer and segment, along principal directions of gradients, in two stages.

    L and R hold the leading eigenvectors of Σ_i G_i G_iᵀ and Σ_i G_iᵀ G_i over the segment's first examples
    (each estimated from random combinations of columns and rows, without forming G_i). How many of each a layer gets
    is chosen greedily by energy gained per number. Inner products lose what is outside these directions (a bias that
    the projection gap and the audit measure) and have no random error inside them. Parameters that are not a matrix
    get random signs.

    When a segment ends, its rows are shortened along the leading directions of the rows themselves, over all layers
    together: they show hardly less in a quarter of the numbers.

    Args:
        k: The most numbers in a stored row, for each segment.
        wide: Numbers in a row while its segment is recorded, and up to eight times as many if that is cheap beside
            the training of this model; ``k`` or fewer for no second stage.
        warm_up_examples: Examples of each segment whose gradients wait in memory until its directions are known: the
            first steps alone are not like the others.
        warm_up_mib: The most memory for waiting gradients, in MiB (of 2²⁰ bytes), and a batch more. Once 512 examples
            wait, 192 MiB are enough; where all of it holds fewer, they are rounded to twelve bits. More of it is more
            exact where an example's gradient is large: tokens times widths, added up over the layers.
        seed: Seed of the random combinations and signs.
    """

    k: int = 512
    wide: int = 2048
    warm_up_examples: int = 4096
    warm_up_mib: int = 1024
    seed: int = 0
    kind: ClassVar[str] = "Kronecker"
    follows_gradients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse invalid sizes."""
        sizes = {"warm_up_examples": self.warm_up_examples, "warm_up_mib": self.warm_up_mib}
        _check(self, self.seed, k=self.k, wide=self.wide, **sizes)
        object.__setattr__(self, "wide", max(self.wide, self.k))

    @property
    def warm_up(self) -> int:
        """The number of examples whose gradients are needed to fix the map."""
        return self.warm_up_examples

    def warm_up_bytes(self, examples: int) -> int:
        """The most memory for them, and a batch more, when so many wait."""
        most = self.warm_up_mib << 20
        return most if examples < _CHOOSING else min(most, _ENOUGH_BYTES)

    @property
    def choosing(self) -> int:
        """With fewer examples than this, memory for more is worth rounding them."""
        return _CHOOSING

    def bind(self, blocks: Sequence[Block], like: Tensor, warm_up: WarmUp) -> Projector:
        """Find the principal directions of the gradients seen and make the map."""
        loose = sum(width for width in self._loose_widths(blocks).values())
        beside = self._beside(blocks) if warm_up.total is not None else []
        sizes = warm_up.sizes or [1.0] * len(warm_up.batches)
        seen = Seen(warm_up.thinned(_CHOOSING), sizes, warm_up.factors or {}, self.seed, warm_up.group)

        def columns(training: float) -> int:
            affordable = min(_SECOND_STAGE_SHARE * training / (_PRODUCTS * self.k), float(warm_up.room))
            times = max((n for n in _TIMES_AS_WIDE if self.k < self.wide and n * self.wide <= affordable), default=1)
            return times * self.wide - loose - len(beside)

        bases, kept = principal_bases(blocks, seen, columns), {}
        for position, (left, right) in bases.items():
            kept[f"{position}.left"], kept[f"{position}.right"] = left, right
        projector = self.restore(blocks, like, kept)
        for position in beside:
            part = projector.maps[position]
            assert warm_up.total is not None
            assert isinstance(part, TwoSidedMap)
            kept[f"{position}.beside"] = part.direction_of(warm_up.total[blocks[position].span])
        return self.restore(blocks, like, kept) if beside else projector

    def _beside(self, blocks: Sequence[Block]) -> list[int]:
        """List the matrices that get one more direction where the sum is known; none if there are no columns left."""
        matrices = [position for position, block in enumerate(blocks) if block.matrix is not None]
        fewest = sum(fewest_columns(blocks[position]) + 1 for position in matrices)
        fits = fewest + sum(self._loose_widths(blocks).values()) <= self.wide == self.width(blocks)
        return matrices if fits else []

    def _loose_widths(self, blocks: Sequence[Block]) -> dict[int, int]:
        """Give an eighth of the columns, in equal parts, to the parameters that are not a matrix."""
        loose = [position for position, block in enumerate(blocks) if block.matrix is None]
        return {p: min(blocks[p].numel, max(1, self.wide // (8 * len(loose)))) for p in loose}

    def columns(self, blocks: Sequence[Block]) -> int:
        """Count the columns: k if the model has as many parameters."""
        return self.width(blocks) if self.wide == self.k else min(self.k, self.width(blocks))

    def width(self, blocks: Sequence[Block]) -> int:
        """Count the columns of a row while it is recorded, at the least; each block gets one or more."""
        loose = self._loose_widths(blocks)
        matrices = [block for block in blocks if block.matrix is not None]
        fewest, most = sum(map(fewest_columns, matrices)), sum(block.numel for block in matrices)
        return sum(loose.values()) + max(fewest, min(self.wide - sum(loose.values()), most))

    def takes_sides(self, block: Block) -> bool:
        """Whether it is a matrix."""
        return block.matrix is not None

    def restore(self, blocks: Sequence[Block], like: Tensor, kept: Mapping[str, Tensor]) -> Projector:
        """Rebuild the same map from its stored bases."""
        widths = self._loose_widths(blocks)
        maps: list[Map] = []
        start = 0
        for position, block in enumerate(blocks):
            if block.matrix is None:
                columns = slice(start, start + widths[position])
                whole = widths[position] == block.numel
                maps.append(IdentityMap(columns) if whole else hashed(columns, block.numel, 8, self.seed, position))
            else:
                left, right = kept[f"{position}.left"], kept[f"{position}.right"]
                beside = kept.get(f"{position}.beside")
                columns = slice(start, start + len(left) * len(right) + (beside is not None))
                maps.append(TwoSidedMap(columns, left, right, len(block.parameters) > 1, beside))
            start = columns.stop
        staged = "second_stage" in kept
        stage = SecondStage(kept["second_stage"], kept["scale"], self.columns(blocks)) if staged else None
        return Projector(blocks, maps, like, max(start, self.width(blocks)), second_stage=stage)

    def second_stage(
        self, projector: Projector, rows: Tensor, total: Tensor, rates: Tensor, group: ProcessGroup
    ) -> SecondStage | None:
        """Choose the directions along which a finished segment's rows are stored."""
        k = self.columns(projector.blocks)
        if k == projector.width:
            return None
        scale = torch.ones_like(total)
        for position, span in projector.spans.items():
            scale[span] = float(rates[position]) ** 0.5 if rates[position] > 0 else 1.0
        basis = leading_directions(rows, scale, total / scale, k, seed=self.seed, group=group)
        return SecondStage(basis if basis.dtype == torch.float64 else basis.half(), scale, k)


def _check(projection: Projection, seed: object, **sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise _no_map(projection, name, size, "an integer from 1 up")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 64:
        raise _no_map(projection, "seed", seed, "an integer from 0 to 2⁶⁴ − 1")


def _no_map(projection: Projection, name: str, size: object, expected: str) -> ConfigurationError:
    return ConfigurationError(
        f"{projection.kind}({name}=…)",
        "the value is invalid",
        got=repr(size),
        expected=expected,
        source="the projection's parameters",
        fix=f"Leave {name} out for its default",
    )


def projection_from_description(described: Mapping[str, Any]) -> Projection:
    """Rebuild a projection from what `Projection.describe` returned.

    Raises:
        ConfigurationError: The kind is not known.
    """
    kinds: dict[str, type[Projection]] = {c.kind: c for c in (Identity, SparseSign, Kronecker)}
    parameters = dict(described)
    kind = parameters.pop("kind", None)
    if kind not in kinds:
        raise ConfigurationError(
            "projection",
            "this kind is unknown",
            got=repr(kind),
            expected=", ".join(kinds),
            source="the run's manifest",
            fix="Read the run with the version of pkexplain that wrote it",
        )
    return kinds[kind](**parameters)
