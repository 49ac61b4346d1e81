"""Every call that writes to a run fails once and is interrupted once: the run verifies, goes on, and explains.

A short form takes some of the calls; the full one, marked `stress`, takes all (`make stress`).
"""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
import torch

import pkexplain as pk
from pkexplain.errors import RunError, RunNotFoundError
from pkexplain.store.upkeep import find_damage
from tests.faults import say
from tests.interruptions import Interrupted
from tests.record.test_resume import assert_same_run
from tests.trainings import Training

GONE = list(range(0, 32, 3))  # so many that every segment saw several of them
KINDS = [(error, done) for error in ("OSError", "KeyboardInterrupt") for done in (False, True)]
NAMED = re.compile(r"^(writing|deleting|reading) \S+ of the run in ")


def explained(training, **options):
    return pk.Explainer(training.run, training.model, **options).contributions(training.queries[:1])


def run_with(work, directory, at, error, done):
    """Do some work with a call that fails; say whether an error came of it."""
    try:
        with Interrupted(directory, at, error, done).around():
            work()
    except KeyboardInterrupt:
        assert error == "KeyboardInterrupt"
        return True
    except RunError as raised:
        message = str(raised)
    else:
        return False
    assert error == "OSError"
    assert NAMED.match(message), message
    return True


def count_calls(work, directory):
    counted = Interrupted(directory)
    with counted.around():
        work()
    return counted.calls


def assert_whole(run):
    manifest, damaged = find_damage(run)
    assert not damaged, damaged
    return len(manifest.segments)


def sweep(count, every, start):
    return [(at, *KINDS[(at + turn) % 4]) for turn in range(4) for at in range((start + turn) % every, count, every)]


# ----------------------------------------------------------------------------------------------------------- recording


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    path = tmp_path_factory.mktemp("unbroken")
    Training(path, "sgd").go(epochs=2)
    return path / "run"


class Finished:
    """Counts the segments whose manifest was written, as a reader would find them."""

    def __init__(self, training):
        self.training, self.most = training, 0
        real = training.store.commit

        def commit(manifest):
            real(manifest)
            self.most = max(self.most, len(manifest.segments))

        training.store.commit = commit


def interrupt_recording(tmp_path, unbroken, every, start):
    counted = Training(tmp_path / "counted", "sgd") if (tmp_path / "counted").mkdir() is None else None
    calls = count_calls(lambda: counted.go(epochs=2), counted.run)
    raised = 0
    cases = sweep(len(calls), every, start)
    for case, (at, error, done) in enumerate(cases):
        place = tmp_path / str(case)
        place.mkdir()
        training = Training(place, "sgd")
        finished = Finished(training)
        what = f"{calls[at]}: {error} {'after' if done else 'before'} it"
        raised += run_with(lambda training=training: training.go(epochs=2), training.run, at, error, done)
        try:
            segments = assert_whole(training.run)
            assert segments >= finished.most, what
            if segments:
                assert np.isfinite(explained(Training(place, "sgd"))).all(), what
        except RunNotFoundError:
            assert not finished.most, what
        again = Training(place, "sgd")
        try:
            again.go(epochs=2)
        except RunError:  # the user's own checkpoint was not written, but there are segments: begin anew
            assert not again.checkpoint.exists(), what
            shutil.rmtree(again.run)
            again.go(epochs=2)
        assert_same_run(unbroken, training.run)
        assert not [f for f in training.run.rglob("*") if f.suffix == ".tmp"], what
        assert_whole(training.run)
        shutil.rmtree(place)
    return len(calls), len(cases), raised


def test_recording_that_fails_or_is_interrupted_at_some_calls(tmp_path, unbroken):
    _, cases, raised = interrupt_recording(tmp_path, unbroken, every=61, start=3)
    assert cases > 10
    assert raised > 5


@pytest.mark.stress
def test_recording_that_fails_or_is_interrupted_at_every_call(tmp_path, unbroken):
    calls, cases, raised = interrupt_recording(tmp_path, unbroken, every=1, start=0)
    say(f"recording and saving: {calls} calls, {cases} failures and interruptions, {raised} with an error, all whole")


# ------------------------------------------------------------------------------- merging, withdrawing, indexing, copies


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("finished")
    training = Training(path, "sgd")
    training.go(epochs=2)
    pk.merge(training.run, shards=2)
    return training


def rows_of(run, ids):
    """The bytes of some examples' rows, as they are stored."""
    trajectory = pk.DirectoryStore(run).trajectory()
    found = set()
    for t in range(len(trajectory)):
        start = 0
        for shard in trajectory.segment(t).shards:
            places, _ = shard.places(torch.tensor([i - start for i in ids if start <= i < start + len(shard)]).long())
            found |= {row.contiguous().view(torch.uint8).numpy().tobytes() for row in shard.rows[places]}
            start += len(shard)
    unseen = {0, 0x80}  # zeros, some of them negative
    return {row for row in found if not unseen.issuperset(row)}


def assert_nowhere(run, rows):
    for file in run.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert not any(row in content for row in rows), file


def merge(training, run):
    pk.merge(run, shards=3)


def withdraw(training, run):
    pk.withdraw(run, GONE)


def build_index(training, run):
    pk.Explainer(run, training.model, index="IVF4,SQ8").prepare()


def copy(training, run):
    pk.copy_run(run, run.with_name("copy"))


def salvage(training, run):
    pk.salvage(run)


def interrupt(work, finished, tmp_path, every, start):
    def fresh(name):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        shutil.copytree(finished.run, tmp_path / name / "run")
        (tmp_path / name / "run" / "index").mkdir()
        shutil.copytree(indexed(finished), tmp_path / name / "run" / "index", dirs_exist_ok=True)
        if work is salvage:
            last = pk.DirectoryStore(finished.run).manifest().segments[-1].files.vectors
            (tmp_path / name / "run" / last).write_bytes(b"half")
        return tmp_path / name / "run"

    rows, here = rows_of(finished.run, GONE), fresh("counted")
    assert len(rows) > 6
    calls = count_calls(lambda: work(finished, here), here.parent)
    expected = pk.Explainer(here, finished.model).contributions(finished.queries[:1])
    cases, raised = sweep(len(calls), every, start), 0
    for at, error, done in cases:
        run, what = fresh("failing"), f"{calls[at]}: {error} {'after' if done else 'before'} it"
        raised += run_with(lambda run=run: work(finished, run), run.parent, at, error, done)
        if work is not salvage:
            assert_whole(run)
            assert np.isfinite(pk.Explainer(run, finished.model).contributions(finished.queries[:1])).all(), what
        if work is copy:
            shutil.rmtree(run.with_name("copy")) if (run.with_name("copy") / "manifest.json").exists() else None
        work(finished, run)
        assert_whole(run)
        found = pk.Explainer(run, finished.model).contributions(finished.queries[:1])
        assert np.array_equal(found, expected), what
        if work is withdraw:
            assert_nowhere(run, rows)
        if work is copy:
            assert_whole(run.with_name("copy"))
        assert not [f for f in run.parent.rglob("*.tmp") if "index" not in f.parts], what
    return len(calls), len(cases), raised


def indexed(finished):
    """The folder of an index of the finished run, which holds its rows uncompressed."""
    place = finished.run.with_name("indexed")
    if not place.exists():
        shutil.copytree(finished.run, place)
        pk.Explainer(place, finished.model, index="IVF4,Flat").prepare()
        assert list((place / "index").glob("*.faiss"))
    return place / "index"


WORKS = [merge, withdraw, build_index, copy, salvage]


@pytest.mark.parametrize("work", WORKS)
def test_a_run_that_is_changed_while_some_calls_fail_or_are_interrupted(finished, tmp_path, work):
    _, cases, _ = interrupt(work, finished, tmp_path, every=29, start=2)
    assert cases >= 2


@pytest.mark.stress
@pytest.mark.parametrize("work", WORKS)
def test_a_run_that_is_changed_while_every_call_fails_or_is_interrupted(finished, tmp_path, work):
    calls, cases, raised = interrupt(work, finished, tmp_path, every=1, start=0)
    say(f"{work.__name__}: {calls} calls, {cases} failures and interruptions, {raised} with an error, all whole")
