"""Rows of a made run as large as one likes, with the norms and the spectrum of a recorded one, for `index.py`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import pkexplain as pk
from pkexplain.demo import build_cnn, load_digits, train_cnn
from pkexplain.explain.queries import as_queries

COLUMNS = 2048
BLOCK = 20_000


def record(seed: int, device: str = "cpu") -> tuple[pk.MemoryStore, nn.Module, np.ndarray]:
    """Train and record the demo's CNN; return run, model and the corrected covectors of 400 test digits' logits."""
    train, test = (TensorDataset(*(part.to(device) for part in some.tensors)) for some in load_digits())
    model, run = build_cnn(seed).to(device), pk.MemoryStore()
    train_cnn(model, train, run=run, seed=seed)
    explainer = pk.Explainer(run, model)
    queries = as_queries(test.tensors[0][:400], explainer.trajectory.inputs, explainer._first.trajectory_model.device)
    found = [
        explainer._first.corrected(some, out).projected.flatten(1)
        for some, out, _ in explainer._chunks(queries, pk.Logit())
    ]
    return run, model, torch.cat(found).float().cpu().numpy()


@dataclass(frozen=True)
class Spectrum:
    """What of a recorded run is kept in made rows, in the run's own principal directions.

    Attributes:
        deviations: Root mean square of the rows along each direction, ``(COLUMNS,)``.
        norms: Norm of each recorded row, ``(examples,)``.
        queries: Its covectors along the same directions, ``(queries, COLUMNS)``.
    """

    deviations: Tensor
    norms: Tensor
    queries: Tensor

    @classmethod
    def of(cls, rows: Tensor, queries: Tensor) -> Spectrum:
        """Take it from recorded rows and covectors, ``(examples, dimension)`` and ``(queries, dimension)``."""
        values, vectors = torch.linalg.eigh((rows @ rows.T).double())
        largest = slice(-COLUMNS, None)
        directions = (rows.T @ vectors[:, largest].float()) / values[largest].sqrt().float()
        deviations = (values[largest] / len(rows)).sqrt().float()
        return cls(deviations, rows.norm(dim=1), queries @ directions)


@dataclass(frozen=True)
class MadeSegment:
    """Rows as a recorder stores them: float16, memory-mapped, each with a power of two of its own."""

    rows: np.ndarray
    scale: np.ndarray
    row_sum: Tensor

    def read_rows(self, ids: Tensor | slice, dtype: torch.dtype = torch.float32) -> Tensor:
        chosen = ids if isinstance(ids, slice) else ids.numpy()
        return torch.from_numpy(self.rows[chosen]).to(dtype) * torch.from_numpy(self.scale[chosen, None]).to(dtype)


@dataclass(frozen=True)
class MadeRun:
    """As much of a trajectory as searching its rows needs: one segment of the first ``num_examples`` rows of a file."""

    folder: Path
    num_examples: int

    @property
    def rows_id(self) -> str:
        return f"{self.folder.name} {self.num_examples}"

    def __len__(self) -> int:
        return 1

    def segment(self, t: int) -> MadeSegment:
        n = self.num_examples
        with np.load(self.folder / "scale.npz") as kept:
            scale, row_sum = kept["scale"][:n], torch.from_numpy(kept["row_sum"])
        mapped = np.memmap(self.folder / "rows", np.float16, "c", shape=(len(scale), COLUMNS))
        return MadeSegment(mapped, scale, row_sum)


def make_rows(spectrum: Spectrum, count: int, seed: int, folder: Path, device: str = "cpu") -> np.ndarray:
    """Write rows: Gaussian with the spectrum, rescaled to norms drawn from the recorded ones, in random directions.

    Made on ``device``; with another device, other rows of the same kind.

    Returns:
        The covectors in the coordinates of the rows, ``(queries, COLUMNS)``.
    """
    folder.mkdir()
    generator = torch.Generator(device).manual_seed(seed)
    spectrum = Spectrum(*(value.to(device) for value in vars(spectrum).values()))
    new = {"generator": generator, "device": device}
    turn = torch.linalg.qr(torch.randn(COLUMNS, COLUMNS, **new)).Q
    scales, row_sum = [], torch.zeros(COLUMNS, dtype=torch.float64, device=device)
    with (folder / "rows").open("wb") as file:
        for start in range(0, count, BLOCK):
            size = min(BLOCK, count - start)
            rows = torch.randn(size, COLUMNS, **new) * spectrum.deviations
            norms = spectrum.norms[torch.randint(len(spectrum.norms), (size,), **new)]
            rows = (rows * (norms / rows.norm(dim=1))[:, None]) @ turn
            scale = torch.exp2(rows.abs().amax(1).log2().ceil() - 14)
            stored = (rows / scale[:, None]).half()
            row_sum += scale.double() @ stored.double()
            file.write(stored.cpu().numpy().data)
            scales.append(scale)
    np.savez(folder / "scale.npz", scale=torch.cat(scales).cpu().numpy(), row_sum=row_sum.cpu().numpy())
    return (spectrum.queries @ turn).cpu().numpy()
