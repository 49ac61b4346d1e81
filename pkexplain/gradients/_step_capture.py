"""One recorded step: the layers' uses in it, and its backward passes, watched while they run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pkexplain.errors import RecordingError
from pkexplain.gradients._gaps import relative_gap
from pkexplain.gradients._junctions import Junction, read_junction
from pkexplain.gradients._uses import NotedUse, standard_layouts
from pkexplain.gradients.factors import ExampleGradients
from pkexplain.gradients.graph import Graph, random_state_kept
from pkexplain.gradients.split import Split, learn_split, verify_split
from pkexplain.gradients.torch_state import without_autocast
from pkexplain.gradients.watch import Watch

if TYPE_CHECKING:
    from pkexplain.gradients.capture import Capture

_KEPT = 64
"""Graphs whose split is remembered."""


class StepCapture:
    """One step: the uses noted since the last backward pass, and the backward passes themselves.

    Attributes:
        watching: Closes what listens to the model and to backward passes.
    """

    def __init__(
        self, capture: Capture, examples: int, sink: Callable[[int, ExampleGradients], None], watch: Watch
    ) -> None:
        self._capture, self._examples, self._sink, self._watch = capture, examples, sink, watch
        self.watching = ExitStack()
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
        gradient = gradients[number]
        if self._capture.rehearsing or not self._depth or self._split is None or gradient is None:
            return
        noted.arrived[at] = gradient.detach()
        if len(noted.arrived) == len(noted.edges):
            self._deliver(noted)

    def _deliver(self, noted: NotedUse) -> None:
        split = self._split
        assert split is not None
        layouts = split.layouts.get(noted.key)
        if layouts is None:  # a use of a checkpointed part, which runs again inside the backward pass
            layouts = standard_layouts(noted)
        with torch.no_grad(), without_autocast():
            self._capture.deliver(noted, layouts, self._examples, self._pass_on, split.rules)

    def _pass_on(self, position: int, gradients: ExampleGradients) -> None:
        if self._coded is not None:
            total = gradients.weighted(self._coded[0])
            known = self._totals.get(position)
            self._totals[position] = total if known is None else known + total
        self._sink(position, gradients)

    def around(self, run: Callable[[], Any], arguments: dict[str, Any]) -> Any:
        """Prepare for one of the user's backward passes, run it, and check what came of it."""
        if self._capture.rehearsing or self._depth:  # ours, or a checkpoint's inside another
            return run()
        if not self._accumulates(arguments.get("inputs")):  # a derivative by inputs, which no .grad of ours receives
            return run()
        self._watch.begin()
        handles: list[Any] = []
        roots, gradients = _roots(arguments)
        if roots:
            with random_state_kept(), without_autocast():
                handles = self._prepare(roots, gradients)
        self._depth = 1
        self._capture.running = True
        try:
            result = run()
            for noted in self._uses:
                if noted.arrived and len(noted.arrived) < len(noted.edges):
                    self._deliver(noted)
        finally:
            self._depth = 0
            self._capture.running = False
            for handle in handles:
                handle.remove()
            for noted in self._uses:
                noted.arrived.clear()
        with without_autocast():
            self._compare()
        return result

    def _accumulates(self, inputs: Any) -> bool:
        """Whether a backward pass adds to the parameters' ``.grad``."""
        if inputs is None:
            return True
        given = {id(tensor) for tensor in ([inputs] if isinstance(inputs, Tensor) else inputs)}
        mine = [p for p in self._capture.parameters.values() if p.requires_grad]
        held = sum(id(p) in given for p in mine)
        if 0 < held < len(mine):
            raise RecordingError(
                "recorder.step(ids)",
                "backward(inputs=…) was given some of the recorded parameters and not others",
                got=f"{held} of {len(mine)}",
                expected="all of them, or none",
                source="the training loop",
                fix="Leave inputs out, or freeze the other parameters",
            )
        return held > 0

    def _prepare(self, roots: list[Tensor], gradients: list[Tensor | None]) -> list[Any]:
        """Make sure that the graph's split is known; listen to its junctions."""
        capture = self._capture
        known = capture.split
        simple = known is not None and not known.junctions and not known.unsplit and known.fixed
        if simple and known is not None and known.fits(self._uses, self._examples) and not self._watch.verify:
            self._split = known
            return []
        graph = Graph(roots, gradients, capture.parameters)
        if graph.is_of_another_model:  # an explanation inside a recorded step, say
            self._split = None
            return []
        graph.axes = frozenset(self._watch.axes)
        key = hash((graph.key, tuple(noted.key for noted in self._uses)))
        split = capture.known_splits.get(key)
        usable = split is not None and split.fixed and split.fits(self._uses, self._examples)
        capture.rehearsing = True
        capture.generator.manual_seed(7)  # a resumed run draws the same codes
        try:
            if split is None or not usable:
                kind, draw = capture.dtype, capture.generator
                split = learn_split(graph, self._uses, capture.blocks, self._examples, draw, kind, split)
            elif self._watch.verify:
                self._coded = verify_split(graph, self._examples, capture.generator, split.half)
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            raise reentrant() from error
        finally:
            capture.rehearsing = False
        self._split = split
        if split is None:  # the gradient is not finite: nothing to record
            return []
        if len(capture.known_splits) >= _KEPT:
            capture.known_splits.clear()
        capture.known_splits[key] = capture.split = split
        capture.unsplit.update(split.unsplit)
        capture.interacting |= split.interacting
        if capture.gap == 0:
            capture.tolerance = split.tolerance
        self._watch.learnt(split)
        self._note(split, split.gaps)
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
                    with without_autocast():
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
            unsplit, tolerance = set(self._split.unsplit), self._split.tolerance
            gaps = relative_gap(self._capture.blocks, self._totals, true, unsplit, tolerance)
        self._totals = {}
        if any(not self._split.holds(position, gap) for position, gap in gaps.items()):
            self._capture.forget()
        self._note(self._split, gaps)

    def _note(self, split: Split, gaps: dict[int, float]) -> None:
        capture = self._capture
        for position, gap in gaps.items():
            capture.gaps[position] = max(capture.gaps.get(position, 0.0), gap)
            allowed = split.allowance(position)
            if gap / allowed > capture.gap / capture.tolerance:
                capture.gap, capture.tolerance = gap, allowed

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


def reentrant() -> RecordingError:
    """Make the error for a checkpoint whose graph is not there to be checked."""
    return RecordingError(
        "recorder.step(ids)",
        "part of the model is checkpointed in the old way, whose graph cannot be looked at before the backward pass",
        got="torch.utils.checkpoint with use_reentrant=True",
        expected="use_reentrant=False",
        source="the model's forward pass",
        fix="Pass use_reentrant=False (in transformers: gradient_checkpointing_kwargs={'use_reentrant': False}); "
        "the numbers are the same",
    )
