"""Copies of models, also of those that keep tensors of their last forward pass."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from pkexplain.gradients.compiled import uncompiled

__all__ = ["copy_model"]


def copy_model(model: nn.Module) -> nn.Module:
    """Copy a model, as it was before `torch.compile`.

    A tensor that a module keeps from its last forward pass is copied without its graph.
    """
    model = uncompiled(model)
    memo: dict[int, Any] = {id(t): t.detach().clone() for p in model.modules() for t in _kept(vars(p)) if not t.is_leaf}
    for part in reversed(list(model.modules())):  # those inside others first
        if uncompiled(part) is not part:
            memo[id(part)] = copy.deepcopy(uncompiled(part), memo)
    return copy.deepcopy(model, memo)


def _kept(value: Any) -> Iterator[Tensor]:
    """The tensors among a module's attributes, its parameters, buffers and parts aside."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for name, part in value.items():
            if name not in ("_parameters", "_buffers", "_modules"):
                yield from _kept(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _kept(part)
