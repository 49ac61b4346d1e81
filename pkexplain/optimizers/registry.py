"""Which update rule belongs to an optimizer."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from pkexplain.errors import UnsupportedOptimizerError
from pkexplain.optimizers.further_rules import ASGD, Adadelta, Adafactor, Rprop
from pkexplain.optimizers.library_rules import Lion, Prodigy, TransformersAdafactor
from pkexplain.optimizers.rules import SGD, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop, UpdateRule

__all__ = ["register_update_rule", "rule_for", "unwrapped"]

_RULES: list[UpdateRule] = [
    SGD(), Adam(), AdamW(), NAdam(), RAdam(), Adamax(), RMSprop(), Adagrad(), Adadelta(), ASGD(), Rprop(), Adafactor(),
    Lion("lion_pytorch.lion_pytorch.Lion"), Lion("timm.optim.lion.Lion"), Prodigy("prodigyopt.prodigy.Prodigy"),
    TransformersAdafactor(),
]  # fmt: skip


def register_update_rule(rule: UpdateRule) -> None:
    """Register an optimizer with every `Recorder` of this process; a rule for the same class is replaced.

    If a rule's step differs from the optimizer's, the difference is on the ledger's ``optimizer`` line. Try a new rule
    with every option switched on and ``projection=Identity()``: what is left there should be rounding error. A rule
    that copies the step (``gradient_step`` as the step divided by the gradient) makes any optimizer close and means
    nothing.

    Args:
        rule: An object with the attribute ``optimizer`` and the method ``read`` of `UpdateRule`.
    """
    _RULES[:] = [rule, *(known for known in _RULES if _name_of(known.optimizer) != _name_of(rule.optimizer))]


def rule_for(optimizer: torch.optim.Optimizer) -> UpdateRule:
    """Find the rule of an optimizer: its own, or that of the class whose ``step`` it inherits.

    Raises:
        UnsupportedOptimizerError: It has none; the message lists the optimizers that have one.
    """
    for kind in type(optimizer).__mro__:
        for rule in _RULES:
            if rule.optimizer in (kind, _name_of(kind)) and _step_of(type(optimizer)) is _step_of(kind):
                return rule
    if isinstance(optimizer, getattr(torch.optim, "Muon", ())):
        raise UnsupportedOptimizerError(
            "recording an optimizer",
            "it orthogonalises in bfloat16: a tenth of each step is rounding error, which belongs to no example",
            got=_name_of(type(optimizer)),
            expected="an optimizer whose step is linear in the gradient, with its state as recorded",
            source="pkexplain.optimizers",
            fix="Train with AdamW, or record a run of the same model that does",
        )
    known = ", ".join(sorted({_name_of(rule.optimizer).rpartition(".")[2] for rule in _RULES}))
    raise UnsupportedOptimizerError(
        "recording an optimizer",
        "it has no update rule, so its displacements would be wrong",
        got=_name_of(type(optimizer)),
        expected=known,
        source="the optimizers that can be recorded",
        fix="Train with one of these, or write its rule and hand it to pkexplain.register_update_rule",
    )


def _name_of(kind: type[torch.optim.Optimizer] | str) -> str:
    """The full name of a class, as a rule may give it in place of the class."""
    return kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"


def _step_of(kind: type[torch.optim.Optimizer]) -> object:
    """The function that steps, under the wrappers that torch puts around it."""
    return inspect.unwrap(kind.step)


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer itself, if a library has put another around it that holds it as ``optimizer``."""
    while callable(getattr(getattr(optimizer, "optimizer", None), "step", None)):
        optimizer = optimizer.optimizer
    return optimizer
