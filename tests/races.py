"""Five processes on one run: one withdraws, one merges, one verifies, one indexes and one explains."""

from __future__ import annotations

import os
import random
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import pkexplain as pk
from pkexplain.errors import RunBusyError
from pkexplain.store.upkeep import find_damage
from tests.conftest import digits

EXAMPLES = 400


def small_training(run: Path) -> tuple[nn.Module, torch.Tensor]:
    """Record a model on real digits; every example is seen in every segment. Return it, with some queries."""
    torch.manual_seed(0)
    model, (x, y) = nn.Linear(64, 10).double(), digits(EXAMPLES + 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    projection = pk.Kronecker(64, warm_up_examples=64)
    options = {"num_examples": EXAMPLES, "projection": projection, "dtype": torch.float64, "segments": 10}
    with pk.Recorder(run, model, optimizer, **options) as recorder:  # pyright: ignore[reportArgumentType]
        for ids in [ids for _ in range(3) for ids in torch.arange(EXAMPLES).split(40)]:
            with recorder.step(ids):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[ids]), y[ids]).backward()
                optimizer.step()
    return model, x[EXAMPLES:]


class Racers:
    """What the five processes do, and what each may find.

    Args:
        run: The run.
        model: The model.
        queries: Some queries.
    """

    def __init__(self, run: Path, model: nn.Module, queries: torch.Tensor) -> None:
        self.run, self.model, self.queries = run, model, queries
        self.output = pk.Logit(3)
        explainer = pk.Explainer(run, model)
        self.expected = [explainer.explain(query, output=self.output).contributions for query in queries]

    def withdraw(self, turn: int, chance: random.Random) -> str:
        pk.withdraw(self.run, [chance.randrange(EXAMPLES)])
        time.sleep(0.2)
        return "withdrawn"

    def merge(self, turn: int, chance: random.Random) -> str:
        pk.merge(self.run, shards=chance.randrange(1, 5))
        time.sleep(0.3)
        return "merged"

    def verify(self, turn: int, chance: random.Random) -> str:
        _, damaged = find_damage(self.run)
        assert not damaged, damaged
        store = pk.DirectoryStore(self.run)
        with store.lock():
            store.sweep()
        return "whole"

    def index(self, turn: int, chance: random.Random) -> str:
        explainer = pk.Explainer(self.run, self.model, index="IVF4,Flat")
        self._check(explainer.explain(self.queries[turn % 8], output=self.output), turn % 8)
        return "indexed"

    def explain(self, turn: int, chance: random.Random) -> str:
        """Ask an explainer that stays open."""
        if turn == 0:
            self.open = pk.Explainer(self.run, self.model)
            self.known: set[int] = set()
        q = turn % 8
        gone = self._check(self.open.explain(self.queries[q], output=self.output), q)
        assert self.known <= gone, "an example came back"
        self.known = gone
        return "explained"

    def _check(self, explanation: pk.Explanation, q: int) -> set[int]:
        """Check that every example contributes what it did before, or nothing; return those that do not."""
        found = np.asarray(explanation.contributions)
        gone = {int(i) for i in np.flatnonzero(found == 0)}
        kept = [i for i in range(EXAMPLES) if i not in gone]
        assert np.array_equal(found[kept], self.expected[q][kept]), "a wrong number"
        assert explanation.num_examples == len(kept), "withdrawn, and still there"
        for shown in (*explanation.proponents, *explanation.opponents):
            assert shown.id not in gone
            assert abs(shown.contribution - self.expected[q][shown.id]) < 1e-12
        assert abs(explanation.gap) < 1e-9
        return gone


def _repeat(racers: Racers, name: str, until: float, queue: Any) -> None:
    torch.set_num_threads(1)
    seen: Counter[str] = Counter()
    work: Callable[[int, random.Random], str] = getattr(racers, name)
    chance, turn = random.Random(name), 0
    try:
        while time.monotonic() < until or not turn:
            try:
                seen[work(turn, chance)] += 1
                turn += 1
            except RunBusyError:
                seen["busy"] += 1
                time.sleep(chance.uniform(0, 0.05))
    except BaseException:
        queue.put((name, traceback.format_exc()))
    else:
        queue.put((name, dict(seen)))
    queue.close()
    queue.join_thread()
    os._exit(0)


def race(directory: Path, seconds: float) -> dict[str, Any]:
    """Let them all work at once; return what each did, and check that nothing of a withdrawn row is left."""
    model, queries = small_training(directory / "run")
    shutil.copytree(directory / "run", directory / "before")
    racers, context = Racers(directory / "run", model, queries), get_context("fork")
    queue, until = context.Queue(), time.monotonic() + seconds
    names = ("withdraw", "merge", "verify", "index", "explain")
    processes = [context.Process(target=_repeat, args=(racers, name, until, queue)) for name in names]
    for process in processes:
        process.start()
    told = dict(queue.get(timeout=seconds + 120) for _ in processes)
    for process in processes:
        process.join()
    wrong = [found for found in told.values() if not isinstance(found, dict)]
    assert not wrong, wrong[0]
    manifest, damaged = find_damage(directory / "run")
    assert not damaged
    told["gone"], told["left"] = len(manifest.withdrawn), len(_left(directory, manifest.withdrawn))
    return told


def _left(directory: Path, gone: tuple[int, ...]) -> list[str]:
    """Search every file of the run for the rows of withdrawn examples, as they were stored, segment by segment.

    A segment's sum of withdrawn rows is a row if only one was withdrawn; there are more by then.
    """
    before, found = pk.DirectoryStore(directory / "before").trajectory(), []
    contents = {f: f.read_bytes() for f in (directory / "run").rglob("*") if f.is_file()}
    for t in range(len(before)):
        segment = before.segment(t)
        (shard,) = segment.shards
        for i in gone:
            for place in shard.places(torch.tensor([i]))[0].tolist():
                stored = shard.rows[place].contiguous().view(torch.uint8).numpy().tobytes()
                scaled = segment.read_rows(torch.tensor([i])).numpy().tobytes()
                found += [f"{f}: {i}" for f, content in contents.items() if stored in content or scaled in content]
    return found
