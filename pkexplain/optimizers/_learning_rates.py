"""How far an optimizer moves the parameters for a unit of gradient, summed over a segment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pkexplain.gradients.devices import fetch
from pkexplain.optimizers.rules import LinearStep, Number


class RateSums:
    """The learning rate summed over a segment, as each block of parameters feels it.

    It is how far a gradient of one, the same at every step, would have moved: with SGD and momentum μ, soon
    learning rate / (1 − μ) a step. If the optimizer multiplies elementwise by A, its mean is taken, weighted by the
    squared gradient in the same coordinates:

        Σ_p (Σ_s A_p) g_p² / Σ_p g_p²

    Args:
        spans: Each block's slice of the flat vector.
    """

    def __init__(self, spans: Mapping[int, slice]) -> None:
        """Start the first segment with an empty momentum buffer."""
        self._spans = spans
        self._buffer: dict[int, Number] = dict.fromkeys(spans, 0.0)
        self._begin()

    def _begin(self) -> None:
        self._moved: dict[int, Number] = dict.fromkeys(self._spans, 0.0)
        self._energy: dict[int, Number] = {}

    @property
    def buffer(self) -> dict[int, Number]:
        """What the unit gradient has left in each block's momentum buffer."""
        return self._buffer

    def load_state_dict(self, buffer: Mapping[int, Any]) -> None:
        """Restore the momentum buffer.

        Raises:
            ValueError: It does not fit the parameters.
        """
        for block, span in self._spans.items():
            value = buffer[block]
            shape = (span.stop - span.start,)
            fits = value.shape == shape if isinstance(value, Tensor) else isinstance(value, float)
            if not fits or not torch.as_tensor(value, device=getattr(value, "device", "cpu")).isfinite().all():
                raise ValueError(f"no buffer of block {block}")
            self._buffer[block] = value

    def step(self, numbers: Mapping[int, LinearStep], gradient: Tensor) -> None:
        """Follow one optimizer step.

        Args:
            numbers: The step's numbers for each block.
            gradient: The gradient that the step applied, ``(parameters,)``.
        """
        for block, span in self._spans.items():
            n = numbers[block]
            buffer = self._buffer[block] = n.momentum * self._buffer[block] + n.gain
            moved = self._moved[block] = _add(self._moved[block], n.buffer_step, buffer)
            moved = self._moved[block] = _add(moved, n.gradient_step, 1.0)
            if isinstance(moved, Tensor):
                g = gradient[span]
                self._energy[block] = _add(self._energy.get(block, 0.0), g, g)

    def close(self, balance: Mapping[int, float]) -> Tensor:
        """End the segment and start the next.

        Args:
            balance: What each block's sum is multiplied by, because rows and covectors are multiplied elementwise.

        Returns:
            One sum for each block, in float64, ``(blocks,)``.
        """
        sums = []
        for block in sorted(self._spans):
            moved = self._moved[block]
            if isinstance(moved, Tensor):
                energy = torch.as_tensor(self._energy[block], device=moved.device).double()
                (size,), (sum_of,) = fetch([energy.sum(), (energy * moved.double()).sum()])
                moved = sum_of / size if size > 0 else 0.0
            sums.append(moved * balance.get(block, 1.0))
        self._begin()
        return torch.tensor(sums, dtype=torch.float64, device="cpu")


def _add(total: Number, factor: Number, number: Number) -> Number:
    """Add a product; in place if the total is a tensor, as nothing else holds it."""
    if isinstance(total, Tensor) and isinstance(factor, Tensor):
        return total.addcmul_(factor, number) if isinstance(number, Tensor) else total.add_(factor, alpha=number)
    return total if isinstance(factor, float) and factor == 0.0 else total + factor * number
