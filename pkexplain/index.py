"""The compressed gradient-space index: maximum-inner-product search over all rows, with faiss.

A row of the index is the concatenation of an example's rows over all segments, a query that of its covectors, so that
their inner product is the contribution. Whatever the factory string rounds away, candidates are ranked again from the
stored rows.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pkexplain.errors import ConfigurationError, MissingDependencyError, message
from pkexplain.store import checksum_file
from pkexplain.trajectory import Trajectory

__all__ = ["RowIndex"]

_BLOCK_BYTES = 1 << 28
"""Memory for the rows that are added at once."""
_TRAINING_ROWS = 65536


def _faiss() -> Any:
    try:
        import faiss
    except (ImportError, RuntimeError, OSError) as error:  # faiss-gpu without its CUDA libraries is a RuntimeError
        raise MissingDependencyError(
            message(
                "searching the index",
                f"faiss does not load ({error})",
                got="no working module 'faiss'",
                expected="faiss-cpu or faiss-gpu",
                source="the environment",
                fix="Install it: pip install 'pkexplain[cpu]' (or 'pkexplain[gpu]' on a machine with CUDA, not both)",
            )
        ) from error
    return faiss


class RowIndex:
    """A faiss index over the rows of a run.

    Args:
        trajectory: The run.
        factory: Any faiss factory string, for example ``"Flat"``, ``"SQfp16"``, ``"IVF64,Flat"``.
        directory: Where the index is kept, or None for memory alone.

    Raises:
        MissingDependencyError: faiss is not installed.
        ConfigurationError: faiss refuses the factory string.
    """

    def __init__(self, trajectory: Trajectory, factory: str, directory: Path | None) -> None:
        """Check the factory string; nothing is built yet."""
        self._trajectory, self.factory = trajectory, factory
        self._faiss = _faiss()
        self.dimension = len(trajectory) * len(trajectory.segment(0).row_sum)
        self._empty = self._make()
        self._index: Any = None
        rows = [trajectory.segment(t).row_sum.numpy() for t in range(len(trajectory))]
        state = hashlib.sha256(f"{trajectory.run_id} {factory}".encode())
        for row_sum in rows:
            state.update(row_sum.tobytes())
        self._state = state.hexdigest()
        self._file = directory / f"{self._state[:16]}.faiss" if directory else None

    def _make(self) -> Any:
        try:
            return self._faiss.index_factory(self.dimension, self.factory, self._faiss.METRIC_INNER_PRODUCT)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ConfigurationError(
                message(
                    f"Explainer(index={self.factory!r})",
                    "faiss refuses this factory string",
                    got=str(error).strip().splitlines()[-1][:200],
                    expected="a string for faiss.index_factory",
                    source=f"faiss, for {self.dimension} dimensions",
                    fix='Use index="Flat" for exact search',
                )
            ) from error

    @property
    def ready(self) -> bool:
        """Whether the index is in memory."""
        return self._index is not None

    def prepare(self, on_rows: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Load the index from beside the run, or build it and keep it there.

        Args:
            on_rows: Told how many rows are in, and of how many.

        Raises:
            ConfigurationError: faiss cannot train this index on this run.
        """
        if self._index is None:
            self._index = self._load()
        if self._index is None:
            self._index = self._build(on_rows)
            self._save()

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Find the rows with the largest inner products.

        Args:
            queries: Covectors, ``(queries, segments * columns)``.
            k: How many rows for each.

        Returns:
            Example ids, ``(queries, k)``; −1 where the index found fewer.
        """
        self.prepare()
        return self._index.search(np.ascontiguousarray(queries, dtype=np.float32), min(k, self._index.ntotal))[1]

    def _build(self, on_rows: Callable[[int, int], None]) -> Any:
        index, total = self._empty, self._trajectory.num_examples
        if not index.is_trained:
            chosen = torch.linspace(0, total - 1, min(total, _TRAINING_ROWS)).long().unique()
            try:
                index.train(self._rows(chosen))
            except RuntimeError as error:
                raise ConfigurationError(
                    message(
                        f"Explainer(index={self.factory!r})",
                        "faiss cannot train this index on so few rows",
                        got=f"{total} examples: {str(error).strip().splitlines()[-1][:160]}",
                        expected="as many examples as the index has cells or codes",
                        source="faiss",
                        fix='Use a smaller index, or index="Flat"',
                    )
                ) from error
        block = max(1, _BLOCK_BYTES // (4 * self.dimension))
        for start in range(0, total, block):
            stop = min(start + block, total)
            index.add(self._rows(torch.arange(start, stop)))
            on_rows(stop, total)
        return index

    def _rows(self, ids: torch.Tensor) -> np.ndarray:
        parts = [self._trajectory.segment(t).read_rows(ids) for t in range(len(self._trajectory))]
        return torch.cat(parts, dim=1).numpy()

    def _load(self) -> Any:
        """Load a kept index, or None where there is none that is whole and of this run."""
        if self._file is None or not self._file.is_file():
            return None
        try:
            stated = json.loads(self._file.with_suffix(".json").read_text(encoding="utf-8"))
            whole = stated == self._describe(self._file)
            index = self._faiss.read_index(str(self._file)) if whole else None
        except (OSError, ValueError, RuntimeError):
            return None  # it is made from the rows again, and replaced
        fits = index is not None and (index.d, index.ntotal) == (self.dimension, self._trajectory.num_examples)
        return index if fits else None

    def _save(self) -> None:
        """Keep the index beside the run; a run that cannot be written to keeps it in memory alone.

        A flat index is the rows once more, at twice their size, and as quickly made as read: it is not kept.
        """
        if self._file is None or self.factory == "Flat":
            return
        temporary = self._file.with_suffix(".tmp")
        try:
            self._file.parent.mkdir(exist_ok=True)
            self._faiss.write_index(self._index, str(temporary))
            described = json.dumps(self._describe(temporary))
            os.replace(temporary, self._file)
            self._file.with_suffix(".json").write_text(described, encoding="utf-8")
        except (OSError, RuntimeError):
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _describe(self, file: Path) -> dict[str, Any]:
        size = file.stat().st_size
        return {"state": self._state, "factory": self.factory, "bytes": size, "sha256": checksum_file(file)}
