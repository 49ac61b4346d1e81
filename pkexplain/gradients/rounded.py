"""Gradients in twelve bits a number while they wait for their projection, where memory is short.

With eight, rounding would show where examples nearly cancel: in the sum of the rows. Positions without an output
gradient, as those of padding, take no memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pkexplain.gradients._embedding import EmbeddingGradient
from pkexplain.gradients.factors import ExampleGradients, FormedGradient, LinearGradient, MatrixGradient

__all__ = ["RoundedGradient", "rounded"]

_ROUNDED = LinearGradient, FormedGradient, EmbeddingGradient
_LARGEST = 2046
"""Rounded up, a number is at most this and one, which twelve bits hold."""
_G = TypeVar("_G", bound=ExampleGradients)


@dataclass(frozen=True)
class RoundedGradient(MatrixGradient):
    """A matrix's gradients whose factors are stored in twelve bits a number.

    Each vector (the input or the output gradient at one position) has a scale of its own. It is off by about 0.1%, in
    all directions alike; a projection to few of them hardly sees that.
    """

    shell: Any  # the gradients, with empty tensors in place of those that are rounded
    codes: Mapping[str, Tensor]  # of the vectors at positions with an output gradient, one after another
    scales: Mapping[str, Tensor]
    kept: Tensor  # which positions these are, (examples, positions)
    lengths: Mapping[str, int]  # of the vectors
    shape: tuple[int, int]
    terms: int
    weight: bool
    bias: bool

    @property
    def output_gradients(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What the gradients are linear in."""
        return self._unpacked("output_gradients")

    @property
    def like(self) -> Tensor:
        """An empty tensor of their dtype and device."""
        return self.shell.output_gradients

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return self.shape

    @property
    def positions(self) -> int:
        """Terms in the sum that one example's gradient is."""
        return self.terms

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.kept)

    def _unpacked(self, name: str) -> Tensor:
        found = (_numbers(self.codes[name], self.lengths[name]) * self.scales[name]).to(self.like)
        if len(found) == self.kept.numel():
            return found.view(*self.kept.shape, -1)
        every = found.new_zeros(*self.kept.shape, found.shape[-1])
        every[self.kept] = found
        return every

    def unpacked(self) -> MatrixGradient:
        """Return the same gradients as they were before, but for rounding."""
        return replace(self.shell, **{name: self._unpacked(name) for name in self.codes})

    def with_output_gradients(self, gradients: Tensor) -> MatrixGradient:
        """Return the gradients for other output gradients."""
        return self.unpacked().with_output_gradients(gradients)

    def sketch(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        """Project from both sides, ``(examples, k_rows, k_columns)``."""
        return self.unpacked().sketch(left, right)

    def formed(self) -> tuple[Tensor | None, Tensor | None]:
        """Form the weight's gradients, ``(examples, rows, columns)``, and the bias's, ``(examples, rows)``."""
        return self.unpacked().formed()

    def total(self) -> Tensor:
        """Sum over the examples, ``(numel,)``."""
        return self.unpacked().total()

    def gross(self) -> Tensor:
        """Bound the sum of the gradients' absolute values, ``(numel,)``."""
        return self.unpacked().gross()

    def scaled(self, factors: Tensor) -> MatrixGradient:
        """Multiply elementwise by ``factors``, ``(numel,)``."""
        return self.unpacked().scaled(factors)

    def select(self, positions: Tensor | slice) -> RoundedGradient:
        """Keep the examples at ``positions``."""
        where = torch.zeros_like(self.kept, dtype=torch.long)
        where[self.kept] = torch.arange(int(self.kept.sum()), device=where.device)
        kept, shell = self.kept[positions], self.shell
        rows = where[positions][kept]
        some = ({name: each[rows] for name, each in mine.items()} for mine in (self.codes, self.scales))
        if isinstance(shell, EmbeddingGradient):
            shell = replace(shell, tokens=shell.tokens[positions])
        codes, scales = some
        return replace(self, shell=shell, codes=codes, scales=scales, kept=kept)

    def compact(self) -> RoundedGradient:
        """Return these gradients: they are."""
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        numbers = (each.nbytes for mine in (self.codes, self.scales) for each in mine.values())
        return self.shell.nbytes + self.kept.nbytes + sum(numbers)


def rounded(gradients: _G, seed: int) -> _G | RoundedGradient:
    """Round gradients to twelve bits, if they are of a kind that takes much memory and not in float64.

    Up or down at random, right on average: to round to the nearest would lose what many examples share but is small
    in each.

    Args:
        gradients: The gradients.
        seed: Of the numbers by which it is decided; those of others, torch's, are left alone.
    """
    if not isinstance(gradients, _ROUNDED) or gradients.output_gradients.dtype == torch.float64:
        return gradients
    names = [name for name in ("inputs", "output_gradients") if hasattr(gradients, name)]
    kept = (gradients.output_gradients != 0).any(-1)
    whole: dict[str, Tensor] = {name: getattr(gradients, name) for name in names}
    tensors = {name: each[kept] for name, each in whole.items()}
    scales = {name: each.float().abs().amax(-1, keepdim=True) / _LARGEST for name, each in tensors.items()}
    generator = torch.Generator(gradients.output_gradients.device).manual_seed(seed)
    codes = {name: _codes(each, scales[name], generator) for name, each in tensors.items()}
    lengths = {name: each.shape[-1] for name, each in tensors.items()}
    empty = {name: each.new_empty(*([0] * each.ndim)) for name, each in whole.items()}
    shell: Any = gradients
    about = gradients.matrix, gradients.positions, gradients.weight, gradients.bias
    return RoundedGradient(replace(shell, **empty), codes, scales, kept, lengths, *about)


def _codes(values: Tensor, scales: Tensor, generator: torch.Generator) -> Tensor:
    """Round to whole numbers: their upper eight bits, then their lower four, two in a byte, ``(…, n + ⌈n / 2⌉)``."""
    chance = torch.rand(values.shape, generator=generator, device=values.device)
    levels = (values.float() / torch.where(scales > 0, scales, 1)).add_(chance).floor_().to(torch.int16)
    lower = nn.functional.pad(levels & 15, (0, values.shape[-1] % 2)).to(torch.uint8)
    one, other = lower.tensor_split(2, dim=-1)
    return torch.cat([(levels >> 4).to(torch.int8).view(torch.uint8), one | other << 4], dim=-1)


def _numbers(codes: Tensor, length: int) -> Tensor:
    """Undo the packing, in float32."""
    upper, lower = codes[..., :length].view(torch.int8), codes[..., length:]
    found, half = upper.float().mul_(16), lower.shape[-1]
    found[..., :half] += lower & 15
    found[..., half:] += lower[..., : length - half] >> 4
    return found
