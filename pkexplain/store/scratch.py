"""Room for arrays that are larger than the memory they may take."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from pkexplain.errors import RunError

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
        dtype: Its dtype.
        directory: Where the file goes; it has no name and takes no room once the tensor is gone.

    Raises:
        RunError: There is no room.
    """
    numbers = math.prod(shape)
    if numbers * dtype.itemsize <= MEMORY_BYTES:
        return torch.empty(shape, dtype=dtype)
    name = _reserve(numbers * dtype.itemsize, directory)
    try:
        return torch.from_file(name, shared=True, size=numbers, dtype=dtype).view(shape)
    finally:
        with contextlib.suppress(PermissionError):  # Windows keeps the name of an open file
            os.unlink(name)


def _reserve(size: int, directory: Path | None) -> str:
    """Make a file that has its room: a disk that fills up later would end the process where it writes."""
    try:
        handle, name = tempfile.mkstemp(suffix=".tmp", dir=directory)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle, 0, size)
        except OSError:
            os.unlink(name)
            raise
        finally:
            os.close(handle)
    except OSError as error:
        raise RunError(
            f"making room for {size} bytes of rows in {directory or tempfile.gettempdir()}",
            "there is none; what was finished before is still there",
            got=str(error),
            expected="a directory with room that can be written to",
            source="the operating system",
            fix="Free some space, or record with a smaller k",
        ) from error
    return name
