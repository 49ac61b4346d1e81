"""Per-example gradients from a real backward pass, which is left as it is.

Forward hooks note what each layer was given; hooks on nodes of the autograd graph read the gradients of its outputs
while the user's own backward pass runs. From the two, the layer's rule (`pkexplain.gradients.layers`) computes the
gradient of every example; parameters without a rule are read at the graph's junctions (`pkexplain.gradients.split`).
No output is replaced, no layer is run again, and no `.grad` is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pkexplain.errors import PkexplainError
from pkexplain.gradients._step_capture import StepCapture
from pkexplain.gradients._uses import NotedUse, noting_uses, split_use
from pkexplain.gradients.factors import (
    DenseGradient,
    ExampleGradients,
    FormedGradient,
    LinearGradient,
)
from pkexplain.gradients.graph import backward_listener
from pkexplain.gradients.interrupts import deferred_interrupts
from pkexplain.gradients.layers import Block, Layer, refusal
from pkexplain.gradients.layout import Layout
from pkexplain.gradients.matrices import as_matrix
from pkexplain.gradients.split import Split
from pkexplain.gradients.watch import Watch

__all__ = ["Capture"]

Sink = Callable[[int, ExampleGradients], None]


class Capture:
    """Hooks that turn backward passes of a model into per-example gradients.

    Attributes:
        rehearsing: Whether a pass of its own runs through the graph, which is not the user's.
        running: Whether a backward pass of the user's is running that adds to the parameters' ``.grad``.
        gap: The split gap, since `clear_gap`, of the block that comes closest to its tolerance.
        unsplit: Parameters that could not be split since then, and why.
        gaps: The largest split gap of each block.
        split: How the last graph was split; None before the first.
        known_splits: How graphs are split, by their keys.
        interacting: Whether examples were seen to act on one another.
        tolerance: The gap that was allowed there.

    Args:
        layers: The layers to watch (from `find_layers`).
        blocks: The blocks of parameters, from there, too.
        dtype: Dtype of the gradients; None for the dtype of each layer's output (which autocast may change).
    """

    def __init__(self, layers: Sequence[Layer], blocks: Sequence[Block], dtype: torch.dtype | None = None) -> None:
        """Find the parameters; nothing is hooked yet."""
        self.layers, self.blocks, self.dtype = tuple(layers), tuple(blocks), dtype
        self.parameters = {
            full: layer.module.get_parameter(local)
            for layer in layers
            for position, names in layer.blocks
            for full, local in zip(blocks[position].parameters, names, strict=True)
        }
        self._places = {name: at for at, block in enumerate(self.blocks) for name in block.parameters}
        self.generator = torch.Generator().manual_seed(7)
        self.known_splits: dict[int, Split] = {}
        self.split: Split | None = None
        self.rehearsing = self.running = False
        self._open: StepCapture | None = None
        self.clear_gap()

    def clear_gap(self) -> None:
        """Start measuring anew."""
        self.gap, self.gaps, self.unsplit, self.interacting, self.tolerance = 0.0, {}, {}, False, 1e-8

    def forget(self) -> None:
        """Learn anew at the next backward pass."""
        self.known_splits.clear()
        self.split = None

    @contextmanager
    def during_backward(self, examples: int, sink: Sink, watch: Watch | None = None) -> Iterator[None]:
        """Pass every block's gradients to ``sink`` while the user's own backward passes reach them.

        Args:
            examples: The batch size.
            sink: Called with the block's position and its gradients; several times if a layer is used repeatedly.
            watch: What to tell the recording, and ask it.

        Raises:
            ExampleIdError: Nothing can be split, as nothing has one row per example.
        """
        self.release()
        step = self._open = StepCapture(self, examples, sink, watch or Watch())
        try:
            with deferred_interrupts():
                step.watching.enter_context(noting_uses(self.layers, step.note, lambda: self.rehearsing))
                step.watching.enter_context(backward_listener(step.around))
            yield
        finally:
            self.release()

    def release(self) -> None:
        """Stop watching backward passes, also if an interrupt came where that should have been done."""
        if self._open is None:
            return
        with deferred_interrupts():
            step, self._open = self._open, None
            step.watching.close()
            step.close()
            self.rehearsing = self.running = False

    def deliver(
        self, noted: NotedUse, layouts: dict[int, Layout | None], examples: int, sink: Sink, only: Any = None
    ) -> None:
        """Apply a layer's rule and pass its blocks on."""
        layer = noted.layer
        moving = [block for block in layer.blocks if self._moves(block[0])]
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
                sink(position, self._without_frozen(position, piece))

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
        flat = values.reshape(len(values), -1)
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
