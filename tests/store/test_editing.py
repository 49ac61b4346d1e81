"""Merging and withdrawing change what they say, and nothing else."""

from __future__ import annotations

import random
import shutil

import numpy as np
import pytest
import torch

import pkexplain as pk
from pkexplain.errors import ConfigurationError, ExampleIdError, RunBusyError
from tests.conftest import RecordedTraining
from tests.record.test_resume import assert_same_tensors
from tests.trainings import EXAMPLES, Training, killed_at_random

GONE = [3, 17, 30]


@pytest.fixture
def training(tmp_path):
    made = Training(tmp_path, "sgd")
    made.go(epochs=2)
    return made


def explained(training, index="Flat", **options):
    return pk.Explainer(training.run, training.model, index=index).explain(training.queries[0], **options)


def stored(run):
    trajectory = pk.DirectoryStore(run).trajectory()
    return [trajectory.segment(t) for t in range(len(trajectory))]


# --------------------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("shards", [1, 2, 5, EXAMPLES, EXAMPLES + 3])
def test_rows_lie_in_other_files_and_are_the_same(training, shards):
    before, contributions = stored(training.run), explained(training).contributions
    pk.merge(training.run, shards=3)
    pk.merge(training.run, shards=shards)
    after = stored(training.run)
    for one, other in zip(before, after, strict=True):
        assert len(other.shards) == shards
        assert_same_tensors(one.tensors(), other.tensors())
        starts = np.cumsum([0, *(len(shard) for shard in other.shards)])
        ids = torch.cat([shard.ids + int(start) for shard, start in zip(other.shards, starts, strict=False)])
        assert torch.equal(ids, one.shards[0].ids)
        for name in one.shards[0].tensors().keys() - {"ids"}:
            joined = torch.cat([vars(shard)[name] for shard in other.shards])
            assert torch.equal(joined, vars(one.shards[0])[name]), name
    np.testing.assert_array_equal(explained(training).contributions, contributions)
    files = {file.relative_to(training.run).as_posix() for file in training.run.rglob("*.safetensors")}
    assert files == set(pk.DirectoryStore(training.run).manifest().files)


def test_a_merged_run_is_trained_on(training):
    pk.merge(training.run, shards=2)
    Training(training.run.parent, "sgd").go(epochs=3)
    whole = training.run.parent / "whole"
    whole.mkdir()
    Training(whole, "sgd").go(epochs=3)
    for one, other in zip(stored(whole / "run"), stored(training.run), strict=True):
        assert torch.equal(one.read_rows(slice(None), torch.float64), other.read_rows(slice(None), torch.float64))


@pytest.mark.parametrize("shards", [0, -1, 1.5, "two"])
def test_a_number_of_files_that_cannot_be(training, shards):
    with pytest.raises(ConfigurationError, match=r"^merge\(shards=…\): the rows cannot be stored in this many files"):
        pk.merge(training.run, shards=shards)


# ----------------------------------------------------------------------------------------------------- withdrawing


@pytest.mark.parametrize("shards", [1, 4])
def test_withdrawn_examples_are_on_one_line_and_all_others_stay(training, shards):
    pk.merge(training.run, shards=shards)
    before = explained(training, k=EXAMPLES)
    pk.withdraw(training.run, GONE)
    after = explained(training, k=EXAMPLES)
    others = np.delete(np.arange(EXAMPLES), GONE)
    np.testing.assert_array_equal(after.contributions[others], before.contributions[others])
    assert not after.contributions[GONE].any()
    withdrawn = after.ledger.remainders["withdrawn"]
    assert withdrawn == pytest.approx(before.contributions[GONE].sum(), rel=1e-9)
    assert after.total == pytest.approx(before.total - withdrawn, rel=1e-9)
    assert abs(after.gap) < 1e-9
    assert sum(after.segment_sums) == pytest.approx(after.total, rel=1e-9)
    assert not {c.id for c in (*after.proponents, *after.opponents)} & set(GONE)
    assert "withdrawn" in str(after)
    assert f"examples ({EXAMPLES - len(GONE)})" in str(after)
    assert after.num_examples == EXAMPLES - len(GONE)
    pk.withdraw(training.run, [5])
    both = explained(training)
    assert both.ledger.remainders["withdrawn"] == pytest.approx(before.contributions[[*GONE, 5]].sum(), rel=1e-9)
    assert pk.DirectoryStore(training.run).manifest().withdrawn == (3, 5, 17, 30)


def test_the_rows_are_gone_from_every_file(training):
    explained(training, index="SQ8")
    rows = []
    for segment in stored(training.run):
        places, _ = segment.shards[0].places(torch.tensor(GONE))
        rows.append(segment.shards[0].rows[places].clone())
    rows = [block for block in rows if block.any(dim=1).sum() > 1]  # of one alone, the sum that stays is its row
    assert rows
    audited = [segment.audit_rows[segment.audit_ids == 30] for segment in stored(training.run)]
    assert all(len(row) for row in audited)
    secrets = [row.numpy().tobytes() for part in (rows, audited) for block in part for row in block if row.any()]
    assert all(any(secret in file.read_bytes() for file in training.run.rglob("*.safetensors")) for secret in secrets)
    pk.withdraw(training.run, GONE)
    for file in training.run.rglob("*"):
        if file.is_file():
            assert not any(secret in file.read_bytes() for secret in secrets), file
    assert not list(training.run.rglob("*.faiss"))
    assert not list((training.run / "states").iterdir())


def test_a_run_with_withdrawn_examples_is_trained_on_without_them(training):
    pk.withdraw(training.run, GONE)
    with pytest.raises(ConfigurationError, match=r"buffer at this step was not saved.*with a new optimizer"):
        pk.Recorder.resume(training.run, training.model, training.optimizer).__enter__()
    optimizer = torch.optim.SGD(training.model.parameters(), lr=0.01)
    said = pytest.warns(UserWarning, match="resuming with other options of SGD than before: momentum 0.9 then, 0 now")
    with said, pk.Recorder.resume(training.run, training.model, optimizer) as recorder:
        with pytest.raises(ExampleIdError, match=r"these examples were withdrawn from the run\. Got \[17\]"):
            recorder.step([4, 17]).__enter__()
        with recorder.step([4, 5]):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(training.model(training.inputs[4:6]), training.targets[4:6]).backward()
            optimizer.step()
    after = explained(training)
    assert abs(after.gap) < 1e-9
    assert after.ledger.remainders["withdrawn"]


@pytest.mark.parametrize("ids", [[EXAMPLES], [-1], [1, 1], [0.5]])
def test_examples_that_are_not_there_cannot_be_withdrawn(training, ids):
    with pytest.raises(ExampleIdError, match=r"^withdraw\(ids\): "):
        pk.withdraw(training.run, ids)


@pytest.mark.parametrize("change", [pk.merge, lambda run: pk.withdraw(run, [0])])
def test_a_run_that_is_being_recorded_is_left_alone(tmp_path, change):
    training = Training(tmp_path)
    with training.new_recorder() as recorder:
        training.epoch(recorder, 0)
        with pytest.raises(RunBusyError):
            change(training.run)


@pytest.mark.parametrize("kills", [6, pytest.param(100, marks=pytest.mark.stress)])
def test_killed_at_random_moments_a_change_was_made_or_not(training, kills):
    before, chance, done, attempt = explained(training), random.Random(0), 0, 0
    whole = training.run.with_name("whole")
    shutil.copytree(training.run, whole)
    while done < kills:
        attempt += 1

        def change(gone=attempt % EXAMPLES, shards=1 + attempt % 3):
            pk.merge(training.run, shards=shards)
            pk.withdraw(training.run, [gone])

        done += not killed_at_random(change, chance, longest=0.1)
        after = explained(training)
        withdrawn = pk.DirectoryStore(training.run).manifest().withdrawn
        left = np.delete(np.arange(EXAMPLES), withdrawn)
        np.testing.assert_array_equal(after.contributions[left], before.contributions[left])
        assert after.total + after.ledger.remainders.get("withdrawn", 0.0) == pytest.approx(before.total, rel=1e-9)
        pk.merge(training.run)  # the next writer sweeps out what the killed one has left
        files = {file.relative_to(training.run).as_posix() for file in training.run.rglob("*.safetensors")}
        assert files == set(pk.DirectoryStore(training.run).manifest().files)
        assert not list(training.run.rglob("*.tmp"))
        shutil.rmtree(training.run)
        shutil.copytree(whole, training.run)


def test_a_withdrawn_example_leaves_no_digest_of_its_inputs():
    training = RecordedTraining().train(2)
    assert {"3", "4"} <= training.store.manifest().digests.keys()
    pk.withdraw(training.store, [3])
    found = training.store.manifest().digests
    assert "3" not in found
    assert "4" in found
