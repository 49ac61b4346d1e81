"""The rules that compute a layer's per-example gradients, from its inputs and its outputs' gradients.

Matrices (Linear, Conv, Embedding) keep their gradients in factored form; LayerNorm, GroupNorm and BatchNorm have a
closed-form rule; every other deterministic layer is differentiated one example at a time with `torch.func`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pkexplain.gradients._convolution import ConvolutionGradient
from pkexplain.gradients._embedding import EmbeddingGradient
from pkexplain.gradients.factors import (
    DenseGradient,
    ExampleGradients,
    LinearGradient,
)


@dataclass(frozen=True)
class Use:
    """One use of a layer in a forward pass, and the gradients of its outputs.

    Attributes:
        module: The layer.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        training: Whether it was in training mode.
        gradients: The gradient of each tensor it returned, in that tensor's shape; None if nothing depends on it.
    """

    module: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    training: bool
    gradients: tuple[Tensor | None, ...] = ()

    @property
    def gradient(self) -> Tensor:
        """The gradient of the first output that has one, ``(examples, …)``; a rule is only called if one has."""
        return next(gradient for gradient in self.gradients if gradient is not None)

    def given(self, position: int, name: str) -> Any:
        """An argument of the forward pass; None if it was omitted."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(name)

    @property
    def input(self) -> Tensor:
        """The first argument, in the gradient's dtype unless it holds indices."""
        x = self.given(0, "input").detach()
        return x.to(self.gradient.dtype) if x.is_floating_point() else x


Parts = Sequence[tuple[str, ...]]
"""For each block that a layer contributes to, the local names of the block's parameters."""
Rule = Callable[[Use, Parts], Sequence[ExampleGradients]]


def dense_parts(gradients: Mapping[str, Tensor], parts: Parts) -> list[ExampleGradients]:
    """Concatenate gradients ``(examples, …)`` of single parameters, block by block."""
    return [DenseGradient(torch.cat([gradients[name].flatten(1) for name in names], dim=1)) for names in parts]


def tensors_of(output: Any) -> Iterator[Tensor]:
    """Iterate over the tensors of a tensor, a tuple or a nested tuple, in order."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from tensors_of(part)


def linear(use: Use, parts: Parts) -> list[ExampleGradients]:
    """Linear: Σ_t g_t ⊗ x_t."""
    x, g = use.input, use.gradient
    x, g = x.reshape(len(g), -1, x.shape[-1]), g.reshape(len(g), -1, g.shape[-1])
    return [LinearGradient(x, g, "weight" in names, "bias" in names) for names in parts]


def transposed_linear(use: Use, parts: Parts) -> list[ExampleGradients]:
    """Conv1D of GPT-2, y = x W + b with W ``(inputs, outputs)``: Σ_t x_t ⊗ g_t, and the bias separately."""
    name = "input" if "input" in use.kwargs else "x"
    x, g = use.given(0, name).detach().to(use.gradient.dtype), use.gradient
    x, g = x.reshape(len(g), -1, x.shape[-1]), g.reshape(len(g), -1, g.shape[-1])
    return [LinearGradient(g, x, True, False) if names == ("weight",) else DenseGradient(g.sum(1)) for names in parts]


def convolution(use: Use, parts: Parts) -> list[ExampleGradients]:
    """Conv1d, Conv2d, Conv3d without groups: Σ_p g_p ⊗ patch_p."""
    x, module = use.input, use.module
    padding = module.padding
    if isinstance(padding, str) or module.padding_mode != "zeros":  # uneven, or not of zeros: pad here
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        padding = (0,) * len(module.kernel_size)
    sizes = (module.kernel_size, module.stride, module.dilation, padding)
    g = use.gradient.flatten(2)
    return [ConvolutionGradient(x, g, *sizes, "weight" in names, "bias" in names) for names in parts]


def embedding(use: Use, parts: Parts) -> list[ExampleGradients]:
    """Embedding: Σ_t onehot(token_t) ⊗ g_t."""
    tokens, g, module = use.input, use.gradient, use.module
    tokens, g = tokens.reshape(len(g), -1), g.reshape(len(g), -1, g.shape[-1])
    if module.padding_idx is not None:
        g = g * (tokens != module.padding_idx)[:, :, None]
    return [EmbeddingGradient(tokens, g, module.num_embeddings) for _ in parts]


def scale_and_shift(use: Use, parts: Parts) -> list[ExampleGradients]:
    """LayerNorm, RMSNorm, GroupNorm: the gradient times the normalised input, and the gradient."""
    x, g, module = use.input, use.gradient, use.module
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        norm = F.layer_norm if isinstance(module, nn.LayerNorm) else F.rms_norm
        normalised = norm(x, list(module.normalized_shape), eps=module.eps)  # pyright: ignore[reportArgumentType]
        axes = tuple(range(1, x.ndim - len(module.normalized_shape)))
    else:
        normalised = F.group_norm(x, module.num_groups, eps=module.eps)
        axes = tuple(range(2, x.ndim))
    products = {"weight": g * normalised, "bias": g}
    return dense_parts({name: part.sum(axes) if axes else part for name, part in products.items()}, parts)


def normalises_with_the_batch(module: Any, training: bool) -> bool:
    """Whether a BatchNorm takes the batch's statistics and not the running ones."""
    return training or module.running_mean is None


def batch_statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute the mean of a batch's channels and the root of their variance plus ε, broadcastable to x."""
    var, mean = torch.var_mean(x, (0, *range(2, x.ndim)), correction=0, keepdim=True)
    return mean, (var + eps).sqrt()


def batch_norm(use: Use, parts: Parts) -> list[ExampleGradients]:
    """BatchNorm: like LayerNorm, with the batch's statistics or running ones.

    With the batch's statistics an example also acts through the other examples. Its layers' outputs receive the
    derivative of the whole batch's loss in the backward pass, so the examples still sum to the gradient.
    """
    x, g, module = use.input, use.gradient, use.module
    if normalises_with_the_batch(module, use.training):
        mean, deviation = batch_statistics(x, module.eps)
    else:
        mean, deviation = by_channel(module.running_mean, x), (by_channel(module.running_var, x) + module.eps).sqrt()
    products = {"weight": g * (x - mean) / deviation, "bias": g}
    return dense_parts({name: over_space(part) for name, part in products.items()}, parts)


def by_channel(values: Tensor, like: Tensor) -> Tensor:
    """Reshape one number per channel so that it broadcasts to ``like``, ``(examples, channels, …)``."""
    return values.to(like.dtype).view(1, -1, *(1,) * (like.ndim - 2))


def over_space(values: Tensor) -> Tensor:
    """Sum over all but examples and channels, ``(examples, channels)``."""
    return values.flatten(2).sum(2) if values.ndim > 2 else values


def by_example(use: Use, parts: Parts) -> list[ExampleGradients]:
    """Differentiate the module again, one example at a time (`torch.func.vmap` of `torch.func.vjp`)."""
    gradients = tuple(g for g in use.gradients if g is not None)
    n = len(gradients[0])
    detach = lambda value: value.detach() if isinstance(value, Tensor) else value  # noqa: E731 - used twice, one line
    args, kwargs = tuple(map(detach, use.args)), {name: detach(value) for name, value in use.kwargs.items()}
    batched = lambda value: isinstance(value, Tensor) and value.ndim > 0 and len(value) == n  # noqa: E731
    axes = tuple(0 if batched(value) else None for value in args)
    named_axes = {name: 0 if batched(value) else None for name, value in kwargs.items()}
    values = {name: getattr(use.module, name).detach() for names in parts for name in names}
    # a parameter may have several names in the module, and another owner among its children who answers for itself
    same = {
        f"inner.{alias}": name
        for name in values
        for alias, parameter in use.module._parameters.items()
        if parameter is getattr(use.module, name)
    }
    bare = _WithoutHooks(use.module)

    def one(inputs: tuple[Any, ...], named: dict[str, Any], output_gradients: tuple[Tensor, ...]) -> dict[str, Tensor]:
        inputs = tuple([v[None] if axis == 0 else v for v, axis in zip(inputs, axes, strict=True)])
        named = {name: v[None] if named_axes[name] == 0 else v for name, v in named.items()}

        def run(p: dict[str, Tensor]) -> tuple[Tensor, ...]:
            given = {alias: p[name] for alias, name in same.items()}
            found = tensors_of(torch.func.functional_call(bare, given, inputs, named, tie_weights=False))
            return tuple([t for t, g in zip(found, use.gradients, strict=True) if g is not None])

        outputs, pull = torch.func.vjp(run, values)[:2]
        return pull(tuple(g[None].to(t.dtype) for t, g in zip(outputs, output_gradients, strict=True)))[0]

    found = torch.func.vmap(one, in_dims=(axes, named_axes, 0))(args, kwargs, gradients)
    return dense_parts({name: g.to(gradients[0].dtype) for name, g in found.items()}, parts)


class _WithoutHooks(nn.Module):
    """A module whose own hooks stay silent: they have run, and may belong to the user or watch the whole model."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.forward(*args, **kwargs)
