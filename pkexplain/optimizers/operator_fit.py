"""The operator of an optimizer that divides by a second moment, at the query instead of at the rows.

Such a step moves the parameters by c_s ⊙ m_s, with a number c_s for each coordinate. ⟨φ, c ⊙ g⟩ = ⟨c ⊙ φ, g⟩, so the
numbers can be applied to the query, once a segment, if within a segment they change as a whole:

    c_s ≈ τ_s B        τ_s a number for each block of parameters and step, B one elementwise vector for the segment

Rows then need only numbers τ_s, as under SGD: they are projected in the backward pass, in factors. B is fitted by least
squares to every step's update and to their sum; its misfit is known exactly, in full space, and is on the ledger's
``optimizer`` line. A segment of one step has none. While few gradients have entered the second moment it changes fast,
so the first segments are short.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pkexplain.gradients import devices
from pkexplain.gradients.devices import place
from pkexplain.gradients.layers import Block
from pkexplain.optimizers.displacement import add_product, copy_exactly
from pkexplain.optimizers.levels import Levels, damped
from pkexplain.optimizers.rules import LinearStep, Number
from pkexplain.optimizers.step_numbers import joined
from pkexplain.projection.maps import RowFactors, flat_product, geometric_sides

__all__ = ["FittedOperator", "OperatorFit", "row_factors", "spread"]

_DAMPING_OF_ROWS = 0.01
"""Share of the mean that is added to every coordinate's √v̂ before rows are multiplied by it: little, as the removal
reading takes rows and covectors to be multiplied alike."""
_SUM_COUNTS = 10.0
"""How much the sum of a segment's updates counts in the fit, beside the updates themselves."""
_NUMBERS_AT_ONCE = 1 << 16
"""Coordinates that are followed at a time: few enough to stay in a core's cache."""


def row_factors(step: LinearStep, block: Block, sides: bool, like: Tensor) -> RowFactors:
    """Choose what a block's gradients are multiplied by before they are projected: the root of the operator.

    Half of the operator on the rows' side brings rows and covectors to a similar scale. For a matrix it is of rank one,
    from the row and column means of the logarithms, so that gradients stay in factors.

    Args:
        step: The block's numbers.
        block: The block.
        sides: Whether to return one factor for each row and column.
        like: A tensor of the dtype and device of the arithmetic.
    """
    operator = step.gradient_step + step.gain * step.buffer_step
    flat = operator if isinstance(operator, Tensor) else like.new_full((block.numel,), operator)
    sizes = damped(flat, _DAMPING_OF_ROWS)
    if not sides or block.matrix is None:
        return torch.where(sizes > 0, sizes, sizes.mean().clamp_min(torch.finfo(sizes.dtype).tiny)).sqrt()
    return geometric_sides(sizes.sqrt(), block)


def spread(factors: RowFactors, block: Block) -> Tensor:
    """Return the factors of a block's coordinates, ``(numel,)``, in its parameter order."""
    if isinstance(factors, Tensor):
        return factors
    return flat_product(*factors, len(block.parameters) > 1)


@dataclass(frozen=True)
class FittedOperator:
    """What a segment's steps did to gradients, beyond numbers for each block.

    Attributes:
        operator: B, ``(parameters,)``.
        moved: The sum of all examples' displacements over −B, ``(parameters,)``.
        energy: The size of the updates, squared and summed over the steps, in multiples of B², ``(parameters,)``.
    """

    operator: Tensor
    moved: Tensor
    energy: Tensor


class OperatorFit:
    """Fits B while a segment is recorded.

    Args:
        spans: Each block's slice of the flat vector.
        like: A vector of the right size, dtype and device.
    """

    def __init__(self, spans: Mapping[int, slice], like: Tensor) -> None:
        """Begin with empty momentum buffers."""
        self._spans, self._buffer = spans, torch.zeros_like(like)
        self._true: Tensor | None = None  # the momentum buffer as it is; None while it is the same
        self._begin()

    def _begin(self) -> None:
        new = torch.zeros_like
        self._moved, self._truly = new(self._buffer), new(self._buffer)
        self._products, self._energy = new(self._buffer), new(self._buffer)

    def step(self, numbers: Mapping[int, LinearStep], levels: Levels, gradient: Tensor) -> None:
        """Follow one optimizer step.

        Args:
            numbers: The step's numbers for each block.
            levels: The same, reduced to scalars.
            gradient: The sum of the examples' gradients, scaled, ``(parameters,)``.
        """
        kept = any(isinstance(n.momentum, Tensor) or isinstance(n.gain, Tensor) for n in numbers.values())
        if kept and self._true is None:
            self._true = self._buffer.clone()
        if devices.accelerated(gradient.device):
            everything = slice(0, len(gradient))
            together = joined(numbers, self._spans, gradient[:0])
            self._follow(together, self._spread(levels), gradient, everything, everything)
            return
        scalars = Levels.known([levels])[0]
        for block, span in self._spans.items():
            for start in range(span.start, span.stop, _NUMBERS_AT_ONCE):
                some = slice(start, min(start + _NUMBERS_AT_ONCE, span.stop))
                within = slice(some.start - span.start, some.stop - span.start)
                self._follow(numbers[block], scalars[block], gradient[some], some, within)

    def _spread(self, levels: Levels) -> LinearStep:
        """Spread scalars over all coordinates, where the blocks' differ."""
        plain = joined(levels.scalars, self._spans, self._buffer[:0])
        counts = torch.tensor([span.stop - span.start for span in self._spans.values()], device="cpu")
        spread = {
            name: torch.repeat_interleave(vector, place(counts, vector.device), output_size=len(self._buffer))
            for name, vector in levels.vectors.items()
        }
        return replace(plain, **spread)

    def _follow(self, n: LinearStep, level: LinearStep, gradient: Tensor, some: slice, within: slice) -> None:
        buffer = self._buffer[some]
        buffer.mul_(level.momentum)
        add_product(buffer, level.gain, gradient)
        true = buffer
        if self._true is not None:
            true = self._true[some].mul_(_at(n.momentum, within)).add_(_at(n.gain, within) * gradient)
        modelled, update = buffer * level.buffer_step, true * _at(n.buffer_step, within)
        if isinstance(n.gradient_step, Tensor) or n.gradient_step:
            add_product(modelled, level.gradient_step, gradient)
            update += _at(n.gradient_step, within) * gradient
        self._moved[some] += modelled
        self._truly[some] += update
        self._products[some].addcmul_(modelled, update)
        self._energy[some].addcmul_(modelled, modelled)

    def close(self) -> FittedOperator:
        """End the segment: return its operator, and start the next."""
        fit, energy = self._products, self._energy
        at_once = len(fit) if devices.accelerated(fit.device) else _NUMBERS_AT_ONCE
        for start in range(0, len(fit), at_once):
            some = slice(start, start + at_once)
            counted = _SUM_COUNTS * self._moved[some]
            fit[some].addcmul_(counted, self._truly[some]).div_(energy[some] + counted * self._moved[some])
            fit[some].nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0).clamp_min_(0.0)
        found = FittedOperator(fit, self._moved, energy)
        self._begin()
        return found

    @property
    def moved(self) -> Tensor:
        """The sum of all examples' displacements in this segment over −B, ``(parameters,)``."""
        return self._moved

    @property
    def buffer(self) -> Tensor:
        """The momentum buffer, ``(parameters,)``."""
        return self._buffer

    @property
    def state_dict(self) -> tuple[Tensor, Tensor | None]:
        """The momentum buffers between two segments, ``(parameters,)``."""
        return self._buffer, self._true

    def load_state_dict(self, buffer: Tensor, true: Tensor | None) -> None:
        """Restore the momentum buffers."""
        copy_exactly(self._buffer, buffer)
        if true is not None:
            self._true = torch.zeros_like(self._buffer)
            copy_exactly(self._true, true)


def _at(number: Number, within: slice) -> Number:
    return number[within] if isinstance(number, Tensor) else number
