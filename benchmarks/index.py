"""What does an index find, hold and cost? Made rows up to a million, and a recorded run. About twenty minutes.

It needs Linux and 5 GB of disk, in an empty folder that is given, or in a temporary one. The settings in
`pkexplain/compressed.py` and `pkexplain/index.py` were chosen on another recorded run, other made rows and digits.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from _figures import machine, table, write
from _made_rows import COLUMNS, MadeRun, Spectrum, make_rows, record
from torch import nn

import pkexplain as pk
from pkexplain.demo import load_digits
from pkexplain.index.benchmark import FACTORIES, IndexFigures, compare_indices, measure_index
from pkexplain.index.exact import MEMORY_BUDGET, RunRows
from pkexplain.index.row_index import RowIndex, choose_factory

SEED = 1
SIZES = (10_000, 100_000, 1_000_000)
INDICES = {
    10_000: ("PCA256,IVF128,SQ8",),
    100_000: ("PCA256,IVF256,SQ8",),
    1_000_000: ("PCA256,IVF1024,SQ8", "PCA256,IVF1024,PQ64x8"),
}


def build(folder: Path, count: int, factory: str, sender) -> None:
    """Build an index in a process of its own; send the seconds and the largest resident size in bytes."""
    before = time.perf_counter()
    RowIndex(MadeRun(folder, count), factory, folder / "index").prepare()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    sender.send((time.perf_counter() - before, int(status["VmHWM"].split()[0]) * 1024))


def in_own_process(*arguments) -> tuple[float, int]:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=build, args=(*arguments, sender))
    process.start()
    sender.close()
    found = receiver.recv()
    process.join()
    return found


def shares(found: IndexFigures) -> list[str]:
    size = f"{found.bytes_per_row:,.0f}" if found.bytes_per_row else "–"
    return [f"{found.recall:.3f}", f"{found.captured_mass:.4f}", size]


def made(folder: Path, queries: np.ndarray) -> str:
    rows = []
    for count in SIZES:
        run = MadeRun(folder, count)
        exact = RowIndex(run, "Flat")  # pyright: ignore[reportArgumentType]
        start = time.perf_counter()
        found = exact.propose(queries, 10)
        seconds = (time.perf_counter() - start) / len(queries)
        truth = exact.rows.rank(queries, exact.search(queries, 100), 100)
        assert np.isin(truth[0][:, :10], found).all()
        rows.append([f"{count:,}", "`Flat`", "1", "1", "–", "–", "–", f"{seconds * 1e3:.1f} ms", "–"])
        for factory in INDICES[count]:
            took, peak = in_own_process(folder, count, factory)
            index = RowIndex(run, factory, folder / "index")  # pyright: ignore[reportArgumentType]
            figures = measure_index(index, queries, truth)
            times = [f"{took:.1f} s", f"{peak / 2**30:.2f} GiB", f"{figures.query_seconds * 1e3:.1f} ms"]
            rows.append([f"{count:,}", f"`{factory}`", *shares(figures), *times, f"{figures.rounding:.1%}"])
            print(rows[-1], flush=True)
    head = ["rows", "index", "recall@10", "captured mass", "bytes a row", "build", "peak memory", "a query", "rounding"]
    return table(head, rows)


def recorded(trajectory, queries: np.ndarray) -> str:
    lines = []
    for found in compare_indices(trajectory, queries, [*FACTORIES, "PCA256,PQ32"]):
        if isinstance(found, tuple):
            raise SystemExit(found[1])
        times = [f"{found.build_seconds:.1f} s", f"{found.query_seconds * 1e3:.1f} ms", f"{found.rounding:.1%}"]
        lines.append([f"`{found.factory}`", *shares(found), *times])
        print(lines[-1], flush=True)
    return table(["index", "recall@10", "captured mass", "bytes a row", "build", "a query", "rounding"], lines)


def added_up(store: pk.MemoryStore, model: nn.Module) -> str:
    """Explain with every index: the sum after correction, what can fail beside it, and how tight the bound is."""
    queries, lines = load_digits()[1].tensors[0][400:500], []
    for factory in [*FACTORIES, "PCA256,PQ32"]:
        explanations = pk.Explainer(store, model, index=factory).explain(queries, output=pk.Logit())
        gaps = [abs(e.gap / (e.final - e.initial)) for e in explanations]
        before = [next(c.value for c in e.checks if c.name == "projection gap") for e in explanations]
        sums = [abs(e.contributions.sum() - e.total) / abs(e.final - e.initial) for e in explanations]
        shown = [max(abs(c.contribution) for c in (*e.proponents, *e.opponents)) for e in explanations]
        bounds = [e.remainder.bound / most for e, most in zip(explanations, shown, strict=True)]
        held = [
            (max(gaps), "{:.1e}"),
            (max(sums), "{:.1e}"),
            (np.median(before), "{:.1%}"),
            (np.median(bounds), "{:.2f}"),
        ]
        lines.append([f"`{factory}`", *(form.format(value) for value, form in held)])
        print(lines[-1], flush=True)
    head = ["index", "gap of the ledger, largest", "stored rows' sum, largest error"]
    return table([*head, "projection gap before correction, median", "bound of the rest, median"], lines)


def main(place: Path) -> None:
    os.environ["PKEXPLAIN_CACHE"] = str(place / "cache")
    store, model, covectors = record(SEED)
    trajectory, rows = store.trajectory(), RunRows(store.trajectory())
    spectrum = Spectrum.of(rows.read(slice(0, len(rows))), torch.from_numpy(covectors))
    asked = make_rows(spectrum, SIZES[-1], SEED, place / "made")[-100:]
    first = made(place / "made", asked)
    second = recorded(trajectory, covectors[-100:])
    third = added_up(store, model)
    write(
        "index",
        f"100 queries in one batch, {MEMORY_BUDGET >> 20:,} MiB of rows at once. {machine()}.\n\n"
        f"Made rows of {COLUMNS:,} numbers (flat float32: {4 * COLUMNS:,} bytes a row); peak memory is the building "
        "process's whole resident size, pages of the mapped file of rows included:\n\n"
        f"{first}\n\nThe recorded run of the demo's CNN, {len(rows):,} rows of {rows.dimension:,} numbers, for which "
        f"`choose_factory` says `{choose_factory(len(rows), rows.dimension)}`:\n\n{second}\n\n"
        "The accounts of 100 other test digits' logits in that run, relative to f_T − f_0 (the bound to the largest "
        f"contribution shown):\n\n{third}",
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder))
