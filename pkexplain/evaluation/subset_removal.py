"""Subset removal: does the output fall if its strongest proponents are left out?

For each query the k examples with the largest contributions are left out, models are trained on the others with several
seeds, and the output is compared with that of models trained on all examples with the same seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pkexplain.errors import EvaluationError
from pkexplain.evaluation._checking import as_finite, as_ids, refuse_too_few
from pkexplain.evaluation._kept_answers import Answers
from pkexplain.evaluation._statistics import Estimate, draw_weights, estimate_mean
from pkexplain.evaluation.retraining import Job, Retraining
from pkexplain.results.numbers import decimals, fixed, percent
from pkexplain.results.text import tabulate

__all__ = ["SubsetRemoval", "subset_removal"]


@dataclass(frozen=True)
class SubsetRemoval:
    """How far outputs fell without their strongest proponents.

    Attributes:
        methods: The names of the methods.
        counts: The numbers of examples left out.
        drops: Output of models trained on all examples minus output of models trained without the query's k strongest
            examples, means over the seeds, ``(methods, counts, queries)``, in output units.
        flips: The share of the seeds with which the predicted class changed, ``(methods, counts, queries)``; None if
            a prediction is not one row of classes.
        means: The mean drop over queries of each method and count, with an interval over queries; all share
            the same resamples.
        flip_means: The same for ``flips``; None without flips.
    """

    methods: tuple[str, ...]
    counts: tuple[int, ...]
    drops: np.ndarray = field(repr=False)
    flips: np.ndarray | None = field(repr=False)
    means: Mapping[str, tuple[Estimate, ...]]
    flip_means: Mapping[str, tuple[Estimate, ...]] | None

    def __str__(self) -> str:
        """Show drops and flips as a plain-text table."""
        places = decimals(mean.value for means in self.means.values() for mean in means)
        rows = []
        for method in self.methods:
            for position, count in enumerate(self.counts):
                mean = self.means[method][position]
                low, high = (fixed(end, places, sign=True) for end in (mean.low, mean.high))
                drop = f"{fixed(mean.value, places, sign=True)} [{low}, {high}]"
                flip = "–" if self.flip_means is None else percent(self.flip_means[method][position].value)
                rows.append([method if not position else "", f"{count:,}", drop, flip])
        title = f"Subset removal: {self.drops.shape[2]:,} queries"
        level = self.means[self.methods[0]][0].level
        note = f"Drop: mean over queries, in output units; in brackets {level:.0%} of the means on resampled queries."
        return tabulate(title, ["method", "left out", "drop", "class changed"], rows, [note])


def subset_removal(
    retraining: Retraining,
    contributions: Mapping[str, Any],
    *,
    counts: Sequence[int] = (50, 200),
    seeds: Sequence[int] = (0, 1, 2),
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> SubsetRemoval:
    """Leave out the examples with the largest contributions to each query, and train again.

    This takes up to ``methods * counts * queries * seeds`` retrainings, and one for each seed on all examples; equal
    sets are trained on once. A drop alone means little: pass random contributions as one of the methods.

    Args:
        retraining: The user's training and queries.
        contributions: Contributions to judge, by method: of every example to every query's output,
            ``(queries, num_examples)``, positive if the output would fall without the example. Ties are broken by the
            lower id.
        counts: The numbers of examples to leave out.
        seeds: The training seeds.
        resamples: Bootstrap resamples of the queries, for the intervals.
        level: The share of the resampled means in an interval.
        seed: Seed of the resamples.

    Returns:
        The drops.

    Raises:
        EvaluationError: There are fewer than ten queries, a count is not below the number of examples, a shape does not
            fit, a number is not finite, or a retraining failed; see `Retraining.ask_all`.
    """
    queries, examples = len(retraining.queries), retraining.num_examples
    _check(contributions, counts, seeds, examples)
    refuse_too_few(queries, "subset_removal(retraining, …)", "queries")
    removed = [  # in the order of methods, counts, queries
        np.sort(row[:count])
        for name, values in contributions.items()
        for rows in [_ranking(values, (queries, examples), name)]
        for count in counts
        for row in rows
    ]
    everything = np.arange(examples)
    sets = [everything, *(np.delete(everything, ids) for ids in removed)]
    jobs: list[Job] = [(ids, seed) for seed in seeds for ids in sets]
    jobs.insert(2, (everything, seeds[-1]))  # early, to notice seeds that change nothing
    answers = retraining.ask_all(jobs, "retraining without subsets")
    del answers[2]
    shape = (len(contributions), len(counts), queries)
    drops, flips = _compare([answers[i : i + len(sets)] for i in range(0, len(answers), len(sets))], shape)
    weights = draw_weights(queries, resamples, seed)

    def means(values: np.ndarray) -> dict[str, tuple[Estimate, ...]]:
        pairs = zip(contributions, values, strict=True)
        return {name: tuple(estimate_mean(row, weights, level) for row in rows) for name, rows in pairs}

    flip_means = None if flips is None else means(flips)
    return SubsetRemoval(tuple(contributions), tuple(counts), drops, flips, means(drops), flip_means)


def _ranking(values: Any, shape: tuple[int, int], name: str) -> np.ndarray:
    asked = f"subset_removal(…, contributions[{name!r}])"
    finite = as_finite(
        values, shape, asked, "(queries, num_examples)", "the queries and num_examples of the retraining"
    )
    return np.argsort(-finite, axis=1, kind="stable")


def _compare(answers: Sequence[Sequence[Answers]], shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray | None]:
    """Compare each query's answers, for each seed, with those of the model trained on all examples."""
    queries = np.arange(len(answers[0][0].outputs))
    drops, flips, classes = np.zeros(shape), np.zeros(shape), True
    for whole, *without in answers:
        outputs = np.stack([a.outputs for a in without]).reshape(*shape, -1)[..., queries, queries]
        drops += (whole.outputs - outputs) / len(answers)
        if whole.classes is None:
            classes = False
            continue
        found = np.stack([a.classes for a in without if a.classes is not None]).reshape(*shape, -1)
        flips += (found[..., queries, queries] != whole.classes) / len(answers)
    return drops, flips if classes else None


def _check(contributions: Mapping[str, Any], counts: Sequence[int], seeds: Sequence[int], num_examples: int) -> None:
    if not contributions:
        expected, fix = "one or more by name", "Pass {'path': explainer.contributions(x)}"
        raise EvaluationError(
            "subset_removal(…, contributions)", "there are none", "nothing", expected, "the definition", fix
        )
    as_ids(seeds, np.iinfo(np.int64).max, f"subset_removal({seeds=})")
    outside = [count for count in counts if not 0 < count < num_examples]
    if outside or not counts:
        wrong = "this many examples cannot be left out" if outside else "there are none"
        expected, fix = f"1 to {num_examples - 1}", "Leave fewer out"
        raise EvaluationError(f"subset_removal({counts=})", wrong, outside, expected, f"{num_examples=}", fix)
