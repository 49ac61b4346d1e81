"""Displacements: how far each example, and weight decay, moved the parameters in a segment.

For the recursion of `pkexplain.optimizers.rules`, a gradient g of step r moves the parameters, up to step e, by

    −(gradient_step_r + gain_r W_r) g,    W_r = moment_step_r + momentum_{r+1} W_{r+1},   W_{e+1} = 0,

and leaves gain_r · momentum_{r+1} ⋯ momentum_e · g in the moment, which goes on moving them in the next segment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pkexplain.optimizers.rules import LinearStep, Number

__all__ = ["MomentumAccount", "Reach", "RowAccumulator", "RowSum", "copy_exactly", "look_back"]


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
    reach: Number = 0.0  # momentum_{r+1} W_{r+1}
    remains: Number = 1.0  # momentum_{r+1} ⋯ momentum_e
    for place in range(len(steps) - 1, -1, -1):
        step = steps[place]
        reach = reach + step.buffer_step
        if chosen is None or place in chosen:
            yield Reach(place, step.gradient_step + step.gain * reach, step.gain * remains)
        reach, remains = reach * step.momentum, remains * step.momentum
    yield Reach(-1, reach, remains)


class RowAccumulator:
    """Displacement rows of some examples, gathered over a segment, and what is still in the moment.

    Args:
        examples: How many rows there are.
        columns: The columns of each block of parameters.
        width: Width of a row.
        like: A tensor of the sums' dtype and device.
        zeros: Makes room for the rows, ``(examples, width)``; by default in memory.
    """

    def __init__(
        self,
        examples: int,
        columns: Mapping[int, slice],
        width: int,
        like: Tensor,
        zeros: Callable[[int, int], Tensor] | None = None,
    ) -> None:
        """Start the first segment, with nothing in the moment."""
        self._examples, self._columns, self._width, self._zeros = examples, columns, width, zeros or like.new_zeros
        self._moment: RowSum | None = None
        self._moved = self._new_sum()

    def _new_sum(self) -> RowSum:
        rows = self._zeros(self._examples, self._width)
        return RowSum(rows, torch.zeros_like(rows[:, 0]), torch.zeros_like(rows[:, 0]))

    @property
    def moment(self) -> RowSum | None:
        """What is still in the moment, between two segments; None for nothing."""
        return self._moment

    def load_state_dict(self, moment: RowSum | None) -> None:
        """Begin with what was in the moment."""
        if moment is not None:
            self._moment, count = self._new_sum(), len(moment.rows)  # there may be more examples now
            for mine, kept in zip(vars(self._moment).values(), vars(moment).values(), strict=True):
                copy_exactly(mine[:count], kept)

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
        ids, rows, derivatives = (value.to(self._moved.rows.device) for value in (ids, rows, derivatives))
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
        if self._moment is None:
            return
        parts = _Parts.of(None, self._moment.rows, self._moment.derivatives(), self._columns)
        self._moved.add(parts, moved, self._columns)
        if any(kept.values()):
            self._moment.shrink(parts, kept, self._columns)
        else:
            self._moment = None

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
    """Gradients of some examples, or of all (``ids`` None), with the size that each block's columns have."""

    ids: Tensor | None
    rows: Tensor
    derivatives: Tensor
    sizes: Tensor  # squared norms, (batch, blocks)

    @classmethod
    def of(cls, ids: Tensor | None, rows: Tensor, derivatives: Tensor, columns: Mapping[int, slice]) -> _Parts:
        parts = [torch.linalg.vector_norm(rows[:, c], dim=1) for c in columns.values()]
        return cls(ids, rows, derivatives, torch.stack(parts, dim=1).square_())

    def weight(self, factors: Mapping[int, float], columns: Mapping[int, slice]) -> Tensor:
        """Compute ‖part‖ / |derivative| of each row multiplied with the factors, 0 where nothing is left of it."""
        values = self.sizes.new_tensor([factors[block] for block in columns])
        size = self.sizes @ values.square()
        return torch.where(size > 0, size.sqrt() / self.derivatives.abs(), 0.0)


@dataclass
class RowSum:
    """A sum of rows, and the mean of their loss derivatives weighted with the kernel, that is ‖part‖ / |derivative|."""

    rows: Tensor
    weight: Tensor
    weighted: Tensor

    def add(self, parts: _Parts, factors: Mapping[int, float], columns: Mapping[int, slice]) -> None:
        """Add gradients, each block's columns with the factor of the block."""
        for span, factor in _spans(factors, columns):
            if parts.ids is None:
                self.rows[:, span].add_(parts.rows[:, span], alpha=factor)
            else:
                self.rows[:, span].index_add_(0, parts.ids, parts.rows[:, span], alpha=factor)
        weight = parts.weight(factors, columns)
        for total, part in ((self.weight, weight), (self.weighted, _times(weight, parts.derivatives))):
            total.add_(part) if parts.ids is None else total.index_add_(0, parts.ids, part)

    def shrink(self, parts: _Parts, factors: Mapping[int, float], columns: Mapping[int, slice]) -> None:
        """Multiply the sum, whose rows ``parts`` are, in place; what it holds counts as one visit from then on."""
        for span, factor in _spans(factors, columns):
            self.rows[:, span] *= factor
        self.weight = parts.weight(factors, columns)
        self.weighted = _times(self.weight, parts.derivatives)

    def derivatives(self) -> Tensor:
        """Return the mean loss derivatives, 0 where there is nothing, ``(examples,)``."""
        return torch.where(self.weight == 0, 0.0, self.weighted / self.weight)


def _spans(factors: Mapping[int, float], columns: Mapping[int, slice]) -> list[tuple[slice, float]]:
    """Give the columns that have a factor in common together where that is all of them."""
    pairs = [(columns[block], factors[block]) for block in columns]
    return [(slice(None), pairs[0][1])] if len({factor for _, factor in pairs}) == 1 else pairs


def _times(weight: Tensor, derivatives: Tensor) -> Tensor:
    """Multiply; nan, a loss derivative that was not seen, counts only where there is weight."""
    return torch.where(weight == 0, 0.0, weight * derivatives)


class MomentumAccount:
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
            moment.mul_(n.momentum)
            if block in sources:
                _add(moment, n.gain, sources[block])
                _add(moved, n.gradient_step, sources[block], -1)
            _add(moved, n.buffer_step, moment, -1)
        self._used.update(sources)

    def shrink(self, numbers: Mapping[int, LinearStep], parameters: Tensor) -> None:
        """Follow one step's decoupled weight decay from the parameters before it, ``(parameters,)``."""
        for block, span in self._spans.items():
            _add(self._moved[span], numbers[block].decoupled_weight_decay, parameters[span], -1)

    @property
    def moment(self) -> Tensor:
        """What is still in the moment, ``(parameters,)``."""
        return self._moment

    def load_state_dict(self, moment: Tensor, blocks: Iterable[int]) -> None:
        """Begin with what was in the moment of some blocks."""
        copy_exactly(self._moment, moment)
        self._used.update(blocks)

    @property
    def blocks(self) -> list[int]:
        """The blocks that have had a gradient."""
        return sorted(self._used)

    def close(self) -> Tensor:
        """End the segment: return what was moved, ``(parameters,)``, and start the next."""
        moved, self._moved = self._moved, torch.zeros_like(self._moved)
        return moved


def copy_exactly(mine: Tensor, kept: Tensor) -> None:
    """Copy a tensor of the same shape and dtype; none is stretched to fit.

    Raises:
        ValueError: It has another shape or dtype.
    """
    if mine.shape != kept.shape or mine.dtype != kept.dtype:
        raise ValueError(f"a tensor {tuple(kept.shape)} of {kept.dtype}, not {tuple(mine.shape)} of {mine.dtype}")
    mine.copy_(kept)


def _add(total: Tensor, factor: Number, vector: Tensor, sign: int = 1) -> None:
    if isinstance(factor, Tensor):
        total.addcmul_(factor, vector, value=sign)
    elif factor:
        total.add_(vector, alpha=sign * factor)
