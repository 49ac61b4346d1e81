"""A training of very many steps, watched while it goes on: what it holds in memory and what a commit costs."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import pkexplain as pk
from tests.conftest import digits

EXAMPLES, BATCH = 16, 4


@dataclass(frozen=True)
class Reading:
    """What was measured after so many steps.

    Attributes:
        steps: Optimizer steps done.
        resident: Bytes that the process holds in memory.
        manifest: Bytes of the manifest.
        commit: Seconds of the longest commit since the reading before.
        seconds: Since the start.
    """

    steps: int
    resident: int
    manifest: int
    commit: float
    seconds: float


def resident() -> int:
    """Bytes that this process holds in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def tiny_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(64, 4).double()


class TimedStore(pk.DirectoryStore):
    """A directory that notes how long its longest commit took."""

    longest = 0.0

    def commit(self, manifest):
        before = time.perf_counter()
        super().commit(manifest)
        self.longest = max(self.longest, time.perf_counter() - before)


def endure(run: Path, steps: int, *, segment: int, every: int) -> Iterator[Reading]:
    """Train and record; measure every so many steps."""
    model, store = tiny_model(), TimedStore(run)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, foreach=False)
    inputs, targets = digits(EXAMPLES)
    targets = targets % 4
    projection = pk.Kronecker(8, warm_up_examples=8)
    recorder = pk.Recorder(
        store, model, optimizer, num_examples=EXAMPLES, projection=projection, segments=segment, dtype=torch.float64
    )
    loop = [(ids, inputs[ids], targets[ids]) for ids in torch.arange(EXAMPLES).split(BATCH)]
    begin = time.perf_counter()
    with recorder:
        for step in range(steps):
            ids, x, y = loop[step % len(loop)]
            with recorder.step(ids):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
            if (step + 1) % every == 0:
                size = (run / "manifest.json").stat().st_size
                yield Reading(step + 1, resident(), size, store.longest, time.perf_counter() - begin)
                store.longest = 0.0


def look(run: Path, last: int = 100) -> int:
    """Open a run that may be growing, and check the account of its last segments; return how many it holds."""
    trajectory = pk.DirectoryStore(run).trajectory()
    for t in range(max(0, len(trajectory) - last), len(trajectory)):
        segment = trajectory.segment(t)
        moved = trajectory.checkpoint(t + 1).parameters - trajectory.checkpoint(t).parameters
        rows = segment.read_rows(slice(None), torch.float64).sum(0)
        assert torch.allclose(rows, segment.row_sum, rtol=0, atol=1e-9 * float(moved.norm()))
        assert trajectory.summaries[t].displacement_gap < 1e-9
        assert float(segment.optimizer.norm()) < 1e-9 * float(moved.norm())
    return len(trajectory)


def watch(run: Path) -> str:
    """Open a run again and again until it says that it is done."""
    openings, longest = 0, 0.0
    while not (run / "done").exists():
        if (run / "segments").exists() and list((run / "checkpoints").glob("00001*")):
            before = time.perf_counter()
            look(run)
            openings, longest = openings + 1, max(longest, time.perf_counter() - before)
        time.sleep(5)
    return f"opened {openings} times meanwhile, {longest:.2f} s at most"


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(watch(Path(sys.argv[1])))
