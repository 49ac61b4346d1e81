"""What the optimizer does in a step: the gradient it is given, and the numbers by which it moves each block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pkexplain.gradients.layers import Block
from pkexplain.optimizers.rules import LinearStep, UpdateRule
from pkexplain.record._contract import broken, moved_by_another, unknown_parameter


class StepReader:
    """Reads an optimizer's steps.

    Attributes:
        applied: The gradient that the last step was given, ``(parameters,)``.

    Args:
        model: The model.
        optimizer: Its optimizer.
        rule: The optimizer's update rule.
        blocks: The recorded parameters.
        like: An empty tensor of the dtype and device to read in.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        rule: UpdateRule,
        blocks: Sequence[Block],
        like: Tensor,
    ) -> None:
        """Find the parameters."""
        self._model, self._optimizer, self._blocks, self._like = model, optimizer, blocks, like
        self._rule = rule
        named = dict(model.named_parameters())
        self._parameters = [named[name] for block in blocks for name in block.parameters]
        self._known = {id(p) for p in self._parameters}
        self._others = {n: (p, p._version) for n, p in named.items() if id(p) not in self._known}
        self._first: list[bool] = []
        self._before: list[dict[str, Any]] = []
        self._given: list[Tensor] = []
        self.applied = like

    def refuse_closure(self, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Refuse a closure, which the optimizer may evaluate any number of times.

        Raises:
            RecordingError: ``step`` was given a closure.
        """
        if any(value is not None for value in (*args[1:], *kwargs.values())):  # the first is the optimizer
            raise broken(
                "optimizer.step() was given a closure",
                "a loss that the optimizer may evaluate several times",
                "Call loss.backward() yourself, then optimizer.step() without arguments",
            )

    def refuse_unknown_parameters(self) -> None:
        """Refuse a parameter that the optimizer updates and the recorder does not know.

        Raises:
            RecordingError: There is one, added or unfrozen after the recorder was made.
        """
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad and id(parameter) not in self._known:
                    names = [name for name, p in self._model.named_parameters() if p is parameter]
                    raise unknown_parameter(names[0] if names else f"of shape {tuple(parameter.shape)}")

    def refuse_movement_of_others(self) -> None:
        """Refuse a parameter that moves without being recorded: its movement would be missing from every account.

        Raises:
            RecordingError: Another optimizer, or the training loop itself, has changed one.
        """
        for name, (parameter, version) in self._others.items():
            if parameter._version != version:
                raise moved_by_another(name)

    @property
    def skips(self) -> bool:
        """Whether the step will change nothing, because a loss scaler found a gradient that is not finite."""
        found = getattr(self._optimizer, "found_inf", None)
        return found is not None and bool(found)

    def begin(self) -> None:
        """Read, before a step, the gradient it is given and which parameters have no state yet."""
        self.applied = self._gradient()
        states, groups = [self._optimizer.state.get(p, {}) for p in self._parameters], self._groups()
        self._before = [self._kept(p, g, groups[id(p)]) for p, g in zip(self._parameters, self._given, strict=True)]
        self._first = [not any(isinstance(value, Tensor) for value in state.values()) for state in states]

    def _groups(self) -> dict[int, dict[str, Any]]:
        """Each parameter's group, by its id."""
        return {id(p): group for group in self._optimizer.param_groups for p in group["params"]}

    def _kept(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """Copy what the update rule wants from before the step."""
        state = {"parameter": parameter, "gradient": gradient, **group, **self._optimizer.state.get(parameter, {})}
        wanted = [name for name in getattr(self._rule, "kept", ()) if name in state]
        copied = {name: state[name] for name in wanted}
        return {f"before.{n}": v.detach().clone() if isinstance(v, Tensor) else v for n, v in copied.items()}

    def _gradient(self) -> Tensor:
        """Copy the gradient that the optimizer is given, ``(parameters,)``; a fused one may change it in place."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        gradients = self._given = [g.to_dense() if g.is_sparse else g for g in gradients]
        applied = torch.cat([g.detach().flatten().to(self._like.dtype) for g in gradients])
        scale = getattr(self._optimizer, "grad_scale", None)  # a fused optimizer divides by it
        return applied if scale is None else applied / scale.to(applied)

    def numbers(self) -> dict[int, LinearStep]:
        """Read the step that was just taken, for each block."""
        group_of = self._groups()
        numbers: dict[int, LinearStep] = {}
        index = 0
        for position, block in enumerate(self._blocks):
            steps = []
            for _ in block.parameters:
                parameter, group = self._parameters[index], group_of[id(self._parameters[index])]
                if parameter.grad is None:
                    steps.append(LinearStep.skipped(float(group["lr"] or 0.0)))  # None: chosen by the optimizer
                else:
                    state = {**self._optimizer.state[parameter], **self._before[index]}
                    steps.append(self._rule.read(group, state, self._first[index]))
                index += 1
            numbers[position] = LinearStep.joined(steps, [math.prod(shape) for shape in block.shapes], self._like)
        return numbers
