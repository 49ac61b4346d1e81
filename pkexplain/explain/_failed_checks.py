"""Checks that failed where only numbers are returned: a warning names them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pkexplain.errors import warn
from pkexplain.results.explanation import Check

__all__ = ["FailedChecks"]


class FailedChecks:
    """Collects the failed checks of many queries.

    Args:
        asked: What the user called.
    """

    def __init__(self, asked: str) -> None:
        """Start with none."""
        self._asked, self._queries, self._failed = asked, 0, 0
        self._worst: dict[str, Check] = {}

    def note(self, checks: Iterable[Sequence[Check]]) -> None:
        """Take note of the checks of further queries."""
        for each in checks:
            failed = [check for check in each if not check.passed]
            self._queries, self._failed = self._queries + 1, self._failed + bool(failed)
            for check in failed:
                before = self._worst.get(check.name)
                if before is None or not check.value <= before.value:
                    self._worst[check.name] = check

    def warn(self) -> None:
        """Warn if there were any."""
        if self._worst:
            worst = ", ".join(f"{c.name} {c.value:.2g} (tolerance {c.tolerance:.2g})" for c in self._worst.values())
            warn(
                f"pkexplain: {self._asked}: checks failed for {self._failed} of {self._queries} queries, at worst "
                f"{worst}. explain() says what each means and what helps."
            )
