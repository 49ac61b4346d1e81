"""Room for arrays that are larger than the memory they may take."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["MEMORY_BYTES", "empty_on_disk", "zeros_on_disk"]

MEMORY_BYTES = 1 << 30
"""An array above this size is a file that is mapped into memory, and gone when nobody uses it any more."""


def zeros_on_disk(*shape: int, like: Tensor, directory: Path | None = None) -> Tensor:
    """Make a tensor of zeros: where ``like`` is, or in a file if that would take too much memory."""
    if math.prod(shape) * like.element_size() <= MEMORY_BYTES:
        return like.new_zeros(shape)
    return empty_on_disk(shape, like.dtype, directory)


def empty_on_disk(shape: tuple[int, ...], dtype: torch.dtype, directory: Path | None = None) -> Tensor:
    """Make a tensor to write into, in memory if it is small, otherwise in a file, where it holds zeros.

    Args:
        shape: Its shape.
        dtype: Its number format.
        directory: Where the file goes; it has no name and takes no room once the tensor is gone.
    """
    numbers = math.prod(shape)
    if numbers * dtype.itemsize <= MEMORY_BYTES:
        return torch.empty(shape, dtype=dtype)
    handle, name = tempfile.mkstemp(suffix=".tmp", dir=directory)
    os.close(handle)
    try:
        return torch.from_file(name, shared=True, size=numbers, dtype=dtype).view(shape)
    finally:
        with contextlib.suppress(PermissionError):  # Windows keeps the name of an open file
            os.unlink(name)
