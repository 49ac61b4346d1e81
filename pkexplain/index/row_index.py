"""The index over the rows of a run: exact search over the stored rows, or a compressed index for large runs.

An index only proposes candidates, which are ranked again by the stored rows: its rounding never reaches a result.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from pkexplain.files import checksum
from pkexplain.index._cache import KeptIndex
from pkexplain.index.exact import ExactSearch, RunRows
from pkexplain.index.faiss_index import CompressedSearch, faiss_or_none
from pkexplain.progress import Progress, no_progress
from pkexplain.store.base import Store
from pkexplain.store.trajectory import Trajectory

__all__ = ["RowIndex", "choose_factory"]

_EXACT_NUMBERS = 1 << 27
"""A run of at most this many stored numbers is searched exactly: 100 queries take a second or two."""
_PRINCIPAL = 256
_FEWEST_ROWS_A_CELL = 39
"""faiss asks for at least this many training rows for each cell."""
_MOST_CELLS = 4096
"""More cells would need a larger sample of rows to train on."""
_CANDIDATES, _FEWEST_CANDIDATES = 4, 200
"""A compressed index proposes this many rows for each one shown, and at least this many."""


def choose_factory(num_examples: int, dimension: int) -> str:
    """Choose an index for a run of this size; docs/index-choice.md has the measurements.

    Args:
        num_examples: Rows.
        dimension: Length of a row, over all segments.

    Returns:
        ``"Flat"`` for a run that is searched exactly in a second or two, otherwise a faiss factory string: principal
        directions, about √num_examples cells if there are enough rows to train them, one byte per number.

    Example:
        >>> choose_factory(4_500, 24_576), choose_factory(1_000_000, 2_048)
        ('Flat', 'PCA256,IVF1024,SQ8')
    """
    if num_examples * dimension <= _EXACT_NUMBERS:
        return "Flat"
    cells = 2 ** round(np.log2(num_examples) / 2)
    parts = [f"PCA{_PRINCIPAL}"] if dimension > _PRINCIPAL else []
    if num_examples >= _FEWEST_ROWS_A_CELL * cells:
        parts.append(f"IVF{min(cells, _MOST_CELLS)}")
    return ",".join([*parts, "SQ8"])


class RowIndex:
    """Search over the rows of a run.

    Args:
        trajectory: The run.
        factory: ``"auto"`` for the choice of `choose_factory`, ``"Flat"`` for exact search, or any other faiss factory
            string, for example ``"SQ8"``, ``"PCA256,IVF1024,SQ8"``.
        directory: Where a compressed index is kept; None for memory only.
        device: Where to search.
        store: Where the run is kept, so that nothing is kept of rows that have been withdrawn since.

    Raises:
        MissingDependencyError: A compressed index needs faiss, which is not installed.
        ConfigurationError: faiss refuses the factory string.
    """

    def __init__(
        self,
        trajectory: Trajectory,
        factory: str = "auto",
        directory: Path | None = None,
        device: torch.device | str = "cpu",
        store: Store | None = None,
    ) -> None:
        """Check the factory string, without building anything."""
        self._rows, self._device = RunRows(trajectory), torch.device(device)
        if factory == "auto":
            factory = choose_factory(len(self._rows), self._rows.dimension) if faiss_or_none() else "Flat"
        self.factory = factory
        self._exactly = ExactSearch(self._rows, self._device)
        self._compressed = None if self.exact else self._empty()
        state = checksum(f"{trajectory.rows_id} {factory}", *self._rows.row_sums)
        of = (store, trajectory.manifest) if store is not None else None
        self._kept = KeptIndex(directory, state, of) if directory and not self.exact else None
        self._ready = self.exact

    def _empty(self) -> CompressedSearch:
        return CompressedSearch(self._rows.dimension, self.factory)

    @property
    def exact(self) -> bool:
        """Whether all stored rows are searched."""
        return self.factory == "Flat"

    @property
    def rows(self) -> RunRows:
        """The rows to search."""
        return self._rows

    @property
    def ready(self) -> bool:
        """Whether it can search without building or loading."""
        return self._ready

    @property
    def searches_on(self) -> str:
        """Where rows are searched: ``"cpu"`` or the GPU's name for torch, such as ``"cuda"``."""
        on_gpu = self.exact or (self._compressed is not None and self._compressed.searches_on_gpu)
        return str(self._device) if on_gpu else "cpu"

    @property
    def kept_bytes(self) -> int:
        """Bytes of the index kept with the run; 0 if none is kept."""
        return self._kept.size if self._kept else 0

    def prepare(self, progress: Progress = no_progress) -> None:
        """Load the compressed index kept with the run, or build it and keep it there; exact search needs neither.

        Args:
            progress: Told how many rows were added, and how many there are.

        Raises:
            ConfigurationError: faiss cannot train this index on this run.
        """
        if self._ready or self._compressed is None:
            return
        if self._kept is None or not self._kept.load(self._compressed, len(self._rows)):
            self._compressed = self._empty()
            self._compressed.build(self._rows, progress, self._device)
            if self._kept is not None:
                self._kept.save(self._compressed)
        self._compressed.move(self._device)
        self._ready = True

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Find the rows with the largest inner products, as approximated by the index.

        Args:
            queries: Covectors, ``(queries, dimension)``.
            k: Rows to find for each query.

        Returns:
            Example ids, ``(queries, min(k, num_examples))``; −1 if the index found fewer.
        """
        self.prepare()
        return (self._compressed or self._exactly).search(queries, k)

    def propose(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Propose rows for both ends of the ranking, the largest and the smallest inner products, in one search.

        Args:
            queries: Covectors, ``(queries, dimension)``.
            k: Rows needed from each end after the candidates are ranked by the stored rows.

        Returns:
            Example ids, ``(queries, proposed)``, more than 2 k if there are that many; may contain repeats and −1.
        """
        if self.exact:
            return self._exactly.search(queries, 2 * k, both_ends=True)
        candidates = max(_FEWEST_CANDIDATES, _CANDIDATES * k)
        ids = self.search(np.concatenate([queries, -queries]), candidates)
        return np.concatenate(np.split(ids, 2), axis=1)

    def reconstruct(self, ids: np.ndarray) -> np.ndarray:
        """Return rows as the index stores them, ``(ids, dimension)``: rounded, unless it is exact."""
        self.prepare()
        if self._compressed is not None:
            return self._compressed.reconstruct(ids)
        return self._rows.read(torch.from_numpy(ids)).numpy()
