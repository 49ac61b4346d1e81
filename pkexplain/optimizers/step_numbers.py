"""The numbers of one optimizer step: of each block of parameters, of all together, and of blocks that have the same.

Where each operation costs more to begin than to do, as on a GPU, parameters are followed together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from pkexplain.optimizers.rules import LinearStep

__all__ = ["StateOfSeveral", "StepNumbers", "joined", "runs", "some_of"]


class StepNumbers(dict[int, LinearStep]):
    """The numbers of each block.

    Attributes:
        flat: The same for all parameters together, scalars or ``(parameters,)``; None if nothing was joined.
    """

    flat: LinearStep | None = None

    @classmethod
    def of_pieces(
        cls, pieces: Sequence[tuple[slice, LinearStep]], spans: Mapping[int, slice], like: Tensor
    ) -> StepNumbers:
        """Make them from the numbers of some parameters each.

        Args:
            pieces: Slices of the flat vector, ascending and without gaps, with their numbers.
            spans: Each block's slice.
            like: A tensor of the dtype and device of the result.
        """
        flat = LinearStep.joined([n for _, n in pieces], [span.stop - span.start for span, _ in pieces], like)
        found, rest = cls(), iter(pieces)
        for block, span in spans.items():
            part, end = some_of(flat, span), span.start
            members: list[LinearStep] = []
            while end < span.stop:
                covered, n = next(rest)
                members.append(n)
                end = covered.stop
            found[block] = replace(part, **_scalars(members))  # a number that the whole block has stays one number
        found.flat = flat
        return found


def _scalars(steps: Sequence[LinearStep]) -> dict[str, float]:
    """The numbers that some parameters have in common."""
    values = {field.name: [getattr(step, field.name) for step in steps] for field in fields(LinearStep)}
    return {
        name: several[0]
        for name, several in values.items()
        if not any(isinstance(value, Tensor) for value in several) and len(set(several)) == 1
    }


def some_of(step: LinearStep, span: slice) -> LinearStep:
    """The numbers of some coordinates."""
    values = {field.name: getattr(step, field.name) for field in fields(step)}
    return replace(step, **{name: value[span] for name, value in values.items() if isinstance(value, Tensor)})


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
