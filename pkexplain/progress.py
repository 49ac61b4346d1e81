"""A progress bar for what takes over a second."""

from __future__ import annotations

import time
from typing import Any

__all__ = ["ProgressBar"]

_PATIENCE = 1.0
"""Seconds of work before a bar appears."""


class ProgressBar:
    """Show how far long work is, one bar for each kind of work, on the terminal's error stream.

    Pass it as ``Explainer(…, progress=ProgressBar())``; where the error stream is no terminal nothing is shown.
    """

    def __init__(self) -> None:
        """Make it; nothing is shown before something has taken a second."""
        self._started: dict[str, float] = {}
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` parts of ``what`` are done."""
        started = self._started.setdefault(what, time.monotonic())
        if done >= total:
            self._finish(what, total)
        elif what in self._tasks or time.monotonic() - started > _PATIENCE:
            bars = self._shown()
            if what not in self._tasks:
                self._tasks[what] = bars.add_task(what, total=total)
            bars.update(self._tasks[what], completed=done, total=total)

    def _finish(self, what: str, total: int) -> None:
        self._started.pop(what, None)
        task = self._tasks.pop(what, None)
        if task is not None:
            self._bars.update(task, completed=total, total=total)
        if self._bars is not None and not self._tasks:
            self._bars.stop()
            self._bars = None

    def _shown(self) -> Any:
        if self._bars is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            console = Console(stderr=True)
            self._bars = Progress(*columns, console=console, disable=not console.is_terminal)
            self._bars.start()
        return self._bars
