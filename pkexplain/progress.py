"""Progress of long work: what is told, and a bar that shows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["Progress", "ProgressBar", "no_progress"]

Progress = Callable[[str, int, int], None]
"""Told what is being done, how many parts of it are done, and how many there are."""

_PATIENCE = 1.0
"""Seconds of work before a bar appears."""


def no_progress(what: str, done: int, total: int) -> None:
    """Ignore progress."""


class ProgressBar:
    """Show the progress of long work, one tqdm bar for each kind of work, in a terminal or a notebook.

    Pass it as ``Explainer(…, progress=ProgressBar())``. Nothing is shown before a second has passed, or where the
    error stream is not a terminal.
    """

    def __init__(self) -> None:
        """Show nothing yet."""
        self._bars: dict[str, Any] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` parts of ``what`` are done."""
        from tqdm.auto import tqdm

        if what not in self._bars:
            self._bars[what] = tqdm(desc=what, delay=_PATIENCE, disable=None)
        bar = self._bars[what]
        bar.total = total
        bar.update(done - bar.n)
        if done >= total:
            self._bars.pop(what).close()
