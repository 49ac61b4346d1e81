"""Progress of long work: what is told, and what shows it: a bar, or a line now and then."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

__all__ = ["Progress", "ProgressBar", "no_progress"]

Progress = Callable[[str, int, int], None]
"""Told what is being done, how many parts of it are done, and how many there are."""

_PATIENCE = 1.0
"""Seconds of work before a bar appears."""
_PAUSE = 30.0
"""Seconds of work before a line is written where there is no terminal, and between two lines."""


def no_progress(what: str, done: int, total: int) -> None:
    """Ignore progress."""


class ProgressBar:
    """Show the progress of long work, one tqdm bar for each kind of work, in a terminal or a notebook.

    Pass it as ``Explainer(…, progress=ProgressBar())``. Nothing is shown before a second has passed. Where the error
    stream is neither a terminal nor a notebook's, as in a job's log, a line is written to it every 30 seconds.
    """

    def __init__(self) -> None:
        """Show nothing yet."""
        self._shown: dict[str, Any] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` parts of ``what`` are done."""
        if what not in self._shown:
            self._shown[what] = _Bar(what) if _is_watched() else _Lines(what)
        self._shown[what].show(done, total)
        if done >= total:
            self._shown.pop(what).close()


class _Bar:
    """A tqdm bar."""

    def __init__(self, what: str) -> None:
        with warnings.catch_warnings():  # in a notebook without ipywidgets, tqdm warns of that, and draws with text
            warnings.simplefilter("ignore")
            from tqdm.auto import tqdm
        self._bar = tqdm(desc=what, delay=_PATIENCE, disable=False)

    def show(self, done: int, total: int) -> None:
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        self._bar.close()


class _Lines:
    """A line now and then."""

    def __init__(self, what: str) -> None:
        self._what, self._began, self._written, self._last = what, time.monotonic(), 0.0, ""

    def show(self, done: int, total: int) -> None:
        now = time.monotonic()
        elapsed = now - self._began
        self._last = f"{self._what}: {done:,} of {total:,} ({done / max(total, 1):.0%}) after {_duration(elapsed)}"
        if now - (self._written or self._began) >= _PAUSE:
            self._written = now
            self._write()

    def close(self) -> None:
        if self._written:
            self._write()

    def _write(self) -> None:
        if self._last and sys.stderr is not None:
            print(f"pkexplain: {self._last}", file=sys.stderr, flush=True)
            self._last = ""


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def _is_watched() -> bool:
    """Whether somebody sees a bar: the error stream is a terminal, or a notebook shows it."""
    if getattr(sys.stderr, "isatty", bool)():
        return True
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and "IPKernelApp" in shell.config
