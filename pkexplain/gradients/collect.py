"""The gradient of every example's own output, for models that are ours: split in one pass, or one pass for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from pkexplain.errors import UnsupportedLayerError
from pkexplain.gradients._uses import NotedUse, noting_uses, split_use, standard_layouts
from pkexplain.gradients.capture import Capture, differentiable_statistics
from pkexplain.gradients.factors import DenseGradient, ExampleGradients
from pkexplain.gradients.watch import Watch

__all__ = ["collect"]

Pieces = list[tuple[int, ExampleGradients]]


def collect(capture: Capture, examples: int, run: Callable[[], Tensor]) -> Pieces:
    """Differentiate one number for each example.

    They are split in one backward pass if the split can be checked, and otherwise come from one pass for each example,
    which is always right.

    Args:
        capture: The layers of a model whose ``.grad`` may be written.
        examples: How many examples there are.
        run: Runs the model: ``(examples,)``, each number a function of its example alone.

    Returns:
        Positions of blocks and their gradients; several of a block add up.
    """
    found: Pieces = []
    capture.clear_gap()
    with torch.enable_grad():
        try:
            with capture.during_backward(examples, lambda at, piece: found.append((at, piece)), Watch(verify=False)):
                values = run()
                if not values.requires_grad:  # it does not depend on a layer
                    return []
                values.sum().backward()
            split = capture.split
            if split is not None and not split.unsplit and not split.interacting:
                return found
        except UnsupportedLayerError:
            pass
        finally:
            _clear(capture)
        return _one_by_one(capture, examples, run)


def _one_by_one(capture: Capture, examples: int, run: Callable[[], Tensor]) -> Pieces:
    """One backward pass for each example."""
    uses: list[NotedUse] = []
    buffers = [layer for layer in capture.layers if layer.buffers]
    with noting_uses(buffers, uses.append, lambda: False, differentiable_statistics):
        values = run()
    handles = [
        edge.node.register_prehook(partial(_note, noted, at, edge.output_nr))
        for noted in uses
        for at, edge in enumerate(noted.edges)
    ]
    dense: dict[str, list[Tensor]] = {name: [] for name in capture.parameters}
    statistics: dict[int, list[Tensor]] = {}
    try:
        for at in range(examples):
            for noted in uses:
                noted.arrived.clear()
            values[at].backward(retain_graph=at + 1 < examples)
            for name, parameter in capture.parameters.items():
                gradient = parameter.grad
                dense[name].append(torch.zeros_like(parameter) if gradient is None else gradient.detach().clone())
            _clear(capture)
            for noted in uses:
                for position, total in _statistics(noted, examples, capture.dtype):
                    rows = statistics.setdefault(position, [torch.zeros_like(total)] * examples)
                    rows[at] = rows[at] + total
    finally:
        for handle in handles:
            handle.remove()
    found = [capture.placed(name, torch.stack(rows)) for name, rows in dense.items()]
    return found + [(position, DenseGradient(torch.stack(rows))) for position, rows in statistics.items()]


def _note(noted: NotedUse, at: int, number: int, gradients: tuple[Tensor | None, ...]) -> None:
    gradient = gradients[number]
    if gradient is not None:
        noted.arrived[at] = gradient.detach()


def _statistics(noted: NotedUse, examples: int, dtype: torch.dtype | None) -> Iterator[tuple[int, Tensor]]:
    """The gradients of one BatchNorm's running statistics, whichever rows they came through."""
    blocks = noted.layer.blocks
    found = split_use(noted, [names for _, names in blocks], standard_layouts(noted), examples, dtype)
    for pieces in found or ():
        for (position, _), piece in zip(blocks, pieces, strict=True):
            yield position, piece.total()


def _clear(capture: Capture) -> None:
    for parameter in capture.parameters.values():
        parameter.grad = None
