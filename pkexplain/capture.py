"""Per-example gradients out of a real backward pass.

A forward hook notes what a layer was given; the gradient of its output arrives during the backward pass; the layer's
rule (`pkexplain.layers`) makes the gradient of every example out of the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pkexplain.errors import ExampleIdError, PkexplainError, message
from pkexplain.gradients import ExampleGradients
from pkexplain.layers import Layer, refusal

__all__ = ["Capture"]


class Capture:
    """Hooks that turn forward and backward passes of a model into per-example gradients.

    Args:
        layers: The layers to watch (from `find_layers`).
        dtype: Number format of the gradients; None for that of each layer's output (which autocast may change).
    """

    def __init__(self, layers: Sequence[Layer], dtype: torch.dtype | None = None) -> None:
        self.layers, self._dtype = tuple(layers), dtype
        self._paused = False

    @contextmanager
    def during_backward(self, examples: int, sink: Callable[[int, ExampleGradients], None]) -> Iterator[None]:
        """Hand every block's gradients to ``sink`` as the user's own backward pass reaches them.

        Args:
            examples: The batch size that every layer's output must lead with.
            sink: Called with the block's position and its gradients; several times where a layer is used repeatedly.

        Raises:
            ExampleIdError: A layer's output does not lead with ``examples`` rows.
        """

        def watch(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            output.register_hook(lambda gradient: self._deliver(layer, args, kwargs, gradient, sink))

        with self._watching(examples, watch):
            yield

    @contextmanager
    def collecting(self, examples: int) -> Iterator[Callable[[Tensor], list[tuple[int, ExampleGradients]]]]:
        """Yield a function that differentiates a scalar and returns every block's gradients, forming no ``.grad``."""
        uses: list[tuple[Layer, tuple[Any, ...], dict[str, Any], Any]] = []

        def note(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            # the edge, not the tensor: an in-place ReLU behind the layer makes of the tensor what it put out
            uses.append((layer, args, kwargs, torch.autograd.graph.get_gradient_edge(output)))

        def gradients(scalar: Tensor) -> list[tuple[int, ExampleGradients]]:
            found: list[tuple[int, ExampleGradients]] = []
            if not scalar.requires_grad:  # it does not depend on a layer
                return found
            outputs = torch.autograd.grad(scalar, [use[3] for use in uses], allow_unused=True)
            for (layer, args, kwargs, _), gradient in zip(uses, outputs, strict=True):
                if gradient is not None:
                    self._deliver(layer, args, kwargs, gradient, lambda b, g: found.append((b, g)))
            return found

        with self._watching(examples, note):
            yield gradients

    @contextmanager
    def _watching(self, examples: int, on_use: Callable[..., None]) -> Iterator[None]:
        def hook_for(layer: Layer) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                if self._paused or not torch.is_grad_enabled():
                    return
                _check_output(layer, output, examples)
                if output.requires_grad:
                    on_use(layer, args, kwargs, output)

            return hook

        handles = [layer.module.register_forward_hook(hook_for(layer), with_kwargs=True) for layer in self.layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _deliver(self, layer: Layer, args: Any, kwargs: Any, gradient: Tensor, sink: Any) -> None:
        gradient = gradient.to(self._dtype or gradient.dtype)
        self._paused = True  # the rule may run the layer again, which is not a use to record
        try:
            with torch.no_grad():
                for position, names in layer.blocks:
                    sink(position, layer.rule(layer.module, args, kwargs, gradient, names))
        except RuntimeError as error:
            if isinstance(error, (PkexplainError, torch.OutOfMemoryError)):
                raise
            why = f"its per-example rule failed ({error})"
            raise refusal(layer.name, layer.module, why) from error
        finally:
            self._paused = False


def _check_output(layer: Layer, output: Any, examples: int) -> None:
    if not isinstance(output, Tensor):
        raise refusal(layer.name, layer.module, f"it returns a {type(output).__name__}, not one tensor")
    if output.ndim == 0 or len(output) != examples:
        raise ExampleIdError(
            message(
                f"recording layer {layer.name!r}",
                "its output does not have one row per example",
                got=f"output of shape {tuple(output.shape)}",
                expected=f"{examples} rows",
                source="the number of ids given to recorder.step(ids)",
                fix="Give one id per row of the batch, and keep the batch as the first dimension of every layer",
            )
        )
