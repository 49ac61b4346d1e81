"""Packed vectors: what rounding takes, and runs that are stored with them against runs that are not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pkexplain as pk
from pkexplain.errors import RunDamagedError
from pkexplain.optimizers import base
from pkexplain.projection import packed
from pkexplain.projection.packed import PackedVector, pack
from pkexplain.store.editing import withdraw
from tests.conftest import RecordedTraining, cnn
from tests.faults import forge_tensors

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
}


def normal(size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [1, 255, 256, 257, 5000])
def test_a_number_is_off_by_at_most_a_step_of_its_block(size):
    vector = normal(size) * 10 ** normal(size, seed=1)
    found = pack(vector)
    for start in range(0, size, 256):
        block, back = vector[start : start + 256], found[start : start + 256]
        assert float((back - block).abs().max()) <= float(block.abs().max()) / 7 * (1 + 1e-5)
    assert found.codes.nbytes <= -(-size // 256) * 128


def test_small_numbers_are_right_on_average():
    """A hundredth of a step each, which rounding to the nearest would lose."""
    vector = torch.full((256 * 400,), 0.01 / 7)
    vector[::256] = 1.0
    small = torch.ones(len(vector), dtype=torch.bool)
    small[::256] = False
    found, count = pack(vector)[:][small], int(small.sum())
    assert float(found.sum()) == pytest.approx(0.01 / 7 * count, rel=5 / (0.01 * count) ** 0.5)
    assert not torch.equal(pack(vector)[:], pack(vector, seed=1)[:])
    assert torch.equal(pack(vector)[:], pack(vector)[:])


@pytest.mark.parametrize("size", [1, 255, 256, 257, 5000])
def test_a_logarithmic_number_is_relatively_off_by_at_most_half_a_step(size):
    vector = (3 * normal(size)).exp()
    vector[::7] = 0.0
    found = pack(vector, logarithmic=True)
    for start in range(0, size, 256):
        block, back = vector[start : start + 256], found[start : start + 256]
        kept = block > 0
        assert torch.equal(back > 0, kept)
        if kept.any():
            logs = block[kept].log()
            step = float(logs.max() - logs.min()) / 254
            assert float((back[kept].log() - logs).abs().max()) <= step / 2 + 1e-5
    assert found.codes.nbytes <= -(-size // 256) * 256


@given(st.integers(0, 3000), st.integers(0, 3000), st.booleans(), st.integers(1, 4))
def test_a_slice_is_that_of_the_whole(a, b, logarithmic, blocks):
    vector, whole = normal(3000).abs(), pack(normal(3000).abs(), logarithmic)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(packed, "_AT_ONCE", 256 * blocks)
        assert torch.equal(pack(vector, logarithmic)[:], whole[:])
        assert torch.equal(whole[a:b], whole[:][a:b])


@pytest.mark.parametrize("logarithmic", [False, True])
def test_nothing_but_zeros_stays_zero(logarithmic):
    assert not pack(torch.zeros(300), logarithmic)[:].any()


def record(kind, bits, store=None, **options):
    """A run in float32 whose vectors are packed, or not."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(base, "_UNPACKED", 0 if bits else 1 << 20)
        options = {"examples": 48, "segments": 6, "projection": pk.Kronecker(60), "queries": 20, **options}
        options = {"image": True, "dtype": torch.float32, "store": store, **options}
        model = cnn(dtype=torch.float32)
        return RecordedTraining(model, OPTIMIZERS[kind], **options).train(epochs=4)


def stored(run):
    trajectory = (pk.DirectoryStore(run.store) if not hasattr(run.store, "trajectory") else run.store).trajectory()
    return [trajectory.segment(t) for t in range(len(trajectory))]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_packing_misses_is_on_the_optimizer_line(kind):
    run = record(kind, bits=True)
    trajectory = run.store.trajectory()
    for t, segment in enumerate(stored(run)):
        moved = trajectory.checkpoint(t + 1).parameters - trajectory.checkpoint(t).parameters
        assert isinstance(segment.weight_decay, PackedVector)
        assert isinstance(segment.operator, PackedVector) == (kind == "adamw")
        projector = trajectory.projector(t, torch.device("cpu"))
        lines = segment.weight_decay.to(moved) + segment.optimizer.to(moved)
        by_rows = segment.read_rows(slice(None)).sum(0)
        explained = projector.project_displacements((moved - lines)[None])[0]
        assert float((by_rows - explained).norm()) < 0.02 * float(explained.norm())


@pytest.mark.parametrize("reading", ["path", "removal"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_packed_run_explains_as_the_unpacked_one(kind, reading):
    found = {}
    for bits in (False, True):
        run = record(kind, bits)
        explanations = pk.Explainer(run.store, run.model).explain(run.queries, reading=reading)
        found[bits] = np.stack([one.contributions for one in explanations])
        if reading == "path":
            for one in explanations:
                checks = {check.name: check for check in one.checks}
                assert checks["displacement gap"].passed
                assert checks["quadrature gap"].passed
                assert checks["completeness gap"].passed
    off = np.linalg.norm(found[True] - found[False], axis=1) / np.linalg.norm(found[False], axis=1)
    assert np.median(off) < 0.02


def test_a_line_that_matters_is_not_packed():
    """Most of what moves the parameters is weight decay: four bits would put a tenth of it on the optimizer line."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(base, "_UNPACKED", 0)
        optimizer = lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=2.0)  # noqa: E731
        options = {"examples": 48, "segments": 6, "projection": pk.Kronecker(60), "image": True}
        model = cnn(dtype=torch.float32)
        run = RecordedTraining(model, optimizer, dtype=torch.float32, **options).train(epochs=2)
    assert any(isinstance(segment.weight_decay, torch.Tensor) for segment in stored(run))
    assert max(summary.optimizer_share for summary in run.store.trajectory().summaries) < 0.01


def test_packed_vectors_are_as_they_were_after_a_withdrawal(tmp_path):
    run = record("adamw", bits=True, store=tmp_path / "run")
    before = [segment.tensors() for segment in stored(run)]
    withdraw(tmp_path / "run", [3, 5])
    for old, new in zip(before, stored(run), strict=True):
        for name in ("weight_decay", "optimizer", "operator"):
            kept = [n for n in old if n.startswith(f"{name}.") or n == name]
            assert kept
            for each in kept:
                assert torch.equal(old[each], new.tensors()[each])


FORGED = {
    "codes too short": {"operator.codes": lambda t: t[:-1]},
    "codes of another type": {"optimizer.codes": lambda t: t.to(torch.int8)},
    "scales of another shape": {"operator.scales": lambda t: t[:, 0].clone()},
    "a scale that is no number": {"optimizer.scales": lambda t: t * float("nan")},
    "numbers that overflow": {"operator.scales": lambda t: t + 80},
    "lines that overflow": {"weight_decay.scales": lambda t: torch.full_like(t, 1e38)},
}


@pytest.mark.parametrize("case", FORGED)
def test_forged_packed_vectors_are_refused(tmp_path, case):
    run = record("adamw", bits=True, store=tmp_path / "run")
    ((name, change),) = FORGED[case].items()
    forge_tensors(
        tmp_path / "run", "segments/00001.safetensors", lambda tensors: tensors | {name: change(tensors[name])}
    )
    with pytest.raises(RunDamagedError, match="segments/00001"):
        pk.Explainer(tmp_path / "run", run.model).explain(run.queries[0])
