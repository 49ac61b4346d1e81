"""A sample of the parameters' coordinates that stands for all of them in an inner product.

Full-space products ⟨∇f, D_i⟩ are the truth with which rows are compared, but a large model's displacements of even a
few examples would take more memory than its training. A sum over all coordinates is estimated without bias from one
of each stretch of consecutive ones, times the stretch's length (stratified sampling; W. G. Cochran, Sampling
Techniques, 1977, chapter 5). Unlike a random projection, a sample can be multiplied by an optimizer's numbers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pkexplain.gradients.factors import ExampleGradients
from pkexplain.gradients.layers import Block
from pkexplain.projection.maps import random_words

__all__ = ["Coordinates"]

_SEED = 0


class Coordinates:
    """Some coordinates of the flat vector of parameters, in its order: always the same for the same blocks.

    Attributes:
        spans: Each block's slice of a sampled vector.

    Args:
        blocks: The recorded parameters.
        most: How many coordinates, at the most; None for all.
    """

    def __init__(self, blocks: Sequence[Block], most: int | None = None) -> None:
        """Choose them: all of a small block, of others in proportion to the square root of their size."""
        sizes = [block.numel for block in blocks]
        counts = sizes if most is None or sum(sizes) <= most else _shares(sizes, most)
        ends = itertools.accumulate(counts, initial=0)
        self.spans = {position: slice(*pair) for position, pair in enumerate(itertools.pairwise(ends))}
        self._blocks = tuple(blocks)
        self._chosen: dict[int, Tensor] = {}  # of those blocks of which not all are chosen: where in the block
        weights = [torch.ones(count, dtype=torch.int64, device="cpu") for count in counts]
        for position, (size, count) in enumerate(zip(sizes, counts, strict=True)):
            if count < size:
                self._chosen[position], weights[position] = _one_of_each(size, count, position)
        self._weights = torch.cat(weights) if self._chosen else None
        self._on: dict[tuple[int, torch.device], Tensor] = {}

    def __len__(self) -> int:
        """Return how many there are."""
        return max((span.stop for span in self.spans.values()), default=0)

    @property
    def complete(self) -> bool:
        """Whether these are all coordinates."""
        return not self._chosen

    def of_block(self, position: int, values: Tensor) -> Tensor:
        """Keep the block's sampled coordinates, ``(…, numel)`` to ``(…, count)``."""
        return values if position not in self._chosen else values[..., self._places(position, values.device)]

    def gradients(self, position: int, gradients: ExampleGradients) -> Tensor:
        """Form a block's gradients at its sampled coordinates only, ``(examples, count)``."""
        if position not in self._chosen:
            return gradients.dense()
        # one example at a time: the whole gradients of a large layer take more memory than all that is kept of them
        each = (gradients.select(slice(at, at + 1)) for at in range(len(gradients)))
        return torch.cat([self.of_block(position, one.dense()) for one in each])

    def within(self, position: int, part: slice) -> tuple[slice, Tensor | slice]:
        """Find the sampled coordinates in a part of a block.

        Args:
            position: The block's position.
            part: The part's slice of the block.

        Returns:
            Their slice of a sampled vector, and where in the part they are.
        """
        span = self.spans[position]
        if position not in self._chosen:
            return slice(span.start + part.start, span.start + part.stop), slice(None)
        places = self._chosen[position]
        first, stop = torch.searchsorted(places, torch.tensor([part.start, part.stop], device="cpu")).tolist()
        return slice(span.start + first, span.start + stop), places[first:stop] - part.start

    def of(self, vectors: Tensor) -> Tensor:
        """Keep the sampled coordinates of flat vectors, ``(…, parameters)`` to ``(…, count)``."""
        if self.complete:
            return vectors
        return torch.cat([self.of_block(p, vectors[..., block.span]) for p, block in enumerate(self._blocks)], dim=-1)

    def weighted(self, sampled: Tensor) -> Tensor:
        """Multiply sampled vectors, ``(…, count)``, so that their products with others estimate those of whole ones."""
        return sampled if self._weights is None else sampled * self._weights.to(sampled)

    def _places(self, position: int, device: torch.device) -> Tensor:
        if (position, device) not in self._on:
            self._on[position, device] = self._chosen[position].to(device)
        return self._on[position, device]


def _shares(sizes: Sequence[int], most: int) -> list[int]:
    """Share out ``most`` coordinates in proportion to the square roots of the blocks' sizes; no block gets too many."""
    counts, open_ = list(sizes), set(range(len(sizes)))
    while True:
        left = most - sum(sizes[at] for at in range(len(sizes)) if at not in open_)
        each = left / sum(math.sqrt(sizes[at]) for at in open_)
        full = {at for at in open_ if each * math.sqrt(sizes[at]) >= sizes[at]}
        if not full:
            break
        open_ -= full
    for at in open_:
        counts[at] = max(1, math.floor(each * math.sqrt(sizes[at])))
    return counts


def _one_of_each(size: int, count: int, stream: int) -> tuple[Tensor, Tensor]:
    """Choose one of each of ``count`` stretches, at random; return where it is and how long its stretch is."""
    starts = np.arange(count + 1, dtype=np.int64) * size // count
    lengths = np.diff(starts)
    chosen = random_words(_SEED, stream, count) % lengths.astype(np.uint64)
    return torch.from_numpy(starts[:-1] + chosen.astype(np.int64)), torch.from_numpy(lengths)
