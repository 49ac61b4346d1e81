"""Compare indices of a run with exact search: what they find, how large they are, how long they take."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pkexplain.errors import ConfigurationError
from pkexplain.index.exact import RunRows
from pkexplain.index.row_index import RowIndex
from pkexplain.store.trajectory import Trajectory

__all__ = ["FACTORIES", "IndexFigures", "combine_rows", "compare_indices", "measure_index"]

FACTORIES = (
    "Flat",
    "SQ8",
    "PCA256,SQ8",
    "PCA256,PQ64",
    "PCA256,OPQ64,PQ64",
    "IVF64,SQ8",
    "PCA256,IVF64,SQ8",
    "PCA256,IVF64,PQ64x8",
    "PCA256,HNSW32",
)
"""Factory strings that are compared by default; each fits a run of a few thousand examples."""
_SHOWN, _HELD, _REPEATS = 10, 100, 3


@dataclass(frozen=True)
class IndexFigures:
    """What one index found, and its cost.

    Attributes:
        factory: The factory string.
        recall: Share of the ten largest inner products that were found, mean over the queries.
        captured_mass: Sum of the best 100 found over the sum of the 100 truly largest, mean over the queries.
        bytes_per_row: Bytes of the index on disk for each row; 0 if no index is kept.
        build_seconds: Wall time to build it.
        query_seconds: Wall time of one query in the batch, for both ends of the ranking, ranked by the stored rows;
            median of three.
        rounding: Relative error of the ten largest inner products when computed from the index's own rows, median over
            queries and rows.
    """

    factory: str
    recall: float
    captured_mass: float
    bytes_per_row: float
    build_seconds: float
    query_seconds: float
    rounding: float


def combine_rows(trajectory: Trajectory, count: int, seed: int = 0, terms: int = 16) -> np.ndarray:
    """Make queries without a model: sums of random rows, each scaled to length one, with Gaussian weights.

    Args:
        trajectory: The run.
        count: The number of queries.
        seed: Seed of the rows chosen and of the weights.
        terms: Rows in each sum.

    Returns:
        ``(count, dimension)``.
    """
    rows, generator = RunRows(trajectory), torch.Generator().manual_seed(seed)
    made = torch.zeros(count, rows.dimension, dtype=torch.float32, device="cpu")
    for _ in range(terms):
        chosen = rows.read(torch.randint(len(rows), (count,), generator=generator, device="cpu"))
        made += torch.randn(
            count, 1, generator=generator, dtype=torch.float32, device="cpu"
        ) * torch.nn.functional.normalize(chosen, dim=1)
    return made.numpy()


def measure_index(index: RowIndex, queries: np.ndarray, truth: tuple[np.ndarray, np.ndarray]) -> IndexFigures:
    """Build an index and search it.

    Args:
        index: The index, built and timed here unless it is ready.
        queries: Covectors, ``(queries, dimension)``.
        truth: The ids of the 100 truly largest inner products, largest first, and the products, ``(queries, 100)``
            each.

    Returns:
        The figures.

    Raises:
        ConfigurationError: faiss cannot train this index on this run.
    """
    ids, scores = truth
    start = time.perf_counter()
    index.prepare()
    build_seconds, seconds, best = time.perf_counter() - start, [], np.empty(0)
    for _ in range(_REPEATS):
        start = time.perf_counter()
        proposed = index.propose(queries, _SHOWN)
        best = index.rows.rank(queries, proposed, _SHOWN)[0]  # reads the candidates of both ends
        seconds.append((time.perf_counter() - start) / len(queries))
    held = index.rows.rank(queries, index.propose(queries, _HELD), ids.shape[1])[1]
    recalls = [np.isin(true[:_SHOWN], shown).mean() for true, shown in zip(ids, best, strict=True)]
    masses = np.where(np.isfinite(held), held, 0).sum(1) / scores.sum(1)
    errors = []
    for query, true, score in zip(queries, ids, scores, strict=True):
        kept = index.reconstruct(true[:_SHOWN]) @ query
        errors.append(np.abs(kept - score[:_SHOWN]) / np.abs(score[:_SHOWN]))
    return IndexFigures(
        factory=index.factory,
        recall=float(np.mean(recalls)),
        captured_mass=float(np.mean(masses)),
        bytes_per_row=index.kept_bytes / len(index.rows),
        build_seconds=build_seconds,
        query_seconds=float(np.median(seconds)),
        rounding=float(np.median(errors)),
    )


def compare_indices(
    trajectory: Trajectory, queries: np.ndarray, factories: Iterable[str] = FACTORIES
) -> Iterator[IndexFigures | tuple[str, str]]:
    """Measure several indices of one run, each in a temporary directory.

    Args:
        trajectory: The run.
        queries: Covectors, ``(queries, dimension)``.
        factories: Factory strings.

    Yields:
        The figures of each, or the factory string and why faiss cannot build it for this run.
    """
    exact = RowIndex(trajectory, "Flat")
    truth = exact.rows.rank(queries, exact.search(queries, _HELD), min(_HELD, len(exact.rows)))
    for factory in factories:
        with tempfile.TemporaryDirectory() as folder:
            try:
                yield measure_index(RowIndex(trajectory, factory, Path(folder)), queries, truth)
            except ConfigurationError as error:
                yield factory, str(error)
