"""A large model's vectors in four or eight bits a number.

What a segment keeps beside its checkpoint are small shares of a displacement, or factors that rows are fitted with
afterwards, so a few bits do; what they miss is on the ledger's line `optimizer`. Numbers are rounded in blocks that
share a scale (as in T. Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2022).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

__all__ = ["MultipliedVector", "Operator", "PackedVector", "Vector", "pack"]

_BLOCK = 256
_AT_ONCE = _BLOCK << 14
"""Numbers that are packed or unpacked at a time; a block never spans two of these."""
_LEVELS = 7
"""A number of four bits is one of -7 to 7 times its block's scale."""
_LOG_LEVELS = 254
"""A positive number of eight bits is one of 255 whose logarithms are evenly spaced; the last code is for 0."""


@dataclass(frozen=True)
class PackedVector:
    """A vector in blocks of 256 numbers.

    Attributes:
        codes: Two numbers a byte, or one of a vector that is not negative, ``(blocks × 128,)`` or ``(blocks × 256,)``.
        scales: Each block's scale ``(blocks,)``, or the logarithm of its smallest number and the step, ``(blocks, 2)``.
        size: How many numbers it has.
    """

    codes: Tensor
    scales: Tensor
    size: int

    def __len__(self) -> int:
        """Return how many numbers it has."""
        return self.size

    def __getitem__(self, span: slice) -> Tensor:
        """Unpack some of it, in float32."""
        start, stop, _ = span.indices(self.size)
        stop = max(start, stop)
        first, last = start // _BLOCK, -(-stop // _BLOCK)
        bytes_ = len(self.codes) // len(self.scales)
        found = torch.empty((last - first) * _BLOCK, dtype=torch.float32, device=self.codes.device)
        for a in range(first, last, _AT_ONCE // _BLOCK):
            b = min(last, a + _AT_ONCE // _BLOCK)
            codes = self.codes[a * bytes_ : b * bytes_].view(b - a, bytes_)
            found[(a - first) * _BLOCK : (b - first) * _BLOCK] = _unpacked(codes, self.scales[a:b]).flatten()
        return found[start - first * _BLOCK : stop - first * _BLOCK]

    @overload
    def to(self, like: Tensor) -> Tensor: ...
    @overload
    def to(self, like: torch.device) -> PackedVector: ...
    def to(self, like: Tensor | torch.device) -> Tensor | PackedVector:
        """Unpack it as a tensor like another, ``(size,)``, or move it to a device as it is."""
        if isinstance(like, torch.device):
            return PackedVector(self.codes.to(like), self.scales.to(like), self.size)
        return self.to(like.device)[:].to(like)

    def double(self) -> Tensor:
        """Unpack it in float64, ``(size,)``."""
        return self[:].double()

    @property
    def finite(self) -> bool:
        """Whether no number is infinite, whatever the codes are."""
        scales = self.scales.double()
        ends = scales[:, 0] + scales[:, 1].clamp_min(0) * 255 if scales.ndim == 2 else scales.abs().log() + 3
        return bool((ends < math.log(torch.finfo(torch.float32).max)).all())

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return what is stored of a vector of that name."""
        return {f"{name}.codes": self.codes, f"{name}.scales": self.scales}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], name: str, size: int) -> PackedVector:
        """Rebuild the vector of that name from stored tensors."""
        return cls(tensors[f"{name}.codes"], tensors[f"{name}.scales"], size)

    @staticmethod
    def shapes(size: int, logarithmic: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of the codes and the scales of so many numbers."""
        blocks = -(-size // _BLOCK)
        return (blocks * _BLOCK // (1 if logarithmic else 2),), (blocks, 2) if logarithmic else (blocks,)


@dataclass(frozen=True)
class MultipliedVector:
    """A vector times numbers that are computed when it is read: many segments' together would not fit in memory.

    Attributes:
        vector: The vector; None for ones.
        factors: Computes the numbers, ``(size,)``.
    """

    vector: Tensor | PackedVector | MultipliedVector | None
    factors: Callable[[], Tensor]

    def __getitem__(self, span: slice) -> Tensor:
        """Compute some of it."""
        factors = self.factors()[span]
        return factors if self.vector is None else self.vector[span].to(factors) * factors

    @overload
    def to(self, like: Tensor) -> Tensor: ...
    @overload
    def to(self, like: torch.device) -> MultipliedVector: ...
    def to(self, like: Tensor | torch.device) -> Tensor | MultipliedVector:
        """Compute it as a tensor like another, ``(size,)``, or move it to a device as it is."""
        if not isinstance(like, torch.device):
            return self[:].to(like)
        return MultipliedVector(None if self.vector is None else self.vector.to(like), self.factors)


Vector = Tensor | PackedVector
"""A vector as it is stored."""
Operator = Vector | MultipliedVector


def pack(vector: Tensor, logarithmic: bool = False, seed: int = 0) -> PackedVector:
    """Pack a vector.

    Numbers of four bits are rounded up or down at random, right on average: to round to the nearest would lose what
    many small ones add up to.

    Args:
        vector: ``(size,)``.
        logarithmic: Whether what counts is each number's relative error, which is at most half a step of its block:
            eight bits for each number, none of which is negative.
        seed: Of the numbers by which is decided how to round; torch's own are left alone.
    """
    generator = None if logarithmic else torch.Generator(vector.device).manual_seed(seed)
    codes, scales = zip(*(_packed(part, generator) for part in _blocks(vector)), strict=True)
    return PackedVector(torch.cat(codes), torch.cat(scales), len(vector))


def _blocks(vector: Tensor) -> Iterator[Tensor]:
    for part in vector.split(_AT_ONCE):
        padded = torch.nn.functional.pad(part.float(), (0, -len(part) % _BLOCK))
        yield padded.view(-1, _BLOCK)


def _packed(blocks: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    if generator is not None:
        scales = blocks.abs().amax(1) / _LEVELS
        chance = torch.rand(blocks.shape, generator=generator, device=blocks.device)
        levels = (blocks / torch.where(scales > 0, scales, 1.0)[:, None]).add_(chance).floor_()
        codes = levels.clamp_(-_LEVELS, _LEVELS).add_(_LEVELS).to(torch.uint8)
        return (codes[:, ::2] | codes[:, 1::2] << 4).flatten(), scales
    positive, logs = blocks > 0, blocks.log()
    low = torch.where(positive, logs, torch.inf).amin(1)
    step = (torch.where(positive, logs, -torch.inf).amax(1) - low) / _LOG_LEVELS
    low, step = (torch.where(positive.any(1), value, 0.0) for value in (low, step))
    levels = ((logs - low[:, None]) / torch.where(step > 0, step, 1.0)[:, None]).round()
    return torch.where(positive, levels, 255).to(torch.uint8).flatten(), torch.stack([low, step], dim=1)


def _unpacked(codes: Tensor, scales: Tensor) -> Tensor:
    if scales.ndim == 1:
        both = torch.stack([codes & 15, codes >> 4], dim=2).flatten(1)
        return (both.to(scales) - _LEVELS) * scales[:, None]
    numbers = codes.to(scales).mul_(scales[:, 1:]).add_(scales[:, :1]).exp_()
    return numbers.masked_fill_(codes == 255, 0.0)
