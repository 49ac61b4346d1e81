"""Checks of example ids; and which tensor of a model's output is its prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pkexplain.errors import ExampleIdError

__all__ = ["check_ids", "first_tensor"]


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


def named_tensors(output: Any) -> dict[str, Tensor]:
    """Name the floating-point tensors of a model's output by their path: ``""``, ``"logits"``, ``"1"``, ``"a.0"``."""
    if isinstance(output, Tensor):
        return {"": output} if output.is_floating_point() else {}
    parts = output.items() if isinstance(output, Mapping) else ()
    parts = enumerate(output) if isinstance(output, (tuple, list)) else parts
    found: dict[str, Tensor] = {}
    for name, part in parts:
        found |= {f"{name}.{path}".rstrip("."): tensor for path, tensor in named_tensors(part).items()}
    return found


def first_tensor(output: Any, path: str | None = None) -> Tensor | None:
    """Find the tensor of a model's output that is the prediction.

    Args:
        output: What the model returned.
        path: Where the training's loss took it from; None where that is not known: the output, its ``logits``, or the
            first tensor.
    """
    found = named_tensors(output)
    if path is not None and path in found:
        return found[path]
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    return found.get("logits", next(iter(found.values()), None))
