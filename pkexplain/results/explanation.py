"""Frozen results: an explanation, made of what is in `pkexplain.results.ledger`.

Everything here is plain data in output units; nothing here computes gradients. `pkexplain.explain.explainer` creates
these objects, `pkexplain.results.report` and `pkexplain.results.plots` show them.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from pkexplain.results.ledger import Check, Contribution, Cost, GroupSum, Ledger, Remainder

if TYPE_CHECKING:
    import datasets
    import pandas

__all__ = ["Check", "Contribution", "Cost", "Explanation", "GroupSum", "Ledger", "Remainder"]


@dataclass(frozen=True)
class Explanation:
    """Why the model gave one output for one query, in terms of training examples.

    Attributes:
        output: What was explained, for example ``"logit[3]"``.
        reading: ``"path"``: the contributions add up; ``"removal"``: they predict how much the output would lose.
        ledger: The ledger of the output.
        proponents: Examples with the largest positive contributions, largest first.
        opponents: Examples with the largest negative contributions, most negative first.
        remainder: What is known about all other examples.
        checks: What can go wrong, measured, with tolerances.
        cost: Forward and backward passes used.
        boundaries: Optimizer steps taken before each checkpoint, ``(segments + 1,)``.
        segment_sums: Σ_i c_i of each segment, in output units, ``(segments,)``.
        checkpoint_outputs: f(x; θ_t) at each checkpoint, in output units, ``(segments + 1,)``.
        query: The query itself, as passed to the model (without a batch dimension).
        all_contributions: c_i of every training example, or an object that computes them; use `contributions`.
        mode: Permissions of the run's files, which a report of it gets, too; None for a run in memory.
        prediction: Which tensor of the model's output was explained, and why; empty if the model returns one tensor.
        run_segments: How many segments the run has, if only its first ones are explained; None for all.
        notes: What a reader should know about the run and the model that was passed, a sentence each: a recording that
            did not finish, examples that were never visited, weights that are not the recorded ones.
        input_digests: Digests of the inputs of some training examples, by id and by the input's name, by which a report
            tells whether the data set that it is given is the recorded one.
    """

    output: str
    reading: str
    ledger: Ledger
    proponents: tuple[Contribution, ...]
    opponents: tuple[Contribution, ...]
    remainder: Remainder
    checks: tuple[Check, ...]
    cost: Cost
    boundaries: tuple[int, ...]
    segment_sums: tuple[float, ...]
    checkpoint_outputs: tuple[float, ...]
    query: object = field(repr=False, compare=False)
    all_contributions: ArrayLike = field(repr=False, compare=False)
    mode: int | None = field(default=None, repr=False, compare=False)
    run_segments: int | None = None
    notes: tuple[str, ...] = ()
    prediction: str = ""
    input_digests: Mapping[str, Mapping[str, str]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def until(self) -> str:
        """Up to where the account goes, in words: "after training", or after the step at which it ends."""
        if self.run_segments is None:
            return "after training"
        return f"after step {self.boundaries[-1]:,} ({len(self.boundaries) - 1} of {self.run_segments} segments)"

    @property
    def initial(self) -> float:
        """f_0(x), the output before training, in output units."""
        return self.ledger.initial

    @property
    def final(self) -> float:
        """f_T(x), the output after training, in output units."""
        return self.ledger.final

    @property
    def total(self) -> float:
        """Σ_i c_i(x) over all training examples, in output units."""
        return self.ledger.examples

    @property
    def gap(self) -> float:
        """The completeness gap, in output units."""
        return self.ledger.gap

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    @property
    def num_examples(self) -> int:
        """The number of training examples, without those that were withdrawn."""
        return self.remainder.num_rest + len({c.id for c in (*self.proponents, *self.opponents)})

    @functools.cached_property
    def contributions(self) -> np.ndarray:
        """The contribution of every training example, ``(num_examples,)``, in output units.

        Exact search computes them along the way; with a compressed index the rows are scanned when this is first read.
        """
        return np.asarray(self.all_contributions)

    @property
    def gross(self) -> float:
        """Σ_i |c_i(x)|, in output units: the total push in either direction, before cancelling."""
        return float(np.abs(self.contributions).sum())

    @property
    def shown_share(self) -> float:
        """The share of the gross contribution held by the proponents and opponents shown, 0 to 1."""
        shown = {c.id: abs(c.contribution) for c in (*self.proponents, *self.opponents)}
        return sum(shown.values()) / gross if (gross := self.gross) else 0.0

    def by_group(self, groups: Sequence[object] | np.ndarray) -> tuple[GroupSum, ...]:
        """Sum the contributions of all training examples by group, net and gross.

        Args:
            groups: One hashable label per training example, ``(num_examples,)``.

        Returns:
            One sum per group, in order of the label; the nets add up to ``total``.

        Raises:
            QueryError: The number of labels is not the number of training examples.
        """
        from pkexplain.results.tables import sum_by_group

        return sum_by_group(self, groups)

    def to_pandas(self, dataset: Any = None, k: int | None = None) -> pandas.DataFrame:
        """Make a table of the training examples, one row each.

        Args:
            dataset: The whole training set in the order of the recorded ids, as for `pkexplain.write_report`. Its
                numbers and texts become columns, by their names or as ``x`` (or ``text``) and ``label``; pictures and
                other tensors are left out. A column that is called like one of ours becomes ``data_…``.
            k: Only so many examples, those with the largest contributions in either direction, largest first; None
                for all, in order of their ids.

        Returns:
            Columns ``id``, ``contribution`` in output units, and ``weight`` and ``kernel``, which are known of the
            proponents and opponents and nan for all others; then those of the data set.

        Raises:
            ConfigurationError: The data set is not the one that was recorded, or ``k`` is invalid.
            MissingDependencyError: pandas is not installed.
        """
        from pkexplain.results.tables import to_pandas

        return to_pandas(self, dataset, k)

    def to_dataset(self, dataset: Any, k: int | None = None) -> datasets.Dataset:
        """Make a Hugging Face data set of the training examples with their contributions.

        Args:
            dataset: The whole training set in the order of the recorded ids: a `datasets.Dataset`, whose columns stay
                as they are, or anything that `to_pandas` reads, whose inputs become a column, too.
            k: As for `to_pandas`.

        Returns:
            The examples, with the columns ``id``, ``contribution``, ``weight`` and ``kernel`` added.

        Raises:
            ConfigurationError: The data set is not the one that was recorded, or ``k`` is invalid.
        """
        from pkexplain.results.tables import to_dataset

        return to_dataset(self, dataset, k)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Save the explanation, with its query and all contributions, in one file; nothing in it is pickled.

        The file's permissions are those of the run's files.

        Args:
            path: Where to write; missing directories are created, and a file that is there is replaced in one step.

        Returns:
            The path of the file.

        Raises:
            ConfigurationError: The query is neither tensors nor text, or a nested mapping or tuple of them.
        """
        from pkexplain.results.saving import save_explanations

        return save_explanations([self], path)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Explanation:
        """Load a saved explanation. It equals the one that was saved; the run is not needed.

        Args:
            path: What `save` returned.

        Returns:
            The explanation.

        Raises:
            ExplanationFileError: The file is damaged, of another version, or not a saved explanation.
        """
        from pkexplain.results.saving import load_explanations

        return load_explanations(path, single=True)[0]

    def __repr__(self) -> str:
        """Describe the explanation in one line, without reading rows."""
        from pkexplain.results.text import one_line

        return f"<Explanation {one_line(self)}>"

    def _repr_html_(self) -> str:
        """Show the explanation as a card, in a notebook."""
        from pkexplain.results.report.card import render_card

        return render_card(self)

    def __str__(self) -> str:
        """Show the ledger, the checks and the examples as plain text."""
        from pkexplain.results.text import render

        return render(self)
