"""Displacements: how far each example, and weight decay, moved the parameters in a segment.

For the recursion of `pkexplain.update_rules`, a gradient g of step r moves the parameters, up to step e, by

    −(gradient_step_r + gain_r W_r) g,    W_r = moment_step_r + decay_{r+1} W_{r+1},   W_{e+1} = 0,

and leaves gain_r · decay_{r+1} ⋯ decay_e · g in the moment, which goes on moving them in the next segment.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pkexplain.update_rules import LinearStep, Number

__all__ = ["MomentAccount", "Reach", "RowAccumulator", "look_back"]


@dataclass(frozen=True)
class Reach:
    """What a gradient of one step has done by the end.

    Attributes:
        step: The step's place in the list; −1 for what was in the moment before the first.
        moved: What the gradient is multiplied with to give minus its displacement.
        kept: What of it is in the moment.
    """

    step: int
    moved: Number
    kept: Number


def look_back(steps: Sequence[LinearStep], wanted: Sequence[int] | None = None) -> Iterator[Reach]:
    """Go from the last step to the first and say what a gradient of each has done since.

    Args:
        steps: The numbers of one block of parameters, step by step.
        wanted: Places to say it for; None for all. −1, a moment from before the first step, is always the last.
    """
    chosen = None if wanted is None else set(wanted)
    reach: Number = 0.0  # decay_{r+1} W_{r+1}
    remains: Number = 1.0  # decay_{r+1} ⋯ decay_e
    for place in range(len(steps) - 1, -1, -1):
        step = steps[place]
        reach = reach + step.moment_step
        if chosen is None or place in chosen:
            yield Reach(place, step.gradient_step + step.gain * reach, step.gain * remains)
        reach, remains = reach * step.decay, remains * step.decay
    yield Reach(-1, reach, remains)


class RowAccumulator:
    """Displacement rows of all examples, gathered over a segment, and what is still in the moment.

    Args:
        examples: How many rows there are.
        columns: The columns of each block of parameters.
        width: Width of a row.
        like: A tensor of the sums' number format and device.
    """

    def __init__(self, examples: int, columns: Mapping[int, slice], width: int, like: Tensor) -> None:
        """Start the first segment, with nothing in the moment."""
        self._examples, self._columns, self._width, self._like = examples, columns, width, like
        self._moment: _Sum | None = None
        self._moved = self._new_sum()

    def _new_sum(self) -> _Sum:
        rows = self._like.new_zeros(self._examples, self._width)
        return _Sum(rows, torch.zeros_like(rows[:, 0]), torch.zeros_like(rows[:, 0]))

    def add(
        self, ids: Tensor, rows: Tensor, derivatives: Tensor, moved: Mapping[int, float], kept: Mapping[int, float]
    ) -> None:
        """Add a batch's gradients, each block's columns with the factors of the block.

        Args:
            ids: Row numbers, ``(batch,)``.
            rows: Gradients in projection space, ``(batch, width)``.
            derivatives: Loss derivatives, ``(batch,)``.
            moved: How far they moved the parameters.
            kept: What of them is in the moment.
        """
        parts = _Parts.of(ids, rows, derivatives, self._columns)
        self._moved.add(parts, moved, self._columns)
        if any(kept.values()):
            if self._moment is None:
                self._moment = self._new_sum()
            self._moment.add(parts, kept, self._columns)

    def pass_on(self, moved: Mapping[int, float], kept: Mapping[int, float]) -> None:
        """Let what is in the moment move the parameters.

        Args:
            moved: How far, for each block.
            kept: What of it stays in the moment.
        """
        before, self._moment = self._moment, None
        if before is not None:
            every = torch.arange(self._examples, device=self._like.device)
            self.add(every, before.rows, before.derivatives(), moved, kept)

    def close(self) -> tuple[Tensor, Tensor]:
        """End the segment and start the next.

        Returns:
            Rows ``(examples, width)`` in parameter units, and for each the loss derivative averaged over what it
            holds with the kernel as weight, ``(examples,)``.
        """
        moved, self._moved = self._moved, self._new_sum()
        return moved.rows.neg_(), moved.derivatives()


@dataclass
class _Parts:
    """Gradients of some examples, with the size that each block's columns have."""

    ids: Tensor
    rows: Tensor
    derivatives: Tensor
    sizes: Tensor  # squared norms, (batch, blocks)

    @classmethod
    def of(cls, ids: Tensor, rows: Tensor, derivatives: Tensor, columns: Mapping[int, slice]) -> _Parts:
        parts = [torch.linalg.vector_norm(rows[:, c], dim=1) for c in columns.values()]
        return cls(ids, rows, derivatives, torch.stack(parts, dim=1).square_())


@dataclass
class _Sum:
    """A sum of rows, and the mean of their loss derivatives weighted with the kernel, that is ‖part‖ / |derivative|."""

    rows: Tensor
    weight: Tensor
    weighted: Tensor

    def add(self, parts: _Parts, factors: Mapping[int, float], columns: Mapping[int, slice]) -> None:
        values = [factors[block] for block in columns]
        if len(set(values)) == 1:
            self.rows.index_add_(0, parts.ids, parts.rows, alpha=values[0])
        else:
            for (_, span), factor in zip(columns.items(), values, strict=True):
                self.rows[:, span].index_add_(0, parts.ids, parts.rows[:, span], alpha=factor)
        size = parts.sizes @ torch.tensor(values, dtype=parts.sizes.dtype, device=parts.sizes.device).square()
        counted = size > 0
        weight = size.sqrt() / parts.derivatives.abs()
        self.weight.index_add_(0, parts.ids, torch.where(counted, weight, 0.0))
        self.weighted.index_add_(0, parts.ids, torch.where(counted, weight * parts.derivatives, 0.0))

    def derivatives(self) -> Tensor:
        return torch.where(self.weight == 0, 0.0, self.weighted / self.weight)


class MomentAccount:
    """What one source of gradients (all examples together, or weight decay) did to the parameters of a segment.

    Args:
        spans: Where each block of parameters lies in the flat vector.
        like: A vector of the right size, format and device.
    """

    def __init__(self, spans: Mapping[int, slice], like: Tensor) -> None:
        """Start the first segment with an empty moment."""
        self._spans, self._moment, self._moved = spans, torch.zeros_like(like), torch.zeros_like(like)
        self._used: set[int] = set()

    def step(self, numbers: Mapping[int, LinearStep], sources: Mapping[int, Tensor]) -> None:
        """Follow one optimizer step.

        Args:
            numbers: The step's numbers for each block.
            sources: The gradient of each block that has one, ``(numel,)``.
        """
        for block in self._used.union(sources):
            n, span = numbers[block], self._spans[block]
            moment, moved = self._moment[span], self._moved[span]
            moment.mul_(n.decay)
            if block in sources:
                _add(moment, n.gain, sources[block])
                _add(moved, n.gradient_step, sources[block], -1)
            _add(moved, n.moment_step, moment, -1)
        self._used.update(sources)

    def shrink(self, numbers: Mapping[int, LinearStep], parameters: Tensor) -> None:
        """Follow one step's decoupled weight decay from the parameters before it, ``(parameters,)``."""
        for block, span in self._spans.items():
            _add(self._moved[span], numbers[block].decoupled_decay, parameters[span], -1)

    def close(self) -> Tensor:
        """End the segment: return what was moved, ``(parameters,)``, and start the next."""
        moved, self._moved = self._moved, torch.zeros_like(self._moved)
        return moved


def _add(total: Tensor, factor: Number, vector: Tensor, sign: int = 1) -> None:
    if isinstance(factor, Tensor):
        total.addcmul_(factor, vector, value=sign)
    elif factor:
        total.add_(vector, alpha=sign * factor)
