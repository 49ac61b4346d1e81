"""Leave-one-out: how much does the output lose without one example, with everything else fixed?

For one seed s, f(x; all, s) − f(x; all without i, s) is compared with c_i(x): both are positive if the output would
fall without the example. Every other random choice of the training must stay the same. In most training loops, leaving
one example out shifts the order of all others and their batches, and that dominates the difference: let the function
draw initial parameters, the order of *all* examples and dropout from the seed, and then skip those not in ``ids``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pkexplain.errors import EvaluationError
from pkexplain.evaluation._checking import as_finite, as_ids, refuse_constant, refuse_too_few
from pkexplain.evaluation._statistics import Estimate, correlations, draw_weights, estimate, resampled_means
from pkexplain.evaluation.retraining import Job, Retraining
from pkexplain.results.text import tabulate

__all__ = ["LeaveOneOut", "LeaveOneOutCorrelation", "leave_one_out", "leave_one_out_correlation"]


@dataclass(frozen=True)
class LeaveOneOut:
    """Output differences without single examples: computed once, used to judge any number of contributions.

    Attributes:
        ids: The examples that were left out, ``(ids,)``.
        differences: Output of the model trained on everything minus that of the model trained without each of them,
            ``(queries, ids)``, in output units.
        num_examples: The size of the whole training set.
    """

    ids: np.ndarray
    differences: np.ndarray
    num_examples: int


@dataclass(frozen=True)
class LeaveOneOutCorrelation:
    """How well contributions predict the output differences without single examples.

    Attributes:
        pearson: Pearson's correlation over the examples left out, mean over queries, with an interval over examples.
        spearman: Spearman's, likewise.
        pearson_per_query: Pearson's correlation for each query, ``(queries,)``.
        spearman_per_query: Spearman's, ``(queries,)``.
        num_ids: The number of examples left out.
    """

    pearson: Estimate
    spearman: Estimate
    pearson_per_query: np.ndarray = field(repr=False)
    spearman_per_query: np.ndarray = field(repr=False)
    num_ids: int

    def __str__(self) -> str:
        """Show the correlations as a plain-text table."""
        rows = []
        pairs = ("Pearson", self.pearson, self.pearson_per_query), ("Spearman", self.spearman, self.spearman_per_query)
        for name, mean, per_query in pairs:
            quartiles = np.quantile(per_query, [0.25, 0.5, 0.75])
            rows.append([name, str(mean), ", ".join(f"{q:.3f}" for q in quartiles)])
        title = f"Leave-one-out: {len(self.pearson_per_query):,} queries, {self.num_ids:,} examples left out one by one"
        note = f"In brackets: {self.pearson.level:.0%} of the means on resampled examples."
        return tabulate(title, ["correlation", "mean over queries", "quartiles over queries"], rows, [note])


def leave_one_out(retraining: Retraining, ids: Sequence[int] | np.ndarray, *, seed: int = 0) -> LeaveOneOut:
    """Train without each of some examples, always with the same seed.

    Args:
        retraining: The user's training and queries; its function should keep the order of the other examples, and
            all noise, the same as with all examples.
        ids: The examples to leave out, one at a time, ``(ids,)``; at least ten, for an interval.
        seed: The training seed.

    Returns:
        The differences.

    Raises:
        EvaluationError: There are too few ids, they are repeated or out of range, or a retraining failed; see
            `Retraining.ask_all`.
    """
    chosen = as_ids(ids, retraining.num_examples, "leave_one_out(…, ids)")
    refuse_too_few(len(chosen), "leave_one_out(…, ids)", "examples")
    everything = np.arange(retraining.num_examples)
    jobs: list[Job] = [(everything, seed), *((np.delete(everything, i), seed) for i in chosen)]
    whole, *without = retraining.ask_all(jobs, "retraining without one")
    differences = np.stack([whole.outputs - answers.outputs for answers in without], axis=1)
    return LeaveOneOut(chosen, differences, retraining.num_examples)


def leave_one_out_correlation(
    contributions: Any, left_out: LeaveOneOut, *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> LeaveOneOutCorrelation:
    """Correlate contributions with the output differences without single examples, for each query.

    Args:
        contributions: Contribution of every example to every query's output, ``(queries, num_examples)``, positive if
            the output would fall without the example.
        left_out: The differences of the same queries' outputs.
        resamples: Bootstrap resamples of the examples left out, for the intervals.
        level: The share of the resampled means in an interval.
        seed: Seed of the resamples.

    Returns:
        The correlations.

    Raises:
        EvaluationError: Fewer than ten examples were left out, a shape does not fit, a number is not finite, or for
            some query all differences or all contributions are the same.

    Example:
        >>> differences = np.arange(20.0).reshape(2, 10) ** 2
        >>> left_out = LeaveOneOut(np.arange(10), differences, num_examples=10)
        >>> print(leave_one_out_correlation(np.arange(20.0).reshape(2, 10), left_out).spearman)
        1.000 [1.000, 1.000]
    """
    asked, differences = "leave_one_out_correlation(contributions, …)", left_out.differences.T
    refuse_too_few(len(left_out.ids), "leave_one_out_correlation(…, left_out)", "examples")
    shape = (differences.shape[1], left_out.num_examples)
    chosen = as_finite(contributions, shape, asked, "(queries, num_examples)", "what was left out")[:, left_out.ids].T
    if not np.isfinite(differences).all():
        got, fix = f"{(~np.isfinite(differences)).sum()} that are not", "Check the retrainings"
        raise EvaluationError(
            "the differences", "not all numbers are finite", got, "finite numbers", "(queries, ids)", fix
        )
    refuse_constant(differences, "the differences", "examples left out", "Leave these queries out")
    refuse_constant(chosen, asked, "examples left out", "Check the contributions of these queries")
    once, weights = np.ones((len(chosen), 1)), draw_weights(len(chosen), resamples, seed)
    per_query, means = {}, {}
    for ranked in (False, True):
        pairs = zip(chosen.T, differences.T, strict=True)
        per_query[ranked] = np.array([correlations(x, y, once, ranked=ranked)[0] for x, y in pairs])
        resampled = resampled_means(chosen, differences, weights, ranked=ranked)
        means[ranked] = estimate(float(per_query[ranked].mean()), resampled, level)
    return LeaveOneOutCorrelation(means[False], means[True], per_query[False], per_query[True], len(chosen))
