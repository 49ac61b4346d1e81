"""One model, several optimizers, each with its own parameters."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pkexplain as pk
from pkexplain.errors import ConfigurationError, ModelMismatchError, RecordingError

N = 12
X = torch.randn(N, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
SETTINGS = {"num_examples": N, "projection": pk.Identity(), "dtype": torch.float64}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def two(model):
    adam = torch.optim.AdamW(model[0].parameters(), lr=0.01, weight_decay=0.1)
    return [torch.optim.SGD(model[2].parameters(), lr=0.1, momentum=0.9, weight_decay=0.01), adam]


def train(model, optimizers, recorder, epochs=2):
    for _ in range(epochs):
        for ids in torch.arange(N).split(4):
            with recorder.step(ids):
                model.zero_grad()
                F.cross_entropy(model(X[ids]), ids % 3).backward()
                for optimizer in optimizers:
                    optimizer.step()


def test_each_moves_its_own_parameters_by_its_own_rule():
    model, run = network(), pk.MemoryStore()
    optimizers = two(model)
    with pk.Recorder(run, model, optimizers, segments=3, **SETTINGS) as recorder:
        train(model, optimizers, recorder, epochs=3)
    trajectory = run.trajectory()
    for summary in trajectory.summaries:
        assert summary.optimizer_share < 1e-12
        assert summary.displacement_gap < 1e-12
    assert trajectory.manifest.optimizer.kind == "SGD + AdamW"
    assert [group["lr"] for group in trajectory.manifest.optimizer.groups] == [0.1, 0.01]
    explanation = pk.Explainer(run, model).explain(X[:1])[0]
    accounted = explanation.ledger.examples + sum(explanation.ledger.remainders.values())
    assert accounted == pytest.approx(explanation.final - explanation.initial, abs=1e-12)
    assert all(check.passed for check in explanation.checks)


def test_the_rows_are_those_of_one_optimizer_with_groups():
    rows = []
    for several in (False, True):
        model, run = network(), pk.MemoryStore()
        halves = [{"params": model[0].parameters(), "lr": 0.02}, {"params": model[2].parameters(), "lr": 0.005}]
        optimizers = [torch.optim.AdamW([half]) for half in halves] if several else [torch.optim.AdamW(halves)]
        with pk.Recorder(run, model, optimizers if several else optimizers[0], **SETTINGS) as recorder:
            train(model, optimizers, recorder)
        trajectory = run.trajectory()
        segments = [trajectory.segment(t) for t in range(len(trajectory))]
        rows.append(torch.cat([segment.read_rows(slice(None), torch.float64) for segment in segments]))
    assert torch.equal(*rows)


def test_a_saved_run_continues_bit_for_bit(tmp_path):
    def state(model, optimizers):
        return [model.state_dict(), *(optimizer.state_dict() for optimizer in optimizers)]

    whole, model = tmp_path / "whole", network()
    optimizers = two(model)
    with pk.Recorder(whole, model, optimizers, segments=2, **SETTINGS) as recorder:
        train(model, optimizers, recorder)
        recorder.save()
        train(model, optimizers, recorder)
    parts, model = tmp_path / "parts", network()
    optimizers = two(model)
    with pk.Recorder(parts, model, optimizers, segments=2, **SETTINGS) as recorder:
        train(model, optimizers, recorder)
        recorder.save()
        saved = state(model, optimizers)
    model = network()
    optimizers = two(model)
    with pytest.raises(ModelMismatchError):
        pk.Recorder.resume(parts, model, optimizers).__enter__()
    for part, kept in zip([model, *optimizers], saved, strict=True):
        part.load_state_dict(kept)
    with pk.Recorder.resume(parts, model, optimizers) as recorder:
        train(model, optimizers, recorder)
    found = [pk.Explainer(run, model).explain(X[:1])[0].contributions for run in (whole, parts)]
    assert (found[0] == found[1]).all()


def test_both_must_step_after_the_backward_pass():
    model = network()
    optimizers = two(model)
    with (
        pk.Recorder(pk.MemoryStore(), model, optimizers, **SETTINGS) as recorder,
        pytest.raises(RecordingError, match=r"1 of 2 optimizers stepped.*no step of AdamW"),
    ):
        train(model, optimizers[:1], recorder)

    def in_turns(recorder):
        with recorder.step(range(N)):
            for optimizer in optimizers:
                F.cross_entropy(model(X), torch.arange(N) % 3).backward()
                optimizer.step()

    with (
        pk.Recorder(pk.MemoryStore(), model, optimizers, **SETTINGS) as recorder,
        pytest.raises(RecordingError, match="a backward pass before it"),
    ):
        in_turns(recorder)


def test_a_parameter_belongs_to_one_optimizer():
    model = network()
    both = [torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.AdamW(model[0].parameters())]
    with pytest.raises(ConfigurationError, match="two optimizers would move the same parameter"):
        pk.Recorder(pk.MemoryStore(), model, both, **SETTINGS)
    with pytest.raises(ConfigurationError, match="there is none"):
        pk.Recorder(pk.MemoryStore(), model, [], **SETTINGS)


def test_a_scaler_that_skips_one_of_them_is_refused():
    model = network()
    optimizers = [torch.optim.SGD(model[at].parameters(), lr=0.1, fused=True) for at in (0, 2)]
    optimizers[0].found_inf = torch.tensor(1.0)  # as a fused optimizer is told
    with (
        pk.Recorder(pk.MemoryStore(), model, optimizers, **SETTINGS) as recorder,
        pytest.raises(RecordingError, match="skipped the step of one optimizer and not that of another"),
    ):
        train(model, optimizers, recorder)
