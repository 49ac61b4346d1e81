"""Correlations with ties, the area under a ROC curve, and bootstrap intervals, vectorised over queries and resamples.

A resample is a column of integer weights: how often each unit (a subset, an example, a query) was drawn. Ranks and
moments are computed with these weights, which is the same as ranking the resampled units, ties averaged, and needs one
sort for all resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pkexplain.errors import EvaluationError

LEAST_UNITS = 10
"""The least number of subsets, left-out examples or queries for which bootstrap percentiles mean anything."""


@dataclass(frozen=True)
class Estimate:
    """A number and its bootstrap interval.

    Attributes:
        value: The number itself.
        low: The lower end of the interval, a percentile of the resampled numbers corrected for their bias.
        high: The upper end.
        level: The share of resampled numbers between the two.
    """

    value: float
    low: float
    high: float
    level: float = 0.95

    def __str__(self) -> str:
        """Show the number and the interval."""
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def estimate(value: float, resampled: np.ndarray, level: float) -> Estimate:
    """Compute an interval from percentiles of resampled numbers, shifted so that their mean is the number itself.

    Args:
        value: The number itself.
        resampled: The number on each resample, ``(resamples,)``; values that are not finite are left out.
        level: The share of resampled numbers between the ends.

    Returns:
        The number and its interval; the ends are nan if no resample gave a number.

    Example:
        >>> print(estimate(0.5, np.linspace(0.0, 1.0, 101), 0.9))
        0.500 [0.050, 0.950]
    """
    finite = resampled[np.isfinite(resampled)]
    if not len(finite):
        return Estimate(value, float("nan"), float("nan"), level)
    # Repeated units lower a rank correlation slightly: without the shift a narrow interval can miss its number.
    shifted = finite - finite.mean() + value
    low, high = np.quantile(shifted, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return Estimate(value, float(low), float(high), level)


def draw_weights(units: int, resamples: int, seed: int) -> np.ndarray:
    """Draw bootstrap resamples: as many units as there are, with replacement.

    Args:
        units: The number of units.
        resamples: The number of resamples.
        seed: Seed of the draws.

    Returns:
        How often each unit was drawn, ``(units, resamples)``; every column sums to ``units``.

    Raises:
        EvaluationError: There are no resamples.
    """
    if resamples < 1:
        expected, fix = "1 or more", "Pass resamples=1000"
        source = "the bootstrap"
        raise EvaluationError("resamples=…", "there are none", got=resamples, expected=expected, source=source, fix=fix)
    return np.random.default_rng(seed).multinomial(units, np.full(units, 1.0 / units), size=resamples).T.astype(float)


def estimate_mean(values: np.ndarray, weights: np.ndarray, level: float) -> Estimate:
    """Estimate the mean of one number per unit, ``(units,)``, with the weights of `draw_weights`."""
    return estimate(float(values.mean()), values @ weights / len(values), level)


def correlations(first: np.ndarray, second: np.ndarray, weights: np.ndarray, *, ranked: bool) -> np.ndarray:
    """Correlate two numbers per unit on every resample: Spearman's correlation of ranks, or Pearson's of the values.

    Args:
        first: One number per unit, ``(units,)``.
        second: Another, ``(units,)``.
        weights: How often each unit is in each resample, ``(units, resamples)``, as integers.
        ranked: Whether to correlate ranks; ties get the mean of their ranks.

    Returns:
        The correlations, ``(resamples,)``; nan if one of the two is constant.

    Example:
        >>> once = np.ones((4, 1))
        >>> correlations(np.array([1.0, 2.0, 3.0, 9.0]), np.array([1.0, 4.0, 4.0, 5.0]), once, ranked=True).round(4)
        array([0.9487])
    """
    if ranked:
        x, y = _ranks(first, weights), _ranks(second, weights)
        x -= (len(first) + 1) / 2.0
        y -= (len(second) + 1) / 2.0
    else:
        x, y = (values[:, None] - values @ weights / len(values) for values in (first, second))
    weighted = weights * x
    covariance = np.einsum("ur,ur->r", weighted, y)
    spread = np.einsum("ur,ur->r", weighted, x) * np.einsum("ur,ur,ur->r", weights, y, y)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(spread > 0.0, covariance / np.sqrt(spread), np.nan)


def _ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Rank units within every resample, from 1, ties averaged, ``(units, resamples)``."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    below = np.zeros((len(values) + 1, weights.shape[1]))  # weight below each position of the order
    np.cumsum(weights[order], axis=0, out=below[1:])
    ranks = below[np.searchsorted(ordered, values, "left")]
    ranks += below[np.searchsorted(ordered, values, "right")]
    ranks += 1.0
    ranks *= 0.5
    return ranks


def resampled_means(first: np.ndarray, second: np.ndarray, weights: np.ndarray, *, ranked: bool) -> np.ndarray:
    """Correlate over units for every query and resample, and take the mean over queries.

    Args:
        first: One number per unit and query, ``(units, queries)``.
        second: Another, ``(units, queries)``.
        weights: How often each unit is in each resample, ``(units, resamples)``.
        ranked: Spearman's correlation instead of Pearson's.

    Returns:
        The means, ``(resamples,)``; a query that is constant in a resample is left out of its mean.
    """
    sums, counts = np.zeros(weights.shape[1]), np.zeros(weights.shape[1])
    for x, y in zip(first.T, second.T, strict=True):
        found = correlations(np.ascontiguousarray(x), np.ascontiguousarray(y), weights, ranked=ranked)
        there = np.isfinite(found)
        sums[there] += found[there]
        counts += there
    with np.errstate(invalid="ignore"):
        return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def roc_area(scores: np.ndarray, positive: np.ndarray) -> float:
    """Compute the area under the ROC curve: P(a positive scores higher) + ½ P(they tie) (Mann and Whitney 1947).

    Args:
        scores: One number per example, ``(num_examples,)``.
        positive: Which examples are positives, ``(num_examples,)``; at least one, and not all.

    Returns:
        The area, 0 to 1.

    Example:
        >>> roc_area(np.array([1.0, 2.0, 2.0, 3.0]), np.array([False, True, False, True]))
        0.875
    """
    groups = np.unique(scores, return_inverse=True)[1]
    return _area(groups[positive], groups[~positive], int(groups.max()) + 1)


def roc_areas(scores: np.ndarray, positive: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Compute `roc_area` on resamples of the positives and, drawn separately, of the negatives.

    Args:
        scores: One number per example, ``(num_examples,)``.
        positive: Which examples are positives, ``(num_examples,)``.
        resamples: The number of resamples.
        seed: Seed of the draws.

    Returns:
        The areas, ``(resamples,)``.
    """
    random = np.random.default_rng(seed)
    groups = np.unique(scores, return_inverse=True)[1]
    count = int(groups.max()) + 1
    inside, outside = groups[positive], groups[~positive]
    draw = lambda part: part[random.integers(len(part), size=len(part))]  # noqa: E731 - a name for two draws
    return np.array([_area(draw(inside), draw(outside), count) for _ in range(resamples)])


def _area(inside: np.ndarray, outside: np.ndarray, groups: int) -> float:
    """Compute the area from the ranks of positives and negatives among the distinct scores."""
    positives = np.bincount(inside, minlength=groups)
    negatives = np.bincount(outside, minlength=groups)
    lower = np.cumsum(negatives) - negatives
    return float(positives @ (lower + 0.5 * negatives) / (len(inside) * len(outside)))
