"""Update rules whose operator also depends on what was there before the step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pkexplain.optimizers.rules import LinearStep, without_unmoved

__all__ = ["ASGD", "Adadelta", "Adafactor", "Rprop"]


def _signed(group: Mapping[str, Any]) -> float:
    return -1.0 if group.get("maximize") else 1.0


class Adadelta:
    """`torch.optim.Adadelta` (Zeiler 2012): both running means as recorded, that of the updates before the step."""

    optimizer: type[torch.optim.Optimizer] = torch.optim.Adadelta
    kept = ("acc_delta",)

    def read(self, group: Mapping[str, Any], state: Mapping[str, Any], first: bool) -> LinearStep:
        """Read one parameter's numbers."""
        second, eps, rate = state["square_avg"], float(group["eps"]), _signed(group) * float(group["lr"])
        before = torch.zeros_like(second) if first else state["before.acc_delta"]
        operator = without_unmoved((before + eps).sqrt() / (second + eps).sqrt(), second)
        decay = _signed(group) * float(group["weight_decay"])
        return LinearStep(0.0, 0.0, 0.0, rate * operator, weight_decay=decay, learning_rate=float(group["lr"]))


class ASGD:
    """`torch.optim.ASGD` (Polyak & Juditsky 1992): the rate before the step; its average is not the model's."""

    optimizer: type[torch.optim.Optimizer] = torch.optim.ASGD
    kept = ("eta",)

    def read(self, group: Mapping[str, Any], state: Mapping[str, Any], first: bool) -> LinearStep:
        """Read one parameter's numbers."""
        start = torch.as_tensor(float(group["lr"]), dtype=state["eta"].dtype, device="cpu")
        rate = float(start if first else state["before.eta"])
        decay = _signed(group) * float(group["weight_decay"])
        shrink = float(group["lambd"]) * rate
        return LinearStep(0.0, 0.0, 0.0, _signed(group) * rate, decay, shrink, learning_rate=rate)


class Rprop:
    """`torch.optim.Rprop` (Riedmiller & Braun 1993): the step size over the gradient's size, both as recorded."""

    optimizer: type[torch.optim.Optimizer] = torch.optim.Rprop
    kept = ()

    def read(self, group: Mapping[str, Any], state: Mapping[str, Any], first: bool) -> LinearStep:
        """Read one parameter's numbers."""
        used, size = state["prev"], state["step_size"]  # the gradient as used: zero where its sign has changed
        operator = torch.where(used == 0, 0.0, size / used.abs())
        return LinearStep(0.0, 0.0, 0.0, _signed(group) * operator, learning_rate=float(group["lr"]))


class Adafactor:
    """`torch.optim.Adafactor` (Shazeer & Stern 2018): the factored second moment and the clipped rate as recorded."""

    optimizer: type[torch.optim.Optimizer] = torch.optim.Adafactor
    kept = ("parameter", "gradient")

    def read(self, group: Mapping[str, Any], state: Mapping[str, Any], first: bool) -> LinearStep:
        """Read one parameter's numbers."""
        parameter, gradient = state["before.parameter"], state["before.gradient"]
        steps, eps1, eps2 = float(state["step"]), group["eps"][0], float(group["eps"][1])
        eps1 = torch.finfo(parameter.dtype).eps if eps1 is None else float(eps1)
        rate = min(float(group["lr"]), steps**-0.5) * max(eps2, _root_mean_square(parameter))
        if gradient.ndim > 1:
            rows, columns = state["row_var"], state["col_var"]
            second = rows @ columns / rows.mean(-2, keepdim=True).clamp(min=eps1)
        else:
            second = state["variance"]
        operator = without_unmoved(second.clamp(min=eps1 * eps1).rsqrt(), second)
        clipped = max(1.0, _root_mean_square(operator * gradient) / float(group["d"]))
        shrink = float(group["lr"]) * float(group["weight_decay"])
        step = _signed(group) * rate / clipped * operator
        return LinearStep(0.0, 0.0, 0.0, step, decoupled_weight_decay=shrink, learning_rate=rate)


def _root_mean_square(values: Tensor) -> float:
    return float(values.norm()) / values.numel() ** 0.5
