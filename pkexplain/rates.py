"""How far an optimizer moves the parameters for a unit of gradient, summed over a segment."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pkexplain.update_rules import LinearStep, Number

__all__ = ["RateSums"]


class RateSums:
    """The learning rate summed over a segment, as each block of parameters feels it in the end.

    A gradient that enters a moment goes on moving the parameters; with SGD and momentum μ the sum is that of
    learning rate / (1 − μ). Where the optimizer multiplies elementwise with A, the rows and covectors of the run
    see S⁻¹ A S⁻¹ in place of A, with the run's balance S; of that the mean is taken, weighted with the squared
    gradient in the same coordinates:

        Σ_s  Σ_p A_p g_p² / Σ_p S_p² g_p²

    Args:
        spans: Where each block of parameters lies in the flat vector.
    """

    def __init__(self, spans: Mapping[int, slice]) -> None:
        """Start the first segment."""
        self._spans = spans
        self._begin()

    def _begin(self) -> None:
        self._sums = dict.fromkeys(self._spans, 0.0)
        self._moved: dict[int, Tensor] = {}
        self._energy: dict[int, Tensor] = {}

    def step(self, numbers: Mapping[int, LinearStep], gradient: Tensor) -> None:
        """Follow one optimizer step.

        Args:
            numbers: The step's numbers for each block.
            gradient: The gradient that it applied, ``(parameters,)``.
        """
        for block, span in self._spans.items():
            reach = _reach(numbers[block])
            if isinstance(reach, Tensor):
                g = gradient[span]
                self._moved[block] = self._moved.get(block, 0.0) + reach
                self._energy[block] = self._energy.get(block, 0.0) + g * g
            else:
                self._sums[block] += reach

    def close(self, balance: Tensor | None) -> Tensor:
        """End the segment and start the next.

        Args:
            balance: S of the run's projection, ``(parameters,)``; None for ones.

        Returns:
            One sum for each block, in float64, ``(blocks,)``.
        """
        for block, moved in self._moved.items():
            energy = self._energy[block].double()
            scale = 1.0 if balance is None else balance[self._spans[block]].double().square()
            size = float((energy * scale).sum())
            self._sums[block] += float((energy * moved.double()).sum()) / size if size > 0 else 0.0
        found = torch.tensor([self._sums[block] for block in sorted(self._spans)], dtype=torch.float64)
        self._begin()
        return found


def _reach(step: LinearStep) -> Number:
    """Sum what a gradient of this step does in it and, at the same numbers, in all that follow."""
    kept = 1.0 - step.decay
    if isinstance(kept, Tensor):
        passed_on = torch.where(kept > 0, step.gain * step.moment_step / kept.clamp_min(1e-30), 0.0)
        return step.gradient_step + passed_on
    return step.gradient_step + (step.gain * step.moment_step / kept if kept > 0 else 0.0)
