"""Recording, indexing and searching on a GPU, beside the card's copy bandwidth. Needs CUDA; about five minutes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from _figures import table, write
from _made_rows import COLUMNS, MadeRun, Spectrum, make_rows, record
from _models import ResNet, VisionTransformer, seeded
from torch import Tensor, nn

import pkexplain as pk
from pkexplain.demo import build_cnn, load_digits
from pkexplain.index.faiss_index import faiss_or_none
from pkexplain.index.row_index import RowIndex

EXAMPLES, BATCH, EPOCHS, PAIRS = 4500, 500, 4, 3
ROWS, QUERIES = 1_000_000, 100


def seconds(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def copy_bandwidth() -> float:
    """Bytes a second that the card reads and writes when it copies 2 GiB, the best of five."""
    one = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(one)
    return 2 * one.nbytes / min(seconds(lambda: other.copy_(one)) for _ in range(5))


def train(build: Callable[[], nn.Module], kind: str, inputs: Tensor, labels: Tensor, run: Path | None) -> float:
    torch.manual_seed(0)
    model = build().cuda()
    rate = {"lr": 0.05, "momentum": 0.9} if kind == "SGD" else {"lr": 1e-3}
    optimizer = getattr(torch.optim, kind)(model.parameters(), **rate)
    recorder = None if run is None else pk.Recorder(run, model, optimizer, num_examples=EXAMPLES)

    def loop() -> None:
        for _ in range(EPOCHS):
            for ids in torch.randperm(EXAMPLES).split(BATCH):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(inputs[ids]), labels[ids]).backward()
                optimizer.step()

    def recorded(recorder: pk.Recorder) -> None:
        with recorder:
            for _ in range(EPOCHS):
                for ids in torch.randperm(EXAMPLES).split(BATCH):
                    with recorder.step(ids):
                        optimizer.zero_grad()
                        nn.functional.cross_entropy(model(inputs[ids]), labels[ids]).backward()
                        optimizer.step()

    return seconds(loop if recorder is None else lambda: recorded(recorder))


def recording() -> list[list[str]]:
    images, labels = (tensor.cuda() for tensor in load_digits()[0].tensors)
    rows = []
    for name, build, kind in [
        ("CNN, SGD", build_cnn, "SGD"),
        ("CNN, AdamW", build_cnn, "AdamW"),
        ("ResNet with BatchNorm, SGD", partial(seeded, ResNet), "SGD"),
        ("vision transformer, AdamW", partial(seeded, VisionTransformer), "AdamW"),
    ]:
        with tempfile.TemporaryDirectory() as folder:
            train(build, kind, images, labels, Path(folder) / "warm")
            plain, recorded = [], []
            for pair in range(PAIRS):
                plain.append(train(build, kind, images, labels, None))
                recorded.append(train(build, kind, images, labels, Path(folder) / str(pair)))
        ratios = np.array(recorded) / np.array(plain)
        spread = f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})"
        rows.append([name, f"{np.median(plain):.2f} s", f"{np.median(recorded):.2f} s", spread])
    return rows


def searching(bandwidth: float) -> list[list[str]]:
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        run, _, covectors = record(seed=0)
        trajectory = run.trajectory()
        whole = torch.cat([trajectory.segment(t).read_rows(slice(None)) for t in range(len(trajectory))], dim=1)
        queries = make_rows(Spectrum.of(whole, torch.from_numpy(covectors)), ROWS, 0, Path(folder) / "rows")[:QUERIES]
        made = MadeRun(Path(folder) / "rows", ROWS)
        for factory in ("Flat", "PCA256,SQ8", "PCA256,IVF1024,SQ8"):
            if factory != "Flat" and faiss_or_none() is None:
                lines.append([factory, "faiss is not installed", "–", "–"])
                continue
            index = RowIndex(made, factory, None, "cuda")
            built = seconds(index.prepare)
            index.propose(queries, 10)
            spent = min(seconds(lambda index=index: index.propose(queries, 10)) for _ in range(3))
            read = ROWS * COLUMNS * 2 / spent / bandwidth if factory == "Flat" else float("nan")
            rate = "–" if factory == "Flat" else f"{ROWS / built:,.0f}"
            share = "–" if np.isnan(read) else f"{read:.1%}"
            lines.append([factory, rate, f"{spent / QUERIES * 1e3:.2f} ms", share])
    return lines


if not torch.cuda.is_available():
    print("There is no CUDA device here: nothing was measured, and the table stays as it is.")
else:
    bandwidth = copy_bandwidth()
    write(
        "gpu",
        f"{torch.cuda.get_device_name()}, copy bandwidth {bandwidth / 1e12:.2f} TB/s; torch {torch.__version__}. "
        f"{EXAMPLES:,} digits, batch {BATCH}, {EPOCHS} epochs, {PAIRS} pairs; {ROWS:,} made rows of {COLUMNS:,} "
        f"numbers, {QUERIES} queries in a batch.\n\n"
        + table(["recording", "training alone", "recorded to disk", "ratio"], recording())
        + "\n\n"
        + table(["search", "rows a second, built", "a query", "share of the copy bandwidth"], searching(bandwidth)),
    )
