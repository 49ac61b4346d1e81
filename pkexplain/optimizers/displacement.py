"""Displacements: how far each example, and weight decay, moved the parameters in a segment.

For the recursion of `pkexplain.optimizers.rules`, a gradient g of step r moves the parameters, up to step e, by

    −(gradient_step_r + gain_r W_r) g,    W_r = buffer_step_r + momentum_{r+1} W_{r+1},   W_{e+1} = 0,

and leaves gain_r · momentum_{r+1} ⋯ momentum_e · g in the momentum buffer, which keeps moving them in the next segment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pkexplain.gradients.devices import place, tensor_on
from pkexplain.optimizers.rules import LinearStep, Number
from pkexplain.optimizers.step_numbers import runs

__all__ = ["Factors", "MomentumBuffer", "Reach", "RowAccumulator", "RowSum", "add_product", "copy_exactly", "look_back"]


Factors = Mapping[int, Number]
"""A factor for each block."""

_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Reach:
    """How far the gradient of one step has moved the parameters by the end.

    Attributes:
        step: The step's position in the list; −1 for what was in the momentum buffer before the first.
        moved: The factor from the gradient to minus its displacement.
        buffered: The factor from the gradient to what is left of it in the momentum buffer.
    """

    step: int
    moved: Number
    buffered: Number


def look_back(steps: Sequence[LinearStep], wanted: Sequence[int] | None = None) -> Iterator[Reach]:
    """Go from the last step to the first and compute how far each step's gradient has reached.

    Args:
        steps: The numbers of one block of parameters, step by step.
        wanted: Positions to return; None for all. −1, the buffer from before the first step, always comes last.
    """
    chosen = None if wanted is None else set(wanted)
    reach: Number = 0.0  # momentum_{r+1} W_{r+1}
    remains: Number = 1.0  # momentum_{r+1} ⋯ momentum_e
    for position in range(len(steps) - 1, -1, -1):
        step = steps[position]
        reach = reach + step.buffer_step
        if chosen is None or position in chosen:
            yield Reach(position, step.gradient_step + step.gain * reach, step.gain * remains)
        reach, remains = reach * step.momentum, remains * step.momentum
    yield Reach(-1, reach, remains)


class RowAccumulator:
    """Displacement rows of some examples, summed over a segment, and what is still in the momentum buffer.

    Args:
        examples: The number of rows.
        columns: The columns of each block of parameters.
        width: Numbers in a row.
        like: A tensor of the sums' dtype and device.
        zeros: Allocates the rows, ``(examples, width)``; by default in memory.
    """

    def __init__(
        self,
        examples: int,
        columns: Mapping[int, slice],
        width: int,
        like: Tensor,
        zeros: Callable[[int, int], Tensor] | None = None,
    ) -> None:
        """Start the first segment with an empty momentum buffer."""
        self._examples, self._columns, self._width, self._zeros = examples, columns, width, zeros or like.new_zeros
        self._buffer: RowSum | None = None
        self._moved = self._new_sum()
        lengths = [span.stop - span.start for span in columns.values()]
        lengths.append(width - sum(lengths))  # columns that no block has
        self._lengths = torch.tensor(lengths, device=self._moved.rows.device)

    def _new_sum(self) -> RowSum:
        rows = self._zeros(self._examples, self._width)
        return RowSum(rows, torch.zeros_like(rows[:, 0]), torch.zeros_like(rows[:, 0]))

    @property
    def buffer(self) -> RowSum | None:
        """What is in the momentum buffer between two segments; None if it is empty."""
        return self._buffer

    def load_state_dict(self, buffer: RowSum | None) -> None:
        """Restore the momentum buffer."""
        if buffer is not None:
            self._buffer, count = self._new_sum(), len(buffer.rows)  # there may be more examples now
            for mine, buffered in zip(vars(self._buffer).values(), vars(buffer).values(), strict=True):
                copy_exactly(mine[:count], buffered)

    def some_in_buffer(self, most: int) -> Tensor:
        """Return some rows that are not zero in the momentum buffer, ``(rows, width)``."""
        if self._buffer is None:
            return self._moved.rows[:0]
        ids = self._buffer.weight.nonzero()[:, 0]
        return self._buffer.rows[ids[:: max(1, -(-len(ids) // most))]]

    def buffer_sum(self) -> Tensor:
        """Sum the rows of the momentum buffer, ``(width,)``."""
        return self._moved.rows.new_zeros(self._width) if self._buffer is None else self._buffer.rows.sum(0)

    def take_over(self, earlier: RowAccumulator, change: Callable[[Tensor], Tensor]) -> None:
        """Take over the momentum buffer of a segment whose rows meant something else.

        Args:
            earlier: Its rows; its buffer is not used any more.
            change: Turns some of them into rows of this segment.
        """
        before = earlier._buffer
        if before is None:
            return
        now = self._buffer = self._new_sum()
        now.weight, now.weighted = before.weight, before.weighted
        for ids in before.weight.nonzero()[:, 0].split(_ROWS_AT_ONCE):
            now.rows[ids] = change(before.rows[ids])

    def add(self, ids: Tensor, rows: Tensor, derivatives: Tensor, moved: Factors, buffered: Factors) -> None:
        """Add a batch's gradients, each block's columns times the block's factors.

        Args:
            ids: Row numbers, ``(batch,)``.
            rows: Gradients in projection space, ``(batch, width)``.
            derivatives: Loss derivatives, ``(batch,)``.
            moved: How far they moved the parameters, for each block.
            buffered: How much of them is left in the momentum buffer, for each block.
        """
        ids, rows, derivatives = (place(value, self._moved.rows.device) for value in (ids, rows, derivatives))
        self._moved.add(ids, rows * self._by_column(moved), derivatives)
        if _any(buffered):
            if self._buffer is None:
                self._buffer = self._new_sum()
            self._buffer.add(ids, rows * self._by_column(buffered), derivatives)

    def pass_on(self, moved: Factors, buffered: Factors) -> None:
        """Let the momentum buffer move the parameters.

        Args:
            moved: How far, for each block.
            buffered: How much of it stays in the buffer.
        """
        if self._buffer is None:
            return
        moves, stays = self._by_column(moved), self._by_column(buffered)
        derivatives = self._buffer.derivatives()
        for some in self._buffer.used():
            self._moved.add(some, self._buffer.rows[some] * moves, derivatives[some])
            self._buffer.shrink(some, stays, derivatives[some])
        if not _any(buffered):
            self._buffer = None

    def _by_column(self, factors: Factors) -> Number:
        """Spread the blocks' factors over their columns, ``(width,)``; one number if they agree."""
        like = self._moved.rows
        values = [factors[block] for block in self._columns]
        if any(isinstance(value, Tensor) for value in values):
            found = like.new_ones(self._width)
            for value, span in zip(values, self._columns.values(), strict=True):
                found[span] = value
            return found
        if len(set(values)) == 1:
            return values[0]
        scalars = tensor_on([*map(float, values), 0.0], like)
        return scalars.repeat_interleave(self._lengths, output_size=self._width)

    def close(self) -> tuple[Tensor, Tensor, Tensor]:
        """End the segment and start the next.

        Returns:
            The rows that are not zero ``(kept, width)`` in parameter units, for each row the kernel-weighted mean of
            the loss derivatives that it holds, ``(kept,)``, and whose they are, ``(kept,)``.
        """
        moved, self._moved = self._moved, self._new_sum()
        ids = moved.weight.nonzero()[:, 0]
        rows = moved.rows if len(ids) == self._examples else moved.rows[ids]
        return rows.neg_(), moved.derivatives()[ids], ids


@dataclass
class RowSum:
    """A sum of rows, and the mean of their loss derivatives weighted by the kernel, ‖row‖ / |derivative|."""

    rows: Tensor
    weight: Tensor
    weighted: Tensor

    def add(self, ids: Tensor | slice, rows: Tensor, derivatives: Tensor) -> None:
        """Add some rows, with their loss derivatives."""
        weight = _kernel_weight(rows, derivatives)
        parts = (self.rows, rows), (self.weight, weight), (self.weighted, _times(weight, derivatives))
        for total, part in parts:
            if isinstance(ids, slice):
                total[ids] += part
            else:
                total.index_add_(0, ids, part)

    def used(self) -> Iterator[Tensor | slice]:
        """Yield the rows that are not zero, or all if that is not many more, a few at a time."""
        count, ids = len(self.weight), self.weight.nonzero()[:, 0]
        if 2 * len(ids) < count:
            yield from ids.split(_ROWS_AT_ONCE)
        else:
            yield from (slice(at, min(at + _ROWS_AT_ONCE, count)) for at in range(0, count, _ROWS_AT_ONCE))

    def shrink(self, some: Tensor | slice, factors: Number, derivatives: Tensor) -> None:
        """Scale some rows in place, by one number or one for each column; a row counts as one visit from then on."""
        self.rows[some] *= factors
        self.weight[some] = _kernel_weight(self.rows[some], derivatives)
        self.weighted[some] = _times(self.weight[some], derivatives)

    def derivatives(self) -> Tensor:
        """Return the mean loss derivatives, 0 for empty rows, ``(examples,)``."""
        return torch.where(self.weight == 0, 0.0, self.weighted / self.weight)


def _kernel_weight(rows: Tensor, derivatives: Tensor) -> Tensor:
    """Compute ‖row‖ / |derivative|; 0 where the row is zero."""
    size = torch.linalg.vector_norm(rows, dim=1)
    return torch.where(size > 0, size / derivatives.abs(), 0.0)


def _any(factors: Factors) -> bool:
    return any(bool(f.any()) if isinstance(f, Tensor) else bool(f) for f in factors.values())


def _times(weight: Tensor, derivatives: Tensor) -> Tensor:
    """Multiply; nan, a loss derivative that was not seen, only counts where the weight is not 0."""
    return torch.where(weight == 0, 0.0, weight * derivatives)


class MomentumBuffer:
    """How far one source of gradients (all examples together, or weight decay) moved the parameters in a segment.

    Args:
        spans: Each block's slice of the flat vector.
        like: A vector of the right size, dtype and device.
    """

    def __init__(self, spans: Mapping[int, slice], like: Tensor) -> None:
        """Start the first segment with an empty momentum buffer."""
        self._spans, self._buffer, self._moved = spans, torch.zeros_like(like), torch.zeros_like(like)
        self._used: set[int] = set()

    def step(
        self,
        numbers: Mapping[int, LinearStep],
        gradient: Tensor | None,
        share: Callable[[LinearStep], Number] = lambda n: 1.0,
    ) -> None:
        """Follow one optimizer step.

        Args:
            numbers: The step's numbers for each block.
            gradient: What the source's gradient is a multiple of, ``(parameters,)``; None if there is none.
            share: The multiple.
        """
        for n, span, blocks in runs(numbers, self._spans):
            part = share(n) if gradient is not None else 0.0
            feeds = isinstance(part, Tensor) or part != 0
            if not feeds and self._used.isdisjoint(blocks):
                continue
            buffer, moved = self._buffer[span], self._moved[span]
            buffer.mul_(n.momentum)
            if feeds and gradient is not None:
                source = gradient[span] if not isinstance(part, Tensor) and part == 1 else part * gradient[span]
                add_product(buffer, n.gain, source)
                add_product(moved, n.gradient_step, source, -1)
                self._used.update(blocks)
            add_product(moved, n.buffer_step, buffer, -1)

    def shrink(self, numbers: Mapping[int, LinearStep], parameters: Tensor) -> None:
        """Follow one step's decoupled weight decay from the parameters before it, ``(parameters,)``."""
        for n, span, _ in runs(numbers, self._spans):
            add_product(self._moved[span], n.decoupled_weight_decay, parameters[span], -1)

    @property
    def moved(self) -> Tensor:
        """The displacement so far in this segment, ``(parameters,)``."""
        return self._moved

    @property
    def buffer(self) -> Tensor:
        """The momentum buffer, ``(parameters,)``."""
        return self._buffer

    def load_state_dict(self, buffer: Tensor, blocks: Iterable[int]) -> None:
        """Restore the momentum buffer of some blocks."""
        copy_exactly(self._buffer, buffer)
        self._used.update(blocks)

    @property
    def blocks(self) -> list[int]:
        """The blocks that have had a gradient."""
        return sorted(self._used)

    def close(self) -> Tensor:
        """End the segment: return the displacement, ``(parameters,)``, and start the next."""
        moved, self._moved = self._moved, torch.zeros_like(self._moved)
        return moved


def copy_exactly(mine: Tensor, other: Tensor) -> None:
    """Copy a tensor of the same shape and dtype; nothing is broadcast.

    Raises:
        ValueError: It has another shape or dtype.
    """
    if mine.shape != other.shape or mine.dtype != other.dtype:
        raise ValueError(f"a tensor {tuple(other.shape)} of {other.dtype}, not {tuple(mine.shape)} of {mine.dtype}")
    mine.copy_(other)


def add_product(total: Tensor, factor: Number, vector: Tensor, sign: int = 1) -> None:
    """Add a number, or one for each coordinate, times a vector, in place."""
    if isinstance(factor, Tensor):
        total.addcmul_(factor, vector, value=sign)
    elif factor:
        total.add_(vector, alpha=sign * factor)
