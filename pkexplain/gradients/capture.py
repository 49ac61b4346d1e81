"""Per-example gradients from a real backward pass, which is left as it is.

Forward hooks note what each layer was given; hooks on nodes of the autograd graph read the gradients of its outputs
while the user's own backward pass runs. From the two, the layer's rule (`pkexplain.gradients.layers`) computes the
gradient of every example; parameters without a rule are read at the graph's junctions (`pkexplain.gradients.split`).
No output is replaced, no layer is run again, and no `.grad` is written.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pkexplain.errors import PkexplainError
from pkexplain.gradients._convolution import ConvolutionGradient
from pkexplain.gradients._embedding import EmbeddingGradient
from pkexplain.gradients._junctions import Junction, read_junction
from pkexplain.gradients._uses import NotedUse, noting_uses, split_use, standard_layouts
from pkexplain.gradients.batch_norm import RowMixture
from pkexplain.gradients.factors import (
    DenseGradient,
    ExampleGradients,
    FormedGradient,
    LinearGradient,
    ScaledGradient,
    as_matrix,
)
from pkexplain.gradients.graph import Graph, backward_listener, random_state_kept
from pkexplain.gradients.layers import Block, Layer, refusal
from pkexplain.gradients.layout import Layout
from pkexplain.gradients.split import Split, learn_split, relative_gap, verify_split

__all__ = ["GRADIENT_CLASSES", "Capture", "differentiable_statistics"]

GRADIENT_CLASSES = (
    ConvolutionGradient,
    DenseGradient,
    EmbeddingGradient,
    FormedGradient,
    LinearGradient,
    RowMixture,
    ScaledGradient,
)
"""The classes of captured gradients; a saved state may contain these and no others."""

Sink = Callable[[int, ExampleGradients], None]
_KEPT = 64
"""Graphs whose split is remembered."""


class Capture:
    """Hooks that turn backward passes of a model into per-example gradients.

    Attributes:
        rehearsing: Whether a pass of its own runs through the graph, which is not the user's.
        gap: The largest split gap since `clear_gap`.
        unsplit: Parameters that could not be split since then, and why.
        gaps: The largest split gap of each block.
        interacting: Whether examples were seen to act on one another.
        tolerance: The largest gap that was allowed.

    Args:
        layers: The layers to watch (from `find_layers`).
        blocks: The blocks of parameters, from there, too.
        dtype: Dtype of the gradients; None for the dtype of each layer's output (which autocast may change).
        private: Whether the model is a copy of ours: a BatchNorm's output may be replaced to differentiate its buffers.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        blocks: Sequence[Block],
        dtype: torch.dtype | None = None,
        private: bool = False,
    ) -> None:
        """Find the parameters; nothing is hooked yet."""
        self.layers, self.blocks, self.dtype = tuple(layers), tuple(blocks), dtype
        self._prepare = differentiable_statistics if private else _unchanged
        self.parameters = {
            full: layer.module.get_parameter(local)
            for layer in layers
            if not layer.buffers
            for position, names in layer.blocks
            for full, local in zip(blocks[position].parameters, names, strict=True)
        }
        self._places = {name: at for at, block in enumerate(self.blocks) for name in block.parameters}
        self._generator = torch.Generator().manual_seed(7)
        self._splits: dict[int, Split] = {}
        self._split: Split | None = None
        self.rehearsing = False
        self.clear_gap()

    def clear_gap(self) -> None:
        """Start measuring anew."""
        self.gap, self.gaps, self.unsplit, self.interacting, self.tolerance = 0.0, {}, {}, False, 1e-8

    def forget(self) -> None:
        """Learn anew at the next backward pass."""
        self._splits.clear()
        self._split = None

    @property
    def splits(self) -> Split | None:
        """How the last graph was split."""
        return self._split

    @contextmanager
    def during_backward(
        self,
        examples: int,
        sink: Sink,
        verify: bool = True,
        learnt: Callable[[Split], None] = lambda split: None,
        axes: Callable[[], Collection[int]] = lambda: (0,),
    ) -> Iterator[None]:
        """Pass every block's gradients to ``sink`` while the user's own backward passes reach them.

        Args:
            examples: The batch size.
            sink: Called with the block's position and its gradients; several times if a layer is used repeatedly.
            verify: Whether the split is checked in this step, also if nothing has changed.
            learnt: Called before each backward pass with the way in which it will be split.
            axes: Returns in which of the first two dimensions the model's inputs have one row per example.

        Raises:
            ExampleIdError: Nothing can be split, as nothing has one row per example.
        """
        step = _Step(self, examples, sink, verify, learnt, axes)
        noting = noting_uses(self.layers, step.note, lambda: self.rehearsing, self._prepare)
        with noting, backward_listener(step.around):
            try:
                yield
            finally:
                step.close()

    def _deliver(
        self, noted: NotedUse, layouts: dict[int, Layout | None], examples: int, sink: Sink, only: Any = None
    ) -> None:
        """Apply a layer's rule and pass its blocks on."""
        layer = noted.layer
        moving = [block for block in layer.blocks if layer.buffers or self._moves(block[0])]
        blocks = [block for block in moving if only is None or block[0] in only]
        if not blocks:
            return
        try:
            found = split_use(noted, [names for _, names in blocks], layouts, examples, self.dtype)
        except RuntimeError as error:
            if isinstance(error, (PkexplainError, torch.OutOfMemoryError)):
                raise
            raise refusal(layer.name, layer.module, f"its per-example rule failed ({error})") from error
        if found is None:
            raise refusal(layer.name, layer.module, "its rows are not the examples, or it has no rule for this use")
        for pieces in found:
            for (position, _), piece in zip(blocks, pieces, strict=True):
                sink(position, piece if layer.buffers else self._without_frozen(position, piece))

    def _moves(self, position: int) -> bool:
        """Whether a block has a parameter that is still trainable."""
        return any(self.parameters[name].requires_grad for name in self.blocks[position].parameters)

    def _without_frozen(self, position: int, gradients: ExampleGradients) -> ExampleGradients:
        """Zero the gradients of a block's parameters that were frozen since."""
        parameters = [self.parameters[name] for name in self.blocks[position].parameters]
        if all(parameter.requires_grad for parameter in parameters):
            return gradients
        dtype = gradients.select(slice(0, 1)).total().dtype
        masks = [p.new_full((p.numel(),), float(p.requires_grad), dtype=dtype) for p in parameters]
        return gradients.scaled(torch.cat(masks))

    def placed(self, name: str, values: Tensor | LinearGradient) -> tuple[int, ExampleGradients]:
        """Put one parameter's gradients ``(examples, *shape)`` in its block."""
        position = self._places[name]
        block = self.blocks[position]
        dtype = self.dtype
        if isinstance(values, LinearGradient):
            if block.matrix == values.matrix and len(block.parameters) == 1:
                x, g = (t if dtype is None else t.to(dtype) for t in (values.inputs, values.output_gradients))
                return position, LinearGradient(x, g, True, False)
            values = values.dense()
        flat = values.flatten(1)
        flat = flat if dtype is None else flat.to(dtype)
        if len(block.parameters) > 1:
            sizes = [self.parameters[each].numel() for each in block.parameters]
            at = block.parameters.index(name)
            wide = flat.new_zeros(len(flat), sum(sizes))
            wide[:, sum(sizes[:at]) : sum(sizes[: at + 1])] = flat
            flat = wide
        if block.matrix is None:
            return position, DenseGradient(flat)
        both = len(block.parameters) > 1
        bias_only = not both and block.matrix[1] == 1 and len(block.shapes[0]) == 1
        formed = torch.stack([as_matrix(row, block.matrix[0], both) for row in flat])
        return position, FormedGradient(formed, not bias_only, both or bias_only)


class _Step:
    """One step: the uses noted since the last backward pass, and the backward passes themselves."""

    def __init__(
        self, capture: Capture, examples: int, sink: Sink, verify: bool, learnt: Callable[[Split], None], axes: Any
    ) -> None:
        self._capture, self._examples, self._sink, self._verify = capture, examples, sink, verify
        self._learnt, self._axes = learnt, axes
        self._uses: list[NotedUse] = []
        self._handles: list[Any] = []
        self._split: Split | None = None
        self._depth = 0
        self._coded: tuple[Tensor, dict[str, Tensor]] | None = None
        self._totals: dict[int, Tensor] = {}

    def note(self, noted: NotedUse) -> None:
        """Take a use, and listen to its outputs' nodes."""
        self._uses.append(noted)
        for at, edge in enumerate(noted.edges):
            self._handles.append(edge.node.register_prehook(partial(self._arrived, noted, at, edge.output_nr)))

    def _arrived(self, noted: NotedUse, at: int, number: int, gradients: tuple[Tensor | None, ...]) -> None:
        if self._capture.rehearsing or not self._depth or self._split is None or gradients[number] is None:
            return
        noted.arrived[at] = gradients[number].detach()
        if len(noted.arrived) == len(noted.edges):
            self._deliver(noted)

    def _deliver(self, noted: NotedUse) -> None:
        split = self._split
        assert split is not None
        layouts = split.layouts.get(noted.key)
        if layouts is None:  # a use of a checkpointed part, which runs again inside the backward pass
            layouts = standard_layouts(noted)
        only = None if noted.layer.buffers else split.rules
        with torch.no_grad():
            self._capture._deliver(noted, layouts, self._examples, self._pass_on, only)

    def _pass_on(self, position: int, gradients: ExampleGradients) -> None:
        if self._coded is not None and position < len(self._capture.blocks):
            total = gradients.weighted(self._coded[0])
            known = self._totals.get(position)
            self._totals[position] = total if known is None else known + total
        self._sink(position, gradients)

    def around(self, run: Callable[[], Any], arguments: dict[str, Any]) -> Any:
        """Prepare for one of the user's backward passes, run it, and check what came of it."""
        if self._capture.rehearsing or self._depth:  # ours, or a checkpoint's inside another
            return run()
        handles: list[Any] = []
        roots, gradients = _roots(arguments)
        if roots:
            with random_state_kept():
                handles = self._prepare(roots, gradients)
        self._depth = 1
        try:
            result = run()
            for noted in self._uses:
                if noted.arrived and len(noted.arrived) < len(noted.edges):
                    self._deliver(noted)
        finally:
            self._depth = 0
            for handle in handles:
                handle.remove()
            for noted in self._uses:
                noted.arrived.clear()
        self._compare()
        return result

    def _prepare(self, roots: list[Tensor], gradients: list[Tensor | None]) -> list[Any]:
        """Make sure that the graph's split is known; listen to its junctions."""
        capture = self._capture
        known = capture._split
        uses = [noted for noted in self._uses if not noted.layer.buffers]
        simple = known is not None and not known.junctions and not known.unsplit and known.fixed
        if simple and known is not None and known.fits(uses, self._examples) and not self._verify:
            self._split = known
            return []
        graph = Graph(roots, gradients, capture.parameters)
        graph.axes = frozenset(self._axes())
        key = hash((graph.key, tuple(noted.key for noted in uses)))
        split = capture._splits.get(key)
        usable = split is not None and split.fixed and split.fits(uses, self._examples)
        capture.rehearsing = True
        capture._generator.manual_seed(7)  # a resumed run draws the same codes
        try:
            if not usable:
                split = learn_split(graph, uses, capture.blocks, self._examples, capture._generator, capture.dtype)
            elif self._verify:
                self._coded = verify_split(graph, self._examples, capture._generator, split.half)
        finally:
            capture.rehearsing = False
        self._split = split
        if split is None:  # the gradient is not finite: nothing to record
            return []
        if len(capture._splits) >= _KEPT:
            capture._splits.clear()
        capture._splits[key] = capture._split = split
        capture.unsplit.update(split.unsplit)
        capture.interacting |= split.interacting
        capture.tolerance = max(capture.tolerance, split.tolerance)
        self._learnt(split)
        self._note(split.gaps)
        return self._listen(graph, split)

    def _listen(self, graph: Graph, split: Split) -> list[Any]:
        handles = []
        for at, place, layout, names in split.junctions:
            junction = Junction(graph.order[at], place, layout, names)

            def read(gradients: tuple[Tensor | None, ...], junction: Junction = junction) -> None:
                if self._capture.rehearsing:
                    return
                self._capture.rehearsing = True  # reading may run the node again
                try:
                    for name, values in read_junction(junction, graph, gradients, self._examples):
                        self._pass_on(*self._capture.placed(name, values))
                finally:
                    self._capture.rehearsing = False

            handles.append(junction.node.register_prehook(read))
        return handles

    def _compare(self) -> None:
        """Compare what was split with the coded pass."""
        if self._coded is None or self._split is None:
            return
        (_, true), self._coded = self._coded, None
        gaps = {}
        if not self._split.interacting:
            gaps = relative_gap(self._capture.blocks, self._totals, true, set(self._split.unsplit))
        self._totals = {}
        tolerance = self._split.tolerance
        if any(not gap <= tolerance for gap in gaps.values()):
            self._capture.forget()
        self._note(gaps)

    def _note(self, gaps: dict[int, float]) -> None:
        capture = self._capture
        for position, gap in gaps.items():
            capture.gaps[position] = max(capture.gaps.get(position, 0.0), gap)
            capture.gap = max(capture.gap, gap)

    def close(self) -> None:
        """Remove what is left of the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _roots(arguments: dict[str, Any]) -> tuple[list[Tensor], list[Tensor | None]]:
    """The tensors that a backward pass starts from, and their gradients."""
    tensors, given = arguments.get("tensors"), arguments.get("grad_tensors")
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors or ())
    given = [given] if isinstance(given, Tensor) or given is None else list(given)
    given = given if len(given) == len(tensors) else [None] * len(tensors)
    pairs = [(t, g) for t, g in zip(tensors, given, strict=True) if isinstance(t, Tensor) and t.grad_fn is not None]
    return [t for t, _ in pairs], [g for _, g in pairs]


def _unchanged(layer: Layer, output: Any) -> Any:
    return output


def differentiable_statistics(layer: Layer, output: Any) -> Any:
    """Let a BatchNorm's output be differentiated if nothing before it is trained; cloned, for an in-place ReLU."""
    if layer.buffers and isinstance(output, Tensor) and not output.requires_grad:
        return output.detach().requires_grad_().clone()
    return output
