"""The size of an optimizer's numbers: one scalar for each block of parameters and step, τ.

It is their geometric mean, over a sample of the block's coordinates. On an accelerator nothing waits for it: a step
only multiplies by it, and it is fetched when the rows are folded, for all steps at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from pkexplain.gradients.devices import fetch, place, tensor_on
from pkexplain.optimizers.rules import LinearStep
from pkexplain.optimizers.step_numbers import StepNumbers

__all__ = ["LevelSampler", "Levels", "damped"]

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


class LevelSampler:
    """Reduces steps to scalars.

    Args:
        spans: Each block's slice of the flat vector.
        like: A tensor of the dtype and device of the arithmetic.
    """

    def __init__(self, spans: Mapping[int, slice], like: Tensor) -> None:
        """Choose the coordinates: evenly spaced in each block."""
        self._spans, self._like = spans, like
        self._places: tuple[Tensor, Tensor] | None = None

    def levels(self, numbers: Mapping[int, LinearStep]) -> Levels:
        """Reduce a step's numbers, given for each block."""
        scalars, vectors = dict(numbers), {}
        for name in (field.name for field in fields(LinearStep)):
            values = {block: getattr(n, name) for block, n in numbers.items()}
            spread = {block: value for block, value in values.items() if isinstance(value, Tensor)}
            if spread:
                vectors[name] = found = _geometric_means(self._samples(numbers, name, spread))
                if len(spread) < len(values):
                    means = dict(zip(spread, found, strict=True))
                    plain = tensor_on([0.0 if block in spread else values[block] for block in values], self._like)
                    vectors[name] = torch.stack([means.get(b, v) for b, v in zip(values, plain, strict=True)])
                scalars |= {block: replace(scalars[block], **{name: 0.0}) for block in spread}
        return Levels(scalars, vectors)

    def _samples(self, numbers: Mapping[int, LinearStep], name: str, spread: Mapping[int, Tensor]) -> Tensor:
        """Take a sample of some blocks' numbers, ``(blocks, most)``, filled up with 0, which counts for nothing."""
        flat = getattr(numbers.flat, name) if isinstance(numbers, StepNumbers) and numbers.flat else None
        if isinstance(flat, Tensor) and len(spread) == len(self._spans):
            places, there = self._all_places()
            return torch.where(there, flat[places], 0.0)
        samples = [number[:: _every(len(number))] for number in spread.values()]
        padded = samples[0].new_zeros(len(samples), max(map(len, samples)))
        for row, sample in zip(padded, samples, strict=True):
            row[: len(sample)] = sample
        return padded

    def _all_places(self) -> tuple[Tensor, Tensor]:
        """The sampled coordinates of all blocks, ``(blocks, most)``, and where there is one."""
        if self._places is None:
            chosen = [
                torch.arange(s.start, s.stop, _every(s.stop - s.start), device="cpu") for s in self._spans.values()
            ]
            padded = torch.full((len(chosen), max(map(len, chosen))), -1, device="cpu")
            for row, sample in zip(padded, chosen, strict=True):
                row[: len(sample)] = sample
            there = padded >= 0
            self._places = place(padded.clamp_min(0), self._like.device), place(there, self._like.device)
        return self._places


def _every(count: int) -> int:
    """Which of so many coordinates belong to a sample."""
    return max(1, count // _SAMPLE)


def _geometric_means(samples: Tensor) -> Tensor:
    """The geometric mean of each row's numbers, with the sign of their sum, ``(rows,)``; 0 if all are 0."""
    sizes = damped(samples)
    positive = sizes > 0
    mean = torch.where(positive, sizes, 1.0).log().sum(1) / positive.sum(1).clamp_min(1)
    return torch.where(positive.any(1), mean.exp(), 0.0).copysign(samples.sum(1))
