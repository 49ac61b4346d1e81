"""Update rules of optimizers from other libraries, found by their full names: nothing is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pkexplain.errors import UnsupportedOptimizerError
from pkexplain.optimizers.rules import LinearStep, Number, without_unmoved

__all__ = ["Lion", "Prodigy", "TransformersAdafactor"]


@dataclass(frozen=True)
class Lion:
    """Lion (Chen et al. 2023): the sign of c as c / |c|, with |c| as recorded.

    c = β₁ m + (1 − β₁) g, from the momentum buffer m before the step. A coordinate whose |c| is close to 0 gets large
    shares of opposite signs: what its examples did there cancelled.
    """

    optimizer: str
    kept = ("exp_avg", "gradient")

    def read(self, group: Mapping[str, Any], state: Mapping[str, Any], first: bool) -> LinearStep:
        """Read one parameter's numbers."""
        (beta1, beta2), gradient, rate = map(float, group["betas"]), state["before.gradient"], float(group["lr"])
        if beta2 == 0:
            raise UnsupportedOptimizerError(
                "reading a step of Lion",
                "its step cannot be written in the momentum buffer after the step",
                got=f"betas={group['betas']}",
                expected="a second beta above 0",
                source="optimizer.param_groups",
                fix="Train with a second beta above 0, such as 0.99",
            )
        before = torch.zeros_like(gradient) if first else state["before.exp_avg"]
        size = (beta1 * before + (1 - beta1) * gradient).abs()
        operator = torch.where(size == 0, 0.0, rate / size)
        through_buffer = beta1 / beta2
        shrink = rate * float(group["weight_decay"])
        steps = through_buffer * operator, (1 - through_buffer) * operator
        return LinearStep(beta2, 1 - beta2, *steps, decoupled_weight_decay=shrink, learning_rate=rate)


@dataclass(frozen=True)
class Prodigy:
    """Prodigy (Mishchenko & Defazio 2023): Adam with a learned step size d, as it was before and after the step."""

    optimizer: str
    kept = ("d",)

    def read(self, group: Mapping[str, Any], state: Mapping[str, Any], first: bool) -> LinearStep:
        """Read one parameter's numbers."""
        beta1, beta2 = map(float, group["betas"])
        before, after, taken = float(state["before.d"]), float(group["d"]), int(group["k"])
        correction = (1 - beta2**taken) ** 0.5 / (1 - beta1**taken) if group["use_bias_correction"] else 1.0
        rate, decay = before * float(group["lr"]) * correction, float(group["weight_decay"])
        second = state["exp_avg_sq"]
        operator = without_unmoved(rate / (second.sqrt() + after * float(group["eps"])), second)
        decays = {"decoupled_weight_decay": rate * decay} if group["decouple"] else {"weight_decay": decay}
        if beta1 == 0:
            return LinearStep(0.0, 0.0, 0.0, after * operator, learning_rate=rate, **decays)
        return LinearStep(beta1, before * (1 - beta1), operator, 0.0, learning_rate=rate, **decays)


@dataclass(frozen=True)
class TransformersAdafactor:
    """`transformers.optimization.Adafactor` (Shazeer & Stern 2018): second moment and clipped rate as recorded."""

    optimizer: str = "transformers.optimization.Adafactor"
    kept = ("gradient",)

    def read(self, group: Mapping[str, Any], state: Mapping[str, Any], first: bool) -> LinearStep:
        """Read one parameter's numbers."""
        rate, gradient = self._rate(group, state), state["before.gradient"]
        if gradient.ndim > 1:
            rows, columns = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
            second = (rows / rows.mean(-1, keepdim=True))[..., None] * columns[..., None, :]
        else:
            second = state["exp_avg_sq"]
        scaled = without_unmoved(second.rsqrt(), second, 2 * float(group["eps"][0]))  # ε is in the mean of squares
        size = float((scaled * gradient).norm()) / gradient.numel() ** 0.5
        operator: Number = rate / max(1.0, size / float(group["clip_threshold"])) * scaled
        decays = {"decoupled_weight_decay": rate * float(group["weight_decay"]), "learning_rate": rate}
        if group["beta1"] is None:
            return LinearStep(0.0, 0.0, 0.0, operator, **decays)
        return LinearStep(float(group["beta1"]), (1 - float(group["beta1"])) * operator, 1.0, 0.0, **decays)

    def _rate(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> float:
        steps, rate = int(state["step"]), group["lr"]
        if group["relative_step"]:
            rate = min(1e-6 * steps if group["warmup_init"] else 1e-2, steps**-0.5)
        size = state["RMS"]
        scale = max(float(group["eps"][1]), float(size) if isinstance(size, Tensor) else size)
        return float(rate) * (scale if group["scale_parameter"] else 1.0)
