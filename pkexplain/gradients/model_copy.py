"""Copies of models, also of those that keep tensors of their last forward pass, or whose ``forward`` was replaced."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from pkexplain.gradients.compiled import uncompiled

__all__ = ["copy_model"]

_AUTOCAST = ("accelerate.utils.operations", "torch.amp.")
"""The modules whose wrappers Accelerate puts around a ``forward``: outputs in float32, then autocast."""


def copy_model(model: nn.Module) -> nn.Module:
    """Copy a model, as it was before `torch.compile`, and before Accelerate put it under autocast.

    A tensor that a module keeps from its last forward pass is copied without its graph. Where a library has replaced
    the ``forward`` of one module by a function that calls the former one (as TRL does), the copy's function calls that
    of the copy: under `copy.deepcopy` alone it would go on to run the original.
    """
    model = uncompiled(model)
    memo: dict[int, Any] = {id(t): t.detach().clone() for p in model.modules() for t in _kept(vars(p)) if not t.is_leaf}
    parts = list(model.modules())
    for part in reversed(parts):  # those inside others first
        if uncompiled(part) is not part:
            memo[id(part)] = copy.deepcopy(uncompiled(part), memo)
    copied = copy.deepcopy(model, memo)
    for part in parts:
        if uncompiled(part) is part:
            _replace_functions(part, memo[id(part)], memo)
    return copied


def _replace_functions(part: nn.Module, copied: nn.Module, memo: dict[int, Any]) -> None:
    """Let the functions that a module holds as attributes of its own work on the copies."""
    for name, value in vars(part).items():
        if name not in vars(copied) or not isinstance(value, (FunctionType, MethodType, functools.partial)):
            continue  # a module does not copy what it was compiled to
        if name == "forward":
            value = _without_autocast(value)
        if isinstance(value, MethodType) and value.__func__ is getattr(type(part), name, None):
            del vars(copied)[name]  # its class has it
        else:
            vars(copied)[name] = _on_copies(value, memo)


def _without_autocast(forward: Any) -> Any:
    """Take off what Accelerate has put around a ``forward``, once or several times."""
    if isinstance(forward, MethodType):
        inner = _without_autocast(forward.__func__)
        return forward if inner is forward.__func__ else MethodType(inner, forward.__self__)
    inner = forward
    while hasattr(inner, "__wrapped__") and _home(inner).startswith(_AUTOCAST):
        inner = inner.__wrapped__
    return inner if _home(forward).startswith(_AUTOCAST[0]) else forward


def _home(function: Any) -> str:
    """The module in which a function was written: ``__module__`` is that of the function it wraps."""
    return getattr(function, "__globals__", {}).get("__name__", type(function).__module__)


def _on_copies(value: Any, memo: dict[int, Any]) -> Any:
    """Replace what a function refers to by the copies."""
    if isinstance(value, MethodType):
        return MethodType(_on_copies(value.__func__, memo), _on_copies(value.__self__, memo))
    if isinstance(value, functools.partial):
        named = {name: _on_copies(each, memo) for name, each in value.keywords.items()}
        made = functools.partial(_on_copies(value.func, memo), *(_on_copies(x, memo) for x in value.args), **named)
        made.__dict__.update(value.__dict__)
        return made
    known = memo.get(id(value))
    if known is not None:
        return known
    return _with_copies(value, memo) if isinstance(value, FunctionType) and value.__closure__ else value


def _with_copies(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    """Make a function like another one, whose variables from outside refer to the copies."""
    cells = function.__closure__ or ()
    mine = tuple(CellType() for _ in cells)
    made = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, mine)
    memo[id(function)] = made  # it may refer to itself
    made.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(made, function)
    vars(made).pop("__wrapped__")
    made.__dict__.update(function.__dict__)  # with the function that it wraps, if there is one
    for cell, other in zip(mine, cells, strict=True):
        if _filled(other):
            cell.cell_contents = _on_copies(other.cell_contents, memo)
    return made


def _filled(cell: CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


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
