"""From covectors to contributions: candidates of the index, ranked by the stored rows, over one process or several.

What the search has left out is bounded: no row contributes more than Σ_t ‖q'_t‖ ‖row_t‖, by Cauchy and Schwarz.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pkexplain.distributed import ProcessGroup
from pkexplain.index.row_index import RowIndex
from pkexplain.results.explanation import Contribution, Remainder
from pkexplain.store.trajectory import Trajectory

__all__ = ["Ranked", "Ranking", "Scan"]

_ROWS_AT_ONCE = 4096
_BOUNDS_AT_ONCE = 1 << 16
_ROUNDING = 1 + 1e-5
"""What the bound is multiplied with, for the float32 numbers it is made of."""


@dataclass(frozen=True)
class Ranked:
    """The strongest contributions to one query.

    Attributes:
        proponents: The largest, largest first.
        opponents: The most negative, most negative first.
        remainder: What is known of all others.
    """

    proponents: tuple[Contribution, ...]
    opponents: tuple[Contribution, ...]
    remainder: Remainder


class Ranking:
    """The rows of a run, or the part of them that this process searches.

    Args:
        trajectory: The run.
        factory: A faiss factory string, or ``"auto"``.
        directory: Where an index is kept, or None.
        device: Where to search.
        group: The processes that share the rows out.
    """

    def __init__(
        self, trajectory: Trajectory, factory: str, directory: Path | None, device: torch.device, group: ProcessGroup
    ) -> None:
        """Open the segments; nothing is built yet."""
        self._examples = trajectory.num_examples - len(trajectory.details.get("withdrawn", ()))
        self._group = group
        share = group.shard(trajectory.num_examples)
        self._first = share.start
        self._trajectory = trajectory.part(share) if group.world_size > 1 else trajectory
        self._segments = [self._trajectory.segment(t) for t in range(len(trajectory))]
        self._index: RowIndex | None = None
        if directory is not None and group.world_size > 1:
            directory = directory / f"part-{group.rank}-of-{group.world_size}"
        self._make = lambda: RowIndex(self._trajectory, factory, directory, device)
        self._norms: Tensor | None = None

    @property
    def index(self) -> RowIndex:
        """The index over these rows; it is built at its first search.

        Raises:
            MissingDependencyError: faiss is not installed.
            ConfigurationError: faiss refuses the factory string.
        """
        if self._index is None:
            self._index = self._make()
        return self._index

    def rank(self, projected: Tensor, totals: Sequence[float], k: int) -> list[Ranked]:
        """Find the strongest contributions of a batch of queries.

        Args:
            projected: q'_t, ``(queries, segments, k)``.
            totals: Σ_i c_i of each query, in output units.
            k: How many proponents and how many opponents.
        """
        proposed = self.index.propose(projected.flatten(1).float().cpu().numpy(), k)
        known = [torch.from_numpy(np.unique(ids[ids >= 0])) for ids in proposed]
        bounds = [0.0] * len(known) if self.index.exact else self._bounds(known, projected)
        asked = zip(known, projected, bounds, strict=True)
        mine = [self._best(ids, covector, k, bound) for ids, covector, bound in asked]
        everyone = self._group.all_gather(mine)
        return [self._joined([part[q] for part in everyone], total, k) for q, total in enumerate(totals)]

    def _best(self, ids: Tensor, projected: Tensor, k: int, bound: float) -> tuple[list[Contribution], float]:
        """Rank the rows that the index proposes; bound all that are not among the best."""
        found = self.contributions_of(ids, projected)
        kept = found[:k] + [c for c in found[-k:] if c not in found[:k]]
        return kept, max([bound, *(abs(c.contribution) for c in found[k:-k])])

    def _bounds(self, known: Sequence[Tensor], projected: Tensor) -> list[float]:
        """Bound the contributions of all rows but the known ones: Σ_t ‖q'_t‖ ‖row_t‖, the largest for each query."""
        if self._norms is None:
            self._norms = torch.stack([segment.norms for segment in self._segments], dim=1)
        sizes = torch.linalg.vector_norm(projected.cpu().to(self._norms.dtype), dim=2)
        largest = torch.zeros(len(known), dtype=self._norms.dtype)
        for start in range(0, len(self._norms), _BOUNDS_AT_ONCE):
            bounds = sizes @ self._norms[start : start + _BOUNDS_AT_ONCE].T
            for row, ids in zip(bounds, known, strict=True):
                row[ids[(ids >= start) & (ids < start + len(row))] - start] = 0.0
            largest = torch.maximum(largest, bounds.amax(dim=1))
        return (largest * _ROUNDING).tolist()

    def _joined(self, parts: Sequence[tuple[list[Contribution], float]], total: float, k: int) -> Ranked:
        """Join what all processes found for one query."""
        found = sorted((c for best, _ in parts for c in best), key=lambda c: -c.contribution)
        proponents = tuple([c for c in found if c.contribution > 0][:k])
        opponents = tuple([c for c in reversed(found) if c.contribution < 0][:k])
        shown = {c.id: c.contribution for c in (*proponents, *opponents)}
        left_out = [abs(c.contribution) for c in found if c.id not in shown]
        held = sum(shown.values())
        remainder = Remainder(
            shown=held,
            rest=total - held,
            num_rest=self._examples - len(shown),
            bound=max([*left_out, *(bound for _, bound in parts)]) if len(shown) < self._examples else 0.0,
            exact=self.index.exact,
        )
        return Ranked(proponents, opponents, remainder)

    def contributions(self, projected: Tensor) -> np.ndarray:
        """Compute the contributions of all rows of all processes, ``(queries, num_examples)``, in float64."""
        return np.concatenate(self._group.all_gather(self.scan(projected)), axis=1)

    def scan(self, projected: Tensor) -> np.ndarray:
        """Compute the contributions of the rows here, ``(queries, rows)``, in float64."""
        total = torch.zeros(self._trajectory.num_examples, len(projected), dtype=torch.float64)
        for t, segment in enumerate(self._segments):
            covector = projected[:, t].cpu().T
            for start in range(0, len(total), _ROWS_AT_ONCE):
                part = slice(start, start + _ROWS_AT_ONCE)
                total[part] += segment.read_rows(part, projected.dtype) @ covector
        return total.T.numpy()

    def contributions_of(self, ids: Tensor, projected: Tensor) -> list[Contribution]:
        """Rank some rows, largest contribution first, with a_i and K(x, x_i)."""
        parts = [
            segment.read_rows(ids, projected.dtype) @ projected[t].cpu() for t, segment in enumerate(self._segments)
        ]
        by_segment = torch.stack(parts, dim=1).double()
        derivatives = torch.stack([segment.read_loss_derivatives(ids) for segment in self._segments], dim=1).double()
        kernels = torch.where(derivatives == 0, 0.0, -by_segment / derivatives).sum(1)
        totals = by_segment.sum(1)
        order = totals.argsort(descending=True)
        return [
            Contribution(
                id=self._first + int(ids[i]),
                contribution=float(totals[i]),
                weight=float(totals[i] / kernels[i]),
                kernel=float(kernels[i]),
                segments=tuple(by_segment[i].tolist()),
            )
            for i in order.tolist()
        ]


class Scan:
    """All contributions of a batch of queries, computed once, when the first of them is asked for.

    Args:
        whole: All rows of the run.
        projected: q'_t, ``(queries, segments, k)``.
    """

    def __init__(self, whole: Ranking, projected: Tensor) -> None:
        """Keep the covectors; no row is read."""
        self._whole, self._projected = whole, projected
        self._all: np.ndarray | None = None

    def of(self, row: int) -> Callable[[], np.ndarray]:
        """Make the function that returns the contributions to one query, ``(num_examples,)``."""

        def contributions() -> np.ndarray:
            if self._all is None:
                self._all = self._whole.scan(self._projected)
            return self._all[row]

        return contributions
