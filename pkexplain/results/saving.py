"""Explanations in one file: safetensors for the numbers, checked JSON for the rest; nothing is unpickled.

The file's metadata hold its kind, its version, the explanations as JSON, and a checksum of that JSON and all tensors.
JSON is written with its ``NaN``, so that every number comes back as it was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from pkexplain.errors import ConfigurationError, ExplanationFileError
from pkexplain.files import checksum, write_atomically
from pkexplain.results.explanation import Check, Contribution, Cost, Explanation, Ledger, Remainder
from pkexplain.results.explanations import common_mode

__all__ = ["FILE_VERSION", "load_explanations", "save_explanations"]

FILE_VERSION = "1"
_KIND = "pkexplain explanations"


class _Saved(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The fields of an explanation but its contributions, which are a tensor; the query's tensors are named."""

    output: str
    reading: str
    ledger: Ledger
    proponents: tuple[Contribution, ...]
    opponents: tuple[Contribution, ...]
    remainder: Remainder
    checks: tuple[Check, ...]
    cost: Cost
    boundaries: tuple[int, ...]
    segment_sums: tuple[float, ...]
    checkpoint_outputs: tuple[float, ...]
    query: Any
    mode: int | None
    run_segments: int | None
    prediction: str
    notes: tuple[str, ...]
    input_digests: dict[str, dict[str, str]] | None = None  # None: those of the explanation before


def save_explanations(explanations: Sequence[Explanation], path: str | os.PathLike[str]) -> Path:
    """Write explanations to one file; see `Explanation.save`.

    Args:
        explanations: The explanations.
        path: Where to write; missing directories are created.

    Returns:
        The path of the file.

    Raises:
        ConfigurationError: A query cannot be saved.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    content = []
    for place, explanation in enumerate(explanations):
        tensors[f"{place}.contributions"] = torch.tensor(explanation.contributions)
        fields = {name: getattr(explanation, name) for name in _Saved.__struct_fields__}
        fields["query"] = _encode(explanation.query, f"{place}.query", tensors)
        if place and explanation.input_digests == explanations[place - 1].input_digests:
            fields["input_digests"] = None
        content.append(msgspec.to_builtins(_Saved(**fields)))
    text, target = json.dumps(content), Path(path)
    metadata = {"kind": _KIND, "version": FILE_VERSION, "content": text, "sha256": _digest(text, tensors)}
    target.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(target, common_mode(explanations)) as temporary:
        save_file(tensors, temporary, metadata)
    return target


def load_explanations(path: str | os.PathLike[str], *, single: bool = False) -> list[Explanation]:
    """Read explanations from a file that `save_explanations` wrote.

    Args:
        path: The file.
        single: Whether it must hold exactly one.

    Returns:
        The explanations.

    Raises:
        ExplanationFileError: The file is damaged, of another version, or not of saved explanations; or it does not
            hold exactly one.
    """
    text, tensors = _read(Path(path))
    try:
        content = msgspec.convert(json.loads(text), tuple[_Saved, ...])
        explanations: list[Explanation] = []
        for place, saved in enumerate(content):
            before = explanations[-1].input_digests if explanations else {}
            explanations.append(_rebuild(saved, place, tensors, before))
    except (msgspec.ValidationError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise _refused(path, "it does not hold explanations", f"{error!r}"[:300], "what save wrote") from error
    if single and len(explanations) != 1:
        fix = "Load it with pkexplain.Explanations.load"
        raise _refused(path, "it does not hold one explanation", f"{len(explanations)} explanations", "1", fix)
    return explanations


def _read(path: Path) -> tuple[str, dict[str, Tensor]]:
    """Read the JSON and the tensors of a file, checked."""
    from safetensors import SafetensorError, safe_open

    path.open("rb").close()  # a missing file is Python's own error
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("kind") != _KIND:
                raise _refused(path, "it is not a saved explanation", "another safetensors file", _KIND)
            if metadata.get("version") != FILE_VERSION:
                fix = "Load it with the pkexplain that saved it, or explain the query again"
                got = f"version {metadata.get('version', '?')[:20]}"
                raise _refused(path, "it is of another version", got, f"version {FILE_VERSION}", fix)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except SafetensorError as error:
        raise _refused(path, "it is not a saved explanation", f"{error}"[:300], "a safetensors file") from error
    text = metadata.get("content", "")
    if metadata.get("sha256") != _digest(text, tensors):
        raise _refused(path, "it was altered", "another checksum", "the checksum in the file")
    return text, tensors


def _rebuild(
    saved: _Saved, place: int, tensors: Mapping[str, Tensor], digests: Mapping[str, Mapping[str, str]]
) -> Explanation:
    contributions = tensors[f"{place}.contributions"]
    shown = (*saved.proponents, *saved.opponents)
    segments = len(saved.segment_sums)
    if contributions.ndim != 1 or not contributions.is_floating_point():
        raise ValueError(f"contributions of shape {tuple(contributions.shape)}, {contributions.dtype}")
    if any(not 0 <= c.id < len(contributions) for c in shown):
        raise ValueError("an example's id is out of range")
    if not len(saved.boundaries) == len(saved.checkpoint_outputs) == segments + 1:
        raise ValueError("segments and checkpoints do not agree")
    fields: dict[str, Any] = {name: getattr(saved, name) for name in saved.__struct_fields__}
    fields["query"] = _decode(saved.query, tensors)
    fields["input_digests"] = digests if saved.input_digests is None else saved.input_digests
    return Explanation(**fields, all_contributions=contributions.numpy())


def _encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Describe a query in JSON, and collect its tensors."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return ["plain", value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return [
            "mapping",
            {key: _encode(part, f"{name}.{at}", tensors) for at, (key, part) in enumerate(value.items())},
        ]
    if isinstance(value, (tuple, list)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return [kind, [_encode(part, f"{name}.{at}", tensors) for at, part in enumerate(value)]]
    array: Any = value
    try:
        tensor = (
            torch.from_numpy(np.ascontiguousarray(array)) if isinstance(array, np.ndarray) else array.detach().cpu()
        )
        tensors[name] = tensor.contiguous().clone()
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigurationError(
            "Explanation.save",
            "its query cannot be saved",
            got=type(value).__name__,
            expected="a tensor, an array, a number, a text, or a mapping or tuple of these",
            source="the explanation's query",
            fix="Save it without its query: dataclasses.replace(explanation, query=None)",
        ) from error
    return ["array" if isinstance(value, np.ndarray) else "tensor", name]


def _decode(described: Any, tensors: Mapping[str, Tensor]) -> Any:
    kind, value = described
    if kind in ("tensor", "array"):
        return tensors[value] if kind == "tensor" else tensors[value].numpy()
    if kind == "mapping":
        return {key: _decode(part, tensors) for key, part in value.items()}
    if kind in ("tuple", "list"):
        parts = [_decode(part, tensors) for part in value]
        return tuple(parts) if kind == "tuple" else parts
    if kind != "plain" or not (value is None or isinstance(value, (bool, int, float, str))):
        raise ValueError(f"a query of an unknown kind, {str(kind)[:80]!r}")
    return value


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    parts: list[str | Tensor] = [text]
    for name in sorted(tensors):
        parts += [f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}", tensors[name]]
    return checksum(*parts)


def _refused(
    path: str | os.PathLike[str],
    wrong: str,
    got: str,
    expected: str,
    fix: str = "Pass a file that Explanation.save or Explanations.save wrote",
) -> ExplanationFileError:
    return ExplanationFileError(f"loading {os.fspath(path)}", wrong, got, expected, "pkexplain.results.saving", fix)
