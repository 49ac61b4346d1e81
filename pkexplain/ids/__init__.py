"""Checks of example ids; names of a model's inputs and outputs; and which of its outputs is the prediction."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pkexplain.errors import ExampleIdError, QueryError

__all__ = ["PredictionRule", "check_ids", "leaves", "named_tensors", "parts_of"]


def check_ids(
    ids: Sequence[int] | Tensor,
    num_examples: int,
    asked: str = "recorder.step(ids)",
    gone: Sequence[int] = (),
    repeats: bool = False,
) -> Tensor:
    """Check example ids and return them as a tensor of row numbers, ``(batch,)``.

    Args:
        ids: The ids passed.
        num_examples: The number of examples.
        asked: The argument they were passed as.
        gone: Examples that were withdrawn.
        repeats: Whether an example may come more than once.

    Raises:
        ExampleIdError: They are not integers in one dimension, in range and without repeats unless these are allowed.
    """

    def bad(wrong: str, got: Any, fix: str) -> ExampleIdError:
        expected = f"{'' if repeats else 'different '}integers from 0 to {num_examples - 1}"
        return ExampleIdError(asked, wrong, got=got, expected=expected, source=f"{num_examples=}", fix=fix)

    try:
        known = isinstance(ids, Tensor) or hasattr(ids, "dtype")
        tensor = torch.as_tensor(ids if known else list(ids), device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise bad("the ids are not numbers", repr(ids)[:80], "Let the data loader return each row number") from error
    if tensor.ndim != 1 or len(tensor) == 0:
        got = f"shape {tuple(tensor.shape)}"
        raise bad("the ids must be a list with one id per example", got, "Pass one id for each row of the batch")
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise bad("the ids are not integers", tensor.dtype, "Convert them to integers")
    if torch.iinfo(tensor.dtype).max < num_examples - 1:
        largest = f"{tensor.dtype}, whose largest number is {torch.iinfo(tensor.dtype).max}"
        raise bad("ids of this type cannot number all examples, and wrap round", largest, "Make them of int64")
    tensor = tensor.long()
    outside = tensor[(tensor < 0) | (tensor >= num_examples)]
    if len(outside):
        fix = "Count rows of the training set from 0, and pass num_examples=len(train)"
        raise bad("ids are out of range", outside[:5].tolist(), fix)
    withdrawn = tensor[torch.isin(tensor, torch.tensor(gone, dtype=torch.long, device="cpu"))] if len(gone) else ()
    if len(withdrawn):
        raise bad("these examples were withdrawn from the run", list(map(int, withdrawn[:5])), "Train without them")
    values, counts = tensor.unique(return_counts=True)
    if len(values) < len(tensor) and not repeats:
        raise bad("ids are repeated", values[counts > 1][:5].tolist(), "Pass each example once")
    return tensor


def parts_of(value: Any) -> dict[str, Any] | None:
    """Take a mapping, or an instance of a dataclass, apart by name; None for anything else."""
    if isinstance(value, Mapping):
        return {str(name): part for name, part in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return None


def leaves(name: str, value: Any) -> dict[str, Any]:
    """Name what is in nested mappings and dataclasses by its path: ``"0"``, ``"0.tokens"``; a list is one thing."""
    parts = parts_of(value)
    if parts is None:
        return {name: value}
    return {path: leaf for inner, part in parts.items() for path, leaf in leaves(f"{name}.{inner}", part).items()}


def named_tensors(output: Any) -> dict[str, Tensor]:
    """Name the floating-point tensors of a model's output by their path: ``""``, ``"logits"``, ``"1"``, ``"a.0"``."""
    if isinstance(output, Tensor):
        return {"": output} if output.is_floating_point() else {}
    parts = parts_of(output)
    if parts is None and isinstance(output, (tuple, list)):
        parts = {str(place): part for place, part in enumerate(output)}
    if parts is None:  # an object of the model's own: its tensors, but nothing that may lead back to the model
        parts = {name: part for name, part in getattr(output, "__dict__", {}).items() if isinstance(part, Tensor)}
    found: dict[str, Tensor] = {}
    for name, part in parts.items():
        found |= {f"{name}.{path}".rstrip("."): tensor for path, tensor in named_tensors(part).items()}
    return found


@dataclasses.dataclass
class PredictionRule:
    """Which tensor of a model's output is the prediction. Nothing is guessed in silence: the reason is stated.

    In this order: the tensor that was asked for (``of``); the one from which the training's loss was computed; the only
    floating-point tensor with one row for each query; of several, the one named ``logits``. Otherwise it is refused.

    Attributes:
        recorded: The path of the tensor from which the training's loss was computed; None where that is not known.
        asked: The path that was asked for; None for none.
        unsure: Whether the output of a query may be laid out differently than in training, as an input of the training
            is missing: then a position in a tuple is no name.
        stated: Which tensor was chosen last, and why; empty if the model returned one tensor.
    """

    recorded: str | None = None
    asked: str | None = None
    unsure: bool = False
    stated: str = ""

    def choose(self, output: Any, rows: int) -> Tensor:
        """Find the prediction in what a model returned for some queries.

        Raises:
            QueryError: It is not there, or several tensors could be meant.
        """
        every = named_tensors(output)
        found = {path: tensor for path, tensor in every.items() if tensor.ndim and len(tensor) == rows}
        if not found:
            shapes = " and ".join(f"shape {tuple(tensor.shape)}" for tensor in every.values())
            raise QueryError(
                "explaining a query",
                "the model's output does not have one row per query",
                got=shapes or "no tensor",
                expected=f"{rows} rows",
                source="the number of queries",
                fix="Make the model's forward pass keep the batch as the first dimension",
            )
        path, why = self._path(found)
        self.stated = f"{_in_words(path)}, {why}" if path or self.asked is not None else ""
        return found[path]

    def _path(self, found: Mapping[str, Tensor]) -> tuple[str, str]:
        if self.asked is not None:
            if self.asked in found:
                return self.asked, "as asked"
            raise self._refusal(f"the model's output has no tensor {self.asked!r} with one row per query", found)
        positions = self.recorded is not None and any(part.isdigit() for part in self.recorded.split("."))
        if self.recorded in found and not (self.unsure and positions and len(found) > 1):
            return self.recorded or "", "from which the training's loss was computed"
        if len(found) == 1:
            return next(iter(found)), "its only floating-point tensor with one row per query"
        if "logits" in found:
            return "logits", "chosen by its name"
        if self.recorded is None:
            raise self._refusal("the model returns several tensors, and which is the prediction is not known", found)
        here = "may be another one: the query lacks an input of the training" if self.recorded in found else "is gone"
        source = f"the training's loss was computed from {_in_words(self.recorded)}, which {here}"
        raise self._refusal(f"the model returns several tensors, and {source}", found)

    def _refusal(self, wrong: str, found: Mapping[str, Tensor]) -> QueryError:
        listed = [f"{path!r} of shape {tuple(tensor.shape)}" for path, tensor in found.items()]
        some = next((path for path in reversed(list(found)) if path), "")
        return QueryError(
            "explaining a query",
            wrong,
            got=", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else ""),
            expected="one of these by its path",
            source="the model's output",
            fix=f'Name it in the output, for example output=pkexplain.Logit(of="{some}")'
            if some
            else "The model returns one tensor: leave of= out",
        )


def _in_words(path: str) -> str:
    return "output" + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in path.split(".") if part)
