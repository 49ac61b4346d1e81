"""Copies of models, also of those that keep tensors of their last forward pass."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["copy_model"]


def copy_model(model: nn.Module) -> nn.Module:
    """Copy a model; a tensor that a module keeps from its last forward pass is copied without its graph."""
    memo = {id(t): t.detach().clone() for part in model.modules() for t in _kept(vars(part)) if not t.is_leaf}
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
