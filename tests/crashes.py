"""Works that are killed at random moments, again and again, and must come to the same end."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pkexplain as pk
from tests.faults import PHASES, Watch, WatchedTraining, killed
from tests.record.test_resume import assert_same_run


@dataclass(frozen=True)
class Work:
    """Something that writes to a run, and goes on where it stood when it is called again.

    Attributes:
        name: What it is called.
        make: Makes it, in a directory, watched; it has a method ``go_with_patience``.
        readable: Checks what a kill has left, given the directory and the watch.
        same: Compares the ends of an unbroken and a killed one, given their directories.
    """

    name: str
    make: Callable[[Path, Watch], Any]
    readable: Callable[[Path, Watch], None]
    same: Callable[[Path, Path], None]

    def __str__(self) -> str:
        return self.name


def training(name: str, kind: str, projection: pk.Projection | None) -> Work:
    """Record a training that saves its own checkpoints."""

    def make(directory: Path, watch: Watch) -> WatchedTraining:
        return WatchedTraining(directory, kind, projection=projection, watch=watch)

    return Work(name, make, readable, lambda one, other: assert_same_run(one / "run", other / "run"))


def readable(directory: Path, watch: Watch) -> None:
    """Read every finished segment, and check that none was lost."""
    store = pk.DirectoryStore(directory / "run")
    if not (store.path / "manifest.json").exists():
        assert 0 in watch.segments
        return
    found = len(store.manifest().segments)
    assert found in watch.segments, (found, watch.segments, watch.phase)
    if not found:
        return
    trajectory = store.trajectory()
    for t in range(found):
        trajectory.segment(t)
        trajectory.checkpoint(t + 1)
    for name in store.manifest().files:
        store.verify(name)


# What else writes to a run joins here, with what it leaves when it is killed and what its end is compared with.
WORKS = [
    training("SGD, small projection", "sgd", pk.Kronecker(64, warm_up_examples=20)),
    training("SGD, default projection", "sgd", pk.Kronecker()),
    training("AdamW, small projection", "adamw", pk.Kronecker(64, warm_up_examples=20)),
    training("AdamW, default projection", "adamw", pk.Kronecker()),
]


def crash(work: Work, directory: Path, kills: int, seed: int) -> Counter[str]:
    """Kill a work so many times, half of them at any moment and half in each phase in turn; count what it was doing.

    Each time it comes to its end, that is compared with the end of one that was never killed, and it starts anew.
    """
    chance, seen = random.Random(seed), Counter(dict.fromkeys(PHASES, 0))
    (directory / "unbroken").mkdir()
    work.make(directory / "unbroken", Watch()).go_with_patience()
    here = directory / "killed"
    done = ends = 0
    while done < kills or not ends:
        here.mkdir(exist_ok=True)
        last = done >= kills  # let it come to its end once
        aimed = None if last or done % 2 else (PHASES[done // 2 % len(PHASES)], chance.randrange(1, 7))
        short = aimed is not None and aimed[0] == "between files"  # microseconds
        delay = 0.0 if short or chance.random() < 0.5 else chance.uniform(1e-6, 3e-3)
        watch = Watch(aimed, delay)
        watch.note_segments(*[_segments(here)] * 2)
        if killed(work.make(here, watch).go_with_patience, None if last or aimed else 0.6, chance):
            seen[watch.phase] += 1
            done += 1
            work.readable(here, watch)
        else:
            work.same(directory / "unbroken", here)
            shutil.rmtree(here)
            ends += 1
    return seen


def _segments(directory: Path) -> int:
    """How many segments there are before the work goes on."""
    store = pk.DirectoryStore(directory / "run")
    return len(store.manifest().segments) if (store.path / "manifest.json").exists() else 0
