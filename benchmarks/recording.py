"""What does recording cost? The demo's training with and without it, in turn, to disk. About three minutes."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
from _figures import machine, table, write

from pkexplain.demo import EPOCHS, build_cnn, load_digits, train_cnn

PAIRS = 5
train, _ = load_digits()


def seconds(run: Path | None) -> float:
    model = build_cnn()
    start = time.perf_counter()
    train_cnn(model, train, run=run)
    return time.perf_counter() - start


plain, recorded = [], []
with tempfile.TemporaryDirectory() as folder:
    seconds(None)  # warm up
    for pair in range(PAIRS):
        plain.append(seconds(None))
        recorded.append(seconds(Path(folder) / f"run{pair}"))
    size = sum(file.stat().st_size for file in (Path(folder) / "run0").rglob("*") if file.is_file())
ratios = np.array(recorded) / np.array(plain)
rows = [
    ["training alone", f"{np.median(plain):.1f} s", f"{min(plain):.1f} to {max(plain):.1f} s"],
    ["training, recorded to disk", f"{np.median(recorded):.1f} s", f"{min(recorded):.1f} to {max(recorded):.1f} s"],
    ["ratio, pair by pair", f"{np.median(ratios):.2f}", f"{ratios.min():.2f} to {ratios.max():.2f}"],
    ["bytes a training example and segment", f"{size / len(train) / EPOCHS:,.0f}", ""],
]
write(
    "recording",
    f"{EPOCHS} epochs of {len(train):,} digits, batch 64, {PAIRS} pairs. {machine()}.\n\n"
    + table(["", "median", "range"], rows),
)
