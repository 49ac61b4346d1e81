"""From covectors to contributions: the strongest at both ends, and a bound for the rest, over one or more processes.

Exact search scans all rows once, which gives every contribution. A compressed index only proposes rows; they are ranked
by their stored values, and the others are bounded: none contributes more than Σ_t ‖q'_t‖ ‖row_t‖ (Cauchy–Schwarz).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pkexplain.distributed import ProcessGroup
from pkexplain.gradients.torch_state import own_torch_state
from pkexplain.index.exact import ExactSearch, RunRows
from pkexplain.index.row_index import RowIndex
from pkexplain.results.explanation import Contribution, Remainder
from pkexplain.store.base import Store
from pkexplain.store.directory import DirectoryStore
from pkexplain.store.index_files import INDEX_FOLDER
from pkexplain.store.trajectory import Trajectory

_BOUNDS_AT_ONCE = 1 << 16
_ROUNDING = 1 + 1e-5
"""Margin of the bound for the rounding of its float32 terms."""

_Best = tuple[list[Contribution], float]
"""The strongest contributions that one process found for one query, and a bound on all its others."""


@dataclass(frozen=True)
class Ranked:
    """The strongest contributions to one query.

    Attributes:
        proponents: The largest contributions, largest first.
        opponents: The most negative contributions, most negative first.
        remainder: What is known about all others.
        contributions: All of them, ``(num_examples,)``, or an object that computes them on first use.
    """

    proponents: tuple[Contribution, ...]
    opponents: tuple[Contribution, ...]
    remainder: Remainder
    contributions: np.ndarray | DeferredContributions


class Ranking:
    """The rows of a run, or the share of them that this process searches.

    Args:
        trajectory: The run.
        factory: A faiss factory string, or ``"auto"``.
        store: Where the run is kept, and a compressed index with it.
        device: Where to search.
        group: The processes among which the rows are divided.
    """

    def __init__(
        self, trajectory: Trajectory, factory: str, store: Store, device: torch.device, group: ProcessGroup
    ) -> None:
        """Open the segments, without building anything."""
        self.num_examples = trajectory.num_examples - len(trajectory.manifest.withdrawn)
        self.group = group
        shard = group.shard(trajectory.num_examples)
        self.first = shard.start
        self._trajectory = trajectory.subset(shard) if group.world_size > 1 else trajectory
        self._segments = [self._trajectory.segment(t) for t in range(len(trajectory))]
        self._rows = ExactSearch(RunRows(self._trajectory), device)
        self._index: RowIndex | None = None
        directory = store.path / INDEX_FOLDER if isinstance(store, DirectoryStore) else None
        if directory is not None and group.world_size > 1:
            directory = directory / f"part-{group.rank}-of-{group.world_size}"
        self._make = lambda: RowIndex(self._trajectory, factory, directory, device, store)
        self._norms: Tensor | None = None

    @property
    def index(self) -> RowIndex:
        """The index over these rows, built at its first search.

        Raises:
            MissingDependencyError: faiss is not installed.
            ConfigurationError: faiss refuses the factory string.
        """
        if self._index is None:
            self._index = self._make()
        return self._index

    def scan(self, projected: Tensor) -> Tensor:
        """Compute the contributions of this process's rows, ``(queries, rows)``, in float64."""
        return self._rows.scan(projected.unbind(1))

    def bound(self, ids: Sequence[Tensor], projected: Tensor) -> list[float]:
        """Bound the contributions of all rows except some: the largest Σ_t ‖q'_t‖ ‖row_t‖ for each query.

        Args:
            ids: The rows to leave out, for each query.
            projected: q'_t, ``(queries, segments, k)``.
        """
        if self._norms is None:
            self._norms = torch.stack([segment.norms for segment in self._segments], dim=1)
        sizes = torch.linalg.vector_norm(projected.cpu().to(self._norms.dtype), dim=2)
        largest = torch.zeros(len(ids), dtype=self._norms.dtype, device="cpu")
        for start in range(0, len(self._norms), _BOUNDS_AT_ONCE):
            bounds = sizes @ self._norms[start : start + _BOUNDS_AT_ONCE].T
            for row, known in zip(bounds, ids, strict=True):
                row[known[(known >= start) & (known < start + len(row))] - start] = 0.0
            largest = torch.maximum(largest, bounds.amax(dim=1))
        return (largest * _ROUNDING).tolist()

    def by_segment(self, ids: Tensor, projected: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the contributions of some rows to one query, and their kernels.

        Args:
            ids: Rows of this process, ``(ids,)``.
            projected: q'_t, ``(segments, k)``.

        Returns:
            c_i of each segment, ``(ids, segments)``, and K(x, x_i), ``(ids,)``, in float64.
        """
        rows = self._rows.read(ids, projected.dtype)
        products = [part @ covector for part, covector in zip(rows, projected.cpu(), strict=True)]
        contributions = torch.stack(products, dim=1).double()
        derivatives = torch.stack([segment.read_loss_derivatives(ids) for segment in self._segments], dim=1).double()
        return contributions, torch.where(derivatives == 0, 0.0, -contributions / derivatives).sum(1)


def rank(
    rankings: Sequence[Ranking],
    projected: Sequence[Tensor],
    totals: Sequence[float],
    k: int,
    whole: Sequence[Ranking],
    keep: bool = True,
) -> list[Ranked]:
    """Find the strongest contributions of a batch of queries, averaged over runs.

    Args:
        rankings: The rows of each run that this process searches.
        projected: q'_t of each run, ``(queries, segments, k)``.
        totals: Σ_i c_i of each query, in output units.
        k: Number of proponents, and of opponents.
        whole: All rows of each run.
        keep: Whether all contributions that exact search has computed are kept; otherwise they are computed again when
            they are read.
    """
    first, batch = rankings[0], _Batch(whole, projected)
    contributions: Sequence[Any] = [DeferredContributions(batch, q) for q in range(len(totals))]
    if first.index.exact:
        scores = mean_scan(rankings, projected)
        best = _best_of_all(rankings, projected, scores, k)
        contributions = list(scores.numpy()) if keep and first.group.world_size == 1 else contributions
    else:
        best = _best_of_proposed(first, projected[0], k)
    everyone = first.group.all_gather(best)
    return [_join(first, [part[q] for part in everyone], total, k, contributions[q]) for q, total in enumerate(totals)]


def mean_scan(rankings: Sequence[Ranking], projected: Sequence[Tensor]) -> Tensor:
    """Compute the contributions of all rows, averaged over runs, ``(queries, rows)``, in float64."""
    scores = rankings[0].scan(projected[0])
    for ranking, covectors in zip(rankings[1:], projected[1:], strict=True):
        scores += ranking.scan(covectors)
    return scores.div_(len(rankings))


def _best_of_all(rankings: Sequence[Ranking], projected: Sequence[Tensor], scores: Tensor, k: int) -> list[_Best]:
    """Take both ends of all contributions; the largest of the others is their bound."""
    many = min(k, scores.shape[1])
    ends = torch.cat([scores.topk(many, largest=largest).indices for largest in (True, False)], dim=1)
    others = scores.abs().scatter_(1, ends, 0.0).amax(1) if scores.shape[1] else scores.new_zeros(len(scores))
    return [
        (_contributions(rankings, ids.unique(), [p[q] for p in projected]), float(others[q]))
        for q, ids in enumerate(ends)
    ]


def _best_of_proposed(ranking: Ranking, projected: Tensor, k: int) -> list[_Best]:
    """Rank the rows that a compressed index proposes, and bound all others."""
    proposed = ranking.index.propose(projected.flatten(1).float().cpu().numpy(), k)
    known = [torch.from_numpy(np.unique(ids[ids >= 0])) for ids in proposed]
    best = []
    for ids, covectors, bound in zip(known, projected, ranking.bound(known, projected), strict=True):
        ranked = _contributions([ranking], ids, [covectors])
        shown = ranked[:k] + [c for c in ranked[-k:] if c not in ranked[:k]]
        best.append((shown, max([bound, *(abs(c.contribution) for c in ranked[k:-k])])))
    return best


def _contributions(rankings: Sequence[Ranking], ids: Tensor, projected: Sequence[Tensor]) -> list[Contribution]:
    """Compute some rows' contributions to one query, averaged over runs, largest first.

    a_i is the mean contribution divided by the mean kernel.
    """
    found = [ranking.by_segment(ids, covectors) for ranking, covectors in zip(rankings, projected, strict=True)]
    segments = torch.stack([contributions for contributions, _ in found]).mean(0)
    kernels = torch.stack([kernel for _, kernel in found]).mean(0)
    totals = segments.sum(1)
    return [
        Contribution(
            id=rankings[0].first + int(ids[i]),
            contribution=float(totals[i]),
            weight=float(totals[i] / kernels[i]),
            kernel=float(kernels[i]),
            segments=tuple(segments[i].tolist()),
        )
        for i in totals.argsort(descending=True).tolist()
    ]


def _join(
    ranking: Ranking, parts: Sequence[_Best], total: float, k: int, contributions: np.ndarray | DeferredContributions
) -> Ranked:
    """Merge what all processes found for one query."""
    found = sorted((c for best, _ in parts for c in best), key=lambda c: -c.contribution)
    proponents = tuple([c for c in found if c.contribution > 0][:k])
    opponents = tuple([c for c in reversed(found) if c.contribution < 0][:k])
    shown = {c.id: c.contribution for c in (*proponents, *opponents)}
    not_shown = [abs(c.contribution) for c in found if c.id not in shown]
    held = sum(shown.values())
    remainder = Remainder(
        shown=held,
        rest=total - held,
        num_rest=ranking.num_examples - len(shown),
        bound=max([*not_shown, *(bound for _, bound in parts)]) if len(shown) < ranking.num_examples else 0.0,
        exact=ranking.index.exact,
    )
    return Ranked(proponents, opponents, remainder, contributions)


class _Batch:
    """All contributions to a batch of queries, computed on first use."""

    def __init__(self, whole: Sequence[Ranking], projected: Sequence[Tensor]) -> None:
        self._whole, self._projected = whole, projected
        self._scores: np.ndarray | None = None

    def row(self, query: int) -> np.ndarray:
        if self._scores is None:
            with own_torch_state():  # it may be anybody who looks at an explanation
                self._scores = mean_scan(self._whole, self._projected).numpy()
        return self._scores[query]


class DeferredContributions:
    """The contributions of all examples to one query, for a run that is only scanned on demand.

    ``np.asarray`` turns it into an array with one scan of the rows, and it is pickled as that array: a saved
    explanation does not need the run.

    Args:
        batch: The batch of queries.
        query: The position of the query in it.
    """

    def __init__(self, batch: _Batch, query: int) -> None:
        """Keep the covectors, without reading rows."""
        self._batch, self._query = batch, query

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Scan the rows, ``(num_examples,)``."""
        return np.array(self._batch.row(self._query), dtype=dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the numbers."""
        return np.array, (np.asarray(self),)
