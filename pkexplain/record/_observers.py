"""Hooks on the model: the loss derivatives of its outputs, and the shapes of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pkexplain.gradients.capture import Capture
from pkexplain.gradients.fused_head import fused_head, fused_head_below
from pkexplain.ids import leaves, named_tensors
from pkexplain.record._contract import several_in_one_row
from pkexplain.store.manifest import InputEntry

_BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
"""Inputs of transformers by which a model is told where one text of a row ends and the next begins."""


class LossDerivatives:
    """Watches ∂(loss)/∂y at the model's output, for the loss as it was back-propagated (including a mean's 1/batch).

    Args:
        model: The model.
        capture: Tells which passes through the graph are not the user's.
        output: Which tensor of the model's output is the prediction, if that is known.

    Attributes:
        output: The same; otherwise ``logits`` if the loss depends on it, or the output that is nearest to the loss. A
            fused head's log p counts as the logits that it did not form.
    """

    def __init__(self, model: nn.Module, capture: Capture, output: str | None = None) -> None:
        """Keep the model; nothing is watched yet."""
        self._model, self._capture, self.output = model, capture, output

    @contextmanager
    def noting(self, batch: Any) -> Iterator[None]:
        """Set ``batch.derivatives``, ``(batch,)``: each example's loss derivative along its unit direction u_i.

        If the output is one number, u_i is +1 and the derivative has a sign. Otherwise u_i is the direction in which
        the loss falls fastest, and the derivative is −‖∂ℓ_i/∂y_i‖.
        """

        def note(path: str, here: Tensor, single: bool = False) -> None:
            if self._capture.rehearsing or not self._capture.running:
                return
            before = seen.get(path)
            seen[path] = here if before is None else (before + here if single else -torch.hypot(before, here))
            if self.output is None or path == "logits":
                self.output = path
            if path == self.output:
                batch.derivatives = seen[path]

        def arrive(path: str, gradient: Tensor) -> None:
            flat = gradient.detach().flatten(1) if gradient.ndim > 1 else gradient.detach()[:, None]
            single = flat.shape[1] == 1
            note(path, flat[:, 0] if single else -flat.norm(dim=1), single)

        def returned(output: Any) -> None:
            for path, tensor in named_tensors(output).items():
                if not (tensor.requires_grad and tensor.ndim and len(tensor) == len(batch.ids)):
                    continue
                if not _on_token_scores(tensor, output, partial(note, path), partial(note, _logits(path))):
                    _on_gradient(tensor, partial(arrive, path))

        seen: dict[str, Tensor] = {}
        with calls_of(self._model, after=returned):
            yield


def _on_gradient(tensor: Tensor, tell: Callable[[Tensor], None]) -> None:
    """Tell the gradient of a tensor that the loss depends on, or of that from which it was cast.

    Where a model computes its own loss under autocast, Accelerate casts its outputs to float32 afterwards: the loss
    depends on the tensors before that.
    """
    node, place = tensor.grad_fn, tensor.output_nr
    cast = node is not None and type(node).__name__.startswith("ToCopyBackward")
    while node is not None and type(node).__name__.startswith("ToCopyBackward"):
        node, place = node.next_functions[0]
    if node is None or not cast:
        tensor.register_hook(tell)
        return

    def before(gradients: tuple[Tensor | None, ...]) -> None:
        gradient = gradients[place]
        if gradient is not None:
            tell(gradient)

    node.register_prehook(before)


def _logits(path: str) -> str:
    """The path at which a model returns logits that returns log p at this one, under a fused head."""
    return ".".join([*path.split(".")[:-1], "logits"])


def _on_token_scores(
    tensor: Tensor, output: Any, tell: Callable[[Tensor], None], tell_logits: Callable[[Tensor], None]
) -> bool:
    """Tell the loss derivatives of the logits that a fused head did not form; False if the tensor is not its log p.

    Args:
        tensor: A tensor that the model returned.
        output: All that it returned.
        tell: Told minus the norm of each example's ∂ℓ/∂(log p), if the logits' cannot be had, ``(batch,)``.
        tell_logits: Told minus the norm of each example's ∂ℓ/∂(logits), ``(batch,)``.
    """
    node = fused_head_below(tensor)
    if node is None:
        return False
    metadata: Any = node._input_metadata
    tokens, rows = metadata[0].shape[0], torch.arange(len(tensor), device=tensor.device)
    owners = rows[:, None].expand(tensor.shape).flatten()
    mask = getattr(output, "label_mask", None)
    if tokens != len(owners):  # on a GPU the head leaves ignored tokens out
        if not isinstance(mask, Tensor) or mask.shape != tensor.shape:
            return False
        owners = owners[mask.flatten().to(tensor.device)]
    if tokens != len(owners):
        return False

    def before(gradients: tuple[Tensor | None, ...]) -> None:
        gradient, *others = gradients
        if gradient is None or any(other is not None for other in others):
            return
        head = fused_head(node)
        squares = gradient.square() if head is None else head.score_gradient_squares(gradient)
        total = squares.new_zeros(len(tensor)).index_add_(0, owners.to(squares.device), squares)
        (tell if head is None else tell_logits)(-total.sqrt())

    node.register_prehook(before)
    return True


class InputShapes:
    """Notes the shapes and dtypes of the model's tensor inputs, without the batch; a size that varies becomes None.

    Attributes:
        seen: The inputs with one row per example, by position or name.
        axes: In which dimensions, of the first two, some input has one row per example.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        """Keep the model; nothing is noted yet."""
        self._model = model
        self.seen: dict[str, InputEntry] = {}
        self.axes: set[int] = set()

    @contextmanager
    def noting(self, examples: int) -> Iterator[None]:
        """Note the inputs of every forward pass with ``examples`` rows."""

        def given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            named = named_inputs(args, kwargs)
            if examples > 1 and holds_several(named):
                raise several_in_one_row(examples)
            self.axes |= _batch_axes(named, examples)
            for name, value in named.items():
                if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != examples:
                    continue
                shape = tuple(value.shape[1:])
                known = self.seen.get(name)
                if known is not None and len(known.shape) == len(shape):
                    shape = tuple(a if a == b else None for a, b in zip(known.shape, shape, strict=True))
                self.seen[name] = InputEntry(shape=shape, dtype=str(value.dtype).removeprefix("torch."))

        with calls_of(self._model, before=given):
            yield


@contextmanager
def calls_of(
    model: nn.Module,
    before: Callable[[tuple[Any, ...], dict[str, Any]], None] | None = None,
    after: Callable[[Any], None] | None = None,
) -> Iterator[None]:
    """Listen to a model's forward passes: ``before`` is told the inputs, ``after`` the output.

    A LightningModule need not call its own ``forward`` in training; then those of the part that holds all its
    parameters are taken for its own.
    """
    depth = 0

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal depth
        if not depth and before is not None:
            before(args, kwargs)
        depth += 1

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal depth
        depth -= 1
        if not depth and after is not None and output is not None:  # None: an error
            after(output)

    handles = []
    for part in _stand_ins(model):
        handles.append(part.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(part.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _stand_ins(model: nn.Module) -> list[nn.Module]:
    """The modules whose inputs and outputs are those of the model; of those that are called, the outermost counts."""
    found = [model]
    while hasattr(found[-1], "training_step"):
        inside = [part for part in found[-1].children() if next(part.parameters(), None) is not None]
        if len(inside) != 1 or next(found[-1].parameters(recurse=False), None) is not None:
            break
        found.append(inside[0])
    return found


def named_inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Name a model's inputs by position or name, and the parts of those that have parts ``"0.input_ids"``."""
    given = {**{str(i): value for i, value in enumerate(args)}, **kwargs}
    return {path: leaf for name, value in given.items() for path, leaf in leaves(name, value).items()}


def holds_several(inputs: Mapping[str, Any]) -> bool:
    """Whether a model's inputs are one row of several texts: they come with its boundaries, or positions begin anew."""
    if any(name.rpartition(".")[2] in _BOUNDARIES and value is not None for name, value in inputs.items()):
        return all(len(value) == 1 for name, value in inputs.items() if _is_of_tokens(name, value))
    positions = [value for name, value in inputs.items() if name.rpartition(".")[2] == "position_ids"]
    return any(isinstance(x, Tensor) and x.ndim == 2 and len(x) == 1 and int((x == 0).sum()) > 1 for x in positions)


def _is_of_tokens(name: str, value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 1 and name.rpartition(".")[2] in ("input_ids", "inputs_embeds")


def _batch_axes(inputs: Any, examples: int) -> set[int]:
    """The dimensions, of the first two, in which some tensor of some inputs has one row per example."""
    if isinstance(inputs, Tensor):
        return {axis for axis, size in enumerate(inputs.shape[:2]) if size == examples}
    if isinstance(inputs, nn.utils.rnn.PackedSequence):
        return {1} if int(inputs.batch_sizes[0]) == examples else set()
    if isinstance(inputs, Mapping) or hasattr(inputs, "items"):
        return set().union(*(_batch_axes(value, examples) for _, value in inputs.items()), set())
    if isinstance(inputs, (list, tuple)):
        found = set().union(*(_batch_axes(value, examples) for value in inputs), set())
        images = len(inputs) == examples and all(isinstance(value, Tensor) for value in inputs)
        return found | {0} if images else found
    return set()
