"""What forward hooks note about each use of a layer, and the gradients of its outputs as they arrive."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from pkexplain.gradients._closed_forms import group_rows, living
from pkexplain.gradients._layer_rules import (
    Parts,
    Rule,
    Use,
    embedding,
    linear,
    scale_and_shift,
    tensors_of,
    transposed_linear,
)
from pkexplain.gradients.batch_norm import before_norms, is_before_norm
from pkexplain.gradients.factors import DenseGradient, ExampleGradients, FormedGradient, MatrixGradient
from pkexplain.gradients.layers import Layer
from pkexplain.gradients.layout import Layout

_BY_ROW: tuple[Rule, ...] = (linear, transposed_linear, embedding)
"""Rules that treat the rows of their input one by one, so that these can be arranged by example first."""


@dataclass
class NotedUse:
    """One use of a layer in a forward pass.

    Attributes:
        layer: The layer.
        index: The layer's place among the layers watched.
        occurrence: How many uses of the layer came before it in the step.
        use: Its inputs.
        edges: Its outputs that need a gradient, as edges of the graph: an in-place ReLU turns a tensor into its own.
        places: Which of the returned tensors those are.
        count: How many tensors it returned.
        shapes: The shapes of ``edges``.
        followers: Uses of layers whose input is its output.
        arrived: The gradients of its outputs, in the order of ``edges``.
    """

    layer: Layer
    index: int
    occurrence: int
    use: Use
    edges: list[GradientEdge] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    count: int = 0
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    followers: list[NotedUse] = field(default_factory=list)
    arrived: dict[int, Tensor] = field(default_factory=dict)

    @property
    def key(self) -> tuple[int, int]:
        """The layer and the number of its use."""
        return self.index, self.occurrence

    def standard(self, layouts: Mapping[int, Layout | None], examples: int) -> bool:
        """Whether each output has one row per example, in order, where the layer's rule expects it."""
        axes = self.layer.batch_axes
        found = [layouts[at] for at in range(len(self.edges))]
        return all(
            layout is not None and layout.standard(shape, examples, axes[min(place, len(axes) - 1)])
            for layout, shape, place in zip(found, self.shapes, self.places, strict=True)
        )

    def gradients(self, dtype: torch.dtype | None) -> Use:
        """Return the use with the gradients that arrived."""
        given: list[Tensor | None] = [None] * self.count
        for at, gradient in self.arrived.items():
            given[self.places[at]] = gradient.detach().to(dtype or gradient.dtype)
        return replace(self.use, gradients=tuple(given))


@contextmanager
def noting_uses(layers: Sequence[Layer], note: Callable[[NotedUse], None], skip: Callable[[], bool]) -> Iterator[None]:
    """Note every use of some layers within the block. Forward values are not touched.

    Args:
        layers: The layers.
        note: Called with each use.
        skip: Whether a forward pass is not to be noted.
    """
    made: dict[int, tuple[weakref.ref[Tensor], NotedUse]] = {}  # which use returned a tensor
    counts: dict[int, int] = {}
    noted_uses: list[NotedUse] = []

    def hook_for(index: int, layer: Layer) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if skip() or not torch.is_grad_enabled():
                return
            occurrence = counts[index] = counts.get(index, -1) + 1
            noted = NotedUse(layer, index, occurrence, Use(module, args, kwargs, module.training))
            returned = list(tensors_of(output))
            noted.count = len(returned)
            for place, tensor in enumerate(returned):
                if tensor.requires_grad and tensor.grad_fn is not None:
                    noted.edges.append(get_gradient_edge(tensor))
                    noted.places.append(place)
                    noted.shapes.append(tuple(tensor.shape))
            if noted.edges:
                given = noted.use.given(0, "input")
                source = made.get(id(given))
                if source and source[0]() is given:
                    source[1].followers.append(noted)
                if isinstance(output, Tensor):
                    made[id(output)] = weakref.ref(output), noted
                noted_uses.append(noted)
                note(noted)

        return hook

    handles = [
        layer.module.register_forward_hook(hook_for(index, layer), with_kwargs=True)
        for index, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for noted in noted_uses:  # breaks a cycle: a node's hook holds a use that holds the node
            noted.followers.clear()
            noted.arrived.clear()
            noted.edges.clear()


def standard_layouts(noted: NotedUse) -> dict[int, Layout | None]:
    """One row per example, where the layer's rule expects it."""
    axes = noted.layer.batch_axes
    return {at: Layout(axes[min(place, len(axes) - 1)], "contiguous") for at, place in enumerate(noted.places)}


def split_use(
    noted: NotedUse,
    parts: Parts,
    layouts: Mapping[int, Layout | None],
    examples: int,
    dtype: torch.dtype | None,
    through_norms: bool = True,
) -> Sequence[Sequence[ExampleGradients]] | None:
    """Apply a layer's rule to one use.

    Args:
        noted: The use, with its outputs' gradients.
        parts: The blocks wanted.
        layouts: The layout of each output.
        examples: The batch size.
        dtype: Dtype of the gradients; None for that of the outputs.
        through_norms: Whether a BatchNorm after the layer is followed.

    Returns:
        Gradients for each block, possibly several, which add up; None if the rule cannot be applied to this use.
    """
    layer = noted.layer
    if layer.rule is None or not noted.arrived or not parts:
        return None
    with torch.no_grad():
        use = noted.gradients(dtype)
        if layer.misuse(use):
            return None
        if noted.standard(layouts, examples):
            return _by_rule(noted, use, parts, dtype, through_norms)
        layout = layouts[0]
        if len(noted.edges) != 1 or layout is None:
            return None
        return _rearranged(layer, use, parts, layout, examples)


def _by_rule(
    noted: NotedUse, use: Use, parts: Parts, dtype: torch.dtype | None, through_norms: bool
) -> Sequence[Sequence[ExampleGradients]]:
    rule = noted.layer.rule
    assert rule is not None
    norms = [
        other.gradients(dtype)
        for other in noted.followers
        if through_norms and other.arrived and is_before_norm(rule, use.gradient, other.use)
    ]
    return before_norms(rule, use, norms, parts) if norms else [rule(use, parts)]


def _rearranged(
    layer: Layer, use: Use, parts: Parts, layout: Layout, examples: int
) -> Sequence[Sequence[ExampleGradients]] | None:
    """Apply a rule where rows are not examples: arrange the rows by example, or add up the gradients of the rows."""
    rule, gradient, axis = layer.rule, use.gradient, layout.axis
    assert rule is not None
    owners = layout.owners(gradient.shape[axis], examples)
    x = use.given(0, "x" if rule is transposed_linear and "x" in use.kwargs else "input")
    by_row = rule in _BY_ROW or (rule is scale_and_shift and isinstance(use.module, (nn.LayerNorm, nn.RMSNorm)))
    rows = slice(axis + 1)
    if by_row and isinstance(x, Tensor) and x.shape[rows] == gradient.shape[rows] and axis < gradient.ndim - 1:
        x, gradient = group_rows(owners, examples, [t.movedim(axis, 0) for t in (x.detach(), gradient)])
        return [rule(replace(use, args=(x,), kwargs={}, gradients=(gradient,)), parts)]
    if axis != 0:
        return None
    return [[_summed(piece, owners, examples) for piece in rule(use, parts)]]


def _summed(rows: ExampleGradients, owners: Tensor, examples: int) -> ExampleGradients:
    """Add up the gradients of rows that belong to the same example."""
    if isinstance(rows, MatrixGradient):
        formed = rows.sketch(None, None)
        total = formed.new_zeros(examples, *formed.shape[1:])
        terms = rows.positions * max(1, len(rows) // max(1, examples))
        return FormedGradient(total.index_add_(0, *living(owners, formed)), rows.weight, rows.bias, terms)
    dense = rows.dense()
    total = dense.new_zeros(examples, dense.shape[1])
    return DenseGradient(total.index_add_(0, *living(owners, dense)))
