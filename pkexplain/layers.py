"""Which layers can be recorded, and the rule that gives each one's per-example gradients.

Matrices (Linear, Conv, Embedding) keep their gradients in factors; LayerNorm and GroupNorm have a rule in closed form;
every other deterministic layer is differentiated one example at a time with `torch.func`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pkexplain.errors import ConfigurationError, UnsupportedLayerError, message
from pkexplain.gradients import (
    ConvolutionGradient,
    DenseGradient,
    EmbeddingGradient,
    ExampleGradients,
    LinearGradient,
)

__all__ = ["Block", "Layer", "find_layers", "flatten_blocks", "refusal", "refuse_mixing"]


@dataclass(frozen=True)
class Block:
    """Parameters that one layer owns and one optimizer group moves, side by side in the flat vector of parameters.

    Attributes:
        name: The layer's path in the model (``""`` for the model itself).
        parameters: The parameters' names in the model.
        shapes: Their shapes.
        group: The optimizer's parameter group that moves them.
        start: Where the block begins in the flat vector.
        matrix: ``(rows, columns)`` where the gradient is a `MatrixGradient`, otherwise None.
    """

    name: str
    parameters: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    group: int
    start: int
    matrix: tuple[int, int] | None

    @property
    def numel(self) -> int:
        """How many numbers the block holds."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def span(self) -> slice:
        """Where the block lies in the flat vector."""
        return slice(self.start, self.start + self.numel)


@dataclass(frozen=True)
class Layer:
    """A module that owns trainable parameters, with its rule and its blocks.

    Attributes:
        name: The module's path in the model.
        module: The module.
        rule: Turns what the module was given and its output's gradient into one gradient per local parameter name, or
            into a matrix gradient for all of them.
        blocks: For each block, its position in the model's list of blocks and the local parameter names it holds.
    """

    name: str
    module: nn.Module
    rule: Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor, tuple[str, ...]], ExampleGradients]
    blocks: tuple[tuple[int, tuple[str, ...]], ...]


def _linear(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], gradient: Tensor, names: tuple[str, ...]
) -> ExampleGradients:
    x = (args[0] if args else kwargs["input"]).detach().to(gradient.dtype)
    n = len(gradient)
    return LinearGradient(
        x.reshape(n, -1, x.shape[-1]), gradient.reshape(n, -1, gradient.shape[-1]), "weight" in names, "bias" in names
    )


def _convolution(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], gradient: Tensor, names: tuple[str, ...]
) -> ExampleGradients:
    x = (args[0] if args else kwargs["input"]).detach().to(gradient.dtype)
    padding = module.padding
    if isinstance(padding, str) or module.padding_mode != "zeros":  # uneven, or not of zeros: pad here
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        padding = (0,) * len(module.kernel_size)
    sizes = (module.kernel_size, module.stride, module.dilation, padding)
    return ConvolutionGradient(x, gradient.flatten(2), *sizes, "weight" in names, "bias" in names)


def _embedding(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], gradient: Tensor, names: tuple[str, ...]
) -> ExampleGradients:
    tokens = (args[0] if args else kwargs["input"]).detach()
    n = len(gradient)
    tokens, gradient = tokens.reshape(n, -1), gradient.reshape(n, -1, gradient.shape[-1])
    if module.padding_idx is not None:
        gradient = gradient * (tokens != module.padding_idx)[:, :, None]
    return EmbeddingGradient(tokens, gradient, module.num_embeddings)


def _scale_and_shift(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], gradient: Tensor, names: tuple[str, ...]
) -> ExampleGradients:
    x = (args[0] if args else kwargs["input"]).detach().to(gradient.dtype)
    if isinstance(module, nn.LayerNorm):
        normalised = F.layer_norm(x, module.normalized_shape, eps=module.eps)
        axes = tuple(range(1, x.ndim - len(module.normalized_shape)))
    else:
        normalised = F.group_norm(x, module.num_groups, eps=module.eps)
        axes = tuple(range(2, x.ndim))
    parts = {"weight": gradient * normalised, "bias": gradient}
    summed = [parts[name].sum(axes) if axes else parts[name] for name in names]
    return DenseGradient(torch.cat([part.flatten(1) for part in summed], dim=1))


def _by_example(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], gradient: Tensor, names: tuple[str, ...]
) -> ExampleGradients:
    """Differentiate the module again, one example at a time (`torch.func.vmap` of `torch.func.vjp`)."""
    n = len(gradient)
    detach = lambda value: value.detach() if isinstance(value, Tensor) else value  # noqa: E731 - used twice, one line
    args, kwargs = tuple(map(detach, args)), {name: detach(value) for name, value in kwargs.items()}
    batched = lambda value: isinstance(value, Tensor) and value.ndim > 0 and len(value) == n  # noqa: E731
    axes = tuple(0 if batched(value) else None for value in args)
    named_axes = {name: 0 if batched(value) else None for name, value in kwargs.items()}
    values = {f"inner.{name}": getattr(module, name).detach() for name in names}
    bare = _WithoutHooks(module)

    def one(inputs: tuple[Any, ...], named: dict[str, Any], output_gradient: Tensor) -> dict[str, Tensor]:
        inputs = tuple([v[None] if axis == 0 else v for v, axis in zip(inputs, axes, strict=True)])
        named = {name: v[None] if named_axes[name] == 0 else v for name, v in named.items()}
        output, pull = torch.func.vjp(lambda p: torch.func.functional_call(bare, p, inputs, named), values)[:2]
        return pull(output_gradient[None].to(output.dtype))[0]

    gradients = torch.func.vmap(one, in_dims=(axes, named_axes, 0))(args, kwargs, gradient)
    return DenseGradient(torch.cat([gradients[name].to(gradient.dtype).flatten(1) for name in values], dim=1))


class _WithoutHooks(nn.Module):
    """A module whose own hooks stay silent: they have run, and may belong to the user or watch the whole model."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.forward(*args, **kwargs)


_RULES: dict[type[nn.Module], Callable[..., ExampleGradients]] = {
    nn.Linear: _linear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Conv3d: _convolution,
    nn.Embedding: _embedding,
    nn.LayerNorm: _scale_and_shift,
    nn.GroupNorm: _scale_and_shift,
}
_MIXES_EXAMPLES = (nn.modules.batchnorm._BatchNorm,)
_WITHOUT_RULE = (
    nn.RNNBase,
    nn.MultiheadAttention,
    nn.EmbeddingBag,
    nn.RNNCellBase,
    nn.utils.parametrize.ParametrizationList,  # its output is a weight, not one row per example
)
_RANDOM = (nn.modules.dropout._DropoutNd, nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)


def _matrix_shape(module: Any, names: tuple[str, ...], rule: Any) -> tuple[int, int] | None:
    if rule is _embedding:
        return tuple(module.weight.shape)
    if rule not in (_linear, _convolution):
        return None
    rows = len(module.weight)
    return rows, ("weight" in names) * (module.weight.numel() // rows) + ("bias" in names)


def _rule_for(name: str, module: nn.Module) -> Callable[..., ExampleGradients]:
    """Choose the per-example rule of a module that owns trainable parameters, or refuse it by name."""
    options: Any = module
    for kind, rule in _RULES.items():
        if isinstance(module, kind) and type(module).forward is kind.forward:
            strange = [n for n, _ in module.named_parameters(recurse=False) if n not in ("weight", "bias")]
            if strange:
                raise refusal(name, module, f"its weight is made of {', '.join(strange)} (a hook of weight_norm?)")
            if rule is _convolution and options.groups > 1:
                return _by_example
            if rule is _embedding and (options.max_norm or options.scale_grad_by_freq or options.sparse):
                raise refusal(name, module, "max_norm, scale_grad_by_freq and sparse gradients change what is summed")
            return rule
    for path, part in module.named_modules():
        where = f"its part {path!r} ({type(part).__name__})" if path else type(part).__name__
        if isinstance(part, _WITHOUT_RULE):
            raise refusal(name, module, f"{where} has no per-example rule")
        if isinstance(part, _MIXES_EXAMPLES):
            raise refusal(name, module, f"{where} mixes the examples of a batch")
        if isinstance(part, _RANDOM) and path and getattr(part, "p", None) != 0:
            raise refusal(name, module, f"it owns parameters directly and {where} draws random numbers")
    return _by_example


def refuse_mixing(model: nn.Module) -> None:
    """Refuse a model in which a batch's statistics reach its examples: such a gradient belongs to no single example.

    Raises:
        UnsupportedLayerError: A BatchNorm, trainable or not, normalises with the statistics of the batch.
    """
    for path, module in model.named_modules():
        if isinstance(module, _MIXES_EXAMPLES) and (module.training or module.running_mean is None):
            raise refusal(path, module, "it normalises with the statistics of the batch, which mixes its examples")


def refusal(name: str, module: nn.Module, why: str) -> UnsupportedLayerError:
    """Say by name which layer cannot be recorded, why, and what to do."""
    hint = " (GroupNorm for BatchNorm)" if isinstance(module, _MIXES_EXAMPLES) else ""
    return UnsupportedLayerError(
        message(
            f"recording layer {name or '(the model itself)'!r}",
            f"no per-example gradient rule fits it: {why}",
            got=type(module).__name__,
            expected="Linear, Conv1d/2d/3d, Embedding, LayerNorm, GroupNorm, or a deterministic layer that treats "
            "every example alone",
            source="the layers that can be recorded",
            fix=f"Replace it{hint}, or freeze it and keep it in evaluation mode: "
            f"model.get_submodule({name!r}).requires_grad_(False).eval()",
        )
    )


def find_layers(model: nn.Module, groups: dict[str, int]) -> tuple[list[Layer], list[Block]]:
    """Find every layer with parameters to record, and lay the parameters out in one flat vector, group after group.

    Args:
        model: The model.
        groups: The optimizer's parameter group for each trainable parameter's name.

    Returns:
        The layers, and the blocks in the order of the flat vector.

    Raises:
        UnsupportedLayerError: A layer has no per-example rule, or mixes the examples of a batch.
        ConfigurationError: Nothing is trainable, or a parameter is shared by two layers.
    """
    if not groups:
        raise ConfigurationError(
            message(
                "recording a model",
                "no parameter would change",
                got="no trainable parameter of the model in the optimizer",
                expected="at least one",
                source="requires_grad and optimizer.param_groups",
                fix="Set requires_grad=True on the parameters to train and give them to the optimizer",
            )
        )
    refuse_mixing(model)
    names = {id(p): n for n, p in model.named_parameters()}
    found: list[tuple[int, str, nn.Module, Any, tuple[str, ...]]] = []
    owners: dict[str, str] = {}
    for path, module in model.named_modules():
        local: dict[int, list[str]] = {}
        for name, parameter in module.named_parameters(recurse=False):
            full = names[id(parameter)]
            if full not in groups:
                continue
            if full in owners:
                raise ConfigurationError(
                    message(
                        f"recording parameter {full!r}",
                        "two layers share it",
                        got=f"{owners[full]!r} and {path!r}",
                        expected="one owner",
                        source="model.named_modules()",
                        fix="Untie the two layers, or freeze the shared parameter",
                    )
                )
            owners[full] = path
            local.setdefault(groups[full], []).append(name)
        rule = _rule_for(path, module) if local else None
        found += [(group, path, module, rule, tuple(members)) for group, members in local.items()]
    return _lay_out(found, names)


def _lay_out(
    found: list[tuple[int, str, nn.Module, Any, tuple[str, ...]]], names: dict[int, str]
) -> tuple[list[Layer], list[Block]]:
    """Place the parameters found (group, path, module, rule, local names) one after another, group after group."""
    blocks: list[Block] = []
    layers: dict[str, Layer] = {}
    start = 0
    for group, path, module, rule, members in sorted(found, key=lambda item: item[0]):
        shapes = tuple(tuple(getattr(module, name).shape) for name in members)
        full = tuple(names[id(getattr(module, name))] for name in members)
        block = Block(path, full, shapes, group, start, _matrix_shape(module, members, rule))
        known = layers[path].blocks if path in layers else ()
        layers[path] = Layer(path, module, rule, (*known, (len(blocks), members)))
        blocks.append(block)
        start += block.numel
    return list(layers.values()), blocks


def flatten_blocks(blocks: Sequence[Block], tensors: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Copy named tensors into one flat vector, ``(parameters,)``, in the blocks' order."""
    return torch.cat([tensors[name].detach().to(dtype).flatten() for block in blocks for name in block.parameters])
