"""Optimizer steps that can be taken again, and differentiated: for the replay reading.

A step is a function of θ, of what the optimizer remembers and of the gradient, coordinate by coordinate. Written in
torch operations it is its own derivative: `partial_derivatives` differentiates it, so that a new optimizer is its step
and nothing more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pkexplain.errors import UnsupportedOptimizerError
from pkexplain.optimizers.registry import rule_for

__all__ = ["Partials", "ReplayedStep", "partial_derivatives", "replayed_step", "rule_name"]


class ReplayedStep(Protocol):
    """The step of one kind of optimizer."""

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the numbers that `step` needs, as `read` returns them."""
        ...

    @property
    def remembered(self) -> int:
        """How many vectors the optimizer remembers."""
        ...

    def read(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[float, ...]:
        """Read the options before a step; the first is the step's number, from 1 where nothing is remembered yet."""
        ...

    def step(self, point: Tensor, memory: Sequence[Tensor], gradient: Tensor, options: Mapping[str, float]) -> Any:
        """Take a step: θ and what is remembered, after it. Nothing is changed in place."""
        ...


class _SGD:
    options = ("step", "lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
    remembered = 1

    def read(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[float, ...]:
        number = 1 if state.get("momentum_buffer") is None else 2  # there is no count
        return number, *(float(group[name]) for name in self.options[1:])

    def step(self, point: Tensor, memory: Sequence[Tensor], gradient: Tensor, options: Mapping[str, float]) -> Any:
        (buffer,), momentum = memory, options["momentum"]
        gradient = -gradient if options["maximize"] else gradient
        if options["weight_decay"]:
            gradient = gradient + options["weight_decay"] * point
        if not momentum:
            return point - options["lr"] * gradient, (buffer,)
        buffer = gradient if options["step"] == 1 else momentum * buffer + (1 - options["dampening"]) * gradient
        direction = gradient + momentum * buffer if options["nesterov"] else buffer
        return point - options["lr"] * direction, (buffer,)


class _Adam:
    options = ("step", "lr", "beta1", "beta2", "eps", "weight_decay", "decoupled", "maximize")
    remembered = 2
    decoupled = False

    def read(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[float, ...]:
        if group["amsgrad"]:
            raise _not_replayed("Adam with amsgrad=True")
        decoupled = self.decoupled or bool(group.get("decoupled_weight_decay"))
        first = float(state["step"]) + 1 if "step" in state else 1.0
        numbers = group["lr"], *group["betas"], group["eps"], group["weight_decay"], decoupled, group["maximize"]
        return first, *map(float, numbers)

    def step(self, point: Tensor, memory: Sequence[Tensor], gradient: Tensor, options: Mapping[str, float]) -> Any:
        (mean, square), (number, rate, beta1, beta2, eps, decay, decoupled, maximize) = memory, options.values()
        gradient = -gradient if maximize else gradient
        if decoupled:
            point = point * (1 - rate * decay)
        elif decay:
            gradient = gradient + decay * point
        mean = beta1 * mean + (1 - beta1) * gradient
        square = beta2 * square + (1 - beta2) * gradient * gradient
        root = square.sqrt() / (1 - beta2**number) ** 0.5
        return point - rate / (1 - beta1**number) * mean / (root + eps), (mean, square)


class _AdamW(_Adam):
    decoupled = True


_STEPS: dict[type[torch.optim.Optimizer], ReplayedStep] = {
    torch.optim.SGD: _SGD(),
    torch.optim.Adam: _Adam(),
    torch.optim.AdamW: _AdamW(),
}


def replayed_step(kind: torch.optim.Optimizer | str) -> ReplayedStep:
    """Find the step of an optimizer.

    Args:
        kind: The optimizer, or the name of the class whose rule it has, as `torch.optim` calls it.

    Raises:
        UnsupportedOptimizerError: Its step cannot be replayed.
    """
    named = {known.__name__: step for known, step in _STEPS.items()}
    if isinstance(kind, str):
        return named[kind] if kind in named else _refuse(kind)
    of = rule_for(kind).optimizer
    step = _STEPS.get(of) if isinstance(of, type) else None
    if step is None:
        return _refuse(type(kind).__name__)
    for group in kind.param_groups:
        step.read(group, {})  # refuses options that it cannot follow
    return step


def rule_name(optimizer: torch.optim.Optimizer) -> str:
    """Name the class whose rule an optimizer has, as `torch.optim` calls it."""
    of = rule_for(optimizer).optimizer
    return of.__name__ if isinstance(of, type) else of


def _refuse(kind: str) -> Any:
    raise _not_replayed(kind)


def _not_replayed(kind: str) -> UnsupportedOptimizerError:
    return UnsupportedOptimizerError(
        "recording for replay",
        "this optimizer's step is not among those that can be taken again backwards",
        got=kind,
        expected=", ".join(known.__name__ for known in _STEPS),
        source="pkexplain.optimizers.replayed",
        fix="Train with one of these, or leave replay out: the path and the removal reading know this optimizer",
    )


@dataclass(frozen=True)
class Partials:
    """The derivatives of one step, coordinate by coordinate.

    Attributes:
        of: ``of[k][i]`` is the derivative of the k-th output (θ, then what is remembered) by the i-th input (θ, what is
            remembered, the gradient), ``(numbers,)``; None where it is zero.
    """

    of: tuple[tuple[Tensor | None, ...], ...]

    def of_slice(self, some: slice) -> Partials:
        """Return the derivatives of some of the coordinates."""
        return Partials(tuple(tuple(None if each is None else each[some] for each in row) for row in self.of))

    def carry(self, cotangents: Sequence[Tensor], gradient: Tensor) -> None:
        """Carry cotangents from the outputs to the inputs.

        Args:
            cotangents: Of each output, ``(queries, numbers)``; afterwards, of each input but the gradient.
            gradient: Where to write that of the gradient, ``(queries, numbers)``.
        """
        for start in range(0, gradient.shape[1], _AT_ONCE):  # so that a processor's cache holds what is read again
            here = slice(start, start + _AT_ONCE)
            outputs = [each[:, here] for each in cotangents]
            results = [self._sum(outputs, i, here) for i in range(len(outputs) + 1)]
            for place, result in zip([*outputs, gradient[:, here]], results, strict=True):
                place.zero_() if result is None else place.copy_(result)

    def _sum(self, outputs: Sequence[Tensor], i: int, here: slice) -> Tensor | None:
        """Carry some coordinates' cotangents of the outputs to the i-th input."""
        result: Tensor | None = None
        for output, row in zip(outputs, self.of, strict=True):
            derivative = row[i]
            if derivative is None:
                continue
            if result is None:
                result = output * derivative[here]
            else:
                result.addcmul_(output, derivative[here])
        return result


_AT_ONCE = 1024
"""Coordinates at a time."""


def partial_derivatives(
    step: ReplayedStep, point: Tensor, memory: Sequence[Tensor], gradient: Tensor, options: Mapping[str, float]
) -> Partials:
    """Differentiate a step by all that goes into it.

    Where the optimizer has only been given zeros, it divides by ε alone and a derivative would be huge or not a number;
    nothing moves there, and it counts as zero.

    Args:
        step: The kind of step.
        point: θ before it, ``(numbers,)``.
        memory: What is remembered before it, each ``(numbers,)``.
        gradient: The gradient that it is given, ``(numbers,)``.
        options: Its options.
    """
    inputs = [each.detach().requires_grad_() for each in (point, *memory, gradient)]
    after, remembered = step.step(inputs[0], inputs[1:-1], inputs[-1], options)
    unmoved = None
    if step.remembered == 2:
        unmoved = remembered[1].detach() == 0
    rows = []
    for output in (after, *remembered):
        found = torch.autograd.grad(output.sum(), inputs, retain_graph=True, allow_unused=True)
        cleaned = [None if f is None or (unmoved is None and not f.any()) else f for f in found]
        if unmoved is not None and output is after:
            cleaned = [f if f is None or i == 0 else f.masked_fill(unmoved, 0.0) for i, f in enumerate(cleaned)]
        rows.append(tuple(cleaned))
    return Partials(tuple(rows))
