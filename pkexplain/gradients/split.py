"""How a model's gradients are split among the examples of a batch: learnt from the graph, and checked there.

For each block of parameters the first of these that passes the check:

1. ``rule``: the layer's own rule, in factors, its rows arranged by the layout that was learnt;
2. ``graph``: read at the junctions of the graph where the block's parameters meet the examples;
3. ``unsplit``: nothing; the parameters' movement is a line of its own in the ledger.

The check, for all examples and parameters at once: ∂(loss)/∂y with example i's rows multiplied by a random c_i, sent
through the real graph, must give Σ_i c_i g_i of the gradients g_i as they were split. Where it fails, it is measured
how far the passes themselves are from adding up: a gradient that is a small rest of large terms (before a BatchNorm, in
float32) is itself rounded by that much, and no split can be closer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import Node

from pkexplain.errors import ExampleIdError
from pkexplain.gradients._evidence import gather, in_half_precision
from pkexplain.gradients._junctions import Junction, find_junctions, read_junction
from pkexplain.gradients._split_check import SplitCheck
from pkexplain.gradients._uses import NotedUse
from pkexplain.gradients.factors import LinearGradient
from pkexplain.gradients.graph import Graph, layout_of_output
from pkexplain.gradients.layers import Block
from pkexplain.gradients.layout import Codes, Layout

__all__ = ["TOLERANCE", "Split", "learn_split"]

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 5e-3, torch.float16: 5e-3}
"""Split gap up to which a block counts as split, by dtype of the output's gradient."""

_BLIND = 8
"""How many times in a row a split is learnt if some layer has no gradient, as behind a LoRA matrix that begins as 0."""


@dataclass
class Split:
    """How the blocks of a graph are split.

    Attributes:
        examples: The batch size it was learnt on.
        layouts: The layout of each output of each use of a layer.
        rules: Blocks split by their layers' rules.
        junctions: Positions of nodes in the graph's order, their inputs, and their layouts.
        unsplit: Names of the parameters that are not split, and why.
        gaps: The split gap of each block.
        allowed: The gap that was allowed, for blocks whose own rounding is larger than the tolerance.
        interacting: Whether examples act on one another, so that rows were taken for theirs where they are computed.
        half: Whether some of the backward pass is in half precision.
        tolerance: The gap that was allowed.
        blind: How many times in a row it was learnt while some layer had no gradient: nothing can be learnt of that.
    """

    examples: int
    layouts: dict[tuple[int, int], dict[int, Layout | None]] = field(default_factory=dict)
    ranks: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    rules: set[int] = field(default_factory=set)
    junctions: list[tuple[int, int, Layout, tuple[str, ...]]] = field(default_factory=list)
    unsplit: dict[str, str] = field(default_factory=dict)
    gaps: dict[int, float] = field(default_factory=dict)
    allowed: dict[int, float] = field(default_factory=dict)
    interacting: bool = False
    half: bool = False
    tolerance: float = 1e-4
    blind: int = 0

    @property
    def gap(self) -> float:
        """The largest split gap of the blocks that are split."""
        return max(self.gaps.values(), default=0.0)

    def allowance(self, position: int) -> float:
        """The gap up to which a block counts as split."""
        return max(self.tolerance, self.allowed.get(position, 0.0))

    def holds(self, position: int, gap: float) -> bool:
        """Whether a block with this gap counts as split."""
        return gap <= self.allowance(position)

    @property
    def fixed(self) -> bool:
        """Whether it holds for later batches, too."""
        if self.blind and not self.given_up:
            return False
        rules = all(x is None or x.fixed for each in self.layouts.values() for x in each.values())
        return rules and all(layout.fixed for _, _, layout, _ in self.junctions)

    @property
    def given_up(self) -> bool:
        """Whether it is no longer learnt anew, although some layer never had a gradient: one that comes is lost."""
        return self.blind >= _BLIND

    def fits(self, uses: Sequence[NotedUse], examples: int) -> bool:
        """Whether the uses of a step are those that it was learnt on, in sizes that its layouts allow."""
        if {noted.key for noted in uses} != self.layouts.keys():
            return False
        for noted in uses:
            known = self.layouts.get(noted.key)
            if known is None or self.ranks[noted.key] != tuple(map(len, noted.shapes)):
                return False
            if not all(x is None or x.fits(noted.shapes[at], examples) for at, x in known.items()):
                return False
        return True


def learn_split(
    graph: Graph,
    uses: Sequence[NotedUse],
    blocks: Sequence[Block],
    examples: int,
    generator: torch.Generator,
    dtype: torch.dtype | None = None,
    before: Split | None = None,
) -> Split | None:
    """Learn how to split the gradients of a graph, and check it.

    Args:
        graph: The graph.
        uses: The uses of layers in it.
        blocks: The blocks of parameters.
        examples: The batch size.
        generator: For the codes.
        dtype: Dtype of the gradients.
        before: How the same graph was split before.

    Returns:
        The split; None if the gradient is not finite.
    """
    evidence = gather(graph, uses, examples, generator)
    if evidence is None and not graph.edges:
        return Split(examples)
    if evidence is None:
        raise without_rows(graph, examples)
    if not evidence.finite:
        return None
    split = Split(examples, half=in_half_precision(evidence.dtypes))
    split.tolerance = max((TOLERANCE.get(kind, 5e-3) for kind in evidence.dtypes), default=1e-8)
    check = SplitCheck(graph, evidence, blocks, split.tolerance)
    split.allowed = check.allowed
    for noted in uses:
        layouts = {at: check.layout(e.node, s) for at, (e, s) in enumerate(zip(noted.edges, noted.shapes, strict=True))}
        split.layouts[noted.key], split.ranks[noted.key] = layouts, tuple(map(len, noted.shapes))
    gaps = check.of_rules(uses, split.layouts, dtype)
    for position, gap in gaps.items():
        check.allow(position, gap)
    split.rules = {position for position, gap in gaps.items() if split.holds(position, gap)}
    split.gaps = {position: gaps[position] for position in split.rules}
    rest = {name for at, block in enumerate(blocks) if at not in split.rules for name in block.parameters}
    if rest:
        _by_graph(check, split, rest & set(graph.edges))
    if evidence.plain and not split.rules and not split.junctions:
        raise without_rows(graph, examples)
    split.interacting = any(x is not None and x.mixed for x in evidence.layouts.values()) or check.assumed
    if evidence.blind(uses):
        split.blind = 1 + (before.blind if before is not None else 0)
    return split


def without_rows(graph: Graph, examples: int) -> ExampleIdError:
    """Make the error for a graph in which nothing has one row per example."""
    shapes = [tuple(node._input_metadata[0].shape) for node in graph.order if node._input_metadata]
    some = ", ".join(map(str, list(dict.fromkeys(shapes))[:6]))
    return ExampleIdError(
        "recorder.step(ids)",
        "no tensor between the loss and the parameters has one row per example, so nothing can be split",
        got=f"{examples} ids, and tensors of shapes {some} from the loss down",
        expected=f"the model's output, or another tensor below the loss, with {examples} rows",
        source="the number of ids passed to recorder.step(ids)",
        fix="Pass one id per row of the batch; texts packed into one row have to be given a row each",
    )


def verify_split(
    graph: Graph, examples: int, generator: torch.Generator, half: bool
) -> tuple[Tensor, dict[str, Tensor]] | None:
    """Run one coded pass: the codes, ``(examples,)``, and the parameters' coded gradients."""
    frontier = graph.frontier(examples)
    if not frontier:
        return None
    outputs = [edge for edge, guess in frontier if not guess]
    if len(outputs) != len(frontier):
        return None
    pairs = [(e, g) for e, g in zip(outputs, graph.direct(outputs), strict=True) if g is not None]
    codes = Codes(examples, generator)
    number = codes.numbers(half)[0]
    coded = [codes.code(g, layout_of_output(g, examples, "contiguous"), number) for _, g in pairs]
    return codes.values[number], graph.parameters_from([e for e, _ in pairs], coded)


def _by_graph(check: SplitCheck, split: Split, names: set[str]) -> None:
    """Find the junctions of some parameters, and keep those that pass the check."""
    graph, evidence = check.graph, check.evidence
    junctions = find_junctions(graph, evidence.layouts, check.layout, names)
    examples = split.examples
    totals: dict[str, list[Tensor]] = {}
    by_node: dict[Node, list[Junction]] = {}
    for junction in junctions:
        by_node.setdefault(junction.node, []).append(junction)
    failed: dict[str, str] = {}
    pending: list[tuple[Junction, tuple[Tensor | None, ...]]] = []

    def seen(node: Node, gradients: tuple[Tensor | None, ...]) -> None:
        pending.extend((j, tuple(None if g is None else g.detach() for g in gradients)) for j in by_node[node])

    with graph.watching(list(by_node), seen):
        graph.parameters_from(evidence.outputs, evidence.direct)
    for junction, gradients in pending:
        try:
            for name, values in read_junction(junction, graph, gradients, examples):
                codes, ones = evidence.codes.values, torch.ones(examples, dtype=torch.float64, device="cpu")
                weights = [*codes[list(evidence.coded)], ones]
                if isinstance(values, LinearGradient):
                    mine = [values.weighted(w).double() for w in weights]
                else:
                    dense = values.reshape(examples, -1).double()
                    mine = [w.to(dense.device) @ dense for w in weights]
                known = totals.get(name)
                totals[name] = mine if known is None else [a + b for a, b in zip(known, mine, strict=True)]
        except RuntimeError as error:
            failed.update(dict.fromkeys(junction.names, f"reading {junction.node.name()} failed ({error})"))
    mixed = {name for j in junctions if j.layout.mixed for name in j.names}
    for name in sorted(names):
        if name not in evidence.plain:
            continue  # it has no gradient from examples in this graph
        truth = [c.get(name) for c in evidence.coded.values()] + [evidence.plain[name]]
        none = torch.zeros((), dtype=torch.float64, device="cpu")
        zeros = [none] * len(truth)  # a gradient of rounding error is split with them
        pairs = [(a, b) for a, b in zip(totals.get(name, zeros), truth, strict=True) if b is not None]
        pairs = pairs[-1:] if name in mixed else pairs
        gaps = [check.gap(a.to(b.device), b.flatten()) for a, b in pairs]
        position = next(at for at, block in enumerate(check.blocks) if name in block.parameters)
        check.allow(position, max(gaps))
        if name in failed or not split.holds(position, max(gaps)):
            known = name in totals
            split.unsplit[name] = failed.get(name) or (
                f"its split gap is {max(gaps):.1e}" if known else "examples meet it in no place that can be read"
            )
        else:
            split.gaps[position] = max(split.gaps.get(position, 0.0), *gaps)
    for junction in junctions:
        kept = tuple(name for name in junction.names if name not in split.unsplit)
        if kept:
            at = graph.position[junction.node]
            split.junctions.append((at, junction.place, junction.layout, kept))
