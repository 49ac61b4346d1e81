"""What projected batches still do through the moment of an optimizer that divides by a second one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pkexplain.optimizers.base import Factors, Setting
from pkexplain.optimizers.displacement import copy_exactly
from pkexplain.optimizers.rules import LinearStep, Number

__all__ = ["Tail"]


class Tail:
    """What projected batches still do through the moment, in full space.

    Args:
        setting: What is recorded.
    """

    def __init__(self, setting: Setting) -> None:
        """Begin with an empty moment."""
        self._spans = setting.spans
        self._moment = setting.like.new_zeros(setting.size)  # exact
        self._moving = torch.zeros_like(self._moment)  # minus what it moves in a step, as the rows have it
        self.examples = torch.zeros_like(self._moment)
        self.folds: list[tuple[Factors, Factors]] = []
        self._restart()

    def _restart(self) -> None:
        self._moved = dict.fromkeys(self._spans, 0.0)
        self._kept = dict.fromkeys(self._spans, 1.0)
        self._stepped = False
        self._sizes: dict[int, float] = {}

    def step(self, numbers: Mapping[int, LinearStep]) -> None:
        """Follow one step: for each block find the factor that fits what the moment moves best."""
        self._stepped = True
        for block, span in self._spans.items():
            moving, moment = self._moving[span], self._moment[span]
            if block not in self._sizes:  # it changes when the tail is folded or added to
                self._sizes[block] = float(moving.dot(moving))
            size = self._sizes[block]
            if size == 0:
                self._kept[block] = 0.0
                continue
            moment.mul_(numbers[block].momentum)
            true = numbers[block].buffer_step * moment
            self._kept[block] = float(true.dot(moving)) / size
            self._moved[block] += self._kept[block]

    def fold(self) -> None:
        """Settle what was moved since the last fold; what is added from here on counts from here."""
        if not self._stepped:
            return
        self.folds.append((self._moved, self._kept))
        for block, span in self._spans.items():
            self.examples[span] -= self._moved[block] * self._moving[span]
            self._moving[span] *= self._kept[block]
        self._restart()

    def add(self, block: int, moved: Tensor, kept: Tensor, buffer_step: Number) -> float:
        """Add a projected batch's sum; return which multiple of what it moved it goes on moving in a step."""
        span = self._spans[block]
        size = float(moved.dot(moved))
        factor = float((buffer_step * kept).dot(moved)) / size if size > 0 else 0.0
        self._sizes.pop(block, None)
        self._moment[span] += kept
        self._moving[span].add_(moved, alpha=factor)
        return factor

    def close(self) -> Tensor:
        """Return what the examples moved in the segment, ``(parameters,)``, and begin the next."""
        examples, self.examples = self.examples, torch.zeros_like(self.examples)
        return examples

    @property
    def state_dict(self) -> tuple[Tensor, Tensor]:
        """What is in the moment between two segments, and what it moves in a step, ``(parameters,)`` each."""
        return self._moment, self._moving

    def load_state_dict(self, moment: Tensor, moving: Tensor) -> None:
        """Begin with what was in the moment."""
        copy_exactly(self._moment, moment)
        copy_exactly(self._moving, moving)

    def factors(self) -> list[tuple[Factors, Factors]]:
        """For each fold, what a batch that was added then has moved by now and what it keeps; first, the earliest."""
        moved, kept = dict.fromkeys(self._spans, 0.0), dict.fromkeys(self._spans, 1.0)
        found: list[tuple[Factors, Factors]] = [(moved, kept)]
        for by_fold, remains in reversed(self.folds):
            moved = {b: by_fold[b] + remains[b] * moved[b] for b in moved}
            kept = {b: remains[b] * kept[b] for b in kept}
            found.append((moved, kept))
        self.folds = []
        return found[::-1]
