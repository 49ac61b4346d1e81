"""Whether two inputs are of one example, up to what may happen to it on its way to the model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pkexplain.ids.digests import ROUNDED, digest, thinned, without_padding

__all__ = ["FEW", "InputRow", "alike", "distance", "layouts", "overlaps", "standard", "varies"]

FEW = 8
"""Of fewer values, scale and offset say too much: two examples could be made equal."""
_AWAY = 0.3
"""The share of an example's values that may have moved further. Measured: features from bfloat16 instead of float32, at
most 0.05; two rows of one data set, at least 0.55 (tables, digits, photographs)."""
_MOST_CHANNELS = 4
_MOST_KEPT = 1 << 15
"""Values of an input that are kept, so that padding can be looked past."""


@dataclass(frozen=True)
class InputRow:
    """One input of one example, on the CPU.

    Attributes:
        shape: Of what was passed.
        raw: As it was passed; of a large one, some values.
        content: Some of its values, without padding.
        size: Shape without padding.
        digest: Its digest.
    """

    shape: torch.Size
    raw: Tensor
    content: Tensor
    size: torch.Size
    digest: str

    @classmethod
    def of(cls, row: Tensor, mask: Tensor | None = None) -> InputRow:
        """Look at an input, ``(*shape)``, and at its mask, if there is one; see `without_padding`."""
        content = without_padding(row, mask)
        raw = (row if row.numel() <= _MOST_KEPT else thinned(row)).clone()
        return cls(row.shape, raw, thinned(content).clone(), content.shape, digest(content))

    @property
    def code(self) -> str:
        """The hash of its values."""
        return self.digest.partition(" ")[0]

    def is_again(self, row: Tensor) -> bool:
        """Whether an input is the same bit for bit, with its padding; without nan."""
        known = row if row.numel() <= _MOST_KEPT else thinned(row)
        return row.shape == self.shape and torch.equal(known, self.raw)

    def same_as(self, other: InputRow) -> bool:
        """Whether both may be of one example; where nothing can be compared, they may."""
        if self.code == other.code or (self.size == other.size and alike(self.content, other.content)):
            return True
        if self.raw.shape != self.shape or len(self.shape) != len(other.shape):
            return self.shape != other.shape
        if other.raw.shape != other.shape:
            return True
        return any(alike(*pair) for pair in overlaps(self.raw, other.raw))


def overlaps(one: Tensor, other: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """What two rows of one number of dimensions have in common, if padding was added at either end of a dimension."""
    axes = [axis for axis in range(one.ndim) if one.shape[axis] != other.shape[axis]]
    for ends in itertools.product((False, True), repeat=len(axes)):
        a, b = one, other
        for axis, end in zip(axes, ends, strict=True):
            count = min(a.shape[axis], b.shape[axis])
            a = a.narrow(axis, a.shape[axis] - count if end else 0, count)
            b = b.narrow(axis, b.shape[axis] - count if end else 0, count)
        yield a, b


def alike(one: Tensor, other: Tensor) -> bool:
    """Whether values of one shape are equal; floating-point ones up to rounding, a scale and an offset."""
    if not (one.is_floating_point() and other.is_floating_point()):
        return torch.equal(one, other)
    a, b = one.double().flatten(), other.double().flatten()
    if len(a) >= FEW:
        here, there = a - a.nanmedian(), b - b.nanmedian()  # the background, where there is one
        slope = float((here * there).nansum() / here.square().nansum())
        if 0 < slope < float("inf"):
            a, b = here * slope, there
    size = torch.maximum(a.abs(), b.abs())
    telling = (size > 0) | (a.isnan() != b.isnan())
    if not telling.any():
        return True
    away = ~((a - b).abs() <= ROUNDED * (size + size[telling].nanmedian())) & (a != b) & ~(a.isnan() & b.isnan())
    return float(away[telling].double().mean()) <= _AWAY


def varies(values: Tensor) -> bool:
    """Whether there are different values: others say nothing, as a mask of ones."""
    return values.numel() > 1 and bool((values != values.flatten()[0]).any())


def layouts(part: Tensor) -> list[Tensor]:
    """A part of a row, and, of a picture with the channels last, it with the channels first."""
    pictures = part.ndim == 3 and part.shape[-1] <= _MOST_CHANNELS < part.shape[0]
    return [part, part.movedim(-1, 0)] if pictures else [part]


def standard(values: Tensor) -> Tensor:
    """Shift and scale rows, ``(rows, values)``, to mean 0 and norm 1; constant ones become 0."""
    known = values.nan_to_num(0.0, 0.0, 0.0)
    centred = known - known.mean(1, keepdim=True)
    size = centred.norm(dim=1, keepdim=True)
    return torch.where(size > 1e-6 * known.norm(dim=1, keepdim=True), centred / size, 0.0)


def distance(value: Tensor, part: Tensor) -> float:
    """How far an input is from a part of a row, up to a scale and an offset of each channel: 0 if it is the part.

    Of different sizes, one is the beginning or the end of the other. Where nothing can be compared, it is infinite.
    """
    count = min(value.numel(), part.numel())
    if value.numel() == part.numel():
        channels = len(value) if value.ndim == 3 and len(value) <= _MOST_CHANNELS else 1
        pairs = [(value.flatten(), part.flatten())]
    else:
        channels, (a, b) = 1, (value.flatten(), part.flatten())
        pairs = [(a[:count], b[:count]), (a[len(a) - count :], b[len(b) - count :])]
    if count < (2 if value.numel() == part.numel() else FEW // 2):
        return math.inf
    return min(_residual(a, b, channels) for a, b in pairs)


def _residual(one: Tensor, other: Tensor, channels: int) -> float:
    a, b = one.double(), other.double()
    if torch.equal(a.nan_to_num(), b.nan_to_num()):
        return 0.0
    if not (one.is_floating_point() or other.is_floating_point()):
        return math.inf
    if len(a) < FEW:
        return float((a - b).nan_to_num().norm() / b.nan_to_num().norm())
    here, there = standard(a.reshape(channels, -1)), standard(b.reshape(channels, -1))
    varied = (here.any(1) | there.any(1)).sum().clamp(min=1)
    cosine = float((here * there).sum() / varied)
    return math.sqrt(max(0.0, 1 - cosine**2)) if cosine > 0 else math.inf
