"""Methods compared, as frozen data, and how well their rankings of the training examples agree."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

__all__ = ["Comparison", "LeftOut", "Method", "rank_correlation", "top_overlap"]


@dataclass(frozen=True)
class Method:
    """One method's scores, and its cost.

    Attributes:
        name: The method.
        scores: Higher for proponents of minus the query's loss, ``(queries, num_examples)``.
        gap: The completeness gap relative to the change of minus the loss, median over the queries: what the
            sum of the scores leaves unexplained. nan if they are not meant to sum to it.
        overlap: Share of the top ``k`` examples that are also in the path reading's, mean over the queries.
        rank_correlation: Spearman's correlation of all scores with the path reading's, mean over the queries.
        setup_seconds: Wall time of the one-time work.
        query_seconds: Wall time per query, with all queries in one batch.
        peak_bytes: Peak memory over what was used before; coarse (see `pkexplain.baselines._measuring`).
        metrics: The value of each metric.
    """

    name: str
    scores: np.ndarray = field(repr=False, compare=False)
    gap: float
    overlap: float
    rank_correlation: float
    setup_seconds: float
    query_seconds: float
    peak_bytes: float
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class LeftOut:
    """A method that could not be used here.

    Attributes:
        name: The method.
        reason: Why, in one line.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class Comparison:
    """Several methods on one run, with one question: how did each training example change minus each query's loss?

    Attributes:
        methods: The methods; the first is the path reading.
        left_out: Those that could not be used here.
        changes: Change of minus the loss of each query over training, in output units, ``(queries,)``.
        k: The number of top examples for the overlaps.
        overlaps: Share of the top ``k`` examples that two methods have in common, mean over the queries,
            ``(methods, methods)``.
        rank_correlations: Spearman's correlation of the scores of two methods, mean over the queries,
            ``(methods, methods)``; nan if all scores of one are equal.
    """

    methods: tuple[Method, ...]
    left_out: tuple[LeftOut, ...]
    changes: np.ndarray = field(repr=False, compare=False)
    k: int
    overlaps: np.ndarray = field(repr=False, compare=False)
    rank_correlations: np.ndarray = field(repr=False, compare=False)

    def __getitem__(self, name: str) -> Method:
        """Find a method by its name."""
        found = next((method for method in self.methods if method.name == name), None)
        if found is None:
            raise KeyError(f"{name!r}; there are {', '.join(repr(method.name) for method in self.methods)}")
        return found

    @property
    def num_queries(self) -> int:
        """The number of queries."""
        return len(self.changes)

    @property
    def num_examples(self) -> int:
        """The number of training examples."""
        return self.methods[0].scores.shape[1]

    def __repr__(self) -> str:
        """Describe the comparison in one line."""
        size = f"{len(self.methods)} methods, {self.num_queries:,} queries, {self.num_examples:,} examples"
        return f"<Comparison of {size}: {', '.join(method.name for method in self.methods)}>"

    def _repr_html_(self) -> str:
        """Show the table in a notebook."""
        return f"<pre>{html.escape(str(self))}</pre>"

    def __str__(self) -> str:
        """Show the comparison as a plain-text table."""
        from pkexplain.results.text import render_comparison

        return render_comparison(self)


def top_overlap(scores: Sequence[np.ndarray], k: int) -> np.ndarray:
    """Compute the share of the top k examples that two methods have in common, mean over the queries.

    Args:
        scores: Scores of each method, ``(queries, num_examples)``.
        k: The number of top examples.

    Returns:
        Shares from 0 to 1, ``(methods, methods)``. By chance it is k / num_examples.
    """
    among = []
    for each in scores:
        first = np.argsort(-each, axis=1, kind="stable")[:, :k]
        chosen = np.zeros(each.shape)
        np.put_along_axis(chosen, first, 1.0, axis=1)
        among.append(chosen)
    stacked = np.stack(among)
    return np.einsum("aqn,bqn->ab", stacked, stacked) / (stacked.shape[1] * min(k, stacked.shape[2]))


def rank_correlation(scores: Sequence[np.ndarray]) -> np.ndarray:
    """Compute Spearman's rank correlation between methods, mean over the queries; ties share their mean rank.

    Args:
        scores: Scores of each method, ``(queries, num_examples)``.

    Returns:
        Correlations, ``(methods, methods)``; nan if all scores of one are equal for a query.
    """
    ranks = np.stack([[_ranks(row) for row in each] for each in scores])
    ranks -= ranks.mean(axis=2, keepdims=True)
    norms = np.linalg.norm(ranks, axis=2, keepdims=True)
    unit = np.divide(ranks, norms, out=np.full_like(ranks, np.nan), where=norms > 0)
    return np.einsum("aqn,bqn->ab", unit, unit) / ranks.shape[1]


def _ranks(scores: np.ndarray) -> np.ndarray:
    _, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts + 1) / 2)[places]
