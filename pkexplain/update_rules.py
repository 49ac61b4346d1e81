"""How an optimizer turns a gradient into a displacement.

Every rule here is a linear recursion on a moment m that a gradient g feeds, with the step's numbers taken as recorded:

    m ← decay · m + gain · g,        Δθ = −(moment_step · m + gradient_step · g)

A new optimizer is a class with one method that reads these four numbers, and the two of its weight decay, for the step
that is about to happen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from pkexplain.errors import UnsupportedOptimizerError, message

__all__ = ["SGD", "LinearStep", "UpdateRule", "rule_for"]


@dataclass(frozen=True)
class LinearStep:
    """One optimizer step of one parameter group, linear in the gradient.

    Attributes:
        decay: What the moment keeps, 0 where there is none.
        gain: How much of the gradient enters the moment.
        moment_step: How far the moment moves the parameters, in learning-rate units.
        gradient_step: How far the gradient itself moves them.
        coupled_decay: Multiple of θ that is added to the gradient (L2 weight decay).
        decoupled_decay: Multiple of θ that is subtracted from θ (decoupled weight decay).
        learning_rate: The learning rate, for the record.
    """

    decay: float
    gain: float
    moment_step: float
    gradient_step: float
    coupled_decay: float = 0.0
    decoupled_decay: float = 0.0
    learning_rate: float = 0.0


class UpdateRule(Protocol):
    """What a supported optimizer needs: its class, and how to read a step that is about to happen."""

    optimizer: type[torch.optim.Optimizer]

    def read(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> LinearStep:
        """Read the coming step.

        Args:
            group: The optimizer's parameter group.
            state: The optimizer's state of the group's first parameter, before the step.

        Returns:
            The step's numbers.
        """
        ...


class SGD:
    """`torch.optim.SGD`: momentum, dampening, Nesterov, L2 weight decay; the first step has no dampening."""

    optimizer: type[torch.optim.Optimizer] = torch.optim.SGD

    def read(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> LinearStep:
        """Read the coming step."""
        rate, momentum = float(group["lr"]), float(group["momentum"])
        sign = -1.0 if group["maximize"] else 1.0
        l2 = sign * float(group["weight_decay"])  # the gradient is negated before the decay is added
        first = state.get("momentum_buffer") is None
        if momentum == 0:  # a buffer from before waits, unchanged, for momentum to come back
            return LinearStep(float(not first), 0.0, 0.0, sign * rate, coupled_decay=l2, learning_rate=rate)
        gain = 1.0 if first else 1.0 - float(group["dampening"])
        steps = (sign * rate * momentum, sign * rate) if group["nesterov"] else (sign * rate, 0.0)
        return LinearStep(momentum, gain, *steps, coupled_decay=l2, learning_rate=rate)


_RULES: Sequence[UpdateRule] = (SGD(),)


def rule_for(optimizer: torch.optim.Optimizer) -> UpdateRule:
    """Find the rule of an optimizer.

    Raises:
        UnsupportedOptimizerError: There is none; the message lists those that have one.
    """
    for rule in _RULES:
        if type(optimizer) is rule.optimizer:
            return rule
    known = ", ".join(f"torch.optim.{rule.optimizer.__name__}" for rule in _RULES)
    raise UnsupportedOptimizerError(
        message(
            "recording an optimizer",
            "it has no update rule, so its displacements would be wrong",
            got=f"{type(optimizer).__module__}.{type(optimizer).__qualname__}",
            expected=known,
            source="the optimizers that can be recorded",
            fix="Train with one of these",
        )
    )
