"""Does recording leave a training step alone, and are its gradients split as they should be? Tried on one batch."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from pkexplain.errors import ConfigurationError, PkexplainError
from pkexplain.gradients.capture import Capture
from pkexplain.gradients.layers import find_layers
from pkexplain.gradients.split import Split
from pkexplain.gradients.watch import Watch
from pkexplain.record._observers import InputShapes
from pkexplain.record._optimizers import Optimizers

__all__ = ["RecordingCheck", "SplitOfLayer", "verify_recording"]

_REPEATS = 5


@dataclass(frozen=True)
class SplitOfLayer:
    """How the gradient of one block of parameters is split.

    Attributes:
        name: The layer's path in the model.
        parameters: Names of the block's parameters.
        how: ``"rule"`` (the layer's own rule), ``"graph"`` (read in the autograd graph), ``"unsplit"``, or ``"unused"``
            if the loss does not depend on it.
        gap: Its split gap: how far Σ_i c_i g_i of the examples' gradients g_i is from a coded pass through the real
            graph, with example i's share of the loss multiplied by a random c_i; relative.
        share: Its share of the gradient's norm.
        why: Why it is not split; empty if it is.
    """

    name: str
    parameters: tuple[str, ...]
    how: str
    gap: float
    share: float
    why: str = ""


@dataclass(frozen=True)
class RecordingCheck:
    """What `verify_recording` found.

    Attributes:
        changed: What differs, bit for bit, between a step with and without recording: ``"loss"``, ``"gradient of …"``,
            ``"buffer …"``, ``"random state"``. It must be empty.
        layers: How each block of parameters is split.
        examples: The batch size.
        gap: The split gap of the layer that comes closest to its tolerance.
        tolerance: The split gap that is allowed there, by dtype and by the rounding of the gradients themselves.
        interacting: Whether examples act on one another, as in a BatchNorm.
        optimizer: Why the optimizer cannot be recorded; empty if it can, or was not given.
        plain_seconds: A forward and backward pass, the median of 5.
        recorded_seconds: The same while recording, after the first step, without the projection.
        first_seconds: The first recorded step, in which the split is learnt and checked.
    """

    changed: tuple[str, ...]
    layers: tuple[SplitOfLayer, ...]
    examples: int
    gap: float
    tolerance: float
    interacting: bool
    optimizer: str
    plain_seconds: float
    recorded_seconds: float
    first_seconds: float

    @property
    def unsplit(self) -> float:
        """The share of the gradient's norm that is not split."""
        return sum(layer.share**2 for layer in self.layers if layer.how == "unsplit") ** 0.5

    @property
    def passed(self) -> bool:
        """Whether nothing changed, every gap is within the tolerance, and the optimizer can be recorded."""
        return not self.changed and self.gap <= self.tolerance and not self.optimizer

    def __str__(self) -> str:
        """A table of the layers, and what was found in words."""
        width = max([len(layer.name) for layer in self.layers] + [5])
        lines = [f"{'layer':{width}}  split by  split gap  share of gradient"]
        for layer in self.layers:
            gap = f"{layer.gap:9.1e}" if layer.how in ("rule", "graph") else " " * 9
            line = f"{layer.name or '(model)':{width}}  {layer.how:8}  {gap}  {layer.share:8.2%}  {layer.why}"
            lines.append(line.rstrip())
        same = "the same, bit for bit" if not self.changed else f"CHANGED: {', '.join(self.changed[:8])}"
        lines.append(f"Loss, gradients, buffers and random state with and without recording: {same}.")
        lines.append(
            f"Largest split gap {self.gap:.1e} (allowed {self.tolerance:.0e}), {self.examples} examples; "
            f"not split: {self.unsplit:.2%} of the gradient."
        )
        if self.interacting:
            lines.append("Examples act on one another here; a row is credited to the example at whose place it is.")
        if self.optimizer:
            lines.append(f"The optimizer cannot be recorded: {self.optimizer}")
        plain = max(self.plain_seconds, 1e-9)
        lines.append(
            f"A recorded pass takes {self.recorded_seconds / plain:.2f} times a plain one ({plain * 1e3:.1f} ms), "
            f"the first {self.first_seconds / plain:.1f} times; without projection."
        )
        left = [layer.name or "(model)" for layer in self.layers if layer.how == "unsplit"]
        but = f", but not split: {', '.join(left[:8])}" if left else ""
        lines.append(f"passed{but}" if self.passed else f"NOT PASSED{but}")
        return "\n".join(lines)


def verify_recording(
    model: nn.Module,
    batch: Any,
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    examples: int | None = None,
) -> RecordingCheck:
    """Try one batch with and without recording, and compare everything that a training could notice.

    Nothing is written, no step is taken, and the model is left as it was.

    Args:
        model: The model, in the mode in which it will be trained.
        batch: What ``loss`` needs: a tensor, a tuple, a mapping.
        loss: Called with the model and the batch; returns the loss.
        optimizer: The optimizer, or several, to check that their steps can be recorded.
        examples: How many examples the batch holds; by default the leading size of its first tensor.

    Returns:
        What was found; ``print`` shows a table.

    Raises:
        ConfigurationError: The number of examples cannot be told.
        ExampleIdError: Nothing in the graph has one row per example.

    Example:
        >>> import torch, pkexplain as pk
        >>> model, x, y = torch.nn.Linear(3, 2), torch.randn(8, 3), torch.randint(2, (8,))
        >>> loss = lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
        >>> pk.verify_recording(model, (x, y), loss).passed
        True
    """
    count = _count(batch) if examples is None else examples
    why = ""
    if optimizer is not None:
        try:
            Optimizers(optimizer)
        except PkexplainError as error:
            why = str(error)
    with _left_alone(model) as begin:
        plain = _Outcome.of(model, lambda: loss(model, batch), begin)
        times = [_Outcome.of(model, lambda: loss(model, batch), begin).seconds for _ in range(_REPEATS)]
        tried = _Recorded(model, count)
        first = _Outcome.of(model, lambda: loss(model, batch), begin, tried)
        split, gaps = tried.split, dict(tried.capture.gaps)
        gap, tolerance, interacting = tried.capture.gap, tried.capture.tolerance, tried.capture.interacting
        again = [_Outcome.of(model, lambda: loss(model, batch), begin, tried).seconds for _ in range(_REPEATS)]
    return RecordingCheck(
        changed=tuple(first.differences(plain)),
        layers=tuple(_layers(tried, split, gaps, plain.gradients)),
        examples=count,
        gap=gap,
        tolerance=tolerance,
        interacting=interacting,
        optimizer=why,
        plain_seconds=median(times),
        recorded_seconds=median(again),
        first_seconds=first.seconds,
    )


class _Recorded:
    """A capture that keeps nothing, as it is made for a recording."""

    def __init__(self, model: nn.Module, examples: int) -> None:
        names = {name: 0 for name, p in model.named_parameters() if p.requires_grad}
        layers, self.blocks = find_layers(model, names)
        self.capture, self._examples = Capture(layers, self.blocks), examples
        self._inputs = InputShapes(model)
        self.split: Split | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Capture the gradients of a step."""
        watch = Watch(verify=False, learnt=self._learnt, axes=self._inputs.axes)
        with (
            self._inputs.noting(self._examples),
            self.capture.during_backward(self._examples, lambda position, gradients: None, watch),
        ):
            yield

    def _learnt(self, split: Split) -> None:
        self.split = split


@dataclass(frozen=True)
class _Outcome:
    """Everything that a forward and a backward pass leave behind."""

    loss: Tensor
    gradients: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    random: Tensor
    seconds: float

    @classmethod
    def of(
        cls, model: nn.Module, loss: Callable[[], Tensor], begin: Callable[[], None], recorded: _Recorded | None = None
    ) -> _Outcome:
        begin()
        start = time.perf_counter()
        with recorded.watching() if recorded else contextlib.nullcontext():
            value = loss()
            value.backward()
        seconds = time.perf_counter() - start
        gradients = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}
        buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
        return cls(value.detach().clone(), gradients, buffers, torch.get_rng_state(), seconds)

    def differences(self, other: _Outcome) -> Iterator[str]:
        """Name what is not the same, bit for bit."""
        if not _same(self.loss, other.loss):
            yield "loss"
        for kind, mine, theirs in (
            ("gradient of", self.gradients, other.gradients),
            ("buffer", self.buffers, other.buffers),
        ):
            for name in {**mine, **theirs}:
                if name not in mine or name not in theirs or not _same(mine[name], theirs[name]):
                    yield f"{kind} {name}"
        if not torch.equal(self.random, other.random):
            yield "random state"


def _same(a: Tensor, b: Tensor) -> bool:
    a, b = (t.to_dense() if t.is_sparse else t for t in (a, b))
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())


@contextlib.contextmanager
def _left_alone(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Yield a function that puts buffers, gradients and random state back; all are put back at the end."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    gradients = [(p, p.grad) for p in model.parameters()]
    random = torch.get_rng_state()

    def begin() -> None:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for parameter in model.parameters():
            parameter.grad = None
        torch.set_rng_state(random)

    try:
        yield begin
    finally:
        begin()
        for parameter, gradient in gradients:
            parameter.grad = gradient


def _layers(
    tried: _Recorded, split: Split | None, gaps: Mapping[int, float], gradients: Mapping[str, Tensor]
) -> Iterator[SplitOfLayer]:
    whole = sum(float(g.double().norm()) ** 2 for g in gradients.values()) ** 0.5
    for position, block in enumerate(tried.blocks):
        mine = [gradients[name] for name in block.parameters if name in gradients]
        size = sum(float(g.double().norm()) ** 2 for g in mine) ** 0.5
        reasons = [split.unsplit[name] for name in block.parameters if split and name in split.unsplit]
        how = "unsplit" if reasons else "rule" if split and position in split.rules else "graph" if mine else "unused"
        yield SplitOfLayer(
            block.name, block.parameters, how, gaps.get(position, 0.0), size / whole if whole else 0.0, *reasons[:1]
        )


def _count(batch: Any) -> int:
    """The leading size of the first tensor of a batch."""
    if isinstance(batch, Tensor) and batch.ndim:
        return len(batch)
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    for part in parts:
        with contextlib.suppress(ConfigurationError):
            return _count(part)
    raise ConfigurationError(
        "verify_recording(batch=…)",
        "the number of examples cannot be told",
        got=type(batch).__name__,
        expected="a batch with a tensor of one row per example",
        source="the first tensor of the batch",
        fix="Pass examples=",
    )
