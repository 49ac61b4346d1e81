"""Which rows of a tensor belong to which example: learnt from a coded pass, not guessed from sizes.

If example i's share of ∂(loss)/∂y is multiplied by a random c_i and sent through the backward pass, every entry of a
tensor's gradient that only example i reaches is multiplied by c_i, too. So the ratio of the coded gradient to the plain
one tells the example of each row, whatever the layout: batch first, time first, flattened tokens, windows, two views,
routed rows. Where no axis has such ratios the tensor is shared by the examples, or they act on one another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Codes", "Layout", "Sketcher"]

_ENTRIES = 48
"""Entries of every row that are compared."""
_MISS = {torch.float64: 1e-12, torch.float32: 1e-6}
"""Squared relative misfit up to which a layout is exact; 1e-3 for half precision."""
_INTERACTING = 0.5
"""Squared misfit up to which examples that act on one another (BatchNorm) still own their rows."""


@dataclass(frozen=True)
class Layout:
    """The examples of a tensor's rows along one axis.

    Attributes:
        axis: The axis.
        pattern: ``"contiguous"`` (0 0 1 1 …), ``"tiled"`` (0 1 … 0 1 …), or the example of each row, ``(rows,)``, −1
            for rows without a gradient.
        mixed: Whether other examples reach these rows, too.
    """

    axis: int
    pattern: str | Tensor
    mixed: bool = False

    @classmethod
    def of(cls, axis: int, owners: Tensor, examples: int, mixed: bool = False) -> Layout:
        """Describe the owners of a tensor's rows, ``(rows,)``, by a pattern if there is one."""
        rows, dead = len(owners), owners < 0  # rows without a gradient fit any pattern
        everyone = torch.arange(examples, device="cpu")
        if rows % examples == 0:
            for name, made in (
                ("contiguous", everyone.repeat_interleave(rows // examples)),
                ("tiled", everyone.repeat(rows // examples)),
            ):
                if bool((dead | (owners == made)).all()):
                    return cls(axis, name, mixed)
        return cls(axis, owners, mixed)

    @property
    def fixed(self) -> bool:
        """Whether it holds for every batch, of whatever size."""
        return isinstance(self.pattern, str)

    def fits(self, shape: Sequence[int], examples: int) -> bool:
        """Whether a tensor of this shape can have this layout."""
        if len(shape) <= self.axis:
            return False
        rows = shape[self.axis]
        if isinstance(self.pattern, str):
            return rows > 0 and rows % examples == 0
        return len(self.pattern) == rows and int(self.pattern.max()) < examples

    def owners(self, rows: int, examples: int) -> Tensor:
        """Return the example of each row, ``(rows,)``."""
        if isinstance(self.pattern, Tensor):
            return self.pattern
        everyone = torch.arange(examples, device="cpu")
        return (
            everyone.repeat_interleave(rows // examples)
            if self.pattern == "contiguous"
            else (everyone.repeat(rows // examples))
        )

    def standard(self, shape: Sequence[int], examples: int, axis: int = 0) -> bool:
        """Whether the tensor has one row per example, in order, along ``axis``."""
        return self.axis == axis and self.fixed and len(shape) > axis and shape[axis] == examples


class Codes:
    """Random numbers for the examples of a batch: two each, so that no two are alike by chance, and a sign.

    Attributes:
        values: The numbers, then the signs, ``(3, examples)``. Multiplying by a sign is exact in half precision, too.

    Args:
        examples: The batch size.
        generator: Where they come from; not the training's random state.
    """

    def __init__(self, examples: int, generator: torch.Generator) -> None:
        """Draw them, away from 0."""
        values = torch.randn(3, examples, generator=generator, dtype=torch.float64, device="cpu")
        self.values = values + values.sign() * 0.3
        self.values[2] = values[2].sign()

    @staticmethod
    def numbers(half: bool) -> tuple[int, ...]:
        """Which of the codes check a split: in half precision only the signs, whose rounding is the training's own."""
        return (2,) if half else (0, 1)

    def code(self, gradient: Tensor, layout: Layout, number: int, rest: bool = False) -> Tensor:
        """Multiply a tensor's rows by their examples' codes c, or by what is left of them, 1 − c."""
        owners = layout.owners(gradient.shape[layout.axis], self.values.shape[1])
        values = 1 - self.values[number] if rest else self.values[number]
        factors = torch.where(owners < 0, 0.0, values[owners.clamp_min(0)])
        shape = [1] * gradient.ndim
        shape[layout.axis] = len(factors)
        return gradient * factors.to(gradient.device, gradient.dtype).view(shape)


class Sketcher:
    """Compares a few entries of every row of a gradient, plain and coded.

    Half of them are random, and half are each row's largest: where a loss depends on one token of each example, say,
    random ones would miss it.

    Args:
        codes: The examples' codes.
        generator: Chooses the random entries.
    """

    def __init__(self, codes: Codes, generator: torch.Generator) -> None:
        """Nothing is chosen yet."""
        self._codes, self._generator = codes, generator
        self._random: dict[tuple[torch.Size, int], Tensor] = {}

    def places(self, gradient: Tensor) -> list[Tensor]:
        """Choose entries of every row along each of the first four axes: flat positions, ``(rows, entries)`` each."""
        gradient = _real(gradient)
        return [self._places(gradient, axis) for axis in range(min(gradient.ndim, 4))]

    def sketch(self, gradient: Tensor, places: Sequence[Tensor]) -> list[Tensor]:
        """Read the entries at ``places``, in float64; zeros if there are none."""
        flat = _real(gradient).reshape(-1)
        empty = flat.new_zeros(1, dtype=torch.float64)
        return [flat[at].double() if at.numel() else empty.expand(len(at), 1) for at in places]

    def _places(self, gradient: Tensor, axis: int) -> Tensor:
        rows = gradient.shape[axis]
        if gradient.numel() == 0:
            return torch.zeros(rows, 0, dtype=torch.long, device=gradient.device)
        before, after = math.prod(gradient.shape[:axis]), math.prod(gradient.shape[axis + 1 :])
        if before * after <= _ENTRIES:
            inside = torch.arange(before * after, device=gradient.device).expand(rows, -1)
        else:
            key = (gradient.shape, axis)
            if key not in self._random:
                self._random[key] = torch.randint(
                    before * after, (_ENTRIES // 2,), generator=self._generator, device="cpu"
                )
            shared = self._random[key].to(gradient.device).expand(rows, -1)
            largest = _largest(gradient.reshape(before, rows, after), _ENTRIES // 2)
            inside = torch.cat([shared, largest], dim=1)
        row = torch.arange(rows, device=gradient.device)[:, None]
        return inside.div(after, rounding_mode="floor") * (rows * after) + row * after + inside % after

    def layout(self, plain: Sequence[Tensor], coded: Sequence[Sequence[Tensor]], dtype: torch.dtype) -> Layout | None:
        """Find the layout of a tensor from its sketches; None if no axis belongs to examples."""
        examples = self._codes.values.shape[1]
        mixed = None
        for axis, rows in enumerate(plain):
            size = rows.square().sum(1)
            if rows.numel() == 0 or not torch.isfinite(size).all() or not size.any():
                continue
            alive = size > size.max() * 1e-24
            values = self._codes.values[:2].to(rows.device)
            ratios = torch.stack([(rows * other[axis]).sum(1) / size.clamp_min(1e-300) for other in coded])
            owners = (ratios[:, :, None] - values[:, None, :]).square().sum(0).argmin(1)
            miss, whole = 0.0, 0.0
            for number, other in enumerate(coded):
                miss += float((other[axis] - values[number][owners][:, None] * rows).square().sum())
                whole += float(other[axis].square().sum())
            owners = torch.where(alive, owners, -1).cpu()
            if miss <= _MISS.get(dtype, 1e-3) * whole:
                return Layout.of(axis, owners, examples)
            likely = Layout.of(axis, owners, examples, mixed=True)
            if mixed is None and likely.fixed and miss < _INTERACTING * whole:
                mixed = likely
        return mixed


def _real(gradient: Tensor) -> Tensor:
    gradient = gradient.detach()
    return torch.view_as_real(gradient) if gradient.is_complex() else gradient


def _largest(gradient: Tensor, count: int) -> Tensor:
    """The places of the largest entries of parts of every row, ``(rows, parts)``, at most about ``count``.

    Args:
        gradient: ``(before, rows, after)``.
        count: How many parts the entries of a row, ``(before, after)``, are cut into.
    """
    before, rows, after = gradient.shape
    size = gradient.abs()
    if after == 1:  # the last axis: parts of what comes before
        wide = -(-before // count)
        parts = F.pad(size[:, :, 0], (0, 0, 0, -before % wide)).reshape(-1, wide, rows)
        best = parts.max(1).indices
        return (best + wide * torch.arange(len(best), device=best.device)[:, None]).clamp_max(before - 1).T
    each = max(1, count // before)
    wide = -(-after // each)
    largest, best = F.pad(size, (0, -after % wide)).reshape(before, rows, -1, wide).max(3)
    best = (best + wide * torch.arange(best.shape[2], device=best.device)).clamp_max(after - 1)
    places = best + after * torch.arange(before, device=best.device)[:, None, None]
    largest, places = (x.transpose(0, 1).reshape(rows, -1) for x in (largest, places))
    return places.gather(1, largest.topk(min(count, largest.shape[1]), dim=1).indices)
