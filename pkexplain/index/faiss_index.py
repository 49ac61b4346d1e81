"""Compressed rows: any faiss index, trained, filled and searched in a way that suits rows of very unequal norms.

Differences from faiss's own inner-product indices, which expect rows of similar norm:

- A cell of an inverted file holds rows that are close to each other (L2), not rows of one direction: the few large
  rows, which have the largest inner products, get small cells, and the many small rows share a few cells.
- The cells searched are those with the largest ⟨q, c⟩ + s ‖q‖ r, where r is the root mean square distance of a cell's
  rows from its centre c: a wide cell may hold a row that is far better than its centre.
- A principal pre-transform (PCA) uses the second moment without subtracting the mean, which would change the inner
  products of rows with queries. It is found by subspace iteration, for any dimension.
- Pre-transforms are trained on as many rows as fit in the memory budget, later stages on transformed rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pkexplain.errors import ConfigurationError, MissingDependencyError
from pkexplain.index.exact import MEMORY_BUDGET, RunRows
from pkexplain.progress import Progress

__all__ = ["CompressedSearch", "faiss_or_none", "load_faiss"]

_TRAINING_ROWS, _TRAINING_ROWS_A_CELL = 65536, 64
"""The most rows to train an index on: this many, or this many for each cell if that is more."""
_SPREAD = 0.2
"""s above: the assumed cosine between the query and a row's offset from its cell's centre."""
_PROBES = 8
"""Each query searches this many times √C of the C cells."""
_SEARCH_DEPTH = 512
"""The least number of candidates that a graph search (HNSW) keeps."""
_GPU_CANDIDATES = 2048
"""The most rows that faiss finds on a GPU in one search."""
_ITERATIONS, _OVERSAMPLING = 4, 16


def faiss_or_none() -> Any:
    """Return the module faiss, or None if it does not load."""
    try:
        return load_faiss()
    except MissingDependencyError:
        return None


def load_faiss() -> Any:
    """Import faiss.

    Raises:
        MissingDependencyError: It is not installed, or does not load.
    """
    try:
        import faiss
    except (ImportError, RuntimeError, OSError) as error:  # faiss-gpu without its CUDA libraries is a RuntimeError
        raise MissingDependencyError(
            "searching a compressed index",
            f"faiss does not load ({error})",
            got="no working module 'faiss'",
            expected="faiss-cpu or faiss-gpu",
            source="the environment",
            fix="Install it: pip install 'pkexplain[cpu]' (or 'pkexplain[gpu]' on a machine with CUDA, not both), "
            'or search exactly with index="Flat"',
        ) from error
    return faiss


class CompressedSearch:
    """A faiss index over the rows of a run.

    Args:
        dimension: Length of a row.
        factory: Any faiss factory string, for example ``"SQ8"``, ``"PCA256,IVF1024,SQ8"``.

    Raises:
        MissingDependencyError: faiss is not installed.
        ConfigurationError: faiss refuses the factory string.
    """

    def __init__(self, dimension: int, factory: str) -> None:
        """Make the empty index."""
        self._faiss, self.factory = load_faiss(), factory
        self._radii, self._resources = np.zeros(0, dtype=np.float32), None
        self._take(self._make(dimension, self._faiss.METRIC_L2))
        if self._cells is None:
            self._take(self._make(dimension, self._faiss.METRIC_INNER_PRODUCT))

    def _make(self, dimension: int, metric: int) -> Any:
        try:
            return self._faiss.index_factory(dimension, self.factory, metric)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ConfigurationError(
                f"Explainer(index={self.factory!r})",
                "faiss refuses this factory string",
                got=str(error).strip().splitlines()[-1][:200],
                expected="a string for faiss.index_factory",
                source=f"faiss, for {dimension} dimensions",
                fix='Use index="Flat" for exact search',
            ) from error

    def _take(self, index: Any) -> None:
        """Look at the parts of an index: transforms, the index after them, and its cells if it has some."""
        faiss = self._faiss
        self._index = index
        self._transforms: list[Any] = []
        core = faiss.downcast_index(index)
        while isinstance(core, faiss.IndexPreTransform):
            self._transforms += [faiss.downcast_VectorTransform(core.chain.at(i)) for i in range(core.chain.size())]
            core = faiss.downcast_index(core.index)
        self._core = self._on_device = core
        self._cells = core if isinstance(core, faiss.IndexIVF) else None
        self._centres = np.zeros((0, core.d), dtype=np.float32)

    @property
    def num_rows(self) -> int:
        """The number of rows."""
        return self._index.ntotal

    @property
    def dimension(self) -> int:
        """Length of a row before any transform."""
        return self._index.d

    @property
    def radii(self) -> np.ndarray:
        """Root mean square distance of the rows of each cell from its centre, ``(cells,)``; empty without cells."""
        return self._radii

    @property
    def searches_on_gpu(self) -> bool:
        """Whether rows are searched on a GPU: graphs and some codes only work on the CPU."""
        return self._on_device is not self._core

    def build(self, rows: RunRows, progress: Progress, device: torch.device | None = None) -> None:
        """Train the index and fill it, in blocks.

        Args:
            rows: The rows of the run.
            progress: Told how many rows were added, and how many there are.
            device: A GPU to do that on, where faiss has this kind of index there; None for the CPU.

        Raises:
            ConfigurationError: faiss cannot train this index on this run.
        """
        try:
            self._train(rows, device)
        except RuntimeError as error:
            raise ConfigurationError(
                f"Explainer(index={self.factory!r})",
                "faiss cannot train this index on so few rows",
                got=f"{len(rows)} examples: {str(error).strip().splitlines()[-1][:160]}",
                expected="as many examples as the index has cells or codes",
                source="faiss",
                fix='Use a smaller index, or index="Flat"',
            ) from error
        cells = self._cells.nlist if self._cells is not None else 0
        squares, counts = np.zeros(cells), np.zeros(cells)
        filled = self._copy_on(device) or self._core
        for block in rows.blocks(self._core.d):
            vectors = self._transformed(rows.read(block).numpy())
            if self._cells is not None:
                distances, cell = filled.quantizer.search(vectors, 1)
                squares += np.bincount(cell[:, 0], np.maximum(distances[:, 0], 0), cells)
                counts += np.bincount(cell[:, 0], minlength=cells)
            filled.add(vectors)
            progress("index", block.stop, len(rows))
        if filled is not self._core:
            filled.copyTo(self._core)
        self._radii = np.sqrt(squares / np.maximum(counts, 1)).astype(np.float32)
        self._index.ntotal = self._core.ntotal
        self._finish()

    def _train(self, rows: RunRows, device: torch.device | None) -> None:
        cells = self._cells.nlist if self._cells is not None else 0
        most = min(len(rows), max(_TRAINING_ROWS, _TRAINING_ROWS_A_CELL * cells))
        if any(not transform.is_trained for transform in self._transforms):
            sample = rows.read(_spread_evenly(len(rows), min(most, _sample_size(rows.dimension))))
            for transform in self._transforms:
                if not transform.is_trained:
                    self._train_transform(transform, sample)
                if transform is not self._transforms[-1]:
                    sample = torch.from_numpy(transform.apply(sample.numpy()))
            del sample
        if not self._core.is_trained:
            if hasattr(self._core, "do_polysemous_training"):
                self._core.do_polysemous_training = False  # takes minutes, for a feature that is not used
            if self._cells is not None:
                self._cells.cp.seed = 0
                if hasattr(self._cells, "use_precomputed_table"):
                    self._cells.use_precomputed_table = -1  # of L2 distances, which are never asked for
            clustered: list[Any] = [self._core, getattr(self._core, "pq", None)]
            for part in clustered:
                if hasattr(part, "cp"):
                    part.cp.min_points_per_centroid = 1  # no line on stderr for each of hundreds of clusterings
            chosen = _spread_evenly(len(rows), min(most, _sample_size(self._core.d)))
            step = max(1, _sample_size(rows.dimension) // 4)
            parts = [self._transformed(rows.read(ids).numpy()) for ids in chosen.split(step)]
            trained = self._copy_on(device) or self._core
            if trained is not self._core and hasattr(trained, "cp"):
                trained.cp.seed, trained.cp.min_points_per_centroid = 0, 1
            trained.train(np.concatenate(parts))
            if trained is not self._core:
                trained.copyTo(self._core)
        self._index.is_trained = True

    def _train_transform(self, transform: Any, sample: Tensor) -> None:
        faiss = self._faiss
        if isinstance(transform, faiss.PCAMatrix) and not transform.eigen_power and not transform.random_rotation:
            directions = _principal_directions(sample, transform.d_out)
            faiss.copy_array_to_vector(directions.T.contiguous().numpy().ravel(), transform.A)
            transform.is_trained = transform.is_orthonormal = True
        else:
            transform.train(sample.numpy())
        if isinstance(transform, faiss.LinearTransform):
            transform.have_bias = False

    def _transformed(self, vectors: np.ndarray) -> np.ndarray:
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        for transform in self._transforms:
            vectors = transform.apply(vectors)
        return vectors

    def _finish(self) -> None:
        """Turn a filled index into one that is searched by inner products."""
        if self._cells is not None:
            product = self._faiss.METRIC_INNER_PRODUCT
            quantizer = self._faiss.downcast_index(self._cells.quantizer)
            self._centres = quantizer.reconstruct_n(0, self._cells.nlist)
            quantizer.metric_type = self._cells.metric_type = self._index.metric_type = product
            self._cells.nprobe = min(self._cells.nlist, round(_PROBES * self._cells.nlist**0.5))

    def write(self, file: str) -> None:
        """Write the faiss index; `radii` are kept separately."""
        self._faiss.write_index(self._index, file)

    def read(self, file: str, radii: np.ndarray) -> None:
        """Read what `write` wrote; faiss's reader is not safe on a file of unknown origin."""
        self._take(self._faiss.read_index(file))
        self._radii = radii
        self._finish()

    def move(self, device: torch.device) -> None:
        """Search on a GPU, where faiss has been built for it and has this kind of index there."""
        self._on_device = self._copy_on(device) or self._core

    def _copy_on(self, device: torch.device | None) -> Any:
        """Copy the index after its transforms to a GPU; None if faiss has no such index there."""
        if device is None or device.type != "cuda" or not getattr(self._faiss, "get_num_gpus", int)():
            return None
        self._resources = self._resources or self._faiss.StandardGpuResources()
        try:
            return self._faiss.index_cpu_to_gpu(self._resources, device.index or 0, self._core)
        except (AttributeError, RuntimeError):
            return None

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Propose rows with large inner products.

        Args:
            queries: Covectors, ``(queries, dimension)``.
            k: Rows to find for each query.

        Returns:
            Example ids, ``(queries, min(k, num_rows))``; −1 if the index found fewer.
        """
        vectors, k = self._transformed(queries), min(k, self.num_rows)
        index = self._on_device if k <= _GPU_CANDIDATES else self._core
        if self._cells is not None:
            centre_scores = vectors @ self._centres.T
            reach = centre_scores + _SPREAD * np.linalg.norm(vectors, axis=1, keepdims=True) * self._radii
            probes = self._cells.nprobe
            chosen = np.argpartition(-reach, probes - 1, axis=1)[:, :probes]
            scores = np.take_along_axis(centre_scores, chosen, axis=1)
            return index.search_preassigned(vectors, k, chosen, scores)[1]
        if hasattr(index, "hnsw"):
            index.hnsw.efSearch = max(_SEARCH_DEPTH, k)
        return index.search(vectors, k)[1]

    def reconstruct(self, ids: np.ndarray) -> np.ndarray:
        """Return rows as the index holds them, ``(ids, dimension)``, in the units of the stored rows."""
        cells = self._cells
        if cells is not None and cells.direct_map.type == self._faiss.DirectMap.NoMap:
            cells.make_direct_map()
        vectors = np.stack([self._core.reconstruct(int(i)) for i in ids])
        for transform in reversed(self._transforms):
            vectors = transform.reverse_transform(vectors)
        return vectors


def _sample_size(dimension: int) -> int:
    """Count the rows of this many numbers that fit in half the memory budget, with one copy of them."""
    return max(1, MEMORY_BUDGET // (2 * 2 * 4 * dimension))


def _spread_evenly(total: int, count: int) -> Tensor:
    return (torch.arange(count, dtype=torch.float64, device="cpu") * (total / count)).long()


def _principal_directions(sample: Tensor, count: int) -> Tensor:
    """Find the directions of the largest second moments, by subspace iteration, ``(dimension, count)``."""
    wide = min(sample.shape[1], count + _OVERSAMPLING)
    found = torch.randn(
        sample.shape[1], wide, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu"
    )
    for _ in range(_ITERATIONS):
        found = torch.linalg.qr(sample.T @ (sample @ found)).Q
    moments = sample @ found
    moments = moments.T.double() @ moments.double()
    return found @ torch.linalg.eigh(moments).eigenvectors.flip(1)[:, :count].float()
