"""The replay reading, against finite differences of trainings by a plain loop."""

from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pkexplain as pk

N, EPOCHS, BATCH = 40, 3, 8
INPUTS = torch.randn(N, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LABELS = torch.randint(3, (N,), generator=torch.Generator().manual_seed(2))
QUERIES = torch.randn(4, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
DATA = torch.utils.data.TensorDataset(INPUTS, LABELS)
STEP = 1e-5


class Doubled(torch.autograd.Function):
    """An operation that cannot be vectorised."""

    generate_vmap_rule = False

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class Attending(nn.Module):
    """Attention over the inputs, and an operation that cannot be vectorised."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(1, 12), nn.Linear(4, 3)

    def forward(self, x):
        q, k, v = self.into(x[..., None])[:, None].chunk(3, dim=-1)
        return self.out(F.scaled_dot_product_attention(q, k, Doubled.apply(v)).mean((1, 2)))


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Dropout(0.2), nn.Linear(8, 3))


def groups(model):
    first, *others = model.parameters()
    return [{"params": [first], "lr": 0.03, "weight_decay": 0.2}, {"params": others}]


CASES = {
    "SGD": (network, lambda m: torch.optim.SGD(m.parameters(), lr=0.1), {}),
    "Nesterov with decay": (
        network,
        lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01, nesterov=True),
        {},
    ),
    "dampening, maximised, clipped": (
        network,
        lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, dampening=0.3, maximize=True),
        {"clip": 0.5, "sign": -1.0},
    ),
    "Adam with L2, accumulated": (
        network,
        lambda m: torch.optim.Adam(m.parameters(), lr=0.02, weight_decay=0.1),
        {"accumulate": 2},
    ),
    "AdamW, clipped, scheduled": (
        network,
        lambda m: torch.optim.AdamW(m.parameters(), lr=0.02, weight_decay=0.1),
        {"clip": 0.3, "schedule": True},
    ),
    "AdamW, two groups": (network, lambda m: torch.optim.AdamW(groups(m), lr=0.02), {}),
    "attention": (Attending, lambda m: torch.optim.AdamW(m.parameters(), lr=0.02), {}),
}


def fit(build, optimize, *, run=None, weights=None, clip=None, sign=1.0, accumulate=1, schedule=False, **options):
    """Train by a plain loop, recorded if there is a run."""
    torch.manual_seed(3)
    model = build().double()
    optimizer = optimize(model)
    plan = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9) if schedule else None
    weights = torch.ones(N, dtype=torch.float64) if weights is None else weights
    recorder = None
    if run is not None:
        options = {"num_examples": N, "dtype": torch.float64, "segments": 7, "replay": True} | options
        recorder = pk.Recorder(run, model, optimizer, **options)
    torch.manual_seed(4)
    with recorder or contextlib.nullcontext():
        for _ in range(EPOCHS):
            parts = torch.randperm(N).split(BATCH)
            for position, batch in enumerate(parts):
                last = (position + 1) % accumulate == 0 or position + 1 == len(parts)
                with recorder.step(batch, accumulate=not last) if recorder else contextlib.nullcontext():
                    if position % accumulate == 0:
                        optimizer.zero_grad()
                    losses = F.cross_entropy(model(INPUTS[batch]), LABELS[batch], reduction="none")
                    (sign * losses * weights[batch]).mean().backward()
                    if last:
                        if clip:
                            nn.utils.clip_grad_norm_(model.parameters(), clip)
                        optimizer.step()
            if plan:
                plan.step()
    return model.eval()


def settings(clip=None, sign=1.0, **options) -> pk.Replay:
    def loss(model, batch):
        return sign * F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    return pk.Replay(DATA, loss=loss if sign < 0 else None, clip=clip, **options)


@pytest.mark.parametrize("case", CASES)
def test_contributions_are_the_derivatives_by_the_weights(case: str) -> None:
    build, optimize, how = CASES[case]
    run = pk.MemoryStore()
    model = fit(build, optimize, run=run, **how)
    reading = settings(how.get("clip"), how.get("sign", 1.0), trials=0)
    explainer = pk.Explainer(run, model)
    found = explainer.contributions(QUERIES, output=pk.Logit(1), reading=reading)
    for example in (0, 7, 33):
        outputs = []
        for change in (STEP, -STEP):
            weights = torch.ones(N, dtype=torch.float64)
            weights[example] += change
            outputs.append(fit(build, optimize, weights=weights, **how)(QUERIES)[:, 1].detach())
        slope = ((outputs[0] - outputs[1]) / (2 * STEP)).numpy()
        np.testing.assert_allclose(found[:, example], slope, rtol=0, atol=1e-6 * np.abs(found).max())
    assert np.abs(found).max() > 1e-3
    gap = explainer.explain(QUERIES[0], output=pk.Logit(1), reading=reading).checks[0]
    assert gap.name == "replay gap"
    assert gap.value < 1e-8


def test_under_adam_the_weights_of_all_examples_together_move_nothing() -> None:
    """Adam's steps do not depend on the scale of the loss: Σ_i ∂f/∂w_i = 0, but for ε."""
    run = pk.MemoryStore()
    model = fit(network, lambda m: torch.optim.Adam(m.parameters(), lr=0.02, eps=1e-14), run=run)
    explainer = pk.Explainer(run, model)
    exact = explainer.contributions(QUERIES, output=pk.Logit(1), reading=settings(trials=0))
    assert (np.abs(exact.sum(1)) < 1e-6 * np.abs(exact).sum(1)).all()


def test_the_first_adam_step_counts_nothing_in_the_removal_reading() -> None:
    """It is the sign of the gradient: no single example's weight changes it, whatever v as recorded says."""
    run = pk.MemoryStore()
    model = fit(network, lambda m: torch.optim.Adam(m.parameters(), lr=0.02), run=run, projection=pk.Identity())
    explanation = pk.Explainer(run, model).explain(QUERIES, output=pk.Logit(1), reading="removal")
    path = pk.Explainer(run, model).explain(QUERIES, output=pk.Logit(1))
    for mine, other in zip(explanation, path, strict=True):
        assert abs(mine.segment_sums[0]) < 1e-4 * abs(other.segment_sums[0])
        assert abs(mine.segment_sums[-1]) > 0


@pytest.mark.parametrize("case", ["SGD", "AdamW, two groups"])
def test_recording_for_replay_changes_no_bit_of_the_training(case: str) -> None:
    build, optimize, how = CASES[case]
    recorded, plain = fit(build, optimize, run=pk.MemoryStore(), **how), fit(build, optimize, **how)
    random = torch.rand(3)
    fit(build, optimize, **how)
    assert torch.equal(random, torch.rand(3))
    for mine, other in zip(recorded.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_a_replay_leaves_the_model_and_the_random_numbers_alone(tmp_path) -> None:
    build, optimize, how = CASES["SGD"]
    model = fit(build, optimize, run=tmp_path / "run", **how)
    before = [p.detach().clone() for p in model.parameters()]
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    explained = pk.Explainer(tmp_path / "run", model).explain(QUERIES, output=pk.Logit(1), reading=settings())
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert {e.reading for e in explained} == {"replay"}


def test_what_is_shown_belongs_together() -> None:
    build, optimize, how = CASES["SGD"]
    run = pk.MemoryStore()
    explainer = pk.Explainer(run, fit(build, optimize, run=run, **how))
    one = explainer.explain(QUERIES[0], output=pk.Logit(1), reading=settings(), k=5)
    assert "replay" in str(one)
    assert [c.contribution for c in one.proponents] == sorted((c.contribution for c in one.proponents), reverse=True)
    assert one.proponents[0].contribution == one.contributions.max()
    assert one.total == pytest.approx(one.contributions.sum())
    assert sum(one.segment_sums) == pytest.approx(one.total)
    for shown in (*one.proponents, *one.opponents):
        assert sum(shown.segments) == pytest.approx(shown.contribution)
        assert one.contributions[shown.id] == pytest.approx(shown.contribution)
    own = explainer.self_contributions(INPUTS[:6], range(6), output=pk.Logit(1), reading=settings())
    every = explainer.contributions(INPUTS[:6], output=pk.Logit(1), reading=settings())
    np.testing.assert_allclose(own, every.diagonal())


def test_the_run_is_trained_again_once_for_the_same_settings() -> None:
    build, optimize, how = CASES["SGD"]
    run, told = pk.MemoryStore(), []
    explainer = pk.Explainer(run, fit(build, optimize, run=run, **how), progress=lambda what, *_: told.append(what))
    for _ in range(2):
        explainer.contributions(QUERIES, output=pk.Logit(1), reading=pk.Replay(DATA, trials=1))
    assert told.index("replaying backwards") < len(told) - told[::-1].index("replaying backwards") - 1
    after = told[told.index("replaying backwards") :]
    assert "replaying the run" not in after
    assert not any(what.startswith("training without") for what in after)


def test_the_replay_error_tells_smooth_trainings_from_others() -> None:
    def linear():
        return nn.Linear(5, 3)

    errors = {}
    for name, build, rate in (("smooth", linear, 0.05), ("rough", network, 8.0)):
        run = pk.MemoryStore()
        model = fit(build, lambda m, rate=rate: torch.optim.SGD(m.parameters(), lr=rate), run=run)
        explained = pk.Explainer(run, model).explain(QUERIES, output=pk.Logit(1), reading=settings())
        errors[name] = [next(c for c in e.checks if c.name == "replay error") for e in explained]
    assert all(check.passed for check in errors["smooth"])
    assert any(not check.passed for check in errors["rough"])


def test_a_run_that_goes_on_is_replayed_whole(tmp_path) -> None:
    model = network().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)

    def epoch(recorder):
        with recorder:
            for batch in torch.randperm(N).split(BATCH):
                with recorder.step(batch):
                    optimizer.zero_grad()
                    F.cross_entropy(model(INPUTS[batch]), LABELS[batch]).backward()
                    optimizer.step()
            recorder.save()

    run = tmp_path / "run"
    epoch(pk.Recorder(run, model, optimizer, num_examples=N, dtype=torch.float64, replay=True))
    epoch(pk.Recorder.resume(run, model, optimizer))
    explanation = pk.Explainer(run, model).explain(QUERIES[0], output=pk.Logit(1), reading=settings(trials=0))
    assert explanation.checks[0].value < 1e-12


def test_another_loss_is_refused() -> None:
    build, optimize, how = CASES["SGD"]
    run = pk.MemoryStore()
    explainer = pk.Explainer(run, fit(build, optimize, run=run, **how))
    wrong = pk.Replay(DATA, loss=lambda model, batch: model(batch[0]).square().sum(1))
    with pytest.raises(pk.PkexplainError, match="do not lead along the recorded run"):
        explainer.contributions(QUERIES, output=pk.Logit(1), reading=wrong)
    mean = pk.Replay(DATA, loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]))
    with pytest.raises(pk.PkexplainError, match="one loss for each example"):
        explainer.contributions(QUERIES, output=pk.Logit(1), reading=mean)


def test_what_cannot_be_replayed_is_refused_by_name() -> None:
    build, optimize, how = CASES["SGD"]
    run = pk.MemoryStore()
    explainer = pk.Explainer(run, fit(build, optimize, run=run, replay=False, **how))
    with pytest.raises(pk.PkexplainError, match="replay=True"):
        explainer.contributions(QUERIES, output=pk.Logit(1), reading=settings())
    with pytest.raises(pk.PkexplainError, match=r"pkexplain\.Replay\(train\)"):
        explainer.explain(QUERIES, reading="replay")
    with pytest.raises(pk.PkexplainError, match="SGD, Adam, AdamW"):
        fit(build, lambda m: torch.optim.RMSprop(m.parameters()), run=pk.MemoryStore())
    with pytest.raises(pk.PkexplainError, match="amsgrad"):
        fit(build, lambda m: torch.optim.Adam(m.parameters(), amsgrad=True), run=pk.MemoryStore())
    for wrong in ({"clip": 0.0}, {"trials": -1}):
        with pytest.raises(pk.PkexplainError, match="invalid"):
            pk.Replay(DATA, **wrong)


def test_data_and_models_that_do_not_fit_are_refused() -> None:
    build, optimize, how = CASES["SGD"]
    run = pk.MemoryStore()
    explainer = pk.Explainer(run, fit(build, optimize, run=run, **how))
    with pytest.raises(pk.PkexplainError, match="another length"):
        explainer.contributions(QUERIES, output=pk.Logit(1), reading=pk.Replay([*DATA][:-1]))
    with pytest.raises(pk.PkexplainError, match="not \\(inputs, label\\)"):
        explainer.contributions(QUERIES, output=pk.Logit(1), reading=pk.Replay([{"x": x} for x in INPUTS]))
    moving, normed = pk.MemoryStore(), nn.BatchNorm1d(5)
    model = fit(lambda: nn.Sequential(nn.Linear(5, 5), normed, nn.Linear(5, 3)), optimize, run=moving)
    with pytest.raises(pk.PkexplainError, match="buffers that moved"):
        pk.Explainer(moving, model).contributions(QUERIES, output=pk.Logit(1), reading=settings())


def test_half_of_the_first_steps_is_taken_off_where_two_steps_share_the_divisor() -> None:
    from pkexplain.explain._second_moment import _share_in_divisor

    def share(begin: int, end: int, beta: float) -> float:
        pairs = [(s, r) for s in range(begin + 1, end + 1) for r in range(begin + 1, s + 1)]
        return sum((1 - beta) * beta ** (s - r) / (1 - beta**s) for s, r in pairs) / (end - begin)

    assert _share_in_divisor(0, 1, 0.999) == pytest.approx(1.0)
    for span in ((1, 2), (3, 7), (100, 171)):
        assert _share_in_divisor(*span, 0.99) == pytest.approx(share(*span, 0.99))
    assert math.isclose(_share_in_divisor(0, 5, 0.0), 1.0)
