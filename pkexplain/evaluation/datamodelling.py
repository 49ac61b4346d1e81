"""The linear datamodelling score: do sums of contributions predict the outputs of models trained on subsets?

For subsets S_1 … S_m of the training set, f(x; S) the output of a model trained only on S, and contributions c_i(x),

    LDS(x) = Spearman's correlation over j of  f(x; S_j)  and  Σ_{i ∈ S_j} c_i(x)

(Park et al. 2023, *TRAK: Attributing Model Behavior at Scale*), averaged over queries. Only the order of subsets
matters, so contributions of any scale can be judged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pkexplain.errors import EvaluationError
from pkexplain.evaluation._checking import as_finite, refuse_constant, refuse_too_few
from pkexplain.evaluation._statistics import Estimate, correlations, draw_weights, estimate, resampled_means
from pkexplain.evaluation.retraining import Job, Retraining
from pkexplain.files import checksum
from pkexplain.results.text import tabulate

__all__ = [
    "LinearDatamodellingScore",
    "SubsetOutputs",
    "linear_datamodelling_score",
    "retrain_subsets",
]

_SEED_STRIDE = 1_000_000
"""Distance between the seeds of one subset, so that more subsets or seeds reuse earlier retrainings."""


@dataclass(frozen=True)
class SubsetOutputs:
    """The outputs of models trained on subsets: computed once, used to judge any number of contributions.

    Attributes:
        masks: Which examples each subset holds, bool, ``(subsets, num_examples)``.
        repeats: The outputs, ``(seeds, subsets, queries)``, in output units; each subset was trained on once for each
            seed.
    """

    masks: np.ndarray
    repeats: np.ndarray

    def __post_init__(self) -> None:
        """Check that the two fit.

        Raises:
            EvaluationError: A shape or a dtype does not fit, or an output is not finite.
        """
        masks = np.asarray(self.masks)
        if masks.ndim != 2 or masks.dtype != np.bool_:
            got, expected = f"{masks.dtype}, shape {masks.shape}", "bool, (subsets, num_examples)"
            fix = "Pass True for the examples in a subset"
            raise EvaluationError(
                "SubsetOutputs(masks, …)", "these are not masks", got, expected, "the definition", fix
            )
        axes = "(seeds, subsets, queries)"
        repeats = as_finite(
            self.repeats, (None, len(masks), None), "SubsetOutputs(…, repeats)", axes, "the number of masks"
        )
        object.__setattr__(self, "masks", masks)
        object.__setattr__(self, "repeats", repeats)

    @property
    def outputs(self) -> np.ndarray:
        """The outputs averaged over the seeds, ``(subsets, queries)``, in output units."""
        return self.repeats.mean(0)

    @property
    def spread(self) -> np.ndarray:
        """The standard deviation over the seeds, ``(subsets, queries)``, in output units; nan with one seed."""
        return self.repeats.std(0, ddof=1) if len(self.repeats) > 1 else np.full(self.repeats.shape[1:], np.nan)

    @property
    def agreement(self) -> float | None:
        """How well one half of the seeds predicts the other: Spearman's correlation over subsets, mean over queries.

        None with one seed; if the number of seeds is odd, the last one is left out.
        """
        half = len(self.repeats) // 2
        if not half:
            return None
        first, second = self.repeats[:half].mean(0), self.repeats[half : 2 * half].mean(0)
        return float(resampled_means(first, second, np.ones((len(self.masks), 1)), ranked=True)[0])

    @property
    def ceiling(self) -> float | None:
        """Approximate score of a perfect predictor of the mean over infinitely many seeds, 0 to 1; None with one seed.

        The agreement r of two halves gives the reliability of the mean of all seeds, R = k r / (1 + (k − 1) r), with
        k = seeds / half (Spearman 1910; Brown 1910); a perfect predictor correlates with it by √R. Both hold exactly
        for Pearson's correlation, and approximately for Spearman's.
        """
        agreement = self.agreement
        if agreement is None:
            return None
        longer = len(self.repeats) / (len(self.repeats) // 2)
        return math.sqrt(max(0.0, longer * agreement / (1.0 + (longer - 1.0) * agreement)))

    def checksum(self) -> str:
        """A name for these outputs: only scores against the same outputs can be compared."""
        return checksum(self.masks.tobytes(), self.repeats.tobytes())


@dataclass(frozen=True)
class LinearDatamodellingScore:
    """How well contributions predict the outputs of models trained on subsets.

    Attributes:
        mean: The mean over queries, −1 to 1, with an interval over subsets; queries are not resampled.
        per_query: The score of each query, ``(queries,)``.
        subsets: The number of subsets.
        agreement: As in `SubsetOutputs`.
        ceiling: As in `SubsetOutputs`.
        resampled: The mean on each resample of the subsets, ``(resamples,)``.
        resamples_of: The subset outputs and draws of ``resampled``.
    """

    mean: Estimate
    per_query: np.ndarray
    subsets: int
    agreement: float | None
    ceiling: float | None
    resampled: np.ndarray = field(repr=False)
    resamples_of: str = field(repr=False)

    def minus(self, other: LinearDatamodellingScore) -> Estimate:
        """Estimate how much higher this score is than another, on the same resamples of the same subsets.

        Args:
            other: The score of other contributions against the same subset outputs.

        Returns:
            The difference of the means; its interval is narrower than those of the two would suggest.

        Raises:
            EvaluationError: The other score is of other outputs, or of other resamples.
        """
        if self.resamples_of != other.resamples_of:
            raise EvaluationError(
                "score.minus(other)",
                "the two are not of the same subset outputs and resamples",
                other.resamples_of,
                self.resamples_of,
                "this score",
                "Compute both with the same subset outputs, resamples and seed",
            )
        value = self.mean.value - other.mean.value
        return estimate(value, self.resampled - other.resampled, self.mean.level)

    def __str__(self) -> str:
        """Show the score as a plain-text table."""
        quartiles = np.quantile(self.per_query, [0.25, 0.5, 0.75])
        rows = [
            ["mean over queries", str(self.mean)],
            ["quartiles over queries", ", ".join(f"{q:.3f}" for q in quartiles)],
            ["agreement of seeds", "–" if self.agreement is None else f"{self.agreement:.3f}"],
            ["ceiling", "–" if self.ceiling is None else f"{self.ceiling:.3f}"],
        ]
        title = f"Linear datamodelling score: {len(self.per_query):,} queries, {self.subsets:,} subsets"
        note = f"In brackets: {self.mean.level:.0%} of the means on resampled subsets."
        return tabulate(title, ["", "Spearman"], rows, [note])


def retrain_subsets(
    retraining: Retraining, *, count: int = 100, fraction: float = 0.5, seeds: int = 1, seed: int = 0
) -> SubsetOutputs:
    """Train on random subsets, and ask every model the queries.

    This takes ``count * seeds + 1`` retrainings: the extra one trains a second subset with the first one's seed, to
    check that the function uses the ids. With more subsets or seeds later, earlier retrainings are reused.

    Args:
        retraining: The user's training and queries.
        count: The number of subsets; at least 10, for an interval.
        fraction: The share of the training set that each subset holds.
        seeds: Trainings on each subset, each with a different seed.
        seed: Seed of the subsets, and the first training seed.

    Returns:
        The subsets and the outputs.

    Raises:
        EvaluationError: There are too few subsets, or a retraining failed; see `Retraining.ask_all`.
    """
    refuse_too_few(count, f"retrain_subsets({count=})", "subsets")
    size = round(fraction * retraining.num_examples)
    if not 0 < size < retraining.num_examples or seeds < 1 or count > _SEED_STRIDE:
        got, expected = f"{fraction=}, {seeds=}, {count=}", "a fraction between 0 and 1, and 1 or more seeds"
        fix = "Pass fraction=0.5"
        source = f"num_examples={retraining.num_examples}"
        raise EvaluationError("retrain_subsets(…)", "there are no such subsets", got, expected, source, fix)
    masks = np.zeros((count, retraining.num_examples), dtype=bool)
    for position, mask in enumerate(masks):
        random = np.random.default_rng([seed, position])
        mask[random.choice(len(mask), size, replace=False)] = True
    subsets = [np.flatnonzero(mask) for mask in masks]
    jobs: list[Job] = [
        (ids, seed + position + repeat * _SEED_STRIDE)
        for position, ids in enumerate(subsets)
        for repeat in range(seeds)
    ]
    jobs.insert(1, (subsets[1], seed))
    answers = retraining.ask_all(jobs, "retraining on subsets")
    del answers[1]
    outputs = np.stack([answer.outputs for answer in answers]).reshape(count, seeds, -1)
    return SubsetOutputs(masks, outputs.transpose(1, 0, 2))


def linear_datamodelling_score(
    contributions: Any, subset_outputs: SubsetOutputs, *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> LinearDatamodellingScore:
    """Compute Spearman's correlation over subsets of Σ_{i ∈ S} c_i(x) and the output, for each query, and its mean.

    Args:
        contributions: Contribution of every example to every query's output, ``(queries, num_examples)``, of any
            scale; for example from `pkexplain.Explainer.contributions`.
        subset_outputs: The same output of the same queries from models trained on subsets.
        resamples: Bootstrap resamples of the subsets, for the interval.
        level: The share of the resampled means in the interval.
        seed: Seed of the resamples.

    Returns:
        The score.

    Raises:
        EvaluationError: There are fewer than ten subsets, a shape does not fit, a number is not finite, or for some
            query all outputs or all predictions are the same.

    Example:
        >>> random = np.random.default_rng(0)
        >>> contributions, masks = random.normal(size=(3, 40)), random.random((20, 40)) < 0.5
        >>> additive = SubsetOutputs(masks, (masks @ contributions.T)[None])
        >>> print(linear_datamodelling_score(contributions, additive).mean)
        1.000 [1.000, 1.000]
    """
    masks, outputs = subset_outputs.masks, subset_outputs.outputs
    refuse_too_few(len(masks), "linear_datamodelling_score(…, subset_outputs)", "subsets")
    asked, axes = "linear_datamodelling_score(contributions, …)", "(queries, num_examples)"
    shape = (outputs.shape[1], masks.shape[1])
    contributions = as_finite(contributions, shape, asked, axes, "the subset outputs")
    predicted = masks @ contributions.T
    fix = "Leave these queries out, or train for longer"
    refuse_constant(outputs, "the subset outputs", "subsets", fix)
    fix = "Check the contributions of these queries"
    refuse_constant(predicted, asked, "subsets", fix, scale=np.abs(contributions).sum(1))
    once = np.ones((len(masks), 1))
    pairs = zip(predicted.T, outputs.T, strict=True)
    per_query = np.array([correlations(x, y, once, ranked=True)[0] for x, y in pairs])
    resampled = resampled_means(predicted, outputs, draw_weights(len(masks), resamples, seed), ranked=True)
    return LinearDatamodellingScore(
        estimate(float(per_query.mean()), resampled, level),
        per_query,
        len(masks),
        subset_outputs.agreement,
        subset_outputs.ceiling,
        resampled,
        f"{subset_outputs.checksum()[:16]}, {resamples} resamples of seed {seed}",
    )
