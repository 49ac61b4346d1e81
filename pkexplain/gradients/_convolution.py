"""Per-example gradients of a convolution, in factored form."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from pkexplain.gradients.factors import MatrixGradient
from pkexplain.gradients.matrices import outer_product

_NARROW = 64
"""Below this many columns, a matrix product with the patches is faster than a convolution's own gradient."""
_GROUPS = 16
"""Examples that are differentiated as the groups of one convolution; with more, oneDNN becomes slow."""


@dataclass(frozen=True)
class ConvolutionGradient(MatrixGradient):
    """G_i = Σ_p g_i,p ⊗ [patch of x_i at p, 1] over output positions p; projecting patches is itself a convolution."""

    inputs: Tensor  # (examples, channels, *space)
    output_gradients: Tensor  # (examples, rows, positions)
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]  # zeros at both ends of each axis
    weight: bool
    bias: bool
    forms_anew: ClassVar[bool] = True

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return self.output_gradients.shape[1], self.weight * self.inputs.shape[1] * math.prod(self.kernel) + self.bias

    @property
    def positions(self) -> int:
        """Terms in the sum that one example's gradient is."""
        return self.output_gradients.shape[2]

    def sketch(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        """Project from both sides, ``(examples, k_rows, k_columns)``."""
        g = self.output_gradients
        for_weight, for_bias = self._split(right)
        if right is None:
            parts = [formed if left is None else left @ formed for formed in [self._weights()] if self.weight]
            parts += [outer_product(left, g, g.new_ones(1, 1, 1).expand(len(g), 1, g.shape[2]))] if self.bias else []
            return torch.cat(parts, dim=2)
        if for_weight is None:
            x = right[None, :, -1:].expand(len(g), -1, g.shape[2])  # only the bias is trained
        else:
            filters = for_weight.reshape(-1, self.inputs.shape[1], *self.kernel)
            convolve = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel) - 1]
            x = convolve(self.inputs, filters, for_bias, self.stride, self.padding, self.dilation).flatten(2)
        return outer_product(left, g, x)

    def total(self) -> Tensor:
        """Sum over the examples, ``(numel,)``: the weight's gradient of the layer itself."""
        parts = [self._weight_gradient(1).flatten()] if self.weight else []
        return torch.cat([*parts, self.output_gradients.sum((0, 2))]) if self.bias else parts[0]

    def gross(self) -> Tensor:
        """Bound the sum of the gradients' sizes, ``(numel,)``."""
        return replace(self, inputs=self.inputs.abs(), output_gradients=self.output_gradients.abs()).total()

    def formed(self) -> tuple[Tensor | None, Tensor | None]:
        """Form the weight's gradients, ``(examples, rows, columns)``, and the bias's, ``(examples, rows)``."""
        return self._weights() if self.weight else None, self.output_gradients.sum(2) if self.bias else None

    def _weights(self) -> Tensor:
        """Form the weight's gradients, ``(examples, rows, channels * kernel)``."""
        n, rows = len(self), self.output_gradients.shape[1]
        if self.inputs.device.type != "cpu" or self.inputs.shape[1] * math.prod(self.kernel) < _NARROW:
            return outer_product(None, self.output_gradients, self._patches())
        some = [self.select(slice(start, start + _GROUPS)) for start in range(0, n, _GROUPS)]
        parts = [part._weight_gradient(len(part)).view(len(part), rows, -1) for part in some]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _weight_gradient(self, groups: int) -> Tensor:
        """Let torch sum the weight's gradient over the examples of each group, the examples being its channels."""
        n, channels, *space = self.inputs.shape
        axes = len(self.kernel)
        positions = [
            (size + 2 * padding - gap * (kernel - 1) - 1) // stride + 1
            for size, padding, gap, kernel, stride in zip(
                space, self.padding, self.dilation, self.kernel, self.stride, strict=True
            )
        ]
        rows = self.output_gradients.shape[1]
        gradient = (conv1d_weight, conv2d_weight, conv3d_weight)[axes - 1]
        shape = (groups * rows, channels, *self.kernel)
        batch = n // groups
        inputs = self.inputs.reshape(groups, batch, channels, *space).transpose(0, 1)
        outputs = self.output_gradients.reshape(groups, batch, rows, *positions).transpose(0, 1)
        sizes = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": groups}
        return gradient(inputs.flatten(1, 2), shape, outputs.flatten(1, 2), **sizes)

    def _patches(self) -> Tensor:
        """Unfold the inputs, ``(examples, channels * kernel, positions)``."""
        x = F.pad(self.inputs, [size for size in reversed(self.padding) for _ in (0, 1)])
        for axis, (size, step, gap) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True)):
            x = x.unfold(2 + axis, (size - 1) * gap + 1, step)[..., ::gap]
        n = len(self.kernel)
        order = [0, 1, *range(2 + n, 2 + 2 * n), *range(2, 2 + n)]
        return x.permute(order).reshape(len(x), -1, math.prod(x.shape[2 : 2 + n]))

    def select(self, positions: Tensor | slice) -> ConvolutionGradient:
        """Keep the examples at ``positions``."""
        return replace(self, inputs=self.inputs[positions], output_gradients=self.output_gradients[positions])

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        return self.inputs.nbytes + self.output_gradients.nbytes
