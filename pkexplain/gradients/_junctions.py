"""Per-example gradients at a junction: a node where what belongs to examples meets what comes from parameters alone.

A junction's gradient has rows that belong to examples; its other input, made of parameters only, has not. The gradient
of that input, example by example, follows in closed form from what the node saved for its own backward pass; where
there is no closed form the node itself is run once for each example, with the other examples' rows masked. That is
exact also under dropout, fused attention and custom functions, as nothing is computed anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from pkexplain.gradients.factors import LinearGradient
from pkexplain.gradients.graph import Graph, below
from pkexplain.gradients.layout import Layout

Found = tuple[str, Tensor | LinearGradient]
"""A parameter's name and its per-example gradients: dense, ``(examples, *shape)``, or in factors."""

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


def read_junction(junction: Junction, graph: Graph, gradients: Sequence[Tensor | None], examples: int) -> list[Found]:
    """Compute the examples' gradients of the parameters below a junction.

    Args:
        junction: The junction.
        graph: Its graph.
        gradients: The gradients of the node's outputs.
        examples: The batch size.
    """
    places = [at for at, gradient in enumerate(gradients) if gradient is not None]
    if not places:
        return []
    some: Any = gradients[places[0]]
    gradient = some.detach()
    owners = junction.layout.owners(gradient.shape[junction.layout.axis], examples).to(gradient.device)
    if len(places) == 1 and not _packed(junction.node):
        with torch.no_grad():
            closed = _closed(junction, graph, _Rows(gradient, junction.layout.axis, owners, examples))
        if isinstance(closed, LinearGradient):
            return [(graph.leaves[_under_transpose(junction.source, graph) or junction.source], closed)]
        if closed is not None:
            return list(_down(junction, graph, closed))
    return list(_masked(junction, graph, gradients, owners, examples))


def find_junctions(
    graph: Graph,
    layouts: Mapping[Node, Layout | None],
    layout_of: Callable[[Node, tuple[int, ...]], Layout | None],
    names: set[str],
) -> list[Junction]:
    """Find the nodes with examples' rows, one of whose inputs comes from some parameters and from no example.

    Args:
        graph: The graph.
        layouts: The layout of each node that the passes reached.
        layout_of: Returns the layout to read a node by.
        names: The parameters.
    """
    data: set[Node] = set()
    reach: dict[Node, frozenset[str]] = {}
    empty: frozenset[str] = frozenset()
    for node in graph.deepest_first:
        inputs = [m for m, _ in node.next_functions if m is not None]
        if layouts.get(node) is not None or any(m in data for m in inputs):
            data.add(node)
        mine = frozenset([graph.leaves[node]]) & names if node in graph.leaves else empty
        for m in inputs:
            mine = mine | reach.get(m, empty) if reach.get(m) else mine
        reach[node] = mine
    found: list[Junction] = []
    for node in graph.order:
        if node not in data or node not in layouts:
            continue
        shape = tuple(node._input_metadata[0].shape) if node._input_metadata else ()
        for place, (source, _) in enumerate(node.next_functions):
            if source is None or source in data or not reach.get(source):
                continue
            layout = layout_of(node, shape)
            if layout is not None:
                found.append(Junction(node, place, layout, tuple(sorted(reach[source]))))
    return found


@dataclass(frozen=True)
class _Rows:
    """A gradient, and which example each of its rows along one axis belongs to."""

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
        alive = self.owners >= 0
        rows = values.movedim(self.axis, 0)
        total = values.new_zeros(self.examples, *rest)
        total.index_add_(0, self.owners[alive], rows[alive] if not bool(alive.all()) else rows)
        others = [size for at, size in enumerate(padded) if at != self.axis]
        broadcast = [at + 1 for at, size in enumerate(others) if size == 1]
        if broadcast:
            total = total.sum(broadcast, keepdim=True)
        return total.reshape(self.examples, *shape)


def group_rows(owners: Tensor, examples: int, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Arrange rows by example: ``(rows, …)`` to ``(examples, most rows of one, …)``, filled up with zeros."""
    alive = owners >= 0
    counts = torch.bincount(owners[alive], minlength=examples)
    order = owners.argsort(stable=True)[int((~alive).sum()) :]
    widest = int(counts.max()) if len(counts) else 0
    if bool((counts == widest).all()):
        return [t[order].reshape(examples, widest, *t.shape[1:]) for t in tensors]
    starts = counts.cumsum(0) - counts
    mine = owners[order]
    slot = torch.arange(len(order), device=owners.device) - starts[mine]
    found = []
    for t in tensors:
        wide = t.new_zeros(examples, widest, *t.shape[1:])
        wide[mine, slot] = t[order]
        found.append(wide)
    return found


def _packed(node: Node) -> bool:
    """Whether what a node saved lies behind hooks (checkpointing, offloading), which may be unpacked once only."""
    raw = (getattr(node, name) for name in dir(node) if name.startswith("_raw_saved_"))
    return any(getattr(saved, "unpack_hook", None) is not None for saved in raw)


def _under_transpose(source: Node, graph: Graph) -> Node | None:
    """The parameter's node, if a source is its transpose."""
    if source.name() == "TBackward0" and source.next_functions[0][0] in graph.leaves:
        return source.next_functions[0][0]
    return None


def _shape(junction: Junction, graph: Graph) -> tuple[int, ...]:
    source, number = junction.source, junction.edge.output_nr
    if source in graph.leaves:
        return tuple(source.variable.shape)
    return tuple(source._input_metadata[number].shape)


def _closed(junction: Junction, graph: Graph, rows: _Rows) -> Tensor | LinearGradient | None:
    """Apply the node's closed form; None if it has none."""
    name = junction.node.name()
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
    if name == "EmbeddingBackward0" and junction.source in graph.leaves:
        return _lookup(junction, graph, rows)
    return None


def _product(junction: Junction, graph: Graph, rows: _Rows) -> Tensor | LinearGradient | None:
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
    if _under_transpose(junction.source, graph) is not None:
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


def _batch_norm(junction: Junction, rows: _Rows) -> Tensor | None:
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


def _lookup(junction: Junction, graph: Graph, rows: _Rows) -> Tensor | None:
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
    owner = rows.owners.clamp_min(0).view(view).expand(indices.shape)
    total = gradient.new_zeros(rows.examples * count, width)
    total.index_add_(0, (owner * count + indices).flatten(), gradient.reshape(-1, width))
    return total.view(rows.examples, count, width)


def _down(junction: Junction, graph: Graph, gradient: Tensor) -> Any:
    """From the per-example gradients of a junction's input to the parameters below it."""
    source = junction.source
    if source in graph.leaves:
        yield graph.leaves[source], gradient
        return
    leaf = _under_transpose(source, graph)
    if leaf is not None:
        yield graph.leaves[leaf], gradient.transpose(1, 2)
        return
    inputs = [graph.edges[name] for name in junction.names]
    try:
        found = torch.autograd.grad(
            [junction.edge], inputs, [gradient], retain_graph=True, allow_unused=True, is_grads_batched=True
        )
    except RuntimeError:  # a node without a rule for batches
        each = [
            torch.autograd.grad([junction.edge], inputs, [one], retain_graph=True, allow_unused=True)
            for one in gradient
        ]
        found = [None if ones[0] is None else torch.stack(ones) for ones in zip(*each, strict=True)]
    for name, values in zip(junction.names, found, strict=True):
        if values is not None:
            yield name, values.detach()


def _masked(junction: Junction, graph: Graph, gradients: Sequence[Tensor | None], owners: Tensor, examples: int) -> Any:
    """Run the node once for each example, with the gradient of the others' rows set to zero."""
    axis, rows = junction.layout.axis, len(owners)
    inputs = [graph.edges[name] for name in junction.names]
    found: dict[str, list[Tensor | None]] = {name: [None] * examples for name in junction.names}
    apply = _apply(junction)
    for example in range(examples):
        mine = owners == example
        if not bool(mine.any()):
            continue
        masked = [None if g is None else _keep(g, axis, rows, mine) for g in gradients]
        value = apply(masked)
        if value is None:
            continue
        if junction.source in graph.leaves:
            values: Sequence[Tensor | None] = [value]
        else:
            values = torch.autograd.grad([junction.edge], inputs, [value], retain_graph=True, allow_unused=True)
        for name, one in zip(junction.names, values, strict=True):
            found[name][example] = None if one is None else one.detach()
    for name, ones in found.items():
        some = next((one for one in ones if one is not None), None)
        if some is not None:
            some = some.to_dense() if some.is_sparse else some
            yield (
                name,
                torch.stack(
                    [torch.zeros_like(some) if o is None else o.to_dense() if o.is_sparse else o for o in ones]
                ),
            )


def _keep(gradient: Tensor, axis: int, rows: int, mine: Tensor) -> Tensor:
    """Set the other examples' rows to zero; an output without these rows counts as nobody's."""
    if gradient.ndim <= axis or gradient.shape[axis] != rows:
        return torch.zeros_like(gradient)
    shape = [1] * gradient.ndim
    shape[axis] = rows
    return torch.where(mine.view(shape), gradient, torch.zeros((), dtype=gradient.dtype, device=gradient.device))


def _apply(junction: Junction) -> Callable[[Sequence[Tensor | None]], Tensor | None]:
    """Return a function from the node's output gradients to the gradient of the one input."""
    node, source = junction.node, junction.source
    ways = sum(source in set(below([m])) for m, _ in node.next_functions if m is not None)

    def by_engine(gradients: Sequence[Tensor | None]) -> Tensor | None:
        outputs = [GradientEdge(node, at) for at, g in enumerate(gradients) if g is not None]
        given = [g for g in gradients if g is not None]
        return torch.autograd.grad(outputs, [junction.edge], given, retain_graph=True, allow_unused=True)[0]

    def by_call(gradients: Sequence[Tensor | None]) -> Tensor | None:
        # reached by another input, too: only this node, this input (a python function has apply)
        call: Any = getattr(node, "apply", node)
        with torch.no_grad():
            values = call(*gradients)
        return values[junction.place] if isinstance(values, tuple) else values

    return by_engine if ways == 1 else by_call
