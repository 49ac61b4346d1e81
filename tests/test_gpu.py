"""The same numbers on a GPU; run with `pytest -m gpu` on a machine with CUDA."""

from __future__ import annotations

import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

import pkexplain as pk
from pkexplain.index.row_index import RowIndex
from tests.conftest import batches, cnn, digits, mlp, train
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


@pytest.mark.parametrize("optimizer", ["adamw", "adamw, fused", "rmsprop"])
def test_rows_that_are_not_compressed_are_those_of_the_cpu(optimizer):
    found = []
    for device in ("cpu", "cuda"):
        run, _, _ = small_run(device, OPTIMIZERS[optimizer], projection=pk.Identity())
        trajectory = run.trajectory()
        found.append([trajectory.segment(t) for t in range(len(trajectory))])
    for here, there in zip(*found, strict=True):
        a, b = (segment.read_rows(slice(None), torch.float64) for segment in (here, there))
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5 * float(a.abs().max()))
        torch.testing.assert_close(there.rate_sums, here.rate_sums, rtol=1e-6, atol=0)


def test_a_class_token_a_position_and_a_norm_are_read_without_a_pass_for_each_example():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.position = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 9, 8))
            self.norm, self.head = nn.RMSNorm(8), nn.Linear(8, 10)

        def forward(self, images):
            x = torch.cat([self.first.expand(len(images), -1, -1), images.view(-1, 8, 8)], dim=1) + self.position
            return self.head(self.norm(x).tanh().mean(1))

    runs = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        run, _, _ = small_run(device, OPTIMIZERS["adamw"], Tokens().double(), projection=pk.SparseSign(256))
        assert not any(entry.summary.split.unsplit for entry in run.trajectory().manifest.segments)
        runs.append(torch.cat([run.trajectory().segment(t).read_rows(slice(None)) for t in range(3)]))
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-3, atol=1e-5 * float(runs[0].abs().max()))


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


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "adamw, fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "adamw, capturable": lambda p: torch.optim.AdamW(p, lr=1e-3, capturable=True),
    "sgd, fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9),
}


def small_run(device, optimizer, model=None, dtype=torch.float64, *, image=False, ids_there=False, **options):
    """Train and record a small network; return run, model and the images."""
    inputs, targets = (part.to(device) for part in digits(128, dtype, image))
    model, run = (model or mlp(activation=nn.GELU)).to(device), pk.MemoryStore()
    optimizer = optimizer(model.parameters())
    recorder = pk.Recorder(run, model, optimizer, num_examples=96, dtype=dtype, **options)
    with recorder:
        for ids in batches(96, 16, 3):
            ids = torch.tensor(ids, device=device if ids_there else "cpu")
            with recorder.step(ids):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(inputs[ids]), targets[ids]).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
    return run, model, inputs


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("ids_there", [False, True], ids=["ids on the CPU", "ids on the GPU"])
def test_rows_are_those_of_the_cpu_under_every_optimizer(optimizer, ids_there):
    plain = OPTIMIZERS["adamw"] if optimizer is OPTIMIZERS["adamw, capturable"] else optimizer
    found = []
    for device, make in (("cpu", plain), ("cuda", optimizer)):
        run, _, _ = small_run(device, make, projection=pk.SparseSign(256), ids_there=ids_there and device == "cuda")
        trajectory = run.trajectory()
        found.append([trajectory.segment(t) for t in range(len(trajectory))])
    for here, there in zip(*found, strict=True):
        a, b = (segment.read_rows(slice(None), torch.float64).cpu() for segment in (here, there))
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5 * float(a.abs().max()))  # torch's own steps differ, too
        a, b = here.audit_rows, there.audit_rows.cpu()
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5 * float(a.abs().max()))
        torch.testing.assert_close(there.rate_sums.cpu(), here.rate_sums, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_which_cudnn_does_not_differentiate_in_evaluation_mode_are_explained(kind):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = kind(8, 12, batch_first=True), nn.Linear(12, 10)

        def forward(self, images):
            return self.head(self.rnn(images.view(-1, 8, 8))[0][:, -1])

    torch.manual_seed(0)
    run, model, inputs = small_run("cuda", OPTIMIZERS["adamw"], Recurrent(), torch.float32)
    explained = pk.Explainer(run, model).explain(inputs[96:100], output=pk.Logit(0))
    for one in explained:
        assert abs(one.ledger.gap) <= 0.01 * abs(one.ledger.final - one.ledger.initial)
    assert torch.backends.cudnn.enabled


def test_a_convolution_rounded_to_tf32_is_split_and_none_of_it_goes_to_another_line():
    torch.manual_seed(0)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        run, _, _ = small_run("cuda", OPTIMIZERS["sgd, fused"], cnn(dtype=torch.float32), torch.float32, image=True)
    for entry in run.trajectory().manifest.segments:
        assert not entry.summary.split.unsplit
        assert entry.summary.optimizer_share < 1e-3
        assert entry.summary.capture_gap < 1e-2


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_step_waits_for_the_gpu_once(optimizer):
    """Not counted: the first steps of a segment, in which directions are chosen."""
    inputs, targets = (part.cuda() for part in digits(512, torch.float32))
    model, run = mlp(activation=nn.GELU, dtype=torch.float32).cuda(), pk.MemoryStore()
    optimizer = optimizer(model.parameters())
    recorder = pk.Recorder(run, model, optimizer, num_examples=512, segments=10_000)
    waits, steps = [], 0
    with recorder:
        for at, ids in enumerate(batches(512, 16, 3)):
            there = torch.tensor(ids).cuda()
            counted = 70 <= at < 90 and at % 16 not in (0, 1)  # apart from the checks of every 16th step
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn" if counted else "default")
                with recorder.step(ids):
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(model(inputs[there]), targets[there]).backward()
                    optimizer.step()
            torch.cuda.set_sync_debug_mode("default")
            waits += [f"{w.filename}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)]
            steps += counted
    assert steps > 10
    assert len(waits) <= steps, Counter(waits)


def test_an_index_is_filled_on_the_gpu(run):
    trajectory = run.store.trajectory()
    index = RowIndex(trajectory, "PCA64,IVF8,SQ8", None, "cuda")
    index.prepare()
    assert index.searches_on == "cuda"
    assert index._compressed.num_rows == trajectory.num_examples
    rows = index.rows.read(torch.arange(trajectory.num_examples)).numpy()
    kept = index.reconstruct(np.arange(trajectory.num_examples))
    assert np.linalg.norm(kept - rows) < 0.5 * np.linalg.norm(rows)


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
