"""Per-example gradients from a real backward pass.

A forward hook notes a layer's input; the gradient of its output arrives during the backward pass; from the two, the
layer's rule (`pkexplain.gradients.layers`) computes the gradient of every example.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook

from pkexplain.errors import ExampleIdError, PkexplainError
from pkexplain.gradients._convolution import ConvolutionGradient
from pkexplain.gradients._embedding import EmbeddingGradient
from pkexplain.gradients._layer_rules import Parts, Use
from pkexplain.gradients.batch_norm import RowMixture, before_norms, is_before_norm
from pkexplain.gradients.factors import (
    DenseGradient,
    ExampleGradients,
    FormedGradient,
    LinearGradient,
    ScaledGradient,
)
from pkexplain.gradients.layers import Layer, refusal

__all__ = ["GRADIENT_CLASSES", "Capture"]

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


class Capture:
    """Hooks that turn forward and backward passes of a model into per-example gradients.

    Args:
        layers: The layers to watch (from `find_layers`).
        dtype: Dtype of the gradients; None for the dtype of each layer's output (which autocast may change).
    """

    def __init__(self, layers: Sequence[Layer], dtype: torch.dtype | None = None) -> None:
        self.layers, self._dtype = tuple(layers), dtype
        self._parameters = {
            (layer.name, names): [layer.module.get_parameter(name) for name in names]
            for layer in layers
            if not layer.buffers
            for _, names in layer.blocks
        }
        self._paused = False
        self._positions: dict[str, bool] = {}  # embeddings of one-dimensional indices: whether those are positions
        self._broadcast: set[str] = set()  # layers whose single row is known to be broadcast over the examples

    @contextmanager
    def during_backward(self, examples: int, sink: Callable[[int, ExampleGradients], None]) -> Iterator[None]:
        """Pass every block's gradients to ``sink`` when the user's own backward pass reaches them.

        Args:
            examples: The batch size, which must be the first dimension of every layer's output.
            sink: Called with the block's position and its gradients; several times if a layer is used repeatedly.

        Raises:
            ExampleIdError: A layer's output does not have ``examples`` rows.
        """

        def watch(use: _Noted, outputs: Sequence[Tensor]) -> None:
            if len(outputs) == 1:
                outputs[0].register_hook(lambda gradient: self._deliver(use, [gradient], sink))
            else:
                register_multi_grad_hook(outputs, lambda gradients: self._deliver(use, list(gradients), sink))

        with self._watching(examples, watch):
            yield

    @contextmanager
    def collecting(self, examples: int) -> Iterator[Callable[[Tensor], list[tuple[int, ExampleGradients]]]]:
        """Yield a function that differentiates a scalar and returns every block's gradients; no ``.grad`` is set."""
        uses: list[tuple[_Noted, list[Any]]] = []

        def note(use: _Noted, outputs: Sequence[Tensor]) -> None:
            # the edge, not the tensor: an in-place ReLU after the layer turns the tensor into its own output
            uses.append((use, [torch.autograd.graph.get_gradient_edge(output) for output in outputs]))

        def gradients(scalar: Tensor) -> list[tuple[int, ExampleGradients]]:
            found: list[tuple[int, ExampleGradients]] = []
            if not scalar.requires_grad:  # it does not depend on a layer
                return found
            edges = [edge for _, outputs in uses for edge in outputs]
            flat = iter(torch.autograd.grad(scalar, edges, allow_unused=True))
            for use, outputs in uses:
                self._deliver(use, [next(flat) for _ in outputs], lambda b, g: found.append((b, g)))
            return found

        with self._watching(examples, note):
            yield gradients

    @contextmanager
    def _watching(self, examples: int, on_use: Callable[[_Noted, Sequence[Tensor]], None]) -> Iterator[None]:
        spread: list[str] = []  # layers whose output was expanded
        made: dict[int, tuple[weakref.ref[Tensor], _Noted]] = {}  # which use returned a tensor
        used: list[_Noted] = []

        def hook_for(layer: Layer) -> Callable[..., Any]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
                if self._paused or not torch.is_grad_enabled():
                    return None
                if layer.buffers and isinstance(output, Tensor) and not output.requires_grad:
                    # nothing before it is trained, but its statistics are differentiated; cloned, for an in-place ReLU
                    output = output.detach().requires_grad_().clone()
                noted = _Noted(layer, Use(module, args, kwargs, module.training))
                why = layer.misuse(noted.use)
                if why:
                    raise refusal(layer.name, module, why)
                if isinstance(output, Tensor):
                    noted, output = self._spread(noted, output, examples, spread)
                output, places = _apart(layer, output, examples, noted.lifted)
                watched = [tensor for tensor in places if tensor.requires_grad]
                if watched:
                    noted = replace(noted, wanted=tuple(tensor.requires_grad for tensor in places))
                    used.append(noted)
                    on_use(noted, watched)
                    source = made.get(id(noted.use.given(0, "input")))
                    if source and source[0]() is noted.use.given(0, "input"):
                        source[1].followers.append(noted)
                    if isinstance(output, Tensor):
                        made[id(output)] = weakref.ref(output), noted
                return output

            return hook

        handles = [layer.module.register_forward_hook(hook_for(layer), with_kwargs=True) for layer in self.layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for noted in used:  # breaks a cycle: a tensor's hook holds a use that holds the tensor
                noted.followers.clear()
                noted.arrived.clear()

    def _spread(self, noted: _Noted, output: Tensor, examples: int, spread: list[str]) -> tuple[_Noted, Tensor]:
        """Expand an output that the model broadcasts over the batch to one row per example, so its gradient is too.

        Position embeddings are looked up as ``(1, t)`` or ``(t,)``; what a model adds to every example then has a
        leading dimension of 1, or none.
        """
        layer, use = noted.layer, noted.use
        if output.ndim == 0 or layer.batch_axes != (0,):
            return noted, output
        ids = use.given(0, "input")
        if isinstance(layer.module, nn.Embedding) and ids.ndim == 1:
            if not self._are_positions(layer, ids, examples):
                return noted, output
            if examples == 1:
                return replace(noted, use=_widened(use, 1, ids.ndim), lifted=True), output
            spread.append(layer.name)
            wide = replace(noted, use=_widened(use, examples, ids.ndim), spread=True)
            return wide, output.expand(examples, *output.shape)
        if examples == 1 or len(output) != 1 or any(_leads_with(v, examples) for v in _values(use)):
            return noted, output
        if spread:
            raise _positions(spread[0], f"an output of shape {tuple(output.shape)} in layer {layer.name!r} after it")
        return replace(noted, use=_widened(use, examples), spread=True), output.expand(examples, *output.shape[1:])

    def _are_positions(self, layer: Layer, ids: Tensor, examples: int) -> bool:
        """Whether one-dimensional indices are positions, the same for every example, or one index per example."""
        if layer.name not in self._positions:
            counted = torch.equal(ids, torch.arange(examples, device=ids.device, dtype=ids.dtype))
            if examples > 1 and (len(ids) == 1 or counted):  # it could be either
                raise _positions(layer.name, f"indices of shape {tuple(ids.shape)}")
            self._positions[layer.name] = len(ids) != examples
        return self._positions[layer.name]

    def _deliver(self, noted: _Noted, gradients: Sequence[Tensor | None], sink: Any) -> None:
        if all(gradient is None for gradient in gradients):
            return
        layer, flat = noted.layer, iter(gradients)
        arrived = [next(flat) if wanted else None for wanted in noted.wanted]
        arrived = [g if g is None else g.to(self._dtype or g.dtype) for g in arrived]
        arrived = [g[None] if noted.lifted and g is not None else g for g in arrived]
        if noted.spread and layer.name not in self._broadcast and arrived[0] is not None:
            if arrived[0][1:].any():
                self._broadcast.add(layer.name)
            elif arrived[0].any():
                raise _positions(layer.name, "a gradient in the first row only")
        noted.arrived[:] = arrived
        self._paused = True  # the rule may rerun the layer, which is not a use to record
        try:
            with torch.no_grad():
                blocks = [block for block in layer.blocks if layer.buffers or self._moves(layer, block[1])]
                for found in _gradients(noted, tuple(arrived), [names for _, names in blocks]):
                    for (position, names), block in zip(blocks, found, strict=True):
                        sink(position, block if layer.buffers else self._without_frozen(layer, names, block))
        except RuntimeError as error:
            if isinstance(error, (PkexplainError, torch.OutOfMemoryError)):
                raise
            why = f"its per-example rule failed ({error})"
            raise refusal(layer.name, layer.module, why) from error
        finally:
            self._paused = False

    def _moves(self, layer: Layer, names: tuple[str, ...]) -> bool:
        """Whether a block has a parameter that is still trainable."""
        return any(parameter.requires_grad for parameter in self._parameters[layer.name, names])

    def _without_frozen(self, layer: Layer, names: tuple[str, ...], gradients: ExampleGradients) -> ExampleGradients:
        """Zero the gradients of a block's parameters that were frozen since."""
        parameters = self._parameters[layer.name, names]
        if all(parameter.requires_grad for parameter in parameters):
            return gradients
        dtype = gradients.select(slice(0, 1)).total().dtype
        masks = [p.new_full((p.numel(),), float(p.requires_grad), dtype=dtype) for p in parameters]
        return gradients.scaled(torch.cat(masks))


@dataclass(frozen=True)
class _Noted:
    """One use of a layer, and how its output was changed so that it has one row per example."""

    layer: Layer
    use: Use
    wanted: tuple[bool, ...] = ()
    spread: bool = False
    lifted: bool = False  # one example, and a gradient without a batch dimension
    followers: list[_Noted] = field(default_factory=list)  # uses of layers whose input is its output
    arrived: list[Tensor | None] = field(default_factory=list)


def _gradients(noted: _Noted, arrived: tuple[Tensor | None, ...], parts: Parts) -> Sequence[Sequence[ExampleGradients]]:
    """Apply a layer's rule; if BatchNorms follow it, through the output that they normalised."""
    layer, use = noted.layer, replace(noted.use, gradients=arrived)
    if not parts:
        return []
    norms = [
        replace(other.use, gradients=tuple(other.arrived))
        for other in noted.followers
        if other.arrived and is_before_norm(layer.rule, use.gradient, other.use)
    ]
    return before_norms(layer.rule, use, norms, parts) if norms else [layer.rule(use, parts)]


def _values(use: Use) -> list[Any]:
    return [*use.args, *use.kwargs.values()]


def _leads_with(value: Any, size: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == size


def _widened(use: Use, examples: int, plain: int | None = None) -> Use:
    """Expand shared arguments to one per example: those without a batch dimension (of ``plain`` ones), or with 1."""

    def widen(value: Any) -> Any:
        if plain is not None and isinstance(value, Tensor) and value.ndim == plain:
            return value.expand(examples, *value.shape)
        return value.expand(examples, *value.shape[1:]) if plain is None and _leads_with(value, 1) else value

    return replace(use, args=tuple(map(widen, use.args)), kwargs={n: widen(v) for n, v in use.kwargs.items()})


def _apart(layer: Layer, output: Any, examples: int, lifted: bool) -> tuple[Any, list[Tensor]]:
    """Check a layer's outputs; if there are several, clone each, so that none depends on another."""
    if isinstance(output, nn.utils.rnn.PackedSequence):
        raise refusal(layer.name, layer.module, "it was given a PackedSequence")
    if isinstance(output, Tensor):
        if not lifted:
            _check_output(layer, output, examples, layer.batch_axes[0])
        return output, [output]
    places: list[Tensor] = []

    def visit(part: Any) -> Any:
        if isinstance(part, Tensor):
            if part.requires_grad:
                _check_output(layer, part, examples, layer.batch_axes[min(len(places), len(layer.batch_axes) - 1)])
                part = part.clone()  # not a view, which an in-place ReLU after it would bypass
            places.append(part)
            return part
        if isinstance(part, (tuple, list)):
            made = [visit(piece) for piece in part]
            return type(part)(*made) if hasattr(part, "_fields") else type(part)(made)
        if part is not None and not isinstance(part, (bool, int, float, str)):
            raise refusal(layer.name, layer.module, f"it returns a {type(part).__name__}, not tensors")
        return part

    return visit(output), places


def _positions(name: str, got: str) -> ExampleIdError:
    return ExampleIdError(
        f"recording layer {name!r}",
        "its output could belong to the examples or be shared by all of them",
        got=got,
        expected="one row per example, or positions of shape (1, T), added directly to the examples",
        source="the number of ids passed to recorder.step(ids)",
        fix="Pass positions as (1, T): torch.arange(T)[None]",
    )


def _check_output(layer: Layer, output: Tensor, examples: int, axis: int) -> None:
    if output.ndim <= axis or output.shape[axis] != examples:
        raise ExampleIdError(
            f"recording layer {layer.name!r}",
            "its output does not have one row per example",
            got=f"output of shape {tuple(output.shape)}",
            expected=f"{examples} rows",
            source="the number of ids passed to recorder.step(ids)",
            fix="Pass one id per row of the batch, and keep the batch as the first dimension of every layer",
        )
