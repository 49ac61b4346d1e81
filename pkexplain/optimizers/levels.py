"""The size of an optimizer's numbers: one scalar for each block of parameters and step, τ.

It is their geometric mean, over a sample of the block's coordinates. On an accelerator nothing waits for it: a step
only multiplies by it, and it is fetched when the rows are folded, for all steps at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from pkexplain.gradients.devices import fetch, tensor_on
from pkexplain.optimizers.rules import LinearStep

__all__ = ["Levels", "damped"]

_DAMPING = 0.1
"""Share of a block's mean √v̂ that is added to every coordinate's: one with hardly any gradient must not set a mean."""
_SAMPLE = 4096
"""Coordinates of a block from which the size of its numbers is computed, and up to twice as many."""


def damped(numbers: Tensor, damping: float = _DAMPING) -> Tensor:
    """Return sizes with those of coordinates that hardly have a gradient cut down, ``(…, numel)``; 0 stays 0."""
    inverse = numbers.abs().reciprocal()
    usable = torch.isfinite(inverse)
    mean = torch.where(usable, inverse, 0.0).sum(-1, keepdim=True) / usable.sum(-1, keepdim=True).clamp_min(1)
    return torch.where(usable, (inverse + damping * mean).reciprocal(), 0.0)


@dataclass(frozen=True)
class Levels:
    """One step's numbers, reduced to scalars.

    Attributes:
        scalars: The step's numbers for each block; 0 in place of those that differ from coordinate to coordinate.
        vectors: The scalars of the latter, by name, for all blocks, ``(blocks,)``.
    """

    scalars: Mapping[int, LinearStep]
    vectors: Mapping[str, Tensor]

    @classmethod
    def of(cls, numbers: Mapping[int, LinearStep]) -> Levels:
        """Reduce a step's numbers, given for each block."""
        scalars, vectors = dict(numbers), {}
        for name in (field.name for field in fields(LinearStep)):
            values = {block: getattr(n, name) for block, n in numbers.items()}
            spread = {block: value for block, value in values.items() if isinstance(value, Tensor)}
            if spread:
                means = dict(zip(spread, _geometric_means(list(spread.values())), strict=True))
                like = next(iter(means.values()))
                plain = tensor_on([0.0 if block in spread else values[block] for block in values], like)
                vectors[name] = torch.stack([means.get(b, v) for b, v in zip(values, plain, strict=True)])
                scalars |= {block: replace(scalars[block], **{name: 0.0}) for block in spread}
        return cls(scalars, vectors)

    @staticmethod
    def known(several: Sequence[Levels]) -> list[dict[int, LinearStep]]:
        """Wait for the scalars of several steps, and return their numbers for each block."""
        arrived = iter(fetch([vector for levels in several for vector in levels.vectors.values()]))
        found: list[dict[int, LinearStep]] = []
        for levels in several:
            values = {name: next(arrived) for name in levels.vectors}
            numbers = enumerate(levels.scalars.items())
            found.append({b: replace(n, **{name: v[at] for name, v in values.items()}) for at, (b, n) in numbers})
        return found


def _geometric_means(numbers: Sequence[Tensor]) -> Tensor:
    """The geometric mean of some blocks' numbers, with the sign of their sum, ``(blocks,)``; 0 if all are 0."""
    samples = [number[:: max(1, len(number) // _SAMPLE)] for number in numbers]
    padded = samples[0].new_zeros(len(samples), max(map(len, samples)))  # a 0 counts for nothing
    for row, sample in zip(padded, samples, strict=True):
        row[: len(sample)] = sample
    sizes = damped(padded)
    positive = sizes > 0
    mean = torch.where(positive, sizes, 1.0).log().sum(1) / positive.sum(1).clamp_min(1)
    return torch.where(positive.any(1), mean.exp(), 0.0).copysign(padded.sum(1))
