"""The audited examples' displacements under an optimizer with a number for each coordinate, without any approximation.

The rows take such numbers as one operator for the whole segment. The audit is to show what that costs, so it follows
the recursion itself, step by step, for its few examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pkexplain.optimizers.displacement import add_product, copy_exactly
from pkexplain.optimizers.rules import LinearStep, Number
from pkexplain.optimizers.step_numbers import joined
from pkexplain.projection.coordinates import Coordinates

__all__ = ["ExactAudit"]

_FORGOTTEN = 1e-3
"""An example is no longer followed when at most this share of its last gradient is left in the momentum buffer."""


class ExactAudit:
    """Follows some examples' gradients through every step.

    Args:
        examples: How many examples.
        coordinates: Where they are followed: an optimizer's numbers act on each coordinate by itself.
        like: An empty tensor of the dtype and device of the arithmetic.
    """

    def __init__(self, examples: int, coordinates: Coordinates, like: Tensor) -> None:
        """Begin with empty momentum buffers."""
        size, self._coordinates = len(coordinates), coordinates
        self._moved = like.new_zeros(examples, size)
        self._buffer = like.new_zeros(examples, size)  # the first rows are in use
        self._in_use: list[int] = []  # whose they are
        self._left: list[float] = []  # what share of the last gradient is left

    def step(self, numbers: Mapping[int, LinearStep], visits: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Follow one optimizer step.

        Args:
            numbers: The step's numbers for each block.
            visits: The examples in its batches, ``(examples,)`` on the CPU, with their gradients as applied,
                at the coordinates, ``(examples, coordinates)``.
        """
        visited = [pair for places, gradients in visits for pair in zip(places.tolist(), gradients, strict=True)]
        for place, _ in visited:
            self._use(place)
        if not self._in_use:
            return
        n = joined(self._sampled(numbers), self._coordinates.spans, self._moved[:0])
        self._buffer[: len(self._in_use)] *= n.momentum
        for place, gradient in visited:
            add_product(self._buffer[self._in_use.index(place)], n.gain, gradient)
            add_product(self._moved[place], n.gradient_step, gradient, -1)
        for slot, place in enumerate(self._in_use):
            add_product(self._moved[place], n.buffer_step, self._buffer[slot], -1)
        largest, new = max(_largest(number.momentum) for number in numbers.values()), {place for place, _ in visited}
        self._left = [1.0 if p in new else left * largest for p, left in zip(self._in_use, self._left, strict=True)]
        for slot in reversed(range(len(self._in_use))):
            if self._left[slot] <= _FORGOTTEN:
                self._forget(slot)

    def _sampled(self, numbers: Mapping[int, LinearStep]) -> Mapping[int, LinearStep]:
        if self._coordinates.complete:
            return numbers

        found: dict[int, LinearStep] = {}
        for block, number in numbers.items():
            each = {name: value for name, value in vars(number).items() if isinstance(value, Tensor) and value.ndim}
            sampled: dict[str, Any] = {n: self._coordinates.of_block(block, v.flatten()) for n, v in each.items()}
            found[block] = replace(number, **sampled)
        return found

    def _use(self, place: int) -> None:
        if place not in self._in_use:
            self._buffer[len(self._in_use)] = 0.0
            self._in_use.append(place)
            self._left.append(1.0)

    def _forget(self, slot: int) -> None:
        last = len(self._in_use) - 1
        self._buffer[slot] = self._buffer[last]
        self._in_use[slot], self._left[slot] = self._in_use[last], self._left[last]
        self._in_use.pop()
        self._left.pop()

    def close(self) -> Tensor:
        """End the segment: return the displacements, ``(examples, coordinates)``, and start the next."""
        moved, self._moved = self._moved, torch.zeros_like(self._moved)
        return moved

    @property
    def state_dict(self) -> dict[str, Any]:
        """The momentum buffers between two segments."""
        return {"buffer": self._buffer[: len(self._in_use)].clone(), "in_use": self._in_use, "left": self._left}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the momentum buffers."""
        copy_exactly(self._buffer[: len(state["in_use"])], state["buffer"])
        self._in_use, self._left = [int(p) for p in state["in_use"]], [float(share) for share in state["left"]]
        if len({*self._in_use}) < len(self._in_use) or any(not 0 <= p < len(self._moved) for p in self._in_use):
            raise ValueError("examples that are not audited")


def _largest(number: Number) -> float:
    return float(number.max()) if isinstance(number, Tensor) else number
