"""Several runs of one training, averaged."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pkexplain as pk
from pkexplain.errors import ConfigurationError, ModelMismatchError

N = 40


def make(width: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, width), nn.GELU(), nn.Linear(width, 3)).double()


def record(seed: int, *, examples: int = N, segments: int = 2, inputs: int = 6, width: int = 8) -> pk.MemoryStore:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(examples, inputs, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (examples,), generator=generator)
    torch.manual_seed(seed)
    model, run = make(width), pk.MemoryStore()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5)
    with pk.Recorder(
        run,
        model,
        optimizer,
        num_examples=examples,
        segments=segments,
        projection=pk.Kronecker(20),
        dtype=torch.float64,
    ) as recorder:
        for _ in range(3):
            for ids in torch.randperm(examples).split(10):
                with recorder.step(ids):
                    optimizer.zero_grad()
                    F.cross_entropy(model(x[ids]), y[ids]).backward()
                    optimizer.step()
    return run


@pytest.fixture(scope="module")
def runs():
    return [record(seed) for seed in range(3)]


@pytest.fixture(scope="module")
def queries():
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


@pytest.mark.parametrize("reading", ["path", "removal"])
def test_contributions_are_the_mean_of_each_runs(runs, queries, reading):
    output = pk.Margin(1)
    each = [pk.Explainer(run, make()).contributions(queries, output=output, reading=reading) for run in runs]
    mean = pk.Explainer(runs, make()).contributions(queries, output=output, reading=reading)
    np.testing.assert_allclose(mean, np.mean(each, axis=0), rtol=1e-10)


def test_the_mean_account_closes_and_ranks(runs, queries):
    output = pk.Margin(1)
    together = pk.Explainer(runs, make())
    each = [pk.Explainer(run, make()).explain(queries, output=output, k=4) for run in runs]
    every = together.contributions(queries, output=output)
    for q, explanation in enumerate(together.explain(queries, output=output, k=4)):
        parts = [found[q] for found in each]
        assert explanation.initial == pytest.approx(np.mean([part.initial for part in parts]))
        assert explanation.final == pytest.approx(np.mean([part.final for part in parts]))
        assert explanation.total == pytest.approx(every[q].sum())
        assert abs(explanation.gap) < 1e-9
        np.testing.assert_allclose(explanation.contributions, every[q])
        order = np.argsort(-every[q])
        assert [c.id for c in explanation.proponents] == [i for i in order[:4] if every[q][i] > 0]
        assert [c.id for c in explanation.opponents] == [i for i in order[::-1][:4] if every[q][i] < 0]
        for c in (*explanation.proponents, *explanation.opponents):
            assert c.contribution == pytest.approx(every[q][c.id])
            assert c.contribution == pytest.approx(c.weight * c.kernel)
            assert c.contribution == pytest.approx(sum(c.segments))
        shown = {c.id for c in (*explanation.proponents, *explanation.opponents)}
        rest = np.delete(every[q], sorted(shown))
        assert explanation.remainder.rest == pytest.approx(rest.sum())
        assert explanation.remainder.bound == pytest.approx(np.abs(rest).max())
        assert explanation.remainder.num_rest == N - len(shown)
        worst = {name: max(c.value for part in parts for c in part.checks if c.name == name) for name in CHECKS}
        assert {c.name: c.value for c in explanation.checks} == pytest.approx(worst)
        assert explanation.cost.backward_passes == sum(part.cost.backward_passes for part in parts)
        assert "adds up" in str(explanation) or "add up" in str(explanation)


CHECKS = (
    "quadrature gap",
    "optimizer share",
    "displacement gap",
    "capture gap",
    "split gap",
    "projection gap",
    "audit error",
    "completeness gap",
)


def test_a_list_of_one_is_a_run(runs, queries):
    one, same = pk.Explainer([runs[0]], make()), pk.Explainer(runs[0], make())
    np.testing.assert_array_equal(one.contributions(queries), same.contributions(queries))


def test_the_class_is_that_of_the_mean_prediction(runs, queries):
    together = pk.Explainer(runs, make())
    predictions = []
    for run in runs:
        model = make()
        flat, at = run.trajectory().checkpoint(len(run.trajectory())).parameters, 0
        for block in run.trajectory().fingerprint.blocks:
            for name in block.parameters:
                parameter = model.get_parameter(name)
                parameter.data = flat[at : at + parameter.numel()].view_as(parameter).clone()
                at += parameter.numel()
        predictions.append(model(queries))
    classes = torch.stack(predictions).mean(0).argmax(1).tolist()
    assert [e.output for e in together.explain(queries)] == [f"logit[{c}]" for c in classes]


@pytest.mark.parametrize(
    ("other", "wrong"),
    [
        (lambda runs: record(5, examples=30), "their data differ in size. Got 30; expected 40"),
        (lambda runs: record(5, segments=4), "they have different numbers of segments. Got 3; expected 6"),
        (lambda runs: runs[0], "they are the same run. Got one run twice"),
    ],
    ids=["data", "segments", "twice"],
)
def test_runs_that_differ_are_refused(runs, other, wrong):
    with pytest.raises(ConfigurationError, match="cannot be averaged: ") as caught:
        pk.Explainer([runs[0], other(runs)], make())
    assert wrong in str(caught.value)


def test_runs_of_other_models_are_refused(runs):
    with pytest.raises(ModelMismatchError):
        pk.Explainer([runs[0], record(5, width=9)], make())
    with pytest.raises(ConfigurationError, match=r"^Explainer\(\[…\]\): these runs cannot be averaged\. Got 0"):
        pk.Explainer([], make())
