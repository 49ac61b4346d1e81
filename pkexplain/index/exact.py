"""Exact maximum-inner-product search over the stored rows of a run, block by block.

A row is the concatenation of an example's rows over all segments, a query that of its covectors, so that their inner
product is the contribution. Nothing is built or copied: the rows stay where they are stored, and one block of them is
in memory at a time, on any device that torch knows.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from pkexplain.store.trajectory import Trajectory

__all__ = ["MEMORY_BUDGET", "ExactSearch", "RunRows"]

MEMORY_BUDGET = 1 << 30
"""Bytes of rows, and of what is computed from them, that building and searching hold at once, whatever the run's size;
a compressed index itself comes on top of it."""
_COPIES = 4
"""How often a block is in memory while it is read: as stored, scaled, joined with other segments, and searched."""


class RunRows:
    """The rows of a run, concatenated over its segments.

    Args:
        trajectory: The run.
    """

    def __init__(self, trajectory: Trajectory) -> None:
        """Open the segments; no row is read."""
        self._segments = [trajectory.segment(t) for t in range(len(trajectory))]
        self._widths = [len(segment.row_sum) for segment in self._segments]
        self.num_examples, self.dimension = trajectory.num_examples, sum(self._widths)

    def __len__(self) -> int:
        """Return the number of examples."""
        return self.num_examples

    @property
    def row_sums(self) -> list[Tensor]:
        """The sum of each segment's rows, in float64, ``(k,)`` each."""
        return [segment.row_sum for segment in self._segments]

    def read(self, ids: Tensor | slice) -> Tensor:
        """Read rows in float32, ``(ids, dimension)``."""
        return torch.cat([segment.read_rows(ids) for segment in self._segments], dim=1)

    def blocks(self, numbers_beside: int = 0) -> Iterator[slice]:
        """Cut the examples into blocks that fit in the memory budget.

        Args:
            numbers_beside: How many more float32 numbers are held for each row.
        """
        size = max(1, MEMORY_BUDGET // (4 * _COPIES * (self.dimension + numbers_beside)))
        for start in range(0, len(self), size):
            yield slice(start, min(start + size, len(self)))

    def scores(self, block: slice, queries: Tensor) -> Tensor:
        """Compute ⟨q, row⟩ for a block of rows where the queries are, ``(queries, rows)``."""
        parts = queries.split(self._widths, dim=1)
        total = torch.zeros(len(queries), block.stop - block.start, dtype=queries.dtype, device=queries.device)
        for segment, part in zip(self._segments, parts, strict=True):
            total.addmm_(part, segment.read_rows(block).to(queries.device).T)
        return total

    def rank(self, queries: np.ndarray, ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Rank proposed rows again by their stored values.

        Args:
            queries: Covectors, ``(queries, dimension)``.
            ids: Proposed example ids for each query, ``(queries, proposed)``; −1 for none, repeats allowed.
            k: How many to keep.

        Returns:
            Example ids, the largest inner product first, ``(queries, k)``, and the inner products; −1 and −inf where
            fewer were proposed.
        """
        best = np.full((len(queries), k), -1, dtype=np.int64)
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        for at, (query, proposed) in enumerate(zip(torch.from_numpy(queries).float(), ids, strict=True)):
            unique = np.unique(proposed[proposed >= 0])
            found = self.read(torch.from_numpy(unique)) @ query
            top = found.topk(min(k, len(unique)))
            best[at, : len(top.indices)] = unique[top.indices.numpy()]
            scores[at, : len(top.indices)] = top.values.numpy()
        return best, scores


class ExactSearch:
    """Search all rows, in float32; those of a small run stay in memory once they were read.

    Args:
        rows: The rows of the run.
        device: Where to multiply; blocks of rows are moved there.
    """

    def __init__(self, rows: RunRows, device: torch.device | str = "cpu") -> None:
        """Keep the rows' whereabouts."""
        self._rows, self._device = rows, torch.device(device)
        self._keeps = 4 * len(rows) * rows.dimension <= MEMORY_BUDGET // 2
        self._kept: Tensor | None = None

    def _scores(self, block: slice, queries: Tensor) -> Tensor:
        if not self._keeps:
            return self._rows.scores(block, queries)
        if self._kept is None:
            self._kept = self._rows.read(slice(0, len(self._rows))).to(self._device)
        return queries @ self._kept[block].T

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Find the rows with the largest inner products.

        Args:
            queries: Covectors, ``(queries, dimension)``.
            k: How many rows for each.

        Returns:
            Example ids, the largest inner product first, ``(queries, min(k, num_examples))``.
        """
        asked = torch.from_numpy(np.ascontiguousarray(queries, dtype=np.float32)).to(self._device)
        best = torch.empty(len(asked), 0, device=self._device)
        ids = torch.empty(len(asked), 0, dtype=torch.int64, device=self._device)
        for block in self._rows.blocks(2 * len(asked)):
            found = self._scores(block, asked)
            top = found.topk(min(k, found.shape[1]), dim=1)
            best, ids = torch.cat([best, top.values], 1), torch.cat([ids, top.indices + block.start], 1)
            top = best.topk(min(k, best.shape[1]), dim=1)
            best, ids = top.values, ids.gather(1, top.indices)
        return ids.cpu().numpy()
