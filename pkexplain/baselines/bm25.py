"""BM25: which training texts hold the query's rare words. No model, no training, no gradient."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pkexplain.baselines.baseline import Baseline
from pkexplain.baselines.setting import Setting
from pkexplain.errors import ConfigurationError

__all__ = ["BM25", "bm25"]


@dataclass(frozen=True)
class BM25(Baseline):
    """Okapi BM25 of the training texts, for each query's text.

    Args:
        texts: The training texts, in the order of the recorded ids, ``(num_examples,)``.
        query_texts: The text of each query, ``(queries,)``.
        k1: How quickly a repeated word stops counting.
        b: How much a long text is discounted, 0 to 1.
    """

    name: ClassVar[str] = "BM25"
    texts: Sequence[str] = ()
    query_texts: Sequence[str] = ()
    k1: float = 1.2
    b: float = 0.75

    def prepare(self, setting: Setting) -> Callable[[], np.ndarray]:
        """Check that there is one text for each training example and each query."""
        got, wanted = (len(self.texts), len(self.query_texts)), (len(setting.rows), len(setting.queries))
        if got != wanted:
            raise ConfigurationError(
                "BM25(texts, query_texts)",
                "there must be one text for each training example and one for each query",
                got=f"{got[0]} and {got[1]}",
                expected=f"{wanted[0]} and {wanted[1]}",
                source="the training set and the queries",
                fix="Leave BM25 out if the data is not text",
            )
        return lambda: bm25(self.texts, self.query_texts, k1=self.k1, b=self.b)


def bm25(texts: Sequence[str], queries: Sequence[str], *, k1: float = 1.2, b: float = 0.75) -> np.ndarray:
    """Score texts by the words they share with queries (Robertson and Zaragoza 2009, equation 3.15).

        score(q, d) = Σ over the words w of q of  idf(w) · n (k1 + 1) / (n + k1 (1 − b + b |d| / mean |d|))

    with n the times w is in d, and idf(w) = log(1 + (N − df + ½) / (df + ½)), which is never negative.

    Args:
        texts: The texts, ``(texts,)``.
        queries: The queries, ``(queries,)``; a repeated word counts each time.
        k1: How quickly a repeated word stops counting.
        b: How much a long text is discounted, 0 to 1.

    Returns:
        Scores, ``(queries, texts)``.

    Example:
        >>> bm25(["a red hen", "a fox"], ["the fox"]).round(2).tolist()
        [[0.0, 0.75]]
    """
    import bm25s

    known, asked = ([re.findall(r"\w+", text.lower()) for text in each] for each in (texts, queries))
    scores = np.zeros((len(queries), len(texts)))
    if any(known):
        index = bm25s.BM25(method="lucene", k1=k1, b=b, dtype="float64")
        index.index(known, show_progress=False)
        for row, words in zip(scores, asked, strict=True):
            if words:
                row += index.get_scores(words) * (k1 + 1.0)  # the library omits this common factor
    return scores
