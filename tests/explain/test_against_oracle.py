"""Every contribution against `tests/oracle.py`, which imports nothing of the package."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch import nn

import pkexplain as pk
from pkexplain.explain import dense as exact
from tests import oracle
from tests.conftest import batches, cnn, digits, mlp, train

EXAMPLES, SEGMENT = 24, 6
SGD = torch.optim.SGD
OPTIMIZERS = {
    "plain": (SGD, {}),
    "momentum": (SGD, {"momentum": 0.9}),
    "dampening": (SGD, {"momentum": 0.8, "dampening": 0.3}),
    "nesterov": (SGD, {"momentum": 0.9, "nesterov": True}),
    "adam": (torch.optim.Adam, {"lr": 3e-3}),
    "adam-foreach": (torch.optim.Adam, {"lr": 3e-3, "foreach": True}),
    "adam-fused": (torch.optim.Adam, {"lr": 3e-3, "fused": True}),
    "adamw": (torch.optim.AdamW, {"lr": 3e-3, "weight_decay": 0.0}),
    "amsgrad": (torch.optim.AdamW, {"lr": 3e-3, "weight_decay": 0.0, "amsgrad": True, "betas": (0.8, 0.9)}),
    "nadam": (torch.optim.NAdam, {"lr": 3e-3}),
    "nadam-decoupled": (torch.optim.NAdam, {"lr": 3e-3, "decoupled_weight_decay": True}),
    "radam": (torch.optim.RAdam, {"lr": 3e-3, "betas": (0.9, 0.99)}),
    "adamax": (torch.optim.Adamax, {"lr": 3e-3}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 1e-3}),
    "rmsprop-momentum": (torch.optim.RMSprop, {"lr": 1e-3, "momentum": 0.7, "centered": True}),
    "rmsprop-foreach": (torch.optim.RMSprop, {"lr": 1e-3, "momentum": 0.7, "foreach": True}),
    "adagrad": (torch.optim.Adagrad, {"lr": 1e-2, "lr_decay": 0.01}),
    "adagrad-fused": (torch.optim.Adagrad, {"lr": 1e-2, "fused": True}),
}
HABITS = {
    "plain": {},
    "weight_decay": {"weight_decay": 0.01},
    "clipping": {"clip_norm": 0.5},
    "schedule": {"halved": True},
    "all": {"weight_decay": 0.01, "clip_norm": 0.5, "halved": True},
}


def halving(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=5, gamma=0.5)


def first_logit(row):
    return row[0]


def pair(make, optimizer, options, schedule=None, clip_norm=None, groups=None, segment=SEGMENT):
    """Train twice from the same start: once watched by the oracle, once by the recorder."""
    inputs, targets = digits(EXAMPLES + 4, image=make is cnn)
    loop = batches(EXAMPLES, 8, 4)

    def optimizer_of(model):
        parameters = groups(model) if groups else model.parameters()
        return optimizer(parameters, **{"lr": 0.05, **options})

    watched = make()
    truth = oracle.train(
        watched,
        optimizer_of,
        inputs[:EXAMPLES],
        targets[:EXAMPLES],
        loop,
        loss=nn.functional.cross_entropy,
        schedule=schedule,
        steps_per_segment=segment,
        clip_norm=clip_norm,
        short_first=optimizer is not SGD,
    )
    model, store = make(), pk.MemoryStore()
    applied = optimizer_of(model)
    recorder = pk.Recorder(
        store,
        model,
        applied,
        num_examples=EXAMPLES,
        projection=pk.Identity(),
        segments=segment,
        dtype=torch.float64,
    )
    train(model, applied, inputs, targets, loop, recorder=recorder, schedule=schedule, clip_norm=clip_norm)
    return truth, watched, store, model, inputs[EXAMPLES:]


@functools.lru_cache
def fine():
    return pk.Quadrature(nodes=8, budget=512)


@pytest.mark.parametrize("habits", HABITS.values(), ids=HABITS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("make", [mlp, cnn], ids=["mlp", "cnn"])
def test_every_contribution_is_the_oracles(make, optimizer, habits):
    kind, options = optimizer
    options = {**options, **{name: habits[name] for name in habits if name == "weight_decay"}}
    schedule = halving if habits.get("halved") else None
    truth, watched, store, model, queries = pair(make, kind, options, schedule, habits.get("clip_norm"))
    phi = oracle.covectors(truth, watched, queries, first_logit, nodes=8, pieces=2)
    expected = oracle.contributions(phi, oracle.displacements(truth)).numpy()
    explainer = pk.Explainer(store, model, tolerance=1e-8, quadrature=fine())
    found = explainer.contributions(queries, output=pk.Logit(0))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9 * np.abs(expected).max())
    for explanation, c in zip(explainer.explain(queries, output=pk.Logit(0)), expected, strict=True):
        values = {check.name: check.value for check in explanation.checks}
        assert values["displacement gap"] < 1e-6
        assert values["quadrature gap"] < 1e-6
        assert values["audit error"] < 1e-6
        assert abs(explanation.gap) < 1e-6 * abs(explanation.final - explanation.initial)
        assert explanation.total == pytest.approx(c.sum(), rel=1e-6)
        assert [p.id for p in explanation.proponents] == list(np.argsort(-c)[: len(explanation.proponents)])


NESTEROV_DECAY = {**OPTIMIZERS["nesterov"][1], "weight_decay": 0.01}


@pytest.mark.parametrize("options", [NESTEROV_DECAY, OPTIMIZERS["dampening"][1]], ids=["nesterov", "damp"])
def test_kernels_weights_and_named_lines_are_the_oracles(options):
    truth, watched, store, model, queries = pair(mlp, SGD, options, halving, clip_norm=0.5, segment=3)
    phi = oracle.covectors(truth, watched, queries, first_logit, nodes=8, pieces=2)
    kernel, weight = oracle.kernel_and_weight(truth, phi)
    decay = torch.einsum("tqp,tp->q", phi, oracle.decay(truth))
    explainer = pk.Explainer(store, model, tolerance=1e-8, quadrature=fine())
    for q, explanation in enumerate(explainer.explain(queries, output=pk.Logit(0), k=5)):
        assert explanation.ledger.remainders["weight_decay"] == pytest.approx(float(decay[q]), rel=1e-6, abs=1e-12)
        assert explanation.ledger.remainders["optimizer"] == pytest.approx(0, abs=1e-9)
        for c in (*explanation.proponents, *explanation.opponents):
            assert c.kernel == pytest.approx(float(kernel[q, c.id]), rel=1e-5)
            assert c.weight == pytest.approx(float(weight[q, c.id]), rel=1e-5)
            assert c.weight * c.kernel == pytest.approx(c.contribution, rel=1e-9)
            assert sum(c.segments) == pytest.approx(c.contribution, rel=1e-9)


@pytest.mark.parametrize("optimizer", [OPTIMIZERS["nesterov"], OPTIMIZERS["nadam"]], ids=["nesterov", "nadam"])
def test_parameter_groups_with_rates_of_their_own(optimizer):
    def groups(model):
        weights, biases = [p for p in model.parameters() if p.ndim > 1], [p for p in model.parameters() if p.ndim < 2]
        return [{"params": biases, "lr": 2 * optimizer[1].get("lr", 0.1)}, {"params": weights, "weight_decay": 0.02}]

    truth, watched, store, model, queries = pair(cnn, *optimizer, halving, groups=groups)
    phi = oracle.covectors(truth, watched, queries, first_logit, nodes=8, pieces=2)
    expected = oracle.contributions(phi, oracle.displacements(truth)).numpy()
    explainer = pk.Explainer(store, model, tolerance=1e-8, quadrature=fine())
    found = explainer.contributions(queries, output=pk.Logit(0))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9 * np.abs(expected).max())


def test_the_exact_path_is_the_oracles():
    truth, watched, store, model, queries = pair(cnn, SGD, NESTEROV_DECAY, segment=3)
    before = [p.detach().clone() for p in model.parameters()]
    phi = oracle.covectors(truth, watched, queries, first_logit, nodes=8, pieces=2)
    expected = oracle.contributions(phi, oracle.displacements(truth)).numpy()
    account = exact.path_kernel(store, model, queries, output=pk.Logit(0), nodes=8, pieces=2)
    np.testing.assert_allclose(account.contributions, expected, rtol=1e-8, atol=1e-11)
    np.testing.assert_allclose(account.kernels, oracle.kernel_and_weight(truth, phi)[0], rtol=1e-6, atol=1e-9)
    assert np.abs(account.gap).max() < 1e-9
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
