"""How long a piece of work takes, and how much memory it adds."""

from __future__ import annotations

import math
import threading
import time
from typing import Any

import psutil
import torch

_SECONDS_BETWEEN = 0.005


class Measurement:
    """A context manager that measures the block in it.

    Memory is coarse. On a CPU it is the largest growth of the process's resident memory, sampled every five
    milliseconds; memory that torch already held and reuses is not in it. On a GPU it is the growth of what torch
    allocated there.

    Args:
        device: Device of the work.

    Attributes:
        seconds: Wall time.
        peak_bytes: Peak memory over what was used before.
    """

    def __init__(self, device: torch.device) -> None:
        """Measure nothing yet."""
        self._device = device
        self.seconds, self.peak_bytes = math.nan, math.nan

    def __enter__(self) -> Measurement:
        """Start."""
        self._over = threading.Event()
        self._before = self._highest = self._used()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop, also if the work failed."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds = time.perf_counter() - self._start
        self._over.set()
        self._watcher.join()
        self.peak_bytes = max(self._highest, self._used()) - self._before

    def _watch(self) -> None:
        while not self._over.wait(_SECONDS_BETWEEN):
            self._highest = max(self._highest, self._used())

    def _used(self) -> float:
        if self._device.type == "cuda":
            return float(torch.cuda.memory_allocated(self._device))
        return float(psutil.Process().memory_info().rss)


def available_bytes(device: torch.device) -> float:
    """Return how much memory is available.

    Args:
        device: The device.

    Returns:
        Bytes.
    """
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return float(psutil.virtual_memory().available)
