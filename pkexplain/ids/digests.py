"""Digests of an example's inputs, and what a row of a data set holds: whether data are those that were recorded."""

from __future__ import annotations

import hashlib
import math
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pkexplain.ids import parts_of

__all__ = ["MOST_VALUES", "ROUNDED", "differ", "digest", "read_row", "thinned", "without_padding"]

ROUNDED = 0.02
"""How far a value may move: more than bfloat16 rounds, far less than one example is from another."""
_IGNORED = -100
"""What labels are padded with, and inputs with 0, where no attention mask says what is padding."""
MOST_VALUES = 1 << 13
"""Of a larger input, so many evenly spaced values are looked at."""


def without_padding(row: Tensor, mask: Tensor | None = None) -> Tensor:
    """Cut the padding off one example's input, ``(*shape)``.

    Args:
        row: The input.
        mask: Nonzero where the first dimension of ``row`` is no padding; by default, what is 0 (or, of integers, -100)
            all along an end of a dimension is padding.
    """
    if mask is not None and mask.ndim == 1 and row.ndim and len(mask) == len(row):
        return row[mask != 0]
    content = row != 0
    if not (row.is_floating_point() or row.dtype in (torch.bool, torch.uint8)):
        content &= row != _IGNORED
    for axis in range(row.ndim):
        if content.numel() and content.select(axis, 0).any() and content.select(axis, -1).any():
            continue  # as most inputs are
        known = (content.movedim(axis, 0).flatten(1).any(1) if row.ndim > 1 else content).nonzero()[:, 0]
        start, stop = (int(known[0]), int(known[-1]) + 1) if len(known) else (0, 0)
        row, content = row.narrow(axis, start, stop - start), content.narrow(axis, start, stop - start)
    return row


def thinned(values: Tensor) -> Tensor:
    """Flatten values, and keep at most `MOST_VALUES` of them, evenly spaced."""
    flat = values.flatten()
    return flat[:: -(-len(flat) // MOST_VALUES) or 1]


def digest(content: Tensor) -> str:
    """Return a digest of one example's input on the CPU, ``(*shape)``, `without_padding`.

    Returns:
        A hash of the values, whatever their dtype; the shape; mean and root mean square of the finite values. The hash
        is the same for nan of any kind, and for 0 and -0.
    """
    values = thinned(content).double().numpy() + 0.0  # -0 becomes 0
    values[np.isnan(values)] = np.nan
    known = values[np.isfinite(values)]
    mean, size = (known.mean(), math.sqrt(np.square(known).mean())) if len(known) else (0.0, 0.0)
    code = hashlib.blake2b(values.tobytes(), digest_size=8).hexdigest()
    return f"{code} {'x'.join(map(str, content.shape)) or 'number'} {mean:.4g} {size:.4g}"


def differ(one: str, other: str) -> bool:
    """Whether two digests are of different data for sure: of one shape, and not as if by rounding."""
    a, b = one.split(), other.split()
    if len(a) < 4 or len(b) < 4 or a[0] == b[0] or a[1] != b[1]:
        return False
    scale = max(abs(float(a[3])), abs(float(b[3])))
    return any(abs(float(x) - float(y)) > ROUNDED * scale for x, y in zip(a[2:4], b[2:4], strict=True))


def read_row(dataset: Any, example: int) -> dict[str, Tensor]:
    """Name what a row of a data set holds by its path: tensors, arrays, pictures, numbers and lists; bytes of texts.

    The random numbers of Python, numpy and torch stay as they are: a transform may draw some, and a training goes on.
    """
    python, arrays = random.getstate(), np.random.get_state()
    used = range(torch.cuda.device_count()) if torch.cuda.is_available() and torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=used):
            return _values(dataset[example], "")
    finally:
        random.setstate(python)
        np.random.set_state(arrays)


def _values(row: Any, path: str) -> dict[str, Tensor]:
    parts = parts_of(row)
    if isinstance(row, Tensor):
        return {path: row.detach().cpu()}
    if parts is None and isinstance(row, (list, tuple)):
        numbers = isinstance(row, list) and _as_tensor(row)
        if isinstance(numbers, Tensor):
            return {path: numbers}
        parts = {str(place): part for place, part in enumerate(row)}
    if parts is not None:
        return {name: v for key, part in parts.items() for name, v in _values(part, f"{path}.{key}").items()}
    if isinstance(row, str):
        row = np.frombuffer(row.encode(errors="replace"), np.uint8)
    known = any(hasattr(row, name) for name in ("__array__", "__array_interface__"))  # a picture has the latter
    numbers = _as_tensor(row) if known or isinstance(row, (bool, int, float)) else None
    return {} if numbers is None else {path: numbers}


def _as_tensor(value: Any) -> Tensor | None:
    """Make a tensor of an array, a picture or numbers; None if it is something else."""
    try:
        array = np.asarray(value)
        return torch.from_numpy(np.array(array)) if array.dtype.kind in "biuf" else None
    except (TypeError, ValueError, OverflowError):
        return None
