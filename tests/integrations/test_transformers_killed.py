"""A training by `transformers.Trainer` that is killed again and again ends as one that never was."""

from __future__ import annotations

import json
import os
import random
import shutil
import time

import pytest
import torch

import pkexplain as pk
from pkexplain.errors import RunNotFoundError
from tests.integrations import test_transformers as trainings
from tests.trainings import killed_at_random

transformers = pytest.importorskip("transformers")

from pkexplain.integrations.transformers import RecordingCallback  # noqa: E402

pytestmark = [
    pytest.mark.stress,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
KILLS = 10
WAYS = {
    "steps": {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 2},
    "epochs, accumulation": {"save_strategy": "epoch", "gradient_accumulation_steps": 2},
}


def finished_checkpoint(folder):
    """The last checkpoint that was written to its end; what a kill left of others is deleted."""
    found = []
    for checkpoint in folder.glob("checkpoint-*"):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())  # written last
            found.append(checkpoint)
        except (OSError, ValueError):
            shutil.rmtree(checkpoint)
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


@pytest.mark.parametrize("way", WAYS)
def test_killed_at_random_moments_it_ends_as_the_unbroken_run(way, tmp_path):
    arguments = {**WAYS[way], "num_train_epochs": 12}
    options = {"projection": pk.Kronecker(32, warm_up_examples=16)}
    unbroken, whole = trainings.bert(), pk.DirectoryStore(tmp_path / "whole")
    start = time.monotonic()
    trainings.trainer(tmp_path / "a", unbroken, [RecordingCallback(whole, **options)], **arguments).train()
    longest = 0.2 * (time.monotonic() - start)
    run, home = pk.DirectoryStore(tmp_path / "run"), tmp_path / "b"

    def go():
        checkpoint = finished_checkpoint(home / "out")
        callback = RecordingCallback(run, overwrite=checkpoint is None, **options)
        model = trainings.bert()
        made = trainings.trainer(home, model, [callback], **arguments)
        made.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        torch.save(model.state_dict(), tmp_path / "end.tmp")
        os.replace(tmp_path / "end.tmp", tmp_path / "end.pt")

    chance, kills, reached = random.Random(way), 0, set()
    for _ in range(100):
        if killed_at_random(go, chance, longest * (1 + kills / 5) if kills < KILLS else 1000.0):
            break
        kills += 1
        checkpoint = finished_checkpoint(home / "out")
        reached.add(checkpoint.name if checkpoint else "")
    print(f"{way}: killed {kills} times, going on from {sorted(reached)}")
    assert kills
    resumed = trainings.bert()
    resumed.load_state_dict(torch.load(tmp_path / "end.pt", weights_only=True))
    assert trainings.same(unbroken, resumed)
    assert torch.equal(trainings.contributions(whole), trainings.contributions(run))


def test_a_training_that_was_not_recorded_cannot_be_gone_on_with(tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 3}
    trainings.trainer(tmp_path, trainings.bert(), **arguments).train()
    made = trainings.trainer(tmp_path, trainings.bert(), [RecordingCallback(tmp_path / "run")], **arguments)
    with pytest.raises(RunNotFoundError):
        made.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
