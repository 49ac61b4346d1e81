"""The autograd graph of one backward pass: its nodes, where the model's output y is in it, and passes through it.

Nothing here changes a tensor, a `.grad` or a random state: the passes are `torch.autograd.grad` on the graph that the
user is about to differentiate, retained.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from pkexplain.gradients.layout import Layout

__all__ = ["Graph", "backward_listener", "packed", "random_state_kept"]

_PENALTIES = ("Pow", "Mul", "Sum", "Add", "Mean", "Abs", "Linalg", "Norm", "Div", "Sub", "Sqrt")
"""Names of nodes by which a loss may use a parameter directly, as in a penalty on the weights."""


class Graph:
    """The nodes below a loss, in an order that is the same whenever the graph is.

    Attributes:
        order: The nodes.
        leaves: The name of the parameter that each accumulating node belongs to.
        axes: In which of the first two dimensions the model's inputs have one row per example.

    Args:
        roots: Where the backward pass starts.
        gradients: The gradients it starts with.
        parameters: The parameters by name.
    """

    def __init__(
        self, roots: Sequence[Tensor], gradients: Sequence[Tensor | None], parameters: Mapping[str, nn.Parameter]
    ) -> None:
        """Walk the graph."""
        self.roots = [get_gradient_edge(root) for root in roots]
        self._gradients = [torch.ones_like(r) if g is None else g for r, g in zip(roots, gradients, strict=True)]
        self.edges = {name: get_gradient_edge(p) for name, p in parameters.items() if p.requires_grad}
        self.leaves = {edge.node: name for name, edge in self.edges.items()}
        self.order = list(below([edge.node for edge in self.roots]))
        self.position = {node: at for at, node in enumerate(self.order)}
        self.axes: frozenset[int] = frozenset((0,))
        self._deepest_first = list(deepest_first([edge.node for edge in self.roots]))

    @property
    def is_of_another_model(self) -> bool:
        """Whether no parameter is below the loss, nor a node in which one could be hidden, as in an old checkpoint.

        Where parameters of another model are there, only a checkpoint's node is suspected.
        """
        if any(node in self.position for node in self.leaves):
            return False
        names = {node.name() for node in self.order}
        leaves = (getattr(node, "variable", None) for node in self.order if node.name().endswith("AccumulateGrad"))
        if any(isinstance(leaf, nn.Parameter) for leaf in leaves):
            return not any("Checkpoint" in name for name in names)
        return all(name[-1].isdigit() or name.endswith("AccumulateGrad") for name in names)

    @property
    def key(self) -> int:
        """A number that is the same for graphs of the same structure."""
        return hash(tuple((node.name(), len(node.next_functions)) for node in self.order))

    @property
    def deepest_first(self) -> list[Node]:
        """The nodes, every one after those below it."""
        return self._deepest_first

    def frontier(self, examples: int) -> list[tuple[GradientEdge, bool]]:
        """Find y: the first nodes below the loss whose rows are the examples', and whether that is only a guess.

        A leading size that is a multiple of the batch may hold the rows of one example together or apart.
        """
        penalties = self._penalties()
        found: list[tuple[GradientEdge, bool]] = []
        todo = list(self.roots)
        seen = {(edge.node, edge.output_nr) for edge in todo}
        while todo:
            edge = todo.pop()
            rows = _rows(edge, examples, self.axes)
            if rows is not None and edge.node not in penalties and edge.node not in self.leaves:
                found.append((edge, rows))
                continue
            for node, number in edge.node.next_functions:
                if node is not None and (node, number) not in seen:
                    seen.add((node, number))
                    todo.append(GradientEdge(node, number))
        return sorted(found, key=lambda pair: -pair[0].node._sequence_nr())

    def _penalties(self) -> set[Node]:
        """The nodes that only combine parameters with one another."""
        found: set[Node] = set()
        for node in self._deepest_first:
            inputs = [m for m, _ in node.next_functions if m is not None]
            plain = node.name().startswith(_PENALTIES) and "Mm" not in node.name()
            if node in self.leaves or (inputs and plain and all(m in found for m in inputs) and _owns_inputs(node)):
                found.add(node)
        return found

    def direct(self, outputs: Sequence[GradientEdge]) -> list[Tensor | None]:
        """Compute ∂(loss)/∂y for every y, without what comes through another y above it."""
        whole = self._pass(self.roots, outputs, self._gradients)
        found: list[Tensor | None] = []
        above: set[Node] = set()
        for at, edge in enumerate(outputs):
            gradient = whole[at]
            if gradient is not None and edge.node in above:
                pairs = [(e, g) for e, g in zip(outputs[:at], found, strict=True) if g is not None]
                through = self._pass([e for e, _ in pairs], [edge], [g for _, g in pairs])[0]
                gradient = gradient if through is None else gradient - through
            found.append(gradient)
            above.update(below([edge.node]))
        return found

    def parameters_from(self, outputs: Sequence[GradientEdge], gradients: Sequence[Tensor]) -> dict[str, Tensor]:
        """Take gradients of some edges to the parameters: their gradients by name, where there is one."""
        names = list(self.edges)
        found = self._pass(outputs, [self.edges[name] for name in names], gradients)
        given = ((name, g.detach()) for name, g in zip(names, found, strict=True) if g is not None)
        return {name: g.to_dense() if g.is_sparse else g for name, g in given}

    @staticmethod
    def _pass(outputs: Sequence[GradientEdge], inputs: Sequence[GradientEdge], gradients: Sequence[Tensor]) -> Any:
        if not outputs or not inputs:
            return [None] * len(inputs)
        return torch.autograd.grad(outputs, inputs, gradients, retain_graph=True, allow_unused=True)

    @contextmanager
    def watching(
        self, nodes: Sequence[Node], seen: Callable[[Node, tuple[Tensor | None, ...]], None]
    ) -> Iterator[None]:
        """Call ``seen`` with the gradients of some nodes' outputs in the passes within the block."""
        handles = [node.register_prehook(lambda gradients, node=node: seen(node, gradients)) for node in nodes]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def below(roots: Sequence[Node]) -> Iterator[Node]:
    """Iterate over some nodes and all below them."""
    todo, seen = list(roots), set(roots)
    while todo:
        node = todo.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                todo.append(following)


def deepest_first(roots: Sequence[Node]) -> Iterator[Node]:
    """Iterate over some nodes and all below them, every one after those below it."""
    done: set[Node] = set()
    todo = [(node, False) for node in roots]
    while todo:
        node, ready = todo.pop()
        if ready:
            yield node
        elif node not in done:
            done.add(node)
            todo.append((node, True))
            todo += [(m, False) for m, _ in node.next_functions if m is not None and m not in done]


def packed(node: Node) -> bool:
    """Whether what a node saved lies behind hooks (checkpointing, offloading), which may be unpacked once only."""
    raw = (getattr(node, name) for name in dir(node) if name.startswith("_raw_saved_"))
    saved = (each for one in raw for each in (one if isinstance(one, tuple) else (one,)))  # a python function has many
    return any(getattr(each, "unpack_hook", None) is not None for each in saved)


def _owns_inputs(node: Node) -> bool:
    """Whether every tensor input of a node that is in the graph is one (a product with data has an input outside)."""
    return (
        not node.name().startswith(("Mul", "Div", "Add", "Sub"))
        or all(m is not None for m, _ in node.next_functions)
        or not any(isinstance(getattr(node, f"_saved_{side}", None), Tensor) for side in ("self", "other"))
    )


def _rows(edge: GradientEdge, examples: int, axes: frozenset[int]) -> bool | None:
    """Whether the examples' rows of an output are only a guess; None if it has no such rows."""
    shape = _shape(edge)
    if not len(shape):
        return None
    if shape[0] == examples or (axes and len(shape) > 2 and shape[1] == examples):
        return False
    # without an input of one row per example, a multiple of the batch is a coincidence, or ids that do not fit
    return True if axes and shape[0] and shape[0] % examples == 0 else None


def _shape(edge: GradientEdge) -> Sequence[int]:
    metadata: Any = edge.node._input_metadata
    return tuple(metadata[edge.output_nr].shape) if len(metadata) > edge.output_nr else ()


def layout_of_output(gradient: Tensor, examples: int, guess: str) -> Layout:
    """The layout of y: a contract (batch first, or second in time-first outputs), or the guess that is being tried."""
    if gradient.shape[0] == examples:
        return Layout(0, "contiguous")
    if gradient.ndim > 2 and gradient.shape[1] == examples:
        return Layout(1, "contiguous")
    return Layout(0, guess)


@dataclass
class _Patch:
    """The one replacement of `torch.autograd.backward`, and those who listen to it."""

    original: Any = None
    listeners: tuple[Any, ...] = ()
    lock: threading.Lock = field(default_factory=threading.Lock)


_PATCH = _Patch()


@contextmanager
def backward_listener(around: Callable[[Callable[[], Any], dict[str, Any]], Any]) -> Iterator[None]:
    """Let ``around(run, arguments)`` surround every ``backward()`` within the block, in this thread.

    Args:
        around: Is given a function that runs the backward pass as asked, and its arguments by name.
    """
    mine = (threading.get_ident(), around)
    with _PATCH.lock:  # other threads record and explain, too
        if _PATCH.original is None:
            _PATCH.original = torch.autograd.backward
            torch.autograd.backward = _listened  # loss.backward() looks it up there
        _PATCH.listeners = (*_PATCH.listeners, mine)
    try:
        yield
    finally:
        with _PATCH.lock:
            _PATCH.listeners = tuple(each for each in _PATCH.listeners if each is not mine)
            if not _PATCH.listeners and torch.autograd.backward is _listened:
                torch.autograd.backward, _PATCH.original = _PATCH.original, None


def _listened(*args: Any, **kwargs: Any) -> Any:
    names = ("tensors", "grad_tensors", "retain_graph", "create_graph", "grad_variables", "inputs")
    arguments = {**dict(zip(names, args, strict=False)), **kwargs}
    original = _PATCH.original or _ORIGINAL
    run = lambda: original(*args, **kwargs)  # noqa: E731 - wrapped below
    for thread, around in _PATCH.listeners:
        if thread == threading.get_ident():
            run = lambda run=run, around=around: around(run, arguments)  # noqa: E731
    return run()


_ORIGINAL = torch.autograd.backward


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Restore the random state of the CPU and of every used GPU after the block."""
    cpu = torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if gpus is not None:
            torch.cuda.set_rng_state_all(gpus)
