"""What a node kept for its own backward pass gives, example by example, without running it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from pkexplain.gradients.devices import place
from pkexplain.gradients.factors import LinearGradient
from pkexplain.gradients.fused_head import fused_head
from pkexplain.gradients.graph import Graph
from pkexplain.gradients.layout import Layout

_ELEMENTWISE = ("AddBackward0", "SubBackward0", "MulBackward0", "DivBackward0")


@dataclass(frozen=True)
class Junction:
    """A node whose gradient is to be read.

    Attributes:
        node: The node.
        place: Which of its inputs comes from parameters only.
        layout: The examples of its gradient's rows.
        names: The parameters below that input.
    """

    node: Node
    place: int
    layout: Layout
    names: tuple[str, ...]

    @property
    def source(self) -> Any:
        """The node of that input."""
        return self.node.next_functions[self.place][0]

    @property
    def edge(self) -> GradientEdge:
        """That input."""
        return GradientEdge(self.source, self.node.next_functions[self.place][1])


@dataclass(frozen=True)
class Rows:
    """A gradient, and which example each of its rows along one axis belongs to; the latter on the CPU."""

    gradient: Tensor
    axis: int
    owners: Tensor
    examples: int

    def grouped(self, *tensors: Tensor) -> list[Tensor]:
        """Arrange the rows along the axis by example, ``(examples, most rows of one, …)``, filled up with zeros."""
        return group_rows(self.owners, self.examples, [t.movedim(self.axis, 0) for t in tensors])

    def summed(self, values: Tensor, shape: Sequence[int]) -> Tensor | None:
        """Sum an example's rows to what was broadcast, ``(examples, *shape)``; None if that has the rows itself."""
        padded = [1] * (values.ndim - len(shape)) + list(shape)
        if padded[self.axis] != 1 and self.examples > 1:
            return None
        rest = [size for at, size in enumerate(values.shape) if at != self.axis]
        rows = values.movedim(self.axis, 0)
        total = values.new_zeros(self.examples, *rest)
        total.index_add_(0, *living(self.owners, rows))
        others = [size for at, size in enumerate(padded) if at != self.axis]
        broadcast = [at + 1 for at, size in enumerate(others) if size == 1]
        if broadcast:
            total = total.sum(broadcast, keepdim=True)
        return total.reshape(self.examples, *shape)


def living(owners: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return whose the rows of examples are, and these rows: nobody's are left out.

    Args:
        owners: Whose each row is, on the CPU, ``(rows,)``; −1 for nobody's.
        rows: ``(rows, …)``.
    """
    alive = owners >= 0
    if bool(alive.all()):
        return place(owners, rows.device), rows
    return place(owners[alive], rows.device), rows[place(alive.nonzero()[:, 0], rows.device)]


def group_rows(owners: Tensor, examples: int, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Arrange rows by example: ``(rows, …)`` to ``(examples, most rows of one, …)``, filled up with zeros."""
    device = tensors[0].device
    alive = owners >= 0
    counts = torch.bincount(owners[alive], minlength=examples)
    order = owners.argsort(stable=True)[int((~alive).sum()) :]
    widest = int(counts.max()) if len(counts) else 0
    if bool((counts == widest).all()):
        there = place(order, device)
        return [t[there].reshape(examples, widest, *t.shape[1:]) for t in tensors]
    starts = counts.cumsum(0) - counts
    mine = owners[order]
    slot = torch.arange(len(order), device=owners.device) - starts[mine]
    order, mine, slot = (place(index, device) for index in (order, mine, slot))
    found = []
    for t in tensors:
        wide = t.new_zeros(examples, widest, *t.shape[1:])
        wide[mine, slot] = t[order]
        found.append(wide)
    return found


def under_transpose(source: Node, graph: Graph) -> Node | None:
    """The parameter's node, if a source is its transpose."""
    if source.name() == "TBackward0" and source.next_functions[0][0] in graph.leaves:
        return source.next_functions[0][0]
    return None


def _shape(junction: Junction, graph: Graph) -> tuple[int, ...]:
    source, number = junction.source, junction.edge.output_nr
    if source in graph.leaves:
        return tuple(source.variable.shape)
    return tuple(source._input_metadata[number].shape)


def closed_form(junction: Junction, graph: Graph, rows: Rows) -> Tensor | LinearGradient | None:
    """Apply the node's closed form; None if it has none."""
    name = junction.node.name()
    if name == "ExpandBackward0":  # a class token, say, which every example is given
        return rows.summed(rows.gradient, _shape(junction, graph))
    if name in ("AddmmBackward0", "MmBackward0"):
        return _product(junction, graph, rows)
    if name in _ELEMENTWISE:
        values = _elementwise(junction, rows.gradient)
        if values is None or values.is_complex() or values.shape != rows.gradient.shape:
            return None
        return rows.summed(values, _shape(junction, graph))
    if name == "NativeLayerNormBackward0" and junction.place:
        saved: Any = junction.node
        values = rows.gradient
        if junction.place == 1:
            normalised = (saved._saved_input - saved._saved_result1) * saved._saved_result2
            values = values * normalised.to(values.dtype)
        return rows.summed(values, _shape(junction, graph))
    if "BatchNormBackward" in name and junction.place in (1, 2):
        return _batch_norm(junction, rows)
    if name == "NativeGroupNormBackward0" and junction.place in (1, 2):
        return _group_norm(junction, rows)
    if name == "ChunkedLogProbFunctionBackward":
        return _token_scores(junction, rows)
    if name == "EmbeddingBackward0" and junction.source in graph.leaves:
        return _lookup(junction, graph, rows)
    return None


def _product(junction: Junction, graph: Graph, rows: Rows) -> Tensor | LinearGradient | None:
    """X W + b, of which W or b comes from parameters."""
    node: Any = junction.node
    biased = node.name() == "AddmmBackward0"
    if biased and (node._saved_alpha != 1 or node._saved_beta != 1):
        return None
    if biased and junction.place == 0:
        return rows.summed(rows.gradient, _shape(junction, graph))
    if junction.place != (2 if biased else 1) or rows.axis != 0:
        return None
    inputs = node._saved_mat1 if biased else node._saved_self
    if inputs is None:
        return None
    x, g = rows.grouped(inputs.detach().to(rows.gradient.dtype), rows.gradient)
    if under_transpose(junction.source, graph) is not None:
        return LinearGradient(x, g, True, False)
    if junction.source in graph.leaves:
        return LinearGradient(g, x, True, False)
    return torch.einsum("bmi,bmo->bio", x, g)


def _elementwise(junction: Junction, gradient: Tensor) -> Tensor | None:
    node: Any = junction.node
    name, place = node.name(), junction.place
    if name == "AddBackward0":
        return gradient * node._saved_alpha if place == 1 and node._saved_alpha != 1 else gradient
    if name == "SubBackward0":
        return -gradient * node._saved_alpha if place == 1 else gradient
    if name == "MulBackward0":
        other = node._saved_other if place == 0 else node._saved_self
        return gradient * (other.conj() if other.is_complex() else other)
    return gradient / node._saved_other if place == 0 else None


def _group_norm(junction: Junction, rows: Rows) -> Tensor | None:
    """The scale and the shift of a GroupNorm; the node itself fails if it is asked for these alone."""
    node: Any = junction.node
    values = rows.gradient
    if rows.axis != 0:
        return None
    if junction.place == 1:
        x = node._saved_input
        groups = x.reshape(len(x), node._saved_group, -1)
        normed = (groups - node._saved_result1[:, :, None]) * node._saved_result2[:, :, None]
        values = values * normed.view_as(x).to(values.dtype)
    values = values.flatten(2).sum(2) if values.ndim > 2 else values
    return rows.summed(values, (values.shape[1],))


def _batch_norm(junction: Junction, rows: Rows) -> Tensor | None:
    """The scale and the shift of a BatchNorm."""
    node: Any = junction.node
    values = rows.gradient
    if junction.place == 1:
        x = node._saved_input
        if node._saved_training:
            mean, inverse = node._saved_result1, node._saved_result2
        else:
            eps = node._saved_eps if hasattr(node, "_saved_eps") else node._saved_epsilon
            mean, inverse = node._saved_running_mean, (node._saved_running_var + eps).rsqrt()
        view = (1, -1, *(1,) * (x.ndim - 2))
        values = values * ((x - mean.view(view)) * inverse.view(view)).to(values.dtype)
    if rows.axis != 0:
        return None
    values = values.flatten(2).sum(2) if values.ndim > 2 else values
    return rows.summed(values, (values.shape[1],))


def _lookup(junction: Junction, graph: Graph, rows: Rows) -> Tensor | None:
    """Rows of a table."""
    node: Any = junction.node
    if node._saved_scale_grad_by_freq or rows.axis >= rows.gradient.ndim - 1:
        return None
    count, width = _shape(junction, graph)
    indices = node._saved_indices
    padding = node._saved_padding_idx
    gradient = rows.gradient
    if padding >= 0:
        gradient = gradient * (indices != padding)[..., None]
    view = [1] * indices.ndim
    view[rows.axis] = -1
    owner = place(rows.owners.clamp_min(0), gradient.device).view(view).expand(indices.shape)
    total = gradient.new_zeros(rows.examples * count, width)
    total.index_add_(0, (owner * count + indices).flatten(), gradient.reshape(-1, width))
    return total.view(rows.examples, count, width)


def _token_scores(junction: Junction, rows: Rows) -> Tensor | LinearGradient | None:
    """The weight, or the bias, of a language model's fused head."""
    head = fused_head(junction.node)
    if head is None or junction.place not in (1, 2) or rows.axis != 0 or rows.gradient.ndim != 1:
        return None
    scores = head.score_gradients(rows.gradient)
    if junction.place == 2:
        return rows.summed(scores, (scores.shape[1],))
    x, g = rows.grouped(head.hidden.float(), scores)
    return LinearGradient(x, g, True, False)
