"""Objects to tensors and plain data, and back: the state that a resumed recording needs.

Nothing is pickled. Only the classes that the reader names are rebuilt, from their own fields.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

_PLAN = "plan"


def serialise(value: Any) -> dict[str, Tensor]:
    """Turn an object of tensors, numbers, strings, lists, tuples, mappings and dataclasses into tensors.

    Args:
        value: The object.

    Returns:
        Tensors by name; the one named ``"plan"`` holds the rest, as JSON in bytes.

    Example:
        >>> found = serialise({"buffer": torch.ones(2), "blocks": [0, 3]})
        >>> deserialise(found, ())
        {'buffer': tensor([1., 1.]), 'blocks': [0, 3]}
    """
    tensors: dict[str, Tensor] = {}
    plan = json.dumps(_plan(value, tensors))
    return {**tensors, _PLAN: torch.frombuffer(bytearray(plan.encode()), dtype=torch.uint8)}


def deserialise(tensors: Mapping[str, Tensor], kinds: Iterable[type]) -> Any:
    """Rebuild an object.

    Args:
        tensors: What `serialise` returned.
        kinds: The dataclasses that may be in it.

    Raises:
        ValueError: The tensors hold no such object, or one with another class.
    """
    try:
        plan = json.loads(bytes(tensors[_PLAN].tolist()))
        return _build(plan, tensors, {kind.__name__: kind for kind in kinds})
    except (KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise ValueError(f"{error}") from error


def _plan(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach()
        return {"tensor": name}
    if is_dataclass(value):
        inside = {f.name: _plan(getattr(value, f.name), tensors) for f in fields(value)}
        return {"kind": type(value).__name__, "fields": inside}
    if isinstance(value, (list, tuple, set)):
        return {type(value).__name__: [_plan(part, tensors) for part in value]}
    if isinstance(value, Mapping):
        return {"mapping": [[_plan(key, tensors), _plan(part, tensors)] for key, part in value.items()]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a {type(value).__name__} cannot be kept")


def _build(plan: Any, tensors: Mapping[str, Tensor], kinds: Mapping[str, type]) -> Any:
    if not isinstance(plan, dict):
        return plan
    if "tensor" in plan:
        return tensors[plan["tensor"]]
    if "kind" in plan:
        return kinds[plan["kind"]](**{n: _build(part, tensors, kinds) for n, part in plan["fields"].items()})
    if "mapping" in plan:
        return {_build(key, tensors, kinds): _build(part, tensors, kinds) for key, part in plan["mapping"]}
    ((kind, parts),) = plan.items()
    return {"list": list, "tuple": tuple, "set": set}[kind](_build(part, tensors, kinds) for part in parts)
