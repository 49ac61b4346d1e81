"""The check of a split: Σ_i c_i g_i of split gradients against coded passes, and how far those are rounded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

from pkexplain.gradients._evidence import Evidence
from pkexplain.gradients._gaps import flat_block, scale_share
from pkexplain.gradients._uses import NotedUse, split_use
from pkexplain.gradients.batch_norm import RowMixture
from pkexplain.gradients.graph import Graph
from pkexplain.gradients.layers import Block
from pkexplain.gradients.layout import Layout

_ROUNDINGS = 8
"""Multiples of a block's measured rounding that its split gap may reach instead."""
_NEARLY = 16
"""A block with this share of its tolerance on the batch that it is learnt on may exceed it on a later one. Seen: four
times the gap, in a fine-tuned BERT in bfloat16."""
_TERMS = 32
"""Multiples of ε of the terms that cancel before a BatchNorm, which it may reach, too: its statistics are rounded."""
_EXCUSED = 1000, 0.1
"""The largest split gap that rounding can excuse: a multiple of the tolerance, and at most."""


class _Local(NamedTuple):
    """A use whose part in a block is checked where it is computed: examples act on one another further down."""

    noted: NotedUse
    layouts: Mapping[int, Layout | None]
    position: int
    norms: bool  # whether all of it came through norms that follow


class SplitCheck:
    """Compares Σ_i c_i g_i of split gradients with the coded passes."""

    def __init__(self, graph: Graph, evidence: Evidence, blocks: Sequence[Block], tolerance: float) -> None:
        self.graph, self.evidence, self.blocks = graph, evidence, blocks
        self._norms = any("BatchNorm" in node.name() for node in graph.order)
        self.tolerance, self.assumed = tolerance, False
        self.allowed: dict[int, float] = {}
        self._excused = min(_EXCUSED[0] * tolerance, _EXCUSED[1])
        self._rounding: dict[str, Tensor] | None = None
        self._cancelled: dict[int, Tensor | float] = {}
        numel = sum(block.numel for block in blocks)
        whole = [math.sqrt(sum(float(g.double().square().sum()) for g in c.values())) for c in evidence.coded.values()]
        self._scale = max(whole) / math.sqrt(max(numel, 1))

    def layout(self, node: Node, shape: Sequence[int]) -> Layout | None:
        """The layout of a node; where a BatchNorm mixes examples, the rows by their order."""
        found = self.evidence.layouts.get(node)
        examples = self.evidence.codes.values.shape[1]
        if found is None and self._norms and node in self.evidence.layouts and shape and shape[0] == examples:
            self.assumed = True
            return Layout(0, "contiguous", mixed=True)
        return found

    def gap(self, found: Tensor, true: Tensor) -> float:
        """The relative difference of two coded gradients of the same parameters."""
        size = max(float(true.double().norm()), scale_share(self.tolerance) * self._scale * math.sqrt(true.numel()))
        miss = float((found.double() - true.double()).norm())
        return miss / size if size > 0 else (0.0 if miss == 0 else math.inf)

    def of_rules(
        self,
        uses: Sequence[NotedUse],
        layouts: Mapping[tuple[int, int], dict[int, Layout | None]],
        dtype: torch.dtype | None,
    ) -> dict[int, float]:
        """The gap of every block whose layers have a rule for all their uses."""
        codes, examples = self.evidence.codes, self.evidence.codes.values.shape[1]
        found: dict[int, list[Tensor]] = {}
        local: dict[int, list[_Local]] = {}
        failed: set[int] = set()
        for noted in uses:
            self._hold(noted)
        mixing = any(x is not None and x.mixed for each in layouts.values() for x in each.values())
        for noted in uses:
            wanted, mine = noted.layer.blocks, layouts[noted.key]
            if not noted.arrived:
                continue
            try:
                parts = [names for _, names in wanted]
                pieces = split_use(noted, parts, mine, examples, dtype)
                norms = pieces is not None and len(pieces) == 2  # all of it came through norms that follow
                if pieces is not None and len(pieces) > 2:
                    pieces = split_use(noted, parts, mine, examples, dtype, False)
            except RuntimeError:
                pieces, norms = None, False
            if pieces is None:
                failed.update(position for position, _ in wanted)
                continue
            for each in pieces:
                for (position, _), piece in zip(wanted, each, strict=True):
                    self._add(found, position, [piece.weighted(codes.values[n]) for n in self.evidence.coded])
                    if isinstance(piece, RowMixture):
                        part = torch.finfo(piece.matrices.dtype).eps * piece.gross().double()
                        self._cancelled[position] = self._cancelled.get(position, 0.0) + part
            for position, _ in wanted if mixing else ():
                local.setdefault(position, []).append(_Local(noted, mine, position, norms))
        gaps = {
            position: self._gap_of(position, totals, local.get(position, []))
            for position, totals in found.items()
            if position not in failed
        }
        for noted in uses:
            noted.arrived.clear()
        return gaps

    @staticmethod
    def _add(into: dict[int, list[Tensor]], position: int, totals: list[Tensor]) -> None:
        known = into.get(position)
        into[position] = totals if known is None else [a + b for a, b in zip(known, totals, strict=True)]

    def _hold(self, noted: NotedUse) -> None:
        """Give a use the gradients that its outputs had in the plain pass."""
        noted.arrived.clear()
        for at, edge in enumerate(noted.edges):
            gradients = self.evidence.held.get(edge.node)
            gradient = None if gradients is None else gradients[edge.output_nr]
            if gradient is not None:
                noted.arrived[at] = gradient

    def _locally(self, parts: Sequence[_Local], code: Callable[[Tensor, Layout], Tensor]) -> Tensor:
        """Code the layers' own output gradients, or those of the norms after them, and take them to a block."""
        block = self.blocks[parts[0].position]
        names = [n for n in block.parameters if n in self.graph.edges]
        total = torch.zeros(block.numel, dtype=torch.float64, device="cpu")
        for noted, layouts, _, norms in parts:
            pairs = [
                (noted.edges[at], code(g, layout))
                for at, g in noted.arrived.items()
                if (layout := layouts[at]) is not None and not norms
            ]
            for norm in noted.followers if norms else ():
                pairs += [(norm.edges[at], code(g, Layout(0, "contiguous"))) for at, g in norm.arrived.items()]
            edges, wanted = [e for e, _ in pairs], [self.graph.edges[n] for n in names]
            values = torch.autograd.grad(edges, wanted, [g for _, g in pairs], retain_graph=True, allow_unused=True)
            named = dict(zip(names, values, strict=True))
            part = flat_block(block, {n: g for n, g in named.items() if g is not None})
            total = total.to(part.device) + part
        return total

    def _gap_of(self, position: int, totals: Sequence[Tensor], local: Sequence[_Local]) -> float:
        block, codes = self.blocks[position], self.evidence.codes
        truth = [
            self._locally(local, partial(codes.code, number=number)) if local else flat_block(block, coded)
            for number, coded in self.evidence.coded.items()
        ]
        gaps = [self.gap(a, b) for a, b in zip(totals, truth, strict=True)]
        gap = max(math.inf if math.isnan(gap) else gap for gap in gaps)
        if local and self.tolerance < gap <= self._excused:
            coded, rest = (self._locally(local, partial(codes.code, number=0, rest=left)) for left in (False, True))
            plain = self._locally(local, lambda g, _: g)
            self._allow(position, self.gap(truth[0] + coded + rest - plain, truth[0]), truth[0])
        return gap

    def allow(self, position: int, gap: float) -> None:
        """If a block fails by little, or nearly does, measure its rounding and allow for it."""
        if not self.tolerance / _NEARLY < gap <= self._excused or position in self.allowed:
            return
        if self._rounding is None:
            self._rounding = self.evidence.rounding(self.graph)
        block = self.blocks[position]
        truth = next(flat_block(block, coded) for coded in self.evidence.coded.values())
        self._allow(position, self.gap(truth + flat_block(block, self._rounding), truth), truth)

    def _allow(self, position: int, rounding: float, truth: Tensor) -> None:
        cancelled = self.gap(truth + _TERMS * self._cancelled.get(position, 0.0), truth)
        self.allowed[position] = min(self._excused, max(_ROUNDINGS * rounding, cancelled))
