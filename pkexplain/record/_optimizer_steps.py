"""What the optimizers do in a step: the gradient they are given, and the numbers by which they move each block."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pkexplain.gradients import devices
from pkexplain.gradients.compiled import named_parameters
from pkexplain.gradients.devices import fetch
from pkexplain.gradients.layers import Block
from pkexplain.optimizers.rules import LinearStep, UpdateRule
from pkexplain.optimizers.step_numbers import StateOfSeveral, StepNumbers
from pkexplain.record._contract import broken, moved_by_another, unknown_parameter
from pkexplain.record._optimizers import Optimizers


def skips(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step will change nothing, because a loss scaler found a gradient that is not finite."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def closure_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Callable[[], Any] | None:
    """The closure that an optimizer's ``step`` was given, if any.

    Args:
        args: Its arguments; the first is the optimizer.
        kwargs: Its named arguments.

    Raises:
        RecordingError: It was given something else.
    """
    given = [value for value in (*args[1:], *kwargs.values()) if value is not None]
    if not given:
        return None
    if len(given) == 1 and callable(given[0]):
        return given[0]
    raise broken(
        "optimizer.step() was given arguments",
        ", ".join(type(value).__name__ for value in given),
        "Call loss.backward() yourself, then optimizer.step() without arguments, or with a closure that does it",
    )


def with_result(loss: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments with a closure that only returns the loss: every optimizer with a rule evaluates it once."""

    def known() -> Any:
        return loss

    def instead(value: Any) -> Any:
        return known if callable(value) else value

    return (args[0], *map(instead, args[1:])), {name: instead(value) for name, value in kwargs.items()}


def _spread(value: Any) -> bool:
    """Whether a value of an optimizer's state has a number for each coordinate."""
    return isinstance(value, Tensor) and value.ndim > 0


def _of_torch(rule: UpdateRule) -> bool:
    return isinstance(rule.optimizer, type) and rule.optimizer.__module__.startswith("torch.optim.")


class StepReader:
    """Reads the optimizers' steps.

    Attributes:
        applied: The gradient that the last step was given, ``(parameters,)``.

    Args:
        model: The model.
        optimizers: Its optimizers.
        blocks: The recorded parameters.
        like: An empty tensor of the dtype and device to read in.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Optimizers,
        blocks: Sequence[Block],
        like: Tensor,
    ) -> None:
        """Find the parameters."""
        self._model, self._optimizers, self._blocks, self._like = model, optimizers, blocks, like
        named = dict(named_parameters(model))
        self._parameters = [named[name] for block in blocks for name in block.parameters]
        self._known = {id(p) for p in self._parameters}
        self._others = {n: (p, p._version) for n, p in named.items() if id(p) not in self._known}
        self._first: dict[int, bool] = {}
        self._before: dict[int, dict[str, Any]] = {}
        self.applied = like
        self._counts: dict[int, Tensor] = {}  # steps taken before, where an optimizer counts on a GPU

    def refuse_unknown_parameters(self) -> None:
        """Refuse a parameter that the optimizer updates and the recorder does not know.

        Raises:
            RecordingError: There is one, added or unfrozen after the recorder was made.
        """
        for group in self._optimizers.groups:
            for parameter in group["params"]:
                if parameter.requires_grad and id(parameter) not in self._known:
                    names = [name for name, p in named_parameters(self._model) if p is parameter]
                    raise unknown_parameter(names[0] if names else f"of shape {tuple(parameter.shape)}")

    def refuse_movement_of_others(self) -> None:
        """Refuse a parameter that moves without being recorded: its movement would be missing from every account.

        Raises:
            RecordingError: Another optimizer, or the training loop itself, has changed one.
        """
        for name, (parameter, version) in self._others.items():
            if parameter._version != version:
                raise moved_by_another(name)

    def begin(self, optimizer: torch.optim.Optimizer) -> None:
        """Read, before an optimizer's step, the gradient it is given and which parameters have no state yet."""
        if len(self.applied) == 0:
            self.applied = self._like.new_zeros(sum(p.numel() for p in self._parameters))
        self._counts = {}
        scale = getattr(optimizer, "grad_scale", None)  # a fused optimizer divides by it
        holders, start = self._optimizers.holders(), 0
        given: list[tuple[slice, Tensor]] = []
        for parameter in self._parameters:
            span, start = slice(start, start + parameter.numel()), start + parameter.numel()
            holder, rule, group = holders[id(parameter)]
            if holder is not optimizer:
                continue
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach()
            gradient = gradient.to_dense() if gradient.is_sparse else gradient
            flat = gradient.flatten().to(self.applied)
            given.append((span, flat if scale is None else flat / scale.to(flat)))
            state = optimizer.state.get(parameter, {})
            self._first[id(parameter)] = not any(isinstance(value, Tensor) for value in state.values())
            count = state.get("step")
            if isinstance(count, Tensor) and devices.accelerated(count.device) and _of_torch(rule):
                self._counts[id(parameter)] = count
            self._before[id(parameter)] = {}
            if names := getattr(rule, "kept", ()):
                known = {"parameter": parameter, "gradient": gradient, **group, **state}
                kept = {name: known[name] for name in names if name in known}
                self._before[id(parameter)] = {
                    f"before.{n}": v.detach().clone() if isinstance(v, Tensor) else v for n, v in kept.items()
                }
        if len(given) == len(self._parameters):  # a copy: a fused optimizer may change the gradients in place
            torch.cat([flat for _, flat in given], out=self.applied)
            return
        for span, flat in given:
            self.applied[span] = flat

    def wait(self, *tensors: Tensor) -> list[list[float]]:
        """Wait for some results, and for how many steps the optimizer has taken, all at once; return their numbers.

        torch's optimizers add one to the latter in every step that they do not skip.
        """
        found = fetch([*tensors, *self._counts.values()])
        for parameter, (count,) in zip(self._counts, found[len(tensors) :], strict=True):
            self._before[parameter]["step"] = count + 1
        return found[: len(tensors)]

    def numbers(self) -> Mapping[int, LinearStep]:
        """Read the step that was just taken, for each block."""
        if devices.accelerated(self._like.device):
            return self._together()
        holders = self._optimizers.holders()
        parameters = iter(self._parameters)
        numbers: dict[int, LinearStep] = {}
        for position, block in enumerate(self._blocks):
            steps = []
            for _, parameter in zip(block.parameters, parameters, strict=False):
                _, rule, group = holders[id(parameter)]
                if parameter.grad is None:
                    steps.append(LinearStep.skipped(float(group["lr"] or 0.0)))  # None: chosen by the optimizer
                else:
                    state = {**self._optimizers.state(parameter), **self._before[id(parameter)]}
                    steps.append(rule.read(group, state, self._first[id(parameter)]))
            numbers[position] = LinearStep.joined(steps, [math.prod(shape) for shape in block.shapes], self._like)
        return numbers

    def _together(self) -> StepNumbers:
        """Read together the parameters that a rule treats alike."""
        holders = self._optimizers.holders()
        alike: dict[Any, list[int]] = {}
        states: list[dict[str, Any]] = []
        for at, parameter in enumerate(self._parameters):
            holder, rule, group = holders[id(parameter)]
            states.append({**holder.state.get(parameter, {}), **self._before[id(parameter)]})
            if parameter.grad is None or not getattr(rule, "coordinatewise", False):
                alike[at] = [at]
                continue
            plain = [float(v) if isinstance(v, Tensor) else v for v in states[at].values() if not _spread(v)]
            alike.setdefault((id(group), self._first[id(parameter)], *states[at], *plain), []).append(at)
        pieces: list[tuple[Sequence[int], LinearStep]] = []
        for members in alike.values():
            some = [self._parameters[at] for at in members]
            _, rule, group = holders[id(some[0])]
            if some[0].grad is None:
                step = LinearStep.skipped(float(group["lr"] or 0.0))
            else:
                mine = [states[at] for at in members]
                step = rule.read(group, StateOfSeveral(mine) if len(mine) > 1 else mine[0], self._first[id(some[0])])
            pieces.append((members, step))
        sizes = [parameter.numel() for parameter in self._parameters]
        counts = [len(block.parameters) for block in self._blocks]
        return StepNumbers.of_pieces(pieces, sizes, counts, self._like)
