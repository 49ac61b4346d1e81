"""Which layers can be recorded, by which rule, and how their parameters are laid out in one flat vector."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pkexplain.errors import ConfigurationError, UnsupportedLayerError
from pkexplain.gradients import _layer_rules as rules
from pkexplain.gradients._layer_rules import Parts, Rule, Use
from pkexplain.gradients._recurrent import recurrent, recurrent_axes, recurrent_misuse, recurrent_unfit
from pkexplain.gradients.compiled import named_modules, named_parameters
from pkexplain.gradients.factors import DenseGradient, ExampleGradients, MatrixGradient

__all__ = ["Block", "Layer", "find_layers", "flatten_blocks", "refusal"]


@dataclass(frozen=True)
class Block:
    """Parameters owned by one layer and one optimizer group, contiguous in the flat vector of parameters.

    A parameter that several layers share is a separate block.

    Attributes:
        name: The layer's path in the model, the first of several (``""`` for the model itself).
        parameters: The parameters' names in the model.
        shapes: Their shapes.
        group: The optimizer's parameter group.
        start: The block's first position in the flat vector.
        matrix: ``(rows, columns)`` if the gradient is a `MatrixGradient`, otherwise None.
    """

    name: str
    parameters: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    group: int
    start: int
    matrix: tuple[int, int] | None

    @property
    def numel(self) -> int:
        """The number of parameters."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def span(self) -> slice:
        """The block's slice of the flat vector."""
        return slice(self.start, self.start + self.numel)


@dataclass(frozen=True)
class Layer:
    """A module that owns trainable parameters, with its rule and its blocks.

    Attributes:
        name: The module's path in the model.
        module: The module.
        rule: Computes the gradients of its blocks from one use of the module; None if only the graph can tell.
        blocks: For each block, its position in the model's list of blocks, and the local names of this module's
            parameters in it.
        batch_axes: The batch dimension of each tensor that the module returns; the last entry is repeated.
        misuse: Returns why the rule does not hold for one use of the module, or None.
    """

    name: str
    module: nn.Module
    rule: Rule | None
    blocks: tuple[tuple[int, tuple[str, ...]], ...]
    batch_axes: tuple[int, ...] = (0,)
    misuse: Callable[[Use], str | None] = lambda use: None


@dataclass(frozen=True)
class Composite:
    """How a layer of several matrices is recorded.

    Attributes:
        rule: Its rule.
        unfit: Returns why a module can never be recorded, or None.
        misuse: Returns why one use of it cannot be recorded, or None.
        axes: The batch dimension of each tensor that it returns.
    """

    rule: Rule
    unfit: Callable[[Any], str | None]
    misuse: Callable[[Use], str | None]
    axes: Callable[[Any], tuple[int, ...]]


_RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: rules.linear,
    nn.Conv1d: rules.convolution,
    nn.Conv2d: rules.convolution,
    nn.Conv3d: rules.convolution,
    nn.Embedding: rules.embedding,
    nn.LayerNorm: rules.scale_and_shift,
    nn.RMSNorm: rules.scale_and_shift,
    nn.GroupNorm: rules.scale_and_shift,
    nn.BatchNorm1d: rules.batch_norm,
    nn.BatchNorm2d: rules.batch_norm,
    nn.BatchNorm3d: rules.batch_norm,
}
_RECURRENT = Composite(recurrent, recurrent_unfit, recurrent_misuse, recurrent_axes)
_COMPOSITES: dict[type[nn.Module], Composite] = {
    nn.RNN: _RECURRENT,
    nn.LSTM: _RECURRENT,
    nn.GRU: _RECURRENT,
}
"""Layers of several matrices, which return several tensors."""
_SEPARATE: tuple[Rule, ...] = (rules.transposed_linear, recurrent)
"""Rules that put every parameter in a separate block."""
_BATCH_NORM = nn.modules.batchnorm._BatchNorm
_INSTANCE_NORM = nn.modules.instancenorm._InstanceNorm
_STATELESS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Bilinear,
    nn.PReLU,
)
"""Layers of torch that may be differentiated again, example by example, as they keep no state and draw no numbers."""


def _is_transposed_linear(module: nn.Module) -> bool:
    """Whether it is the Conv1D of `transformers`, found without importing it."""
    kinds = [k for k in type(module).__mro__ if (k.__module__, k.__name__) == ("transformers.pytorch_utils", "Conv1D")]
    return any(type(module).forward is kind.forward for kind in kinds)


def _matrix_shape(module: Any, names: tuple[str, ...], rule: Rule | None) -> tuple[int, int] | None:
    if rule is rules.embedding:
        return tuple(module.weight.shape)
    if rule is rules.transposed_linear:
        return tuple(module.weight.shape) if names == ("weight",) else None
    if rule is recurrent or rule is None:
        shape = tuple(module.get_parameter(names[0]).shape)
        return (shape[0], math.prod(shape[1:])) if len(shape) > 1 and len(names) == 1 else None
    if rule not in (rules.linear, rules.convolution):
        return None
    rows = len(module.weight)
    return rows, ("weight" in names) * (module.weight.numel() // rows) + ("bias" in names)


def _rule_for(module: nn.Module) -> Rule | None:
    """Choose the per-example rule of a module that owns trainable parameters; None if only the graph can tell."""
    options: Any = module
    if _is_transposed_linear(module):
        return rules.transposed_linear
    composite = _composite(module)
    if composite:
        return None if composite.unfit(module) else composite.rule
    own = {name for name, _ in module.named_parameters(recurse=False)}
    for kind, rule in _RULES.items():
        plain = "weight" in own and own <= {"weight", "bias"}  # a parametrised weight is no parameter
        if isinstance(module, kind) and type(module).forward is kind.forward and plain:
            changed = rule is rules.embedding and (options.max_norm or options.scale_grad_by_freq or options.sparse)
            grouped = rule is rules.convolution and options.groups > 1
            return None if changed else rules.by_example if grouped else rule
    stateless = any(isinstance(module, kind) and type(module).forward is kind.forward for kind in _STATELESS)
    return rules.by_example if stateless and "weight" in own and own <= {"weight", "bias"} else None


def _composite(module: nn.Module) -> Composite | None:
    """Find the entry of a layer of several matrices; None for other layers."""
    for kind, entry in _COMPOSITES.items():
        if isinstance(module, kind) and type(module).forward is kind.forward:
            return entry
    return None


def refusal(name: str, module: nn.Module, why: str) -> UnsupportedLayerError:
    """Make the error for a layer that cannot be recorded: its name, why, and what to do."""
    return UnsupportedLayerError(
        f"recording layer {name or '(the model itself)'!r}",
        f"no per-example gradient rule fits it: {why}",
        got=type(module).__name__,
        expected="Linear, Conv1d/2d/3d, Embedding, LayerNorm, GroupNorm, BatchNorm, RNN, LSTM or GRU, batch first",
        source="the layers that can be recorded",
        fix="Replace it, or freeze it and keep it in evaluation mode: "
        f"model.get_submodule({name!r}).requires_grad_(False).eval()",
    )


@dataclass(frozen=True)
class _Owned:
    """Parameters of one module that form one block."""

    group: int
    path: str
    module: nn.Module
    rule: Rule | None
    names: tuple[str, ...]
    parameters: tuple[str, ...]
    shared: bool

    @property
    def matrix(self) -> tuple[int, int] | None:
        return _matrix_shape(self.module, self.names, self.rule)


def find_layers(model: nn.Module, groups: dict[str, int]) -> tuple[list[Layer], list[Block]]:
    """Find every layer with parameters to record, and arrange them in one flat vector, group after group.

    Args:
        model: The model.
        groups: The optimizer's parameter group for each trainable parameter's name.

    Returns:
        The layers, and the blocks in the order of the flat vector. A parameter that several layers share is a separate
        block, which receives gradients from all of them. A BatchNorm without a parameter to record is a layer without
        blocks: the layer before it needs to know about it.

    Raises:
        ConfigurationError: Nothing is trainable.
    """
    if not groups:
        raise ConfigurationError(
            "recording a model",
            "no parameter would change",
            got="no trainable parameter of the model in the optimizer",
            expected="at least one",
            source="requires_grad and optimizer.param_groups",
            fix="Set requires_grad=True on the parameters to train and pass them to the optimizer",
        )
    layers, blocks = _lay_out(sorted(_owned(model, groups), key=lambda owned: owned.group))
    known = {id(layer.module) for layer in layers}
    norms = [(path, m) for path, m in named_modules(model) if isinstance(m, _BATCH_NORM) and id(m) not in known]
    return [*layers, *(Layer(path, module, rules.batch_norm, ()) for path, module in norms)], blocks


def _owned(model: nn.Module, groups: dict[str, int]) -> Iterator[_Owned]:
    """Iterate over the modules that own parameters to record, with one entry for each of their blocks."""
    names = {id(p): n for n, p in named_parameters(model)}
    owners: dict[str, int] = {}
    found: list[tuple[str, nn.Module, dict[str, str]]] = []
    inside: set[nn.Module] = set()
    for path, module in named_modules(model):
        if module in inside:
            continue
        whole = _composite(module) is not None or isinstance(module, nn.MultiheadAttention)
        inside.update(part for part in module.modules() if whole and part is not module)
        local = {n: names[id(p)] for n, p in module.named_parameters(recurse=whole) if names[id(p)] in groups}
        found += [(path, module, local)] if local else []
        for full in local.values():
            owners[full] = owners.get(full, 0) + 1
    for path, module, local in found:
        rule = _rule_for(module)
        together: dict[tuple[int, str], list[str]] = {}
        for name, full in local.items():
            matrix = rule is None and module.get_parameter(name).ndim > 1
            alone = owners[full] > 1 or rule in _SEPARATE or matrix
            together.setdefault((groups[full], full if alone else ""), []).append(name)
        for (group, shared), members in together.items():
            full = tuple(local[name] for name in members)
            yield _Owned(group, path, module, rule, tuple(members), full, owners.get(shared, 0) > 1)


def _lay_out(found: Sequence[_Owned]) -> tuple[list[Layer], list[Block]]:
    """Place the parameters one after another in the order in which they were found."""
    blocks: list[Block] = []
    layers: dict[str, Layer] = {}
    shared: dict[str, int] = {}
    for owned in found:
        position = shared.get(owned.parameters[0]) if owned.shared else None
        if position is None:
            position = len(blocks)
            shapes = tuple(tuple(owned.module.get_parameter(name).shape) for name in owned.names)
            start = blocks[-1].span.stop if blocks else 0
            blocks.append(Block(owned.path, owned.parameters, shapes, owned.group, start, owned.matrix))
            shared.update({owned.parameters[0]: position} if owned.shared else {})
        elif blocks[position].matrix != owned.matrix:  # a matrix for one owner, not for another
            blocks[position] = replace(blocks[position], matrix=None)
        known = layers[owned.path].blocks if owned.path in layers else ()
        composite = _composite(owned.module) if owned.rule is not None else None
        layer = Layer(owned.path, owned.module, owned.rule, (*known, (position, owned.names)))
        if composite:
            layer = replace(layer, batch_axes=composite.axes(owned.module), misuse=composite.misuse)
        layers[owned.path] = layer
    unlike = {shared[owned.parameters[0]] for owned in found if owned.shared and owned.matrix}
    unlike = {position for position in unlike if blocks[position].matrix is None}
    return [_formed(layer, unlike) for layer in layers.values()], blocks


def _formed(layer: Layer, positions: set[int]) -> Layer:
    """Make a layer form its gradients of the blocks at ``positions``, which are not matrices for other owners."""
    forming = {names for position, names in layer.blocks if position in positions}
    plain = layer.rule
    if not forming or plain is None:
        return layer

    def rule(use: Use, parts: Parts) -> list[ExampleGradients]:
        return [
            DenseGradient(g.dense()) if names in forming and isinstance(g, MatrixGradient) else g
            for names, g in zip(parts, plain(use, parts), strict=True)
        ]

    return replace(layer, rule=rule)


def flatten_blocks(blocks: Sequence[Block], tensors: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Copy named tensors into one flat vector, ``(parameters,)``, in the blocks' order."""
    return torch.cat([tensors[name].detach().to(dtype).flatten() for block in blocks for name in block.parameters])
