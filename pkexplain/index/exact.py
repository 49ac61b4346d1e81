"""Exact maximum-inner-product search over the stored rows of a run.

A row concatenates an example's rows over all segments, a query concatenates its covectors, so their inner product is
the contribution. Nothing is built: the stored rows are multiplied block by block, on any device.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from pkexplain.gradients.devices import room_for
from pkexplain.store.trajectory import Trajectory

__all__ = ["MEMORY_BUDGET", "ExactSearch", "RunRows"]

MEMORY_BUDGET = 1 << 30
"""The most bytes of rows, and of what is computed from them, held at once while building and searching, for any run; a
compressed index comes on top."""
_COPIES = 4
"""Copies of a block in memory while it is read: as stored, scaled, joined with other segments, and searched."""


class RunRows:
    """The rows of a run, concatenated over its segments.

    Args:
        trajectory: The run.
    """

    def __init__(self, trajectory: Trajectory) -> None:
        """Open the segments, without reading rows."""
        self.segments = [trajectory.segment(t) for t in range(len(trajectory))]
        self.widths = [len(segment.row_sum) for segment in self.segments]
        self.num_examples, self.dimension = trajectory.num_examples, sum(self.widths)

    def __len__(self) -> int:
        """Return the number of examples."""
        return self.num_examples

    @property
    def row_sums(self) -> list[Tensor]:
        """The sum of each segment's rows, in float64, ``(k,)`` each."""
        return [segment.row_sum for segment in self.segments]

    def read(self, ids: Tensor | slice) -> Tensor:
        """Read rows in float32, ``(ids, dimension)``."""
        return torch.cat([segment.read_rows(ids) for segment in self.segments], dim=1)

    def blocks(self, numbers_per_row: int = 0) -> Iterator[slice]:
        """Split the examples into blocks that fit in the memory budget.

        Args:
            numbers_per_row: Further float32 numbers held for each row.
        """
        size = max(1, MEMORY_BUDGET // (4 * _COPIES * (self.dimension + numbers_per_row)))
        for start in range(0, len(self), size):
            yield slice(start, min(start + size, len(self)))

    def rank(self, queries: np.ndarray, ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Rank candidate rows by their stored values.

        Args:
            queries: Covectors, ``(queries, dimension)``.
            ids: Proposed example ids for each query, ``(queries, proposed)``; −1 for none, repeats allowed.
            k: Rows to return.

        Returns:
            Example ids, the largest inner product first, ``(queries, k)``, and the inner products; −1 and −inf if
            fewer were proposed.
        """
        best = np.full((len(queries), k), -1, dtype=np.int64)
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        for at, (query, proposed) in enumerate(zip(torch.from_numpy(queries).float(), ids, strict=True)):
            unique = np.unique(proposed[proposed >= 0])
            products = self.read(torch.from_numpy(unique)) @ query
            top = products.topk(min(k, len(unique)))
            best[at, : len(top.indices)] = unique[top.indices.numpy()]
            scores[at, : len(top.indices)] = top.values.numpy()
        return best, scores


class ExactSearch:
    """Multiply queries with all rows; those of a small run stay in memory once read, on a GPU as long as they fit.

    Args:
        rows: The rows of the run.
        device: Where to multiply; blocks of rows are moved there.
    """

    def __init__(self, rows: RunRows, device: torch.device | str = "cpu") -> None:
        """Read nothing yet."""
        self._rows, self._device = rows, torch.device(device)
        self._cached: list[Tensor] = []
        self._lock = threading.RLock()  # explanations that are still to be scanned share what is cached

    def scan(self, queries: Sequence[Tensor]) -> Tensor:
        """Compute the inner product of every query with every row, reading each row once.

        Args:
            queries: Covectors of each segment, ``(queries, k)`` each; the products have their dtype, and are
                summed over the segments in float64.

        Returns:
            ``(queries, num_examples)``, in float64, on the CPU.
        """
        scores = torch.empty(len(queries[0]), len(self._rows), dtype=torch.float64, device="cpu")
        with self._lock:
            for block, products in self._products(queries):
                scores[:, block] = products.cpu()
        return scores

    def search(self, queries: np.ndarray, k: int, *, both_ends: bool = False) -> np.ndarray:
        """Find the rows with the largest inner products, block by block.

        Args:
            queries: Covectors, ``(queries, dimension)``.
            k: Rows to find for each query.
            both_ends: Whether to also find the smallest, in the same pass.

        Returns:
            Example ids, the largest inner product first, ``(queries, min(k, num_examples))``; with ``both_ends``
            followed by as many again, the smallest first.
        """
        asked = torch.from_numpy(np.ascontiguousarray(queries, dtype=np.float32)).split(self._rows.widths, dim=1)
        none = torch.empty(0, dtype=torch.float32, device="cpu")
        ends = [(largest, none, none) for largest in ((True, False) if both_ends else (True,))]
        for block, products in self._locked(asked):
            ids = torch.arange(block.start, block.stop, device=products.device).expand_as(products)
            for at, (largest, best, best_ids) in enumerate(ends):
                scores = torch.cat([best, products], 1) if len(best) else products
                known = torch.cat([best_ids, ids], 1) if len(best) else ids
                top = scores.topk(min(k, scores.shape[1]), dim=1, largest=largest)
                ends[at] = largest, top.values, known.gather(1, top.indices)
        return torch.cat([ids for _, _, ids in ends], dim=1).cpu().numpy()

    def read(self, ids: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """Read some rows of every segment, ``(ids, k)`` each, from memory if they are cached."""
        with self._lock:
            cached = self._cached
        if cached and cached[0].dtype == dtype:
            return [rows[ids.to(rows.device)].cpu() for rows in cached]
        return [segment.read_rows(ids, dtype) for segment in self._rows.segments]

    def _locked(self, queries: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor]]:
        with self._lock:
            yield from self._products(queries)

    def _products(self, queries: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor]]:
        """Yield blocks of examples and their ⟨q, row⟩ for every query, ``(queries, block)``."""
        asked = [part.to(self._device) for part in queries]
        count, dtype = len(asked[0]), asked[0].dtype
        self._cache(dtype)
        for block in self._rows.blocks(4 * count):
            total = torch.zeros(count, block.stop - block.start, dtype=torch.float64, device=self._device)
            for t, part in enumerate(asked):
                total += part @ self._block(t, block, dtype).T
            yield block, total

    def _block(self, t: int, block: slice, dtype: torch.dtype) -> Tensor:
        if self._cached:
            return self._cached[t][block]
        return self._rows.segments[t].read_rows(block, dtype).to(self._device)

    def _cache(self, dtype: torch.dtype) -> None:
        """Keep the rows of a small run on the device, so that they are converted once."""
        if self._cached and self._cached[0].dtype == dtype:
            return
        self._cached, rows = [], self._rows
        if dtype.itemsize * len(rows) * rows.dimension > room_for(self._device, MEMORY_BUDGET // 2):
            return
        for segment, width in zip(rows.segments, rows.widths, strict=True):
            kept = torch.empty(len(rows), width, dtype=dtype, device=self._device)
            for block in rows.blocks():
                kept[block] = segment.read_rows(block, dtype)
            self._cached.append(kept)
