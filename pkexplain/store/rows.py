"""Displacement rows as they are stored: rounded, each with its own scale, and summed after rounding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pkexplain.gradients.devices import at_once

__all__ = ["Rows"]

_ROWS_AT_ONCE = 128
"""Rows that are rounded and summed at a time: few enough to stay in a core's cache."""
_MOST_HANDED_DOWN = 2**-9
"""The most rounding error of larger rows that a row takes over, relative to its largest number."""
_ROUNDED_UP = 1 + 1e-5
_SMALLEST_EXPONENT = -126
"""The smallest normal power of two in float32; a row that needs a smaller one becomes zero, not infinity."""


@dataclass(frozen=True)
class Rows:
    """The rows of consecutive examples in one segment; examples that it did not see have none, and count as zeros.

    Attributes:
        rows: Displacement rows P D_i,t as stored, ``(kept, k)``, divided by ``scale``.
        scale: The factor of each row, ``(kept,)``.
        loss_derivatives: ∂ℓ_i/∂y_i of each row along its unit direction u_i, ``(kept,)``, the mean over the row's
            visits weighted by the kernel; signed if the output is one number, otherwise −‖∂ℓ_i/∂y_i‖ (u_i is the
            direction in which the loss falls); nan if the output was not seen.
        norms: ‖P D_i,t‖ of each row as stored, rounded up, ``(kept,)``.
        ids: Whose rows they are, counted from the first of these examples, ascending, ``(kept,)``.
        examples: How many examples there are.
    """

    rows: Tensor
    scale: Tensor
    loss_derivatives: Tensor
    norms: Tensor
    ids: Tensor
    examples: int

    def __len__(self) -> int:
        """Return the number of examples."""
        return self.examples

    def spread(self, name: str) -> Tensor:
        """Return the loss derivatives or norms of all examples, ``(examples,)``."""
        values: Tensor = getattr(self, name)
        return (
            values if len(values) == self.examples else values.new_zeros(self.examples).index_copy_(0, self.ids, values)
        )

    @classmethod
    def pack(
        cls,
        rows: Tensor,
        loss_derivatives: Tensor,
        row_dtype: torch.dtype,
        empty: Callable[[tuple[int, ...], torch.dtype], Tensor] | None = None,
        ids: Tensor | None = None,
        examples: int | None = None,
    ) -> Rows:
        """Round rows to ``row_dtype``, each with its own power of two.

        Args:
            rows: ``(kept, k)``.
            loss_derivatives: ``(kept,)``.
            row_dtype: Dtype to store them in.
            empty: Allocates them; by default in memory.
            ids: Whose rows they are, ascending, ``(kept,)``; None for all.
            examples: How many examples there are; None for as many as rows.
        """
        ids = torch.arange(len(rows), device=rows.device) if ids is None else ids
        if row_dtype == torch.float16:
            largest = torch.maximum(rows.amax(dim=1), -rows.amin(dim=1)).double()
            exponent = torch.where(largest > 0, largest.log2().ceil() - 14, 0.0).clamp_min(_SMALLEST_EXPONENT)
            scale = torch.exp2(exponent).to(torch.float32)
        else:
            scale = torch.ones(len(rows), dtype=torch.float32, device=rows.device)
        shape = (len(rows), rows.shape[1])
        stored = empty(shape, row_dtype) if empty else torch.empty(shape, dtype=row_dtype, device=rows.device)
        sizes, size_of = scale.unique(return_inverse=True)
        error = torch.zeros(len(sizes), rows.shape[1], dtype=torch.float64, device=rows.device)
        for some in torch.arange(len(rows), device=rows.device).split(at_once(_ROWS_AT_ONCE, rows.device)):
            factors = scale[some, None].to(rows.dtype)
            part = rows[some]
            rounded = (part / factors).to(row_dtype)
            stored[some] = rounded
            if row_dtype != rows.dtype:
                error.index_add_(0, size_of[some], (part - rounded.to(rows.dtype) * factors).double())
        if row_dtype != rows.dtype and len(rows):
            _hand_down(rows, stored, sizes, size_of, error)
        return cls(stored, scale, loss_derivatives, _norms(stored, scale), ids, examples or len(rows))

    def sum(self) -> Tensor:
        """Sum the rows as stored, in float64, ``(k,)``."""
        total = torch.zeros(self.rows.shape[1], dtype=torch.float64, device=self.rows.device)
        count = at_once(_ROWS_AT_ONCE, self.rows.device)
        for some, factors in zip(self.rows.split(count), self.scale.split(count), strict=True):
            total += factors.double() @ some.double()
        return total

    def read(self, ids: Tensor | slice, dtype: torch.dtype = torch.float32) -> Tensor:
        """Read rows as stored, ``(ids, k)``, in parameter units of the projection space."""
        if len(self.rows) == self.examples:
            return self._at(ids, dtype)
        places, wanted = self.places(ids)
        count = len(range(*ids.indices(self.examples))) if isinstance(ids, slice) else len(ids)
        found = torch.zeros(count, self.rows.shape[1], dtype=dtype, device=self.rows.device)
        found[wanted] = self._at(places, dtype)
        return found

    def places(self, ids: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Find the rows that there are of some examples.

        Args:
            ids: Examples, or consecutive ones.

        Returns:
            Positions of rows, and which of the examples have them, ``(found,)`` each.
        """
        if isinstance(ids, slice):
            start, stop, _ = ids.indices(self.examples)
            first, last = torch.searchsorted(self.ids, self.ids.new_tensor([start, stop])).tolist()
            return torch.arange(first, last, device=self.ids.device), self.ids[first:last] - start
        if not len(self.ids):
            return self.ids, self.ids
        places = torch.searchsorted(self.ids, ids).clamp_max(len(self.ids) - 1)
        wanted = (self.ids[places] == ids).nonzero()[:, 0]
        return places[wanted], wanted

    def _at(self, places: Tensor | slice, dtype: torch.dtype) -> Tensor:
        return self.rows[places].to(dtype) * self.scale[places, None].to(dtype)

    def subset(self, some: slice) -> Rows:
        """Return the rows of some consecutive examples, without a copy."""
        start, stop, _ = some.indices(self.examples)
        first, last = torch.searchsorted(self.ids, self.ids.new_tensor([start, stop])).tolist()
        kept = {name: value[first:last] for name, value in self.tensors().items()}
        return Rows(**{**kept, "ids": kept["ids"] - start}, examples=max(0, stop - start))

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors to store."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], examples: int) -> Rows:
        """Rebuild the rows of so many examples from stored tensors."""
        names = ("rows", "scale", "loss_derivatives", "norms", "ids")
        return cls(**{name: tensors[name] for name in names}, examples=examples)


def _norms(stored: Tensor, scale: Tensor) -> Tensor:
    wide = torch.float64 if stored.dtype == torch.float64 else torch.float32
    count = at_once(_ROWS_AT_ONCE, stored.device)
    parts = [torch.linalg.vector_norm(some.to(wide), dim=1) for some in stored.split(count)]
    norms = torch.cat(parts) if parts else scale.new_zeros(0, dtype=wide)
    return norms * scale.to(wide) * _ROUNDED_UP


def _hand_down(rows: Tensor, stored: Tensor, sizes: Tensor, size_of: Tensor, errors_by_size: Tensor) -> None:
    """Add the rounding error of larger rows to one row of each scale, in place, so that the sum keeps its digits.

    If large rows cancel, their rounding error can exceed the sum that remains; relative to a smaller row it is small.

    Args:
        rows: The rows, ``(num_examples, k)``.
        stored: The same, divided by their scales and rounded.
        sizes: The scales that occur, ascending, ``(sizes,)``.
        size_of: Which of them each row has, ``(num_examples,)``.
        errors_by_size: The rounding error of the sum of each scale's rows, ``(sizes, k)``.
    """
    error = torch.zeros_like(errors_by_size[0])
    places = torch.arange(len(rows), device=rows.device)
    last = torch.zeros_like(sizes, dtype=torch.long).scatter_reduce_(0, size_of, places, "amax")
    for index in range(len(sizes) - 1, -1, -1):
        size, row = sizes[index].double(), last[index]
        error = error + errors_by_size[index]
        most = rows[row].abs().max().double() * _MOST_HANDED_DOWN
        before = stored[row].double() * size
        stored[row] = ((before + torch.where(error.abs() <= most, error, 0.0)) / size).to(stored.dtype)
        error = error - (stored[row].double() * size - before)
