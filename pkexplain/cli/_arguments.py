"""Parsing of command-line values: numbers, outputs, functions and query files."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pkexplain.errors import QueryError


def parse_numbers(text: str, option: str) -> list[int]:
    """Parse integers separated by commas, for example ``3,17``.

    Raises:
        QueryError: The text is something else.
    """
    numbers = text.split(",")
    if all(number.strip().isdecimal() for number in numbers):
        return [int(number) for number in numbers]
    wrong, expected = "these are not row numbers" if option == "--ids" else "these are not classes", "integers"
    raise QueryError(
        f"{option} {text}",
        wrong,
        got=repr(text),
        expected=f"{expected} and commas",
        source="the command line",
        fix=f"Write them as in {option} 3,17,1204",
    )


def parse_output(text: str) -> Any:
    """Parse an output, for example ``logit:3``.

    Raises:
        QueryError: There is no such output.
    """
    from pkexplain.explain import outputs
    from pkexplain.explain.loss_output import Loss
    from pkexplain.explain.token_outputs import TokenLogProbability

    name, _, number = text.partition(":")
    kinds: dict[str, Any] = {
        "logit": outputs.Logit,
        "log-probability": outputs.LogProbability,
        "margin": outputs.Margin,
        "loss": Loss,
        "value": outputs.Value,
    }
    tokens = number.split(",")
    if name == "tokens" and all(token.isdecimal() for token in tokens):
        return TokenLogProbability([int(token) for token in tokens])
    if name in kinds and (number.isdecimal() or (not number and name != "loss")):
        return kinds[name](*([int(number)] if number else []))
    raise QueryError(
        f"--output {text}",
        "there is no such output",
        got=repr(text),
        expected=", ".join(f"{kind}:NUMBER" for kind in kinds) + ", tokens:NUMBER,NUMBER,…",
        source="pkexplain.explain.outputs",
        fix="For the score of class 3, write --output logit:3",
    )


def call_function(path: str, option: str) -> Any:
    """Import ``package.module:function`` from the Python path or the working directory, and call it.

    Raises:
        QueryError: It cannot be imported or called, or it is a ``--model`` that does not return a model.
    """
    from torch import nn

    module, _, name = path.partition(":")
    here, function = str(Path.cwd()), None
    sys.path.insert(0, here)
    try:
        try:
            function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            wrong = f"it cannot be imported ({error})"
        else:
            wrong = f"it is a {type(function).__name__}, which is not callable"
        if callable(function):
            built = function()  # what it imports may be in the working directory, too
            if option != "--model" or isinstance(built, nn.Module):
                return built
            wrong = f"it returns a {type(built).__name__}, not a torch.nn.Module"
    finally:
        sys.path.remove(here)
    raise QueryError(
        f"{option} {path}",
        wrong,
        got=repr(path),
        expected="package.module:function",
        source="the Python path and the working directory",
        fix="Name a function without arguments in a module that Python can import from here",
    )


def read_query(file: Path, inputs: Collection[str]) -> Any:
    """Read a query without unpickling anything; a single tensor needs no name, unless it is one of the inputs'.

    A ``.json`` file may hold a row of a data set, ``{"input_ids": [101, …]}``, or a list of rows.

    Raises:
        QueryError: The file cannot be read.
    """
    import numpy as np
    import torch

    try:
        if file.suffix == ".npy":
            return torch.from_numpy(np.load(file, allow_pickle=False))
        if file.suffix == ".json":
            read = json.loads(file.read_text(encoding="utf-8"))
            named = isinstance(read, dict) or (isinstance(read, list) and read and isinstance(read[0], dict))
            return read if named else torch.tensor(read, device="cpu")  # rows of a data set are read by the explainer
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            tensors = load_file(file)
            alone = len(tensors) == 1 and not tensors.keys() <= set(inputs)
            return next(iter(tensors.values())) if alone else tensors
        wrong = "this file type is not supported"
    except Exception as error:  # every library has its own errors for a bad file
        wrong = f"it cannot be read ({error})"
    raise QueryError(
        f"--query {file}",
        wrong,
        got=file.name,
        expected="a .npy, .safetensors or .json file of numbers",
        source="the command line",
        fix="Save the query with numpy.save('query.npy', x)",
    )
