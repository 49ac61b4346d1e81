"""What projected batches still do through the momentum buffer, under an optimizer that divides by a second moment."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pkexplain.optimizers.base import Factors, RecordingSpec
from pkexplain.optimizers.displacement import copy_exactly
from pkexplain.optimizers.rules import LinearStep, Number


class Tail:
    """How projected batches keep moving the parameters through the momentum buffer, in full space.

    Args:
        spec: What is recorded, and in which dtype.
    """

    def __init__(self, spec: RecordingSpec) -> None:
        """Begin with an empty buffer."""
        self._spans = spec.spans
        self._buffer = spec.like.new_zeros(spec.size)  # exact
        self._moving = torch.zeros_like(self._buffer)  # minus what it moves in a step, according to the rows
        self.examples = torch.zeros_like(self._buffer)
        self.folds: list[tuple[Factors, Factors]] = []
        self._restart()

    def _restart(self) -> None:
        self._moved = dict.fromkeys(self._spans, 0.0)
        self._remains = dict.fromkeys(self._spans, 1.0)
        self._stepped = False
        self._sizes: dict[int, float] = {}

    def step(self, numbers: Mapping[int, LinearStep]) -> None:
        """Follow one step: for each block, find the factor that best fits what the momentum buffer moves."""
        self._stepped = True
        for block, span in self._spans.items():
            moving, buffer = self._moving[span], self._buffer[span]
            if block not in self._sizes:  # it changes when the tail is folded or added to
                self._sizes[block] = float(moving.dot(moving))
            size = self._sizes[block]
            if size == 0:
                self._remains[block] = 0.0
                continue
            buffer.mul_(numbers[block].momentum)
            true = numbers[block].buffer_step * buffer
            self._remains[block] = float(true.dot(moving)) / size
            self._moved[block] += self._remains[block]

    def fold(self) -> None:
        """Settle what moved since the last fold; what is added later counts from here."""
        if not self._stepped:
            return
        self.folds.append((self._moved, self._remains))
        for block, span in self._spans.items():
            self.examples[span] -= self._moved[block] * self._moving[span]
            self._moving[span] *= self._remains[block]
        self._restart()

    def add(self, block: int, moved: Tensor, buffered: Tensor, buffer_step: Number) -> float:
        """Add a projected batch's sum; return the multiple of its displacement that it keeps adding in each step."""
        span = self._spans[block]
        size = float(moved.dot(moved))
        factor = float((buffer_step * buffered).dot(moved)) / size if size > 0 else 0.0
        self._sizes.pop(block, None)
        self._buffer[span] += buffered
        self._moving[span].add_(moved, alpha=factor)
        return factor

    def close(self) -> Tensor:
        """Return the examples' displacement in the segment, ``(parameters,)``, and begin the next."""
        examples, self.examples = self.examples, torch.zeros_like(self.examples)
        return examples

    @property
    def state_dict(self) -> tuple[Tensor, Tensor]:
        """The momentum buffer between two segments, and what it moves in a step, ``(parameters,)`` each."""
        return self._buffer, self._moving

    def load_state_dict(self, buffer: Tensor, moving: Tensor) -> None:
        """Restore the momentum buffer."""
        copy_exactly(self._buffer, buffer)
        copy_exactly(self._moving, moving)

    def factors(self) -> list[tuple[Factors, Factors]]:
        """Return for each fold, oldest first, how far a batch added then has moved by now and how much it has left."""
        moved, buffered = dict.fromkeys(self._spans, 0.0), dict.fromkeys(self._spans, 1.0)
        found: list[tuple[Factors, Factors]] = [(moved, buffered)]
        for by_fold, remains in reversed(self.folds):
            moved = {b: by_fold[b] + remains[b] * moved[b] for b in moved}
            buffered = {b: remains[b] * buffered[b] for b in buffered}
            found.append((moved, buffered))
        self.folds = []
        return found[::-1]
