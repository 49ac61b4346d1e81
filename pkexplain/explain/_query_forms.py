"""The forms in which users have a query, brought to one: tensors under the names of the recorded inputs."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import inspect
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pkexplain.errors import QueryError
from pkexplain.ids import leaves, parts_of
from pkexplain.store.manifest import InputEntry

_LABELS = ("label", "label_ids")
"""Columns that the collators of transformers rename to ``labels``."""


def forward_names(model: nn.Module) -> dict[str, str]:
    """Name the inputs of a model's forward pass: its parameters, each with the name of a positional argument there."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):  # a forward pass that is not written in Python
        return {}
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return {p.name: p.name if p.kind is p.KEYWORD_ONLY else str(place) for place, p in enumerate(named)}


def is_list_of_queries(x: Any) -> bool:
    """Whether a query is a list with one query in each place, not a list of numbers."""
    if not isinstance(x, Sequence) or isinstance(x, (str, bytes, tuple)) or not len(x):
        return False
    first = x[0]
    structured = isinstance(first, tuple) or parts_of(first) is not None
    return structured or (isinstance(first, (Tensor, np.ndarray)) and first.ndim > 0)


class QueryForm:
    """Reads one query, or one batch, whose inputs are named in one way or another.

    Args:
        shapes: The recorded inputs: ``"0"``, ``"tokens"``, ``"0.tokens"``.
        names: The parameters of the model's forward pass, from `forward_names`.
    """

    def __init__(self, shapes: Mapping[str, InputEntry], names: Mapping[str, str]) -> None:
        """Note how the model was called."""
        self.shapes, self._names = shapes, names
        self._outer = {name.partition(".")[0] for name in shapes}

    def named(self, x: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Name the inputs as they were while recording.

        Returns:
            The inputs, and the mappings or dataclasses that they came in, by the names of the model's arguments.

        Raises:
            QueryError: There is none, one that was seen is misspelt, or one was not seen and the model takes it.
        """
        given = {} if isinstance(x, list) and not x else self._arguments(x)
        found: dict[str, Any] = {}
        for name, value in given.items():
            found |= leaves(name, value)
        if len(found) > 1:
            found = {name: value for name, value in found.items() if value is not None}  # as if it was left out
        if not found:
            raise self.refusal(next(iter(self.shapes), "0"), "there is none", "nothing")
        containers = {name: value for name, value in given.items() if parts_of(value) is not None}
        return self._recorded(found) if self.shapes else found, containers

    def _arguments(self, x: Any) -> dict[str, Any]:
        """Take a query apart into the model's arguments."""
        parts = {str(place): part for place, part in enumerate(x)} if isinstance(x, tuple) else parts_of(x)
        if parts is None:
            return {self._alias("0", lone=True): x}
        if not isinstance(x, tuple):
            whole = any(self._alias(name) == "0" and parts_of(part) is not None for name, part in parts.items())
            if (self._outer == {"0"} and "0" not in self.shapes and not whole) or not (
                self.shapes or isinstance(x, Mapping)
            ):  # the model takes it in one piece
                return {"0": x}
        return {self._alias(name): part for name, part in parts.items()}

    def _alias(self, name: str, lone: bool = False) -> str:
        """Find the recorded argument that is meant: by position if it was recorded by position, else by name."""
        if name in self._outer or not self.shapes:
            return name
        positions = {place: parameter for parameter, place in self._names.items()}
        for other in (self._names.get(name), positions.get(name)):
            if other in self._outer:
                return other
        return next(iter(self._outer)) if lone and len(self._outer) == 1 else name

    def _recorded(self, found: dict[str, Any]) -> dict[str, Any]:
        """Leave out what no input of the training was, unless the model takes it or a name is misspelt."""
        for label in [name for name in found if name.rpartition(".")[2] in _LABELS and name not in self.shapes]:
            renamed = label.rpartition(".")[0] + ".labels" if "." in label else "labels"
            if renamed in self.shapes and renamed not in found:
                found[renamed] = found.pop(label)
        missing = [name for name in self.shapes if name not in found]
        others = [name for name in found if name not in self.shapes]
        for name in others:
            likely = difflib.get_close_matches(name, missing, 1, 0.8)
            if name.rpartition(".")[2] in (*_LABELS, "labels"):
                continue  # the training kept the answers aside
            if name.isdigit() or name in self._names:
                fix = "Leave it out; of a batch (inputs, targets), pass the inputs alone"
                raise self.refusal(
                    name, "no such input was seen while recording", f"{name!r} next to {self.known}", fix
                )
            if likely:
                raise self.refusal(name, "no such input was seen while recording", repr(name), f"Name it {likely[0]!r}")
        if len(others) == len(found):
            got, fix = ", ".join(map(repr, others)), f"Name the query's inputs as in training: {self.known}"
            raise self.refusal(others[0], "no such input was seen while recording", f"{got} next to {self.known}", fix)
        return {name: value for name, value in found.items() if name in self.shapes}

    @property
    def known(self) -> str:
        """The recorded inputs, in words."""
        shown = {place: parameter for parameter, place in self._names.items() if parameter != place}
        return ", ".join(f"{name} ({shown[name]})" if name in shown else name for name in self.shapes)

    @property
    def wanted(self) -> str:
        """The recorded inputs with the shapes of one query, in words."""
        return ", ".join(f"{name!r} of shape {entry.shape}" for name, entry in self.shapes.items()) or "what it takes"

    def parameter(self, name: str) -> str:
        """Name the parameter at a position that does not follow the arguments before it."""
        return next((parameter for parameter, place in self._names.items() if place == name), name)

    def numbers(self, name: str, value: Any) -> Tensor | list[Tensor]:
        """Turn one input into a tensor of the recorded dtype; into a list of them if its rows have different lengths.

        Raises:
            QueryError: It does not hold numbers, or numbers of another kind.
        """
        first = value[0] if isinstance(value, Sequence) and len(value) else None
        if isinstance(value, (str, bytes)) or isinstance(first, (str, bytes)):
            fix = "Tokenise it, as for training"
            raise self.refusal(name, "it is not a tensor but a text", type(value).__name__, fix)
        try:
            found = as_numbers(value)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            fix = "Pass numbers; of a data set, a row such as dataset[0], or rows such as dataset[:8]"
            raise self.refusal(name, "it is not a tensor", type(value).__name__, fix) from error
        own = isinstance(value, (Tensor, np.ndarray, np.generic))
        if not own and isinstance(found, Tensor) and not found.numel():
            raise self.refusal(name, "it holds nothing", repr(value)[:40])
        if isinstance(found, list):
            return [self._converted(name, row, own) for row in found]
        return self._converted(name, found, own)

    def _converted(self, name: str, tensor: Tensor, own: bool) -> Tensor:
        """Convert to the recorded dtype, if no number changes by it; Python's own numbers have no dtype yet."""
        if name not in self.shapes:
            return tensor
        kind = self.shapes[name].torch_dtype
        whole = not (tensor.is_floating_point() or tensor.is_complex())
        if kind.is_floating_point and (tensor.is_floating_point() or (whole and not own)):
            return tensor.to(kind)
        if not whole or kind.is_floating_point:
            raise self.refusal(name, "it has another dtype", tensor.dtype)
        moved = tensor.to(kind)
        if not kind.is_complex and not torch.equal(moved.to(tensor.dtype), tensor):
            raise self.refusal(name, f"its numbers do not fit in {kind}", tensor.dtype)
        return moved

    def is_single(self, name: str, value: Tensor | list[Tensor]) -> bool:
        """Whether an input is that of one query, without a batch dimension.

        A size that differs from the recorded ones is left to the model, as sequences may be of any length. A size of 1
        where there were more real numbers would be broadcast in silence.

        Raises:
            QueryError: It has another number of dimensions, or holds nothing.
        """
        rows = value if isinstance(value, list) else [value]
        if name not in self.shapes:
            if not isinstance(value, list) and not value.ndim:
                raise self.refusal(name, "it has no batch dimension", "a single number")
            return False
        wanted, kind = self.shapes[name].shape, self.shapes[name].torch_dtype
        ranks = {row.ndim + isinstance(value, list) for row in rows}
        known = {len(wanted) + 1} | (set() if isinstance(value, list) else {len(wanted)})
        pairs = [pair for row in rows for pair in zip(reversed(row.shape), reversed(wanted), strict=False)]
        broadcast = kind.is_floating_point and any(size == 1 and known not in (1, None) for size, known in pairs)
        if len(ranks) > 1 or not ranks <= known or broadcast or not all(row.numel() for row in rows):
            shapes = [tuple(row.shape) for row in rows[:5]]
            raise self.refusal(
                name, "it has another shape", f"shape{'s' * (len(rows) > 1)} {', '.join(map(str, shapes))}"
            )
        return ranks == {len(wanted)}

    def refusal(
        self, name: str, wrong: str, got: Any, fix: str = "Prepare the query like the training examples"
    ) -> QueryError:
        """Make the error for an input that does not fit."""
        known = self.shapes.get(name)
        one = "a tensor" if known is None else f"one query of shape {known.shape}, or a batch of them, {known.dtype}"
        if known is None and self.shapes:
            one = f"the inputs {self.known}"
        source = "the inputs seen while recording"
        return QueryError(f"explaining query input {name!r}", wrong, got=got, expected=one, source=source, fix=fix)


def as_numbers(value: Any) -> Tensor | list[Tensor]:
    """Turn numbers in any form into a tensor; rows of different shapes into a list.

    Raises:
        TypeError: They are not numbers; or ValueError or RuntimeError.
    """
    if isinstance(value, Tensor):
        tensor = value.detach()
        return tensor.clone() if tensor.is_inference() else tensor  # autograd refuses those
    if isinstance(value, np.ndarray) and value.dtype != object:
        return torch.from_numpy(np.array(value))  # a copy: read-only arrays, and such with negative strides, are none
    if isinstance(value, (str, bytes)):
        raise TypeError("a text")
    if not isinstance(value, (Sequence, np.ndarray)):
        return torch.as_tensor(value, device="cpu")
    rows = list(value)
    try:
        if not any(isinstance(row, (Tensor, np.ndarray)) for row in rows):
            return torch.tensor(rows, device="cpu")
    except ValueError:  # rows of different lengths
        if not rows or not all(isinstance(row, (Sequence, np.ndarray)) for row in rows):
            raise
    found: list[Tensor] = []
    for row in rows:
        numbers = as_numbers(row)
        if isinstance(numbers, list):
            raise ValueError("its rows are not rectangular")
        found.append(numbers)
    return torch.stack(found) if len({row.shape for row in found}) == 1 else found


def rebuilt(container: Any, parts: dict[str, Any]) -> Any:
    """Make a mapping or a dataclass like another one, with other parts."""
    if not isinstance(container, Mapping):
        copied = copy.copy(container)
        for name, part in parts.items():
            object.__setattr__(copied, name, part)  # it may be frozen
        return copied
    if dataclasses.is_dataclass(container):  # an output of transformers
        return type(container)(**parts)
    if type(container) is dict or not isinstance(container, MutableMapping):
        return parts
    copied = copy.copy(container)  # a BatchEncoding: the model may read its inputs as attributes
    copied.clear()
    copied.update(parts)
    return copied
