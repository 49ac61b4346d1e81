"""Per-example gradients at a junction: a node where what belongs to examples meets what comes from parameters alone.

A junction's gradient has rows that belong to examples; its other input, made of parameters only, has not. The gradient
of that input, example by example, follows in closed form from what the node saved for its own backward pass; where
there is no closed form the node itself is run once for each example, with the other examples' rows masked. That is
exact also under dropout, fused attention and custom functions, as nothing is computed anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from pkexplain.gradients import devices
from pkexplain.gradients._closed_forms import Junction, Rows, closed_form, under_transpose
from pkexplain.gradients.factors import LinearGradient
from pkexplain.gradients.graph import Graph, below, packed
from pkexplain.gradients.layout import Layout

Found = tuple[str, Tensor | LinearGradient]
"""A parameter's name and its per-example gradients: dense, ``(examples, *shape)``, or in factors."""


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
    owners = junction.layout.owners(gradient.shape[junction.layout.axis], examples)
    if places == [0] and not packed(junction.node):
        with torch.no_grad():
            closed = closed_form(junction, graph, Rows(gradient, junction.layout.axis, owners, examples))
        if isinstance(closed, LinearGradient):
            return [(graph.leaves[under_transpose(junction.source, graph) or junction.source], closed)]
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


def _down(junction: Junction, graph: Graph, gradient: Tensor) -> Any:
    """From the per-example gradients of a junction's input to the parameters below it."""
    source = junction.source
    if source in graph.leaves:
        yield graph.leaves[source], gradient
        return
    leaf = under_transpose(source, graph)
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
    apply, device = _apply(junction), next(g.device for g in gradients if g is not None)
    for example in sorted({owner for owner in owners.tolist() if owner >= 0}):
        mine = devices.place(owners == example, device)
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
