"""What the commands are given: outputs, functions and queries, as they are written on the command line."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pkexplain.errors import QueryError, message

if TYPE_CHECKING:
    from torch import nn

__all__ = ["bad_function", "build_model", "call_function", "parse_numbers", "parse_output", "read_query"]


def parse_numbers(text: str, option: str) -> list[int]:
    """Read whole numbers and commas, for example ``3,17``.

    Raises:
        QueryError: They are something else.
    """
    numbers = text.split(",")
    if all(number.strip().isdecimal() for number in numbers):
        return [int(number) for number in numbers]
    wrong, expected = "these are not row numbers" if option == "--ids" else "these are not classes", "whole numbers"
    raise QueryError(
        message(
            f"{option} {text}",
            wrong,
            got=repr(text),
            expected=f"{expected} and commas",
            source="the command line",
            fix=f"Write them as in {option} 3,17,1204",
        )
    )


def parse_output(text: str) -> Any:
    """Read an output as it is written on the command line, for example ``logit:3``.

    Raises:
        QueryError: There is no such output.
    """
    from pkexplain import outputs

    name, _, number = text.partition(":")
    kinds: dict[str, Any] = {
        "logit": outputs.Logit,
        "log-probability": outputs.LogProbability,
        "margin": outputs.Margin,
        "loss": outputs.Loss,
        "value": outputs.Value,
    }
    tokens = number.split(",")
    if name == "tokens" and all(token.isdecimal() for token in tokens):
        return outputs.TokenLogProbability([int(token) for token in tokens])
    if name in kinds and (number.isdecimal() or (not number and name != "loss")):
        return kinds[name](*([int(number)] if number else []))
    raise QueryError(
        message(
            f"--output {text}",
            "there is no such output",
            got=repr(text),
            expected=", ".join(f"{kind}:NUMBER" for kind in kinds) + ", tokens:NUMBER,NUMBER,…",
            source="pkexplain.outputs",
            fix="For the score of class 3, write --output logit:3",
        )
    )


def call_function(path: str, option: str) -> Any:
    """Import ``package.module:function`` from the Python path or the working directory, and call it.

    Raises:
        QueryError: It cannot be imported or called.
    """
    module, _, name = path.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        try:
            function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise bad_function(path, option, f"it cannot be imported ({error})") from error
        if not callable(function):
            raise bad_function(path, option, f"it is a {type(function).__name__}, which cannot be called")
        return function()  # what it imports may lie in the working directory, too
    finally:
        sys.path.remove(here)


def build_model(path: str) -> nn.Module:
    """Call the function of ``--model``.

    Raises:
        QueryError: It does not return a model.
    """
    from torch import nn

    built = call_function(path, "--model")
    if not isinstance(built, nn.Module):
        raise bad_function(path, "--model", f"it returns a {type(built).__name__}, not a torch.nn.Module")
    return built


def bad_function(path: str, option: str, wrong: str) -> QueryError:
    """Say what is wrong with a function that an option names."""
    return QueryError(
        message(
            f"{option} {path}",
            wrong,
            got=repr(path),
            expected="package.module:function",
            source="the Python path and the working directory",
            fix="Name a function without arguments in a module that Python can import from here",
        )
    )


def read_query(file: Path, inputs: Collection[str]) -> Any:
    """Read a query without unpickling anything; a single tensor needs no name, unless it is one of the inputs'.

    Raises:
        QueryError: The file cannot be read.
    """
    import numpy as np
    import torch

    try:
        if file.suffix == ".npy":
            return torch.from_numpy(np.load(file, allow_pickle=False))
        if file.suffix == ".json":
            return torch.tensor(json.loads(file.read_text(encoding="utf-8")))
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            tensors = load_file(file)
            alone = len(tensors) == 1 and not tensors.keys() <= set(inputs)
            return next(iter(tensors.values())) if alone else tensors
        wrong = "this kind of file is not read"
    except Exception as error:  # every library has its own errors for a bad file
        wrong = f"it cannot be read ({error})"
    raise QueryError(
        message(
            f"--query {file}",
            wrong,
            got=file.name,
            expected="a .npy, .safetensors or .json file of numbers",
            source="the command line",
            fix="Save the query with numpy.save('query.npy', x)",
        )
    )
