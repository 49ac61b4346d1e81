"""The explanations of a batch of queries: a list that shows itself as a table, and can be saved."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

from pkexplain.results.explanation import Explanation

if TYPE_CHECKING:
    import pandas

__all__ = ["Explanations", "common_mode"]


class Explanations(list[Explanation]):
    """A list of explanations, one for each query of a batch, in the batch's order."""

    @property
    def passed(self) -> bool:
        """Whether every check of every explanation passed."""
        return all(explanation.passed for explanation in self)

    def to_pandas(self, dataset: Any = None, k: int | None = None) -> pandas.DataFrame:
        """Make one table of all explanations.

        Args:
            dataset: The training set, as for `Explanation.to_pandas`.
            k: Only so many examples for each query.

        Returns:
            The rows of each explanation's table, one after the other, below the columns ``query``, the query's
            position in the list, and ``output``.

        Raises:
            ConfigurationError: As for `Explanation.to_pandas`.
            MissingDependencyError: pandas is not installed.
        """
        from pkexplain.results.tables import join_pandas

        return join_pandas(self, dataset, k)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Save all explanations in one file, as `Explanation.save` does with one.

        Args:
            path: Where to write.

        Returns:
            The path of the file.

        Raises:
            ConfigurationError: A query is neither tensors nor text, or a nested mapping or tuple of them.
        """
        from pkexplain.results.saving import save_explanations

        return save_explanations(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Explanations:
        """Load saved explanations; of a file with a single one, a list of it.

        Args:
            path: What `save` returned.

        Returns:
            The explanations.

        Raises:
            ExplanationFileError: The file is damaged, of another version, or not of saved explanations.
        """
        from pkexplain.results.saving import load_explanations

        return cls(load_explanations(path))

    @overload
    def __getitem__(self, place: SupportsIndex) -> Explanation: ...

    @overload
    def __getitem__(self, place: slice) -> Explanations: ...

    def __getitem__(self, place: SupportsIndex | slice) -> Explanation | Explanations:
        """Return one of the explanations, or some of them as such a list."""
        return Explanations(super().__getitem__(place)) if isinstance(place, slice) else super().__getitem__(place)

    def __str__(self) -> str:
        """Show a plain-text table, one line for each query."""
        from pkexplain.results.text import render_list

        return render_list(self)

    def __repr__(self) -> str:
        """Describe the list in one line."""
        failed = sum(not explanation.passed for explanation in self)
        checks = f"; {failed} with failed checks" if failed else "; all checks passed" if self else ""
        outputs = ", ".join(explanation.output for explanation in self[:3]) + (", …" if len(self) > 3 else "")
        return f"<Explanations of {len(self):,} queries{': ' if self else ''}{outputs}{checks}>"

    def _repr_html_(self) -> str:
        """Show a table in a notebook, one line for each query."""
        from pkexplain.results.report.card import render_list_card

        return render_list_card(self)


def common_mode(explanations: Iterable[Explanation]) -> int | None:
    """Compute the permissions that the files of all explained runs have; None if all are in memory."""
    modes = [each.mode for each in explanations if each.mode is not None]
    return functools.reduce(lambda one, other: one & other, modes) if modes else None
