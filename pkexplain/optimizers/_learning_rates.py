"""How far an optimizer moves the parameters for a unit of gradient, summed over a segment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pkexplain.optimizers.rules import LinearStep, Number

__all__ = ["RateSums"]


class RateSums:
    """The learning rate summed over a segment, as each block of parameters feels it.

    It is what a gradient of one, the same at every step, would have moved: with SGD and momentum μ, soon
    learning rate / (1 − μ) a step. Where the optimizer multiplies elementwise with A, the rows and covectors of the run
    see S⁻¹ A S⁻¹ in place of A, with the run's preconditioner S; of that the mean is taken, weighted with the squared
    gradient in the same coordinates:

        Σ_p (Σ_s A_p) g_p² / Σ_p S_p² g_p²

    Args:
        spans: Where each block of parameters lies in the flat vector.
    """

    def __init__(self, spans: Mapping[int, slice]) -> None:
        """Start the first segment with nothing in the moment."""
        self._spans = spans
        self._moment: dict[int, Number] = dict.fromkeys(spans, 0.0)
        self._begin()

    def _begin(self) -> None:
        self._moved: dict[int, Number] = dict.fromkeys(self._spans, 0.0)
        self._energy: dict[int, Number] = {}

    @property
    def moment(self) -> dict[int, Number]:
        """What the unit gradient has left in the moment of each block."""
        return self._moment

    def load_state_dict(self, moment: Mapping[int, Any]) -> None:
        """Begin with what was in the moment.

        Raises:
            ValueError: It is no such thing.
        """
        for block, span in self._spans.items():
            value = moment[block]
            shape = (span.stop - span.start,)
            fits = value.shape == shape if isinstance(value, Tensor) else isinstance(value, float)
            if not fits or not torch.as_tensor(value).isfinite().all():
                raise ValueError(f"no moment of block {block}")
            self._moment[block] = value

    def step(self, numbers: Mapping[int, LinearStep], gradient: Tensor) -> None:
        """Follow one optimizer step.

        Args:
            numbers: The step's numbers for each block.
            gradient: The gradient that it applied, ``(parameters,)``.
        """
        for block, span in self._spans.items():
            n = numbers[block]
            moment = self._moment[block] = n.momentum * self._moment[block] + n.gain
            moved = self._moved[block] = _add(self._moved[block], n.buffer_step, moment)
            moved = self._moved[block] = _add(moved, n.gradient_step, 1.0)
            if isinstance(moved, Tensor):
                g = gradient[span]
                self._energy[block] = _add(self._energy.get(block, 0.0), g, g)

    def close(self, preconditioner: Tensor | None) -> Tensor:
        """End the segment and start the next.

        Args:
            preconditioner: S of the run's projection, ``(parameters,)``; None for ones.

        Returns:
            One sum for each block, in float64, ``(blocks,)``.
        """
        sums = []
        for block in sorted(self._spans):
            moved = self._moved[block]
            if isinstance(moved, Tensor):
                energy = torch.as_tensor(self._energy[block]).double()
                scale = 1.0 if preconditioner is None else preconditioner[self._spans[block]].double().square()
                size = float((energy * scale).sum())
                moved = float((energy * moved.double()).sum()) / size if size > 0 else 0.0
            sums.append(moved)
        self._begin()
        return torch.tensor(sums, dtype=torch.float64)


def _add(total: Number, factor: Number, number: Number) -> Number:
    """Add a product; in place where the total is a tensor, which nobody else holds."""
    if isinstance(total, Tensor) and isinstance(factor, Tensor):
        return total.addcmul_(factor, number) if isinstance(number, Tensor) else total.add_(factor, alpha=number)
    return total if isinstance(factor, float) and factor == 0.0 else total + factor * number
