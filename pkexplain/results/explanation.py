"""Frozen results: an explanation and its ledger.

Everything here is plain data in output units; nothing here computes gradients. `pkexplain.explain.explainer` creates
these objects, `pkexplain.results.report` and `pkexplain.results.plots` show them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from pkexplain.errors import QueryError

__all__ = ["Check", "Contribution", "Cost", "Explanation", "GroupSum", "Ledger", "Remainder"]


@dataclass(frozen=True)
class Contribution:
    """One training example's contribution to one output.

    Attributes:
        id: The example's row number in the training set.
        contribution: c_i = Σ_t ⟨φ_t, D_i,t⟩, in output units; equals ``weight * kernel``.
        weight: a_i, minus the example's loss derivative, averaged along the path with the kernel as weight
            (Domingos 2020, Definition 2 and Theorem 1); nan if no loss derivative was recorded.
        kernel: K(x, x_i), the path kernel, in output units per unit of weight; nan if no loss derivative was recorded.
        segments: The contribution of each segment of training, in output units; they sum to ``contribution``.
    """

    id: int
    contribution: float
    weight: float
    kernel: float
    segments: tuple[float, ...]


@dataclass(frozen=True)
class Ledger:
    """The sum that makes up the final output: final = initial + examples + remainders + gap.

    Attributes:
        initial: f_0(x), the output before the first recorded step, in output units.
        final: f_T(x), the output after the last recorded step, in output units.
        examples: Σ_i c_i(x) over all training examples, in output units.
        remainders: Changes of the output that belong to no example, by name, in output units: ``"weight_decay"``,
            ``"optimizer"``, ``"unsplit"`` if some gradients were not split among the examples, and, if buffers moved,
            ``"buffers"`` (running statistics and others).
    """

    initial: float
    final: float
    examples: float
    remainders: Mapping[str, float]

    @property
    def gap(self) -> float:
        """The completeness gap, f_T − f_0 − Σ_i c_i − remainders, in output units."""
        return self.final - self.initial - self.examples - sum(self.remainders.values())


@dataclass(frozen=True)
class Check:
    """One thing that can go wrong, measured.

    Attributes:
        name: What is measured, for example ``"quadrature gap"``.
        value: The measured value, dimensionless unless ``meaning`` says otherwise.
        tolerance: The largest value that passes.
        meaning: What the value is, and what to do if it fails.
    """

    name: str
    value: float
    tolerance: float
    meaning: str

    @property
    def passed(self) -> bool:
        """Whether the value is a number within the tolerance."""
        return bool(abs(self.value) <= self.tolerance)


@dataclass(frozen=True)
class GroupSum:
    """Contributions of one group of training examples, summed.

    Attributes:
        group: The group's name or label.
        count: The number of training examples in it.
        net: Σ c_i over the group, in output units.
        gross: Σ |c_i| over the group, in output units.
    """

    group: object
    count: int
    net: float
    gross: float


@dataclass(frozen=True)
class Cost:
    """The cost of an explanation.

    Attributes:
        forward_passes: Evaluations of the model's output for this query, apart from those that gradients take.
        backward_passes: Gradients of the model's output for this query.
        budget: The largest number of gradients allowed.
        exhausted: Whether the budget was spent before the quadrature met its tolerance.
    """

    forward_passes: int
    backward_passes: int
    budget: int
    exhausted: bool = False


@dataclass(frozen=True)
class Remainder:
    """What is known about the examples that are not shown.

    Attributes:
        shown: Σ of the contributions shown, in output units.
        rest: Σ of all others, in output units: the total, which is known exactly, minus those shown.
        num_rest: The number of others.
        bound: None of them contributes more than this, in either direction, in output units.
        exact: Whether all rows were searched; then the bound is the next contribution. Otherwise it is certified by
            the norms of the rows, and much larger than is likely.
    """

    shown: float
    rest: float
    num_rest: int
    bound: float
    exact: bool


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
    prediction: str = ""

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
        labels = [getattr(label, "item", lambda label=label: label)() for label in groups]
        if len(labels) != len(self.contributions):
            raise QueryError(
                "by_group(groups)",
                "there must be one label per training example",
                got=f"{len(labels)} labels",
                expected=f"{len(self.contributions)}",
                source="num_examples of the run",
                fix="Pass the labels of the whole training set, in its order",
            )
        members: dict[object, list[int]] = {}
        for position, label in enumerate(labels):
            members.setdefault(label, []).append(position)
        try:
            order = sorted(members)  # pyright: ignore[reportArgumentType]
        except TypeError:
            order = sorted(members, key=str)
        sums = []
        for label in order:
            part = self.contributions[members[label]].astype(np.float64)
            sums.append(GroupSum(label, len(part), float(part.sum()), float(np.abs(part).sum())))
        return tuple(sums)

    def __str__(self) -> str:
        """Show the ledger, the checks and the examples as plain text."""
        from pkexplain.results.text import render

        return render(self)
