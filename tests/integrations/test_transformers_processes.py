"""Two processes that `transformers.Trainer` trains together."""

from __future__ import annotations

import os
import socket
import traceback

import pytest
import torch

import pkexplain as pk
from tests.integrations import test_transformers as trainings

transformers = pytest.importorskip("transformers")

from pkexplain.integrations.transformers import RecordingCallback  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
ARGUMENTS = {"ddp_backend": "gloo", "gradient_accumulation_steps": 2, "save_strategy": "epoch", "num_train_epochs": 3}


def train(folder, run, resume=None, epochs=3):
    model = trainings.bert()
    seen = trainings.SeenIds(model)
    callbacks = [seen] if run is None else [seen, RecordingCallback(run, segments=1, dataset=trainings.rows())]
    made = trainings.trainer(folder, model, callbacks, **{**ARGUMENTS, "num_train_epochs": epochs})
    made.train(resume_from_checkpoint=resume)
    return model, seen.steps


def work(rank, port, folder):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    torch.set_num_threads(1)
    try:
        plain, steps = train(folder / "plain", None)
        recorded, same_steps = train(folder / "recorded", folder / "run")
        resumed, _ = train(folder / "recorded", folder / "run", str(folder / "recorded" / "out" / "checkpoint-4"))
        found = {
            "steps": steps,
            "unchanged": trainings.same(plain, recorded) and steps == same_steps,
            "resumed": trainings.same(recorded, resumed),
        }
    except BaseException:
        found = {"error": traceback.format_exc()}
    torch.save(found, folder / f"{rank}.pt")


def test_each_process_records_its_own_examples(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, tmp_path), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert [each.get("error", "") for each in found] == ["", ""]
    assert all(each["unchanged"] and each["resumed"] for each in found)
    trajectory = pk.DirectoryStore(tmp_path / "run").trajectory()
    together = [set(a) | set(b) for a, b in zip(found[0]["steps"], found[1]["steps"], strict=True)]
    assert len(trajectory) == len(together)
    before = set()
    for t, ids in enumerate(together):
        shards, start, rows = trajectory.segment(t).shards, 0, set()
        for shard in shards:
            rows |= {start + int(i) for i in shard.ids}
            start += len(shard)
        assert ids <= rows <= before | ids
        before |= ids
    assert before == set(range(trainings.EXAMPLES))
    explanation = pk.Explainer(tmp_path / "run", trainings.bert()).explain(trainings.rows()[3], output=pk.Logit(1))
    assert abs(explanation.ledger.gap) < 1e-4
    closes = {check.name: check.value for check in explanation.checks}
    assert closes["capture gap"] < 1e-4
    assert closes["displacement gap"] < 1e-2
