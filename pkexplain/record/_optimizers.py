"""The optimizers of a training: usually one; each has its own parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pkexplain.errors import ConfigurationError
from pkexplain.optimizers.registry import rule_for, unwrapped
from pkexplain.optimizers.rules import UpdateRule

__all__ = ["Optimizers"]


class Optimizers:
    """One or several optimizers, asked by parameter.

    Attributes:
        all: The optimizers, without what libraries put around them.

    Args:
        given: What the user passed.

    Raises:
        UnsupportedOptimizerError: One has no update rule.
        ConfigurationError: There is none, or two hold the same parameter.
    """

    def __init__(self, given: torch.optim.Optimizer | Sequence[torch.optim.Optimizer]) -> None:
        """Find their rules."""
        several = isinstance(given, Iterable)
        self.all = tuple(map(unwrapped, given if several else [given]))  # pyright: ignore[reportArgumentType]
        self._rules = {id(optimizer): rule_for(optimizer) for optimizer in self.all}
        held = [id(p) for group in self.groups for p in group["params"]]
        if not self.all or len(held) > len(set(held)) or len(self._rules) < len(self.all):
            raise ConfigurationError(
                "Recorder(optimizer=…)",
                "two optimizers would move the same parameter" if self.all else "there is none",
                got=", ".join(type(optimizer).__name__ for optimizer in self.all) or "an empty list",
                expected="an optimizer, or several that hold different parameters",
                source="the optimizers' param_groups",
                fix="Give each parameter to one optimizer",
            )

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The parameter groups of all."""
        return [group for optimizer in self.all for group in optimizer.param_groups]

    def holders(self) -> dict[int, tuple[torch.optim.Optimizer, UpdateRule, dict[str, Any]]]:
        """Each parameter's optimizer, its rule and the parameter's group now, by the parameter's id."""
        return {
            id(p): (optimizer, self._rules[id(optimizer)], group)
            for optimizer in self.all
            for group in optimizer.param_groups
            for p in group["params"]
        }

    def state(self, parameter: Tensor) -> Mapping[str, Any]:
        """The state that a parameter's optimizer keeps of it."""
        return next((o.state[parameter] for o in self.all if parameter in o.state), {})
