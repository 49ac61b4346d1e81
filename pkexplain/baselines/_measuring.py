"""How long a piece of work takes, and how much memory it takes beside what was there."""

from __future__ import annotations

import math
import os
import threading
import time
from pathlib import Path
from typing import Any

import torch

__all__ = ["Measurement", "available_bytes"]

_STATM = Path("/proc/self/statm")
_SECONDS_BETWEEN = 0.005


class Measurement:
    """A context manager that measures the block in it.

    Memory is coarse. Beside a CPU it is the largest growth of the process's resident memory, seen every five
    milliseconds; what torch already held and uses again is not in it. Beside a GPU it is the growth of what torch
    allocated there. It is nan where the system does not say.

    Args:
        device: Where the work is done.

    Attributes:
        seconds: Wall time.
        peak_bytes: Memory beside what was there before, at its highest.
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
        """Stop, whether or not the work failed."""
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
        if not _STATM.exists():
            return math.nan
        return float(_STATM.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def available_bytes(device: torch.device) -> float:
    """Look up how much memory could still be used.

    Args:
        device: Where.

    Returns:
        Bytes; inf where the system does not say.
    """
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return math.inf
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), math.inf)
