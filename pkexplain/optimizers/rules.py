"""How an optimizer turns a gradient into a displacement.

Every rule here is a linear recursion on a momentum buffer m, fed by a gradient g, with the step's numbers as recorded:

    m ← momentum · m + gain · g,        Δθ = −(buffer_step · m + gradient_step · g)

A number is a scalar, or one for each coordinate if the optimizer divides by a second moment. That moment is taken as it
was: credit through it is not split among examples. A new optimizer is a class with one method that reads these numbers,
and the two of its weight decay, from a step that was just taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from pkexplain.errors import UnsupportedOptimizerError

__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "LinearStep",
    "NAdam",
    "Number",
    "RAdam",
    "RMSprop",
    "UpdateRule",
    "plain_number",
    "without_unmoved",
]

Number = float | Tensor
"""A scalar, or one number for each coordinate."""


@dataclass(frozen=True)
class LinearStep:
    """One optimizer step of one parameter, linear in the gradient.

    Attributes:
        momentum: The momentum coefficient: how much the momentum buffer keeps; 0 without one.
        gain: How much of the gradient enters the momentum buffer.
        buffer_step: How far the momentum buffer moves the parameter, in learning-rate units.
        gradient_step: How far the gradient itself moves it.
        weight_decay: Multiple of θ that is added to the gradient (L2 weight decay).
        decoupled_weight_decay: Multiple of θ that is subtracted from θ (decoupled weight decay).
        learning_rate: The learning rate, for the record.
    """

    momentum: Number = 0.0
    gain: Number = 0.0
    buffer_step: Number = 0.0
    gradient_step: Number = 0.0
    weight_decay: Number = 0.0
    decoupled_weight_decay: Number = 0.0
    learning_rate: float = 0.0

    @property
    def elementwise(self) -> bool:
        """Whether a number differs from coordinate to coordinate."""
        return any(isinstance(getattr(self, field.name), Tensor) for field in fields(self))

    @classmethod
    def skipped(cls, learning_rate: float = 0.0) -> LinearStep:
        """Make the step of a parameter without a gradient: torch leaves it and its state alone."""
        return cls(1.0, 0.0, 0.0, 0.0, learning_rate=learning_rate)

    @classmethod
    def joined(cls, steps: Sequence[LinearStep], sizes: Sequence[int], like: Tensor) -> LinearStep:
        """Join the steps of parameters that follow one another in the flat vector.

        Args:
            steps: The step of each parameter.
            sizes: How many coordinates each has.
            like: A tensor of the dtype and device of the result.

        Raises:
            UnsupportedOptimizerError: A number is neither a scalar nor one for each coordinate.
        """
        numbers: dict[str, Any] = {"learning_rate": max(step.learning_rate for step in steps)}
        for field in fields(cls)[:-1]:
            values = [plain_number(getattr(step, field.name), size) for step, size in zip(steps, sizes, strict=True)]
            if not any(isinstance(value, Tensor) for value in values) and len(set(values)) == 1:
                numbers[field.name] = values[0]
                continue
            parts = [
                value.detach().to(like).flatten() if isinstance(value, Tensor) else like.new_full((size,), value)
                for value, size in zip(values, sizes, strict=True)
            ]
            numbers[field.name] = parts[0] if len(parts) == 1 else torch.cat(parts)
        return cls(**numbers)


def plain_number(value: Number, size: int) -> Number:
    """Turn a 0-d tensor into a float, and refuse a tensor that does not fit the parameter."""
    if isinstance(value, Tensor) and value.ndim == 0:
        return float(value)
    if isinstance(value, Tensor) and value.numel() != size:
        raise UnsupportedOptimizerError(
            "reading an optimizer's step",
            "its update rule gave a number that does not fit the parameter",
            got=f"a tensor of shape {tuple(value.shape)}",
            expected=f"a scalar, or the parameter's shape ({size} numbers)",
            source="UpdateRule.read",
            fix="Return scalars, or tensors of the parameter's shape",
        )
    return value


class UpdateRule(Protocol):
    """What a supported optimizer needs: its class, and how to read a step that was just taken.

    The class may be given by its full name, such as ``"lion_pytorch.lion_pytorch.Lion"``, so that its library need not
    be imported. A rule may have an attribute ``kept``: names in the optimizer's state or in the parameter's group,
    ``"parameter"`` or ``"gradient"``, whose values before the step it finds in ``state`` as ``"before.…"``.

    A rule whose numbers at a coordinate depend on the state at that coordinate alone may say so with an attribute
    ``coordinatewise``: on a GPU it is then asked once for many parameters, whose tensors are joined.
    """

    @property
    def optimizer(self) -> type[torch.optim.Optimizer] | str:
        """The optimizer's class, or its full name."""
        ...

    def read(self, group: Mapping[str, Any], state: Mapping[str, Any], first: bool) -> LinearStep:
        """Read one parameter's numbers.

        Args:
            group: The optimizer's parameter group, as the step used it.
            state: The optimizer's state of the parameter, after the step.
            first: Whether the parameter had no tensor in its state before the step.

        Returns:
            The step's numbers: scalars, or tensors of the parameter's shape.
        """
        ...


def _signed(group: Mapping[str, Any]) -> float:
    return -1.0 if group.get("maximize") else 1.0


def _decays(group: Mapping[str, Any], decoupled: bool) -> dict[str, float]:
    """Read the weight decay; a maximized gradient is negated before an L2 decay is added to it."""
    rate, decay = float(group["lr"]), float(group["weight_decay"])
    if decoupled:
        return {"decoupled_weight_decay": rate * decay, "learning_rate": rate}
    return {"weight_decay": _signed(group) * decay, "learning_rate": rate}


class SGD:
    """`torch.optim.SGD`: momentum, dampening, Nesterov, L2 weight decay; the first step has no dampening."""

    optimizer: type[torch.optim.Optimizer] = torch.optim.SGD
    coordinatewise = True

    def read(self, group: Mapping[str, Any], state: Mapping[str, Any], first: bool) -> LinearStep:
        """Read one parameter's numbers."""
        rate, momentum = _signed(group) * float(group["lr"]), float(group["momentum"])
        if momentum == 0:  # a buffer from before waits, unchanged, for momentum to come back
            return LinearStep(float(not first), 0.0, 0.0, rate, **_decays(group, False))
        gain = 1.0 if first else 1.0 - float(group["dampening"])
        steps = (rate * momentum, rate) if group["nesterov"] else (rate, 0.0)
        return LinearStep(momentum, gain, *steps, **_decays(group, False))


class Adam:
    """`torch.optim.Adam` (Kingma & Ba 2015), AMSGrad included: v̂ as recorded after the step."""

    optimizer: type[torch.optim.Optimizer] = torch.optim.Adam
    coordinatewise = True

    def read(self, group: Mapping[str, Any], state: Mapping[str, Any], first: bool) -> LinearStep:
        """Read one parameter's numbers."""
        beta1, beta2 = map(float, group["betas"])
        steps = float(state["step"])
        second = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
        rate = _signed(group) * float(group["lr"]) / (1 - beta1**steps)
        buffer_step = _over_root(rate, second, 1 - beta2**steps, group["eps"])
        return LinearStep(beta1, 1 - beta1, buffer_step, 0.0, **_decays(group, self._decoupled(group)))

    def _decoupled(self, group: Mapping[str, Any]) -> bool:
        return bool(group.get("decoupled_weight_decay"))


class AdamW(Adam):
    """`torch.optim.AdamW` (Loshchilov & Hutter 2019): Adam with decoupled weight decay."""

    optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW

    def _decoupled(self, group: Mapping[str, Any]) -> bool:
        return True


class NAdam:
    """`torch.optim.NAdam` (Dozat 2016): the gradient also moves the parameters directly."""

    optimizer: type[torch.optim.Optimizer] = torch.optim.NAdam
    coordinatewise = True

    def read(self, group: Mapping[str, Any], state: Mapping[str, Any], first: bool) -> LinearStep:
        """Read one parameter's numbers."""
        beta1, beta2 = map(float, group["betas"])
        steps, product = float(state["step"]), float(state["mu_product"])
        now, following = (beta1 * (1 - 0.5 * 0.96 ** (s * float(group["momentum_decay"]))) for s in (steps, steps + 1))
        rate = _signed(group) * float(group["lr"])
        rate = _over_root(rate, state["exp_avg_sq"], 1 - beta2**steps, group["eps"])
        buffer_step, gradient_step = rate * following / (1 - product * following), rate * (1 - now) / (1 - product)
        decays = _decays(group, bool(group.get("decoupled_weight_decay")))
        return LinearStep(beta1, 1 - beta1, buffer_step, gradient_step, **decays)


class RAdam:
    """`torch.optim.RAdam` (Liu et al. 2020): in its first steps the momentum buffer is not divided by √v̂."""

    optimizer: type[torch.optim.Optimizer] = torch.optim.RAdam
    coordinatewise = True

    def read(self, group: Mapping[str, Any], state: Mapping[str, Any], first: bool) -> LinearStep:
        """Read one parameter's numbers."""
        beta1, beta2 = map(float, group["betas"])
        steps = float(state["step"])
        longest, left = 2 / (1 - beta2) - 1, 1 - beta2**steps
        length = longest - 2 * steps * beta2**steps / left
        rate = _signed(group) * float(group["lr"]) / (1 - beta1**steps)
        second = state["exp_avg_sq"]
        if length > 5:
            rectified = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
            buffer_step = _over_root(rate * (rectified * left) ** 0.5, second, 1.0, group["eps"])
        else:
            buffer_step = torch.full_like(second, rate)
        decays = _decays(group, bool(group.get("decoupled_weight_decay")))
        return LinearStep(beta1, 1 - beta1, buffer_step, 0.0, **decays)


class Adamax:
    """`torch.optim.Adamax` (Kingma & Ba 2015): the infinity norm as recorded."""

    optimizer: type[torch.optim.Optimizer] = torch.optim.Adamax
    coordinatewise = True

    def read(self, group: Mapping[str, Any], state: Mapping[str, Any], first: bool) -> LinearStep:
        """Read one parameter's numbers."""
        beta1 = float(group["betas"][0])
        rate = _signed(group) * float(group["lr"]) / (1 - beta1 ** float(state["step"]))
        buffer_step = without_unmoved(rate / state["exp_inf"], state["exp_inf"], float(group["eps"]))
        return LinearStep(beta1, 1 - beta1, buffer_step, 0.0, **_decays(group, False))


class RMSprop:
    """`torch.optim.RMSprop`: the gradient is divided before it enters the momentum buffer; `centered` as recorded."""

    optimizer: type[torch.optim.Optimizer] = torch.optim.RMSprop
    coordinatewise = True

    def read(self, group: Mapping[str, Any], state: Mapping[str, Any], first: bool) -> LinearStep:
        """Read one parameter's numbers."""
        second, rate, momentum = state["square_avg"], _signed(group) * float(group["lr"]), float(group["momentum"])
        if group["centered"]:
            second = second - state["grad_avg"].square()
        inverse = _over_root(1.0, second, 1.0, group["eps"], state["square_avg"])
        if momentum > 0:
            return LinearStep(momentum, inverse, rate, 0.0, **_decays(group, False))
        return LinearStep(0.0, 0.0, 0.0, rate * inverse, **_decays(group, False))


class Adagrad:
    """`torch.optim.Adagrad` (Duchi et al. 2011): the sum of squares as recorded."""

    optimizer: type[torch.optim.Optimizer] = torch.optim.Adagrad
    coordinatewise = True

    def read(self, group: Mapping[str, Any], state: Mapping[str, Any], first: bool) -> LinearStep:
        """Read one parameter's numbers."""
        rate = _signed(group) * float(group["lr"]) / (1 + (float(state["step"]) - 1) * float(group["lr_decay"]))
        return LinearStep(0.0, 0.0, 0.0, _over_root(rate, state["sum"], 1.0, group["eps"]), **_decays(group, False))


def _over_root(rate: float, second: Tensor, correction: float, eps: float, squares: Tensor | None = None) -> Tensor:
    """Compute rate / (√(v / correction) + ε), with one new tensor; 0 where the mean of squares is (v, unless given)."""
    divided = (second.detach() / correction).sqrt_().add_(float(eps)).reciprocal_().mul_(rate)
    return without_unmoved(divided, second if squares is None else squares)


def without_unmoved(operator: Tensor, size: Tensor, least: float = 0.0) -> Tensor:
    """Set an operator to 0 where what the optimizer divides by has nothing of a gradient in it.

    There it has only been given zeros and moves nothing, whatever it divides by. The examples' gradients need not sum
    to exactly zero: in bfloat16, those of two batches can cancel once they are rounded. Divided by ε, they are huge.

    Args:
        operator: What gradients or the momentum buffer are multiplied by, ``(…)``; changed in place.
        size: What the optimizer divides by, or its square, ``(…)``.
        least: Its value where all gradients were zero.
    """
    return operator.masked_fill_(size <= least, 0.0)
