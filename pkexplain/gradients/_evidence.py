"""Passes through a graph that show which rows belong to which example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from pkexplain.gradients._uses import NotedUse
from pkexplain.gradients.graph import Graph, below, layout_of_output
from pkexplain.gradients.layout import Codes, Layout, Sketcher


@dataclass
class Evidence:
    """What the passes through the graph showed."""

    codes: Codes
    layouts: dict[Node, Layout | None]
    plain: dict[str, Tensor]
    coded: dict[int, dict[str, Tensor]]
    held: dict[Node, tuple[Tensor | None, ...]]
    outputs: list[GradientEdge]
    direct: list[Tensor]
    known: list[Layout]
    dtypes: set[torch.dtype]

    @property
    def labelled(self) -> int:
        """How many nodes belong to examples."""
        return sum(x is not None and not x.mixed for x in self.layouts.values())

    def rounding(self, graph: Graph) -> dict[str, Tensor]:
        """How far the graph's own passes are from adding up: |G(c) + G(1 − c) − G(1)|, zero but for rounding."""
        found: dict[str, Tensor] = {}
        for number in (0, 1):  # not the signs, which are rounded alike in both
            coded, rest = (
                graph.parameters_from(
                    self.outputs,
                    [self.codes.code(g, at, number, left) for g, at in zip(self.direct, self.known, strict=True)],
                )
                for left in (False, True)
            )
            for name, whole in self.plain.items():
                if name in coded and name in rest:
                    miss = (coded[name].double() + rest[name].double() - whole.double()).abs()
                    found[name] = torch.maximum(found[name], miss) if name in found else miss
        return found

    def blind(self, uses: Sequence[NotedUse]) -> bool:
        """Whether some gradient in the graph, of a parameter or of what a layer returned, is zero everywhere."""
        given = [
            gradients[edge.output_nr]
            for noted in uses
            for edge in noted.edges
            if (gradients := self.held.get(edge.node)) is not None
        ]
        return any(g is not None and not bool(g.any()) for g in (*given, *self.plain.values()))

    @property
    def finite(self) -> bool:
        return all(bool(torch.isfinite(g).all()) for g in self.plain.values())


def gather(graph: Graph, uses: Sequence[NotedUse], examples: int, generator: torch.Generator) -> Evidence | None:
    """Run the passes, for every guess at the layout of y, and keep the evidence of the best."""
    frontier = graph.frontier(examples)
    if not frontier:
        return None
    guesses = ("contiguous", "tiled") if any(guess for _, guess in frontier) else ("contiguous",)
    found: list[Evidence] = []
    for guess in guesses:
        evidence = _passes(graph, uses, [edge for edge, _ in frontier], guess, examples, generator)
        if evidence is not None:
            found.append(evidence)
    return max(found, key=lambda each: each.labelled, default=None)


def _passes(
    graph: Graph,
    uses: Sequence[NotedUse],
    outputs: Sequence[GradientEdge],
    guess: str,
    examples: int,
    generator: torch.Generator,
) -> Evidence | None:
    """Send ∂(loss)/∂y, and two coded ones, through the graph."""
    pairs = [(edge, g.detach()) for edge, g in zip(outputs, graph.direct(outputs), strict=True) if g is not None]
    if not pairs:
        return None
    edges, direct = [edge for edge, _ in pairs], [g for _, g in pairs]
    codes = Codes(examples, generator)
    sketcher = Sketcher(codes, generator)
    watched = {edge.node for noted in uses for edge in noted.edges}
    nodes = [node for node in below([edge.node for edge in edges]) if node not in graph.leaves]
    sketches: list[dict[Node, list[Tensor]]] = [{}, {}, {}]
    places: dict[Node, tuple[torch.Size, list[Tensor]]] = {}
    dtypes: dict[Node, torch.dtype] = {}
    held: dict[Node, tuple[Tensor | None, ...]] = {}

    def seen(number: int, node: Node, gradients: tuple[Tensor | None, ...]) -> None:
        first = next((g for g in gradients if g is not None), None)
        if first is None:
            return
        if number == 0:
            places[node], dtypes[node] = (first.shape, sketcher.places(first)), first.dtype
        if node in places and places[node][0] == first.shape:
            sketches[number][node] = sketcher.sketch(first, places[node][1])
        if number == 0 and node in watched:
            held[node] = tuple(None if g is None else g.detach() for g in gradients)

    known = {edge.node: layout_of_output(g, examples, guess) for edge, g in pairs}
    with graph.watching(nodes, lambda node, gradients: seen(0, node, gradients)):
        plain = graph.parameters_from(edges, direct)
    coded = {}
    for number in (0, 1):
        given = [codes.code(g, known[edge.node], number) for edge, g in pairs]
        with graph.watching(nodes, lambda node, gradients, at=1 + number: seen(at, node, gradients)):
            coded[number] = graph.parameters_from(edges, given)
    half = in_half_precision(set(dtypes.values()))
    if half:
        coded = {2: graph.parameters_from(edges, [codes.code(g, known[edge.node], 2) for edge, g in pairs])}
    layouts: dict[Node, Layout | None] = {}
    for node, rows in sketches[0].items():
        others = [s[node] for s in sketches[1:] if node in s]
        same = len(others) == 2 and all([x.shape for x in other] == [x.shape for x in rows] for other in others)
        layouts[node] = sketcher.layout(rows, others, torch.bfloat16 if half else dtypes[node]) if same else None
    if not any("BatchNorm" in node.name() for node in nodes):  # only there is a row one example's by its place
        layouts = {node: None if layout is not None and layout.mixed else layout for node, layout in layouts.items()}
    single = {edge.node for edge in edges if edge.node not in _nested(edges)}
    layouts.update({node: layout for node, layout in known.items() if node in single})
    ways = [known[edge.node] for edge in edges]
    return Evidence(codes, layouts, plain, coded, held, edges, direct, ways, set(dtypes.values()))


def in_half_precision(dtypes: set[torch.dtype]) -> bool:
    return bool(dtypes & {torch.bfloat16, torch.float16})


def _nested(edges: Sequence[GradientEdge]) -> set[Node]:
    """The nodes of outputs that lie below other outputs."""
    found: set[Node] = set()
    nodes = {edge.node for edge in edges}
    for edge in edges:
        found |= nodes & (set(below([edge.node])) - {edge.node})
    return found
