"""The numbers of one optimizer step: of each block of parameters, of all together, and of blocks that have the same.

Where each operation costs more to begin than to do, as on a GPU, parameters are followed together.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from pkexplain.optimizers.rules import LinearStep, Number, plain_number

__all__ = ["StateOfSeveral", "StepNumbers", "joined", "runs"]

_NAMES = [field.name for field in fields(LinearStep)][:-1]  # without the learning rate


class StepNumbers(dict[int, LinearStep]):
    """The numbers of each block.

    Attributes:
        flat: The same for all parameters together, scalars or ``(parameters,)``; None if nothing was joined.
    """

    flat: LinearStep | None = None

    @classmethod
    def of_pieces(
        cls,
        pieces: Sequence[tuple[Sequence[int], LinearStep]],
        sizes: Sequence[int],
        counts: Sequence[int],
        like: Tensor,
    ) -> StepNumbers:
        """Make them from numbers that some parameters have together.

        Args:
            pieces: Positions of parameters, and their numbers: scalars, or those of one parameter after another.
            sizes: How many coordinates each parameter has.
            counts: How many parameters each block has.
            like: A tensor of the dtype and device of the result.
        """
        flat, found = {}, [dict[str, Number]() for _ in counts]
        for name in _NAMES:
            values: list[Any] = [None] * len(sizes)
            for members, step in pieces:
                lengths = [sizes[at] for at in members]
                value = plain_number(getattr(step, name), sum(lengths))
                several = isinstance(value, Tensor)
                parts = value.detach().to(like).flatten().split(lengths) if several else [value] * len(members)
                for member, part in zip(members, parts, strict=True):
                    values[member] = part
            one = not isinstance(values[0], Tensor) and len({*map(_key, values)}) == 1
            pairs = zip(values, sizes, strict=True)
            spread = like[:0] if one else torch.cat([_filled(v, n, like) for v, n in pairs])
            flat[name], at, start = values[0] if one else spread, 0, 0
            for block, count in zip(found, counts, strict=True):
                mine, end = values[at : at + count], start + sum(sizes[at : at + count])
                alike = not isinstance(mine[0], Tensor) and len({*map(_key, mine)}) == 1
                block[name] = mine[0] if alike else spread[start:end]  # a number that all of it has stays one number
                at, start = at + count, end
        rates = {at: step.learning_rate for members, step in pieces for at in members}
        starts = list(itertools.accumulate(counts, initial=0))
        steps = [
            LinearStep(**numbers, learning_rate=max(rates[p] for p in range(a, b)))  # pyright: ignore[reportArgumentType]
            for numbers, (a, b) in zip(found, itertools.pairwise(starts), strict=True)
        ]
        made = cls(enumerate(steps))
        made.flat = LinearStep(**flat, learning_rate=max(rates.values()))
        return made


def _filled(value: Number, count: int, like: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else like.new_full((count,), value)


def _key(value: Number) -> Any:
    """What tells numbers apart: a scalar's value, a tensor itself."""
    return id(value) if isinstance(value, Tensor) else value


def joined(numbers: Mapping[int, LinearStep], spans: Mapping[int, slice], like: Tensor) -> LinearStep:
    """Join the blocks' numbers, scalars or ``(parameters,)`` each."""
    if isinstance(numbers, StepNumbers) and numbers.flat is not None:
        return numbers.flat
    return LinearStep.joined([numbers[block] for block in spans], [s.stop - s.start for s in spans.values()], like)


def runs(
    numbers: Mapping[int, LinearStep], spans: Mapping[int, slice]
) -> Iterator[tuple[LinearStep, slice, list[int]]]:
    """Join consecutive blocks that have the same scalars; return their numbers, their slice and which they are."""
    if isinstance(numbers, StepNumbers) and numbers.flat is not None:
        yield numbers.flat, slice(0, max(span.stop for span in spans.values())), list(spans)
        return
    found: tuple[LinearStep, slice, list[int]] | None = None
    for block, span in spans.items():
        n = numbers[block]
        if found and found[1].stop == span.start and not n.elementwise and not found[0].elementwise and n == found[0]:
            found = n, slice(found[1].start, span.stop), [*found[2], block]
            continue
        if found:
            yield found
        found = n, span, [block]
    if found:
        yield found


class StateOfSeveral(Mapping[str, Any]):
    """The state of several parameters, for a rule that treats each coordinate alike: their tensors, one after another.

    A tensor is joined when it is asked for; anything else is the first parameter's.
    """

    def __init__(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Keep the states."""
        self._states = states

    def __getitem__(self, name: str) -> Any:
        """Return a value, or join the parameters' tensors, ``(numbers,)``."""
        values = [state[name] for state in self._states]
        first = values[0]
        return torch.cat([v.flatten() for v in values]) if isinstance(first, Tensor) and first.ndim else first

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._states[0])

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._states[0])
