"""The operator at the query, checked against the exact recursion and against plain loops."""

from __future__ import annotations

import itertools

import pytest
import torch

import pkexplain as pk
from pkexplain.gradients import devices
from pkexplain.gradients.layers import Block
from pkexplain.optimizers import accumulator
from pkexplain.optimizers.levels import Levels, LevelSampler
from pkexplain.optimizers.operator_fit import OperatorFit, row_factors, spread
from pkexplain.optimizers.rules import LinearStep
from tests.conftest import RecordedTraining, batches, cnn, digits, mlp

EXAMPLES = 48
ADAPTIVE = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3),
    "adam, coupled decay": lambda p: torch.optim.Adam(p, lr=3e-3, weight_decay=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-3),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}


def record(optimizer, make=mlp, epochs=4, **options):
    options = {"examples": EXAMPLES, "segments": 12, **options}
    return RecordedTraining(make(), optimizer, dtype=torch.float64, **options).train(epochs=epochs)


def segments(run):
    trajectory = run.store.trajectory()
    return [trajectory.segment(t) for t in range(len(trajectory))]


def total_displacements(run, ids):
    """Σ_t D_i,t of some examples, from the rows of a run without compression: the same however it is cut."""
    trajectory = run.store.trajectory()
    return sum(trajectory.segment(t).read_rows(ids, torch.float64) for t in range(len(trajectory)))


@pytest.mark.parametrize("optimizer", ADAPTIVE.values(), ids=ADAPTIVE)
def test_audited_displacements_are_exact_whatever_the_rows_are(optimizer):
    compressed, whole = record(optimizer, projection=pk.Kronecker(60)), record(optimizer, projection=pk.Identity())
    trajectory = compressed.store.trajectory()
    ids = trajectory.segment(0).audit_ids
    found = sum(trajectory.segment(t).audit_rows for t in range(len(trajectory)))
    expected = total_displacements(whole, ids)
    assert len(ids) == 16
    assert (found - expected).norm() < 2e-3 * expected.norm()  # what is left of a gradient is dropped at 1 in 1,000


@pytest.mark.parametrize("optimizer", ADAPTIVE.values(), ids=ADAPTIVE)
@pytest.mark.filterwarnings("ignore:pkexplain. .* record shorter segments")
def test_rows_add_up_to_what_moved_less_what_the_ledger_names(optimizer):
    """With room for everything P is a rotation: nothing but the operator is approximate."""
    run = record(optimizer, projection=pk.Kronecker(100_000), epochs=3)
    trajectory = run.store.trajectory()
    for t in range(len(trajectory)):
        segment, projector = trajectory.segment(t), trajectory.projector(t, torch.device("cpu"))
        moved = trajectory.checkpoint(t + 1).parameters - trajectory.checkpoint(t).parameters
        explained = moved - segment.weight_decay - segment.optimizer
        query = torch.randn(1, len(moved), generator=torch.Generator().manual_seed(t), dtype=torch.float64)
        rows = segment.read_rows(slice(None), torch.float64)
        by_rows = float(rows.sum(0) @ projector.project_covectors(query)[0])
        assert by_rows == pytest.approx(float(query[0] @ explained), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("wide", [20, 60], ids=["one stage", "two stages"])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_the_sum_of_a_short_segment_is_hardly_projected_away(kind, wide):
    """All of its gradients wait, so that their sum is known: it has a direction of its own in every layer."""
    optimizer = ADAPTIVE.get(kind) or (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    projection = pk.Kronecker(20, wide=wide)
    run = record(optimizer, make=cnn, image=True, projection=projection, segments=1, epochs=1)
    trajectory, kept, without = run.store.trajectory(), [], []
    for t in range(len(trajectory)):
        segment, projector = trajectory.segment(t), trajectory.projector(t, torch.device("cpu"))
        moved = trajectory.checkpoint(t + 1).parameters - trajectory.checkpoint(t).parameters
        query = torch.randn(1, len(moved), generator=torch.Generator().manual_seed(t), dtype=torch.float64)
        true = float(query[0] @ (moved - segment.weight_decay - segment.optimizer))
        kept.append((float(segment.row_sum @ projector.project_covectors(query)[0]) - true) ** 2)
        for part in projector.maps:
            if getattr(part, "beside", None) is not None:
                part.beside.zero_()
        without.append((float(segment.row_sum @ projector.project_covectors(query)[0]) - true) ** 2)
    assert sum(kept) < 0.1 * sum(without)


def test_a_fitted_operator_is_the_least_squares_one():
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    operators = 0.1 + torch.rand(5, 6, generator=generator, dtype=torch.float64)
    fit = OperatorFit({0: slice(0, 6)}, torch.zeros(6, dtype=torch.float64))
    buffer, true, modelled = torch.zeros(6, dtype=torch.float64), [], []
    for gradient, operator in zip(gradients, operators, strict=True):
        step = LinearStep(0.9, 0.1, operator, 0.0)
        levels = LevelSampler({0: slice(0, 6)}, operator).levels({0: step})
        level = Levels.known([levels])[0][0]
        fit.step({0: step}, levels, gradient)
        buffer = 0.9 * buffer + 0.1 * gradient
        true.append(operator * buffer)
        modelled.append(float(level.buffer_step) * buffer)
    true, modelled = torch.stack(true), torch.stack(modelled)
    found = fit.close()
    for p in range(6):  # the updates, and ten times their sum
        a = torch.cat([modelled[:, p], 10**0.5 * modelled[:, p].sum()[None]])
        b = torch.cat([true[:, p], 10**0.5 * true[:, p].sum()[None]])
        assert float(found.operator[p]) == pytest.approx(max(0.0, float(a @ b / (a @ a))), rel=1e-9)
    torch.testing.assert_close(found.moved, modelled.sum(0))


def test_one_step_has_no_misfit():
    fit = OperatorFit({0: slice(0, 4)}, torch.zeros(4, dtype=torch.float64))
    operator, gradient = torch.tensor([1e-4, 3.0, 1e6, 2.0]).double(), torch.tensor([1.0, -2.0, 1e-9, 0.5]).double()
    step = LinearStep(0.9, 0.1, operator, 0.0)
    fit.step({0: step}, LevelSampler({0: slice(0, 4)}, operator).levels({0: step}), gradient)
    found = fit.close()
    torch.testing.assert_close(found.operator * found.moved, 0.1 * operator * gradient)


TWO = {"adamw": ADAPTIVE["adamw"], "rmsprop": ADAPTIVE["rmsprop"], "adagrad": ADAPTIVE["adagrad"]}


@pytest.mark.parametrize("optimizer", TWO.values(), ids=TWO)
@pytest.mark.parametrize("projection", [pk.Kronecker(60), pk.Identity()], ids=["compressed", "whole"])
def test_where_nothing_may_wait_the_numbers_are_the_same(optimizer, projection, monkeypatch):
    """On an accelerator scalars stay where they are, and vectors are followed whole; tried here on the CPU."""
    here = record(optimizer, projection=projection)
    monkeypatch.setattr(devices, "accelerated", lambda device: True)
    there = record(optimizer, projection=projection)
    for t, (one, other) in enumerate(zip(segments(here), segments(there), strict=True)):
        for name in ("rate_sums", "weight_decay", "optimizer", "audit_rows"):
            a, b = getattr(one, name), getattr(other, name)
            torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-9 * max(1e-3, float(a.abs().max())))
        a, b = (segment.read_rows(slice(None), torch.float64) for segment in (one, other))
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-9 * float(a.abs().max()), msg=f"segment {t}")


def test_where_nothing_may_wait_clipping_and_two_optimizers_are_followed(monkeypatch):
    found = []
    for accelerated in (False, True):
        monkeypatch.setattr(devices, "accelerated", lambda device, accelerated=accelerated: accelerated)
        torch.manual_seed(0)
        model, run = mlp(), pk.MemoryStore()
        weights, rest = [[p for p in model.parameters() if (p.ndim > 1) == matrix] for matrix in (True, False)]
        optimizers = [torch.optim.AdamW(weights, lr=3e-3), torch.optim.SGD(rest, lr=0.1, momentum=0.9)]
        inputs, targets = digits(EXAMPLES, torch.float64)
        recorder = pk.Recorder(
            run, model, optimizers, num_examples=EXAMPLES, projection=pk.Kronecker(60), dtype=torch.float64
        )
        with recorder:
            for ids in batches(EXAMPLES, 16, 2):
                with recorder.step(ids):
                    for optimizer in optimizers:
                        optimizer.zero_grad()
                    torch.nn.functional.cross_entropy(model(inputs[ids]), targets[ids]).backward()
                    torch.nn.utils.clip_grad_norm_(weights, 0.05)
                    for optimizer in optimizers:
                        optimizer.step()
        trajectory = run.trajectory()
        found.append([trajectory.segment(t) for t in range(len(trajectory))])
        assert min(entry.summary.rescaled[0] for entry in trajectory.manifest.segments) < 0.9  # it clipped
        assert max(entry.summary.bent for entry in trajectory.manifest.segments) < 1e-6
    for one, other in zip(*found, strict=True):
        a, b = (segment.read_rows(slice(None), torch.float64) for segment in (one, other))
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-9 * float(a.abs().max()))
        torch.testing.assert_close(other.rate_sums, one.rate_sums, rtol=1e-9, atol=0)


def test_an_operator_of_rank_one_is_found_by_its_sides():
    u, v = torch.tensor([1.0, 4.0]).double(), torch.tensor([0.25, 1.0, 9.0]).double()
    operator = torch.cat([(u[:, None] * v[:-1]).flatten(), u * v[-1]])  # the bias is the last column
    block = Block("layer", ("weight", "bias"), ((2, 2), (2,)), 0, 0, (2, 3))
    factors = row_factors(LinearStep(0.0, 1.0, operator, 0.0), block, True, operator)
    ratio = spread(factors, block).square() / operator
    assert float(ratio.max() / ratio.min()) < 1.5  # 1 but for the damping
    assert isinstance(factors, tuple)


# --------------------------------------------------------------------------------------------------- what is stored


def test_a_segment_keeps_rows_of_the_examples_that_it_saw_and_of_no_others():
    run = record(lambda p: torch.optim.SGD(p, lr=0.1), segments=2, projection=pk.Kronecker(60), epochs=1)
    whole = record(lambda p: torch.optim.SGD(p, lr=0.1), segments="epoch", projection=pk.Identity(), epochs=1)
    trajectory, seen = run.store.trajectory(), []
    for t in range(len(trajectory)):
        (shard,) = trajectory.segment(t).shards
        assert len(shard) == EXAMPLES
        assert len(shard.rows) == len(shard.ids) == 16  # two batches of eight
        others = torch.tensor([i for i in range(EXAMPLES) if i not in set(shard.ids.tolist())])
        assert not trajectory.segment(t).read_rows(others).any()
        assert not trajectory.segment(t).norms[others].any()
        seen += shard.ids.tolist()
    assert sorted(seen) == list(range(EXAMPLES))
    assert (whole.store.trajectory().segment(0).norms > 0).all()


def test_each_segment_has_directions_of_its_own_from_its_own_gradients():
    run = record(
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), make=cnn, image=True, projection=pk.Kronecker(60, wide=60)
    )
    trajectory = run.store.trajectory()
    kept = trajectory.segment(0).directions.items()
    widest = max((n for n, _ in kept if n.endswith(("left", "right"))), key=lambda n: dict(kept)[n].shape[1])
    sides = [trajectory.segment(t).directions[widest] for t in range(len(trajectory))]
    for side in sides:
        torch.testing.assert_close(side @ side.T, torch.eye(len(side), dtype=side.dtype))
    assert any(a.shape != b.shape or not torch.allclose(a, b) for a, b in itertools.pairwise(sides))
    assert {len(trajectory.segment(t).row_sum) for t in range(len(trajectory))} == {60}


def test_waiting_gradients_are_bounded(monkeypatch):
    """Once more than the bound waits, the directions are chosen from what there is."""
    monkeypatch.setattr(pk.Kronecker, "warm_up_bytes", lambda self, examples: 1)
    bound, bind = [], accumulator.DisplacementAccumulator._bind

    def counting(self, over=False):
        bound.append(len(self._held))
        return bind(self, over)

    monkeypatch.setattr(accumulator.DisplacementAccumulator, "_bind", counting)
    run = record(lambda p: torch.optim.AdamW(p, lr=1e-3), projection=pk.Kronecker(60))
    assert bound
    assert set(bound) == {1}
    assert run.values()["displacement gap"] < 1e-8
