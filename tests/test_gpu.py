"""The same numbers on a GPU; run with `pytest -m gpu` on a machine with CUDA."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import pkexplain as pk
from pkexplain.index.row_index import RowIndex
from tests.conftest import batches, digits, mlp, train
from tests.trainings import Training

pytestmark = pytest.mark.gpu


def recorded(device: str, projection: pk.Identity | pk.SparseSign | pk.Kronecker):
    inputs, targets = (part.to(device) for part in digits(128, torch.float64))
    model, store = mlp(activation=nn.GELU).to(device), pk.MemoryStore()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)
    recorder = pk.Recorder(
        store, model, optimizer, num_examples=96, projection=projection, segments=4, dtype=torch.float64
    )
    train(model, optimizer, inputs, targets, batches(96, 16, 2), recorder=recorder)
    explainer = pk.Explainer(store, model, tolerance=1e-6, quadrature=pk.Quadrature(nodes=4, budget=64))
    found = [explainer.contributions(inputs[96:], output=pk.Logit(0), reading=r) for r in ("path", "removal")]
    return found, explainer.explain(inputs[100], output=pk.Logit(0))


@pytest.mark.parametrize("projection", [pk.Identity(), pk.SparseSign(k=256), pk.Kronecker(k=256)], ids=lambda p: p.kind)
def test_the_numbers_are_those_of_the_cpu(projection):
    here, explained = recorded("cpu", projection)
    there, explained_there = recorded("cuda", projection)
    for mine, theirs in zip(here, there, strict=True):
        np.testing.assert_allclose(theirs, mine, rtol=1e-6, atol=1e-8 * np.abs(mine).max())
    assert [c.id for c in explained_there.proponents] == [c.id for c in explained.proponents]
    assert explained_there.passed == explained.passed


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_run_that_is_resumed_on_the_gpu_is_the_unbroken_one(tmp_path, kind):
    found = []
    for name, parts in (("whole", [(0, 3)]), ("broken", [(0, 2), (2, 3)])):
        (tmp_path / name).mkdir()
        for start, stop in parts:
            training = Training(tmp_path / name, kind)
            training.model.cuda()
            training.inputs, training.targets = training.inputs.cuda(), training.targets.cuda()
            recorder, _ = training.resumed()
            with recorder:
                for epoch in range(start, stop):
                    training.epoch(recorder, epoch)
                    training.save(recorder, epoch)
        trajectory = pk.DirectoryStore(tmp_path / name / "run").trajectory()
        found.append(torch.cat([trajectory.segment(t).read_rows(slice(None), torch.float64) for t in range(6)]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


def test_a_search_on_the_gpu_finds_what_one_on_the_cpu_finds(run):
    trajectory = run.store.trajectory()
    shape = 20, len(trajectory) * len(trajectory.segment(0).row_sum)
    queries = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    for factory in ("Flat", "PCA64,SQ8", "PCA64,IVF8,SQ8"):
        best = []
        for device in ("cpu", "cuda"):
            index = RowIndex(trajectory, factory, None, device)
            best.append(set(index.rows.rank(queries, index.propose(queries, 5), 5)[0].ravel()))
        assert len(best[0] & best[1]) >= 0.98 * len(best[0])
