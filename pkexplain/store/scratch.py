"""Arrays that are too large for memory."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pkexplain.errors import RunError
from pkexplain.gradients.devices import room_for

__all__ = ["MEMORY_BYTES", "SCRATCH", "empty_on_disk", "zeros_on_disk"]

MEMORY_BYTES = 1 << 30
"""A larger array is a file mapped into memory, deleted when it is no longer used; a GPU with room takes larger ones."""
_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}
SCRATCH = "pkexplain-rows-"
"""How the names of such files begin."""


def zeros_on_disk(*shape: int, like: Tensor, directory: Path | None = None) -> Tensor:
    """Make a tensor of zeros: on ``like``'s device, or in a file if it would take too much of its memory."""
    if math.prod(shape) * like.element_size() <= room_for(like.device, MEMORY_BYTES):
        if like.device.type == "cpu" and like.dtype in _NUMPY:
            return torch.from_numpy(np.zeros(shape, _NUMPY[like.dtype]))  # pages that nobody writes take no time
        return like.new_zeros(shape)
    return empty_on_disk(shape, like.dtype, directory)


def empty_on_disk(shape: tuple[int, ...], dtype: torch.dtype, directory: Path | None = None) -> Tensor:
    """Make a tensor to write into, in memory if it is small, otherwise in a file, where it holds zeros.

    Args:
        shape: Its shape.
        dtype: Its dtype.
        directory: Directory of the file; it is deleted with the tensor.

    Raises:
        RunError: The disk is full.
    """
    numbers = math.prod(shape)
    if numbers * dtype.itemsize <= MEMORY_BYTES:
        return torch.empty(shape, dtype=dtype, device="cpu")
    name = _reserve(numbers * dtype.itemsize, directory)
    try:
        return torch.from_file(name, shared=True, size=numbers, dtype=dtype).view(shape)
    finally:
        with contextlib.suppress(PermissionError):  # Windows keeps the name of an open file
            os.unlink(name)


def _reserve(size: int, directory: Path | None) -> str:
    """Make a file with its space reserved: if the disk filled up later, writing would kill the process."""
    try:
        handle, name = tempfile.mkstemp(prefix=SCRATCH, suffix=".tmp", dir=directory)
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
            f"reserving {size} bytes of rows in {directory or tempfile.gettempdir()}",
            "there is no space; what was finished before is still there",
            got=str(error),
            expected="a directory with room that can be written to",
            source="the operating system",
            fix="Free some space, or record with a smaller k",
        ) from error
    return name
