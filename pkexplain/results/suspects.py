"""Training examples whose labels are likely wrong, as plain data."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pkexplain.results.text import tabulate

if TYPE_CHECKING:
    import pandas

__all__ = ["Suspect", "Suspects"]


@dataclass(frozen=True)
class Suspect:
    """One example that the model kept objecting to.

    Attributes:
        id: Its row number in the training set.
        score: How strongly; see `pkexplain.suspects`.
        prediction: The class that the trained model gives it, or the number; None if it was not asked.
        neighbours: The examples whose stored gradients are most like its own, most alike first, and the cosine of each;
            a negative one pulled the other way. Empty if they were not looked for.
    """

    id: int
    score: float
    prediction: float | int | None = None
    neighbours: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Suspects(Sequence[Suspect]):
    """The most suspicious examples, most suspicious first.

    Attributes:
        found: The examples.
        scores: The score of every training example, ``(num_examples,)``; nan of those that were never visited.
        centred: Whether the mean score of each example's label was subtracted.
        mode: Permissions of files written from this, those of the run's files; None for the umask's.
    """

    found: tuple[Suspect, ...]
    scores: np.ndarray = field(repr=False)
    centred: bool = False
    mode: int | None = field(default=None, repr=False)

    def __len__(self) -> int:
        """Return how many are shown."""
        return len(self.found)

    def __getitem__(self, position: Any) -> Any:
        """Return one of them, or a slice."""
        return self.found[position]

    @property
    def ids(self) -> np.ndarray:
        """Their row numbers, ``(shown,)``."""
        return np.array([each.id for each in self.found], dtype=np.int64)

    def __str__(self) -> str:
        """Show them as a plain-text table."""
        rows = []
        for each in self.found[:_LINES]:
            says = "–" if each.prediction is None else f"{each.prediction:g}"
            near = ", ".join(str(i) for i, _ in each.neighbours[:3]) or "–"
            rows.append([f"{each.id:,}", f"{each.score:.3f}", says, near])
        notes = [_MEANING + (" Minus its label's mean." if self.centred else "")]
        if len(self) > _LINES:
            notes.append(f"And {len(self) - _LINES:,} more.")
        title = f"Likely wrong labels: {len(self):,} of {len(self.scores):,} examples"
        return tabulate(title, ["example", "score", "model says", "neighbours"], rows, notes)

    def to_pandas(self) -> pandas.DataFrame:
        """Make a table, one row for each shown example: ``id``, ``score``, ``prediction``."""
        import pandas

        return pandas.DataFrame([{"id": s.id, "score": s.score, "prediction": s.prediction} for s in self.found])

    def write_report(
        self,
        path: str | os.PathLike[str],
        *,
        dataset: Any,
        label_names: Sequence[str] | Mapping[Any, str] | None = None,
        title: str | None = None,
    ) -> Path:
        """Write them as one self-contained HTML page, with picture or text, label and neighbours.

        Args:
            path: Where to write; missing directories are created, and a file that is there is replaced in one step.
            dataset: The whole training set, in the order of the recorded ids.
            label_names: Name of each label; by default the data set's own, if it has any.
            title: The page's title.

        Returns:
            The path of the file.

        Raises:
            ConfigurationError: The data set is not the one that was recorded, or the path is a URL.
            MissingDependencyError: jinja2 is not installed.
        """
        from pkexplain.results.report.suspects import write_page

        return write_page(self, path, dataset=dataset, label_names=label_names, title=title)


_LINES = 20
_MEANING = "Score: the mean of ‖ℓ′‖ while it was trained on: 0 where the model agreed with it, 1 where not at all."
