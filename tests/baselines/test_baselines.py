"""Other methods on a recorded run, against plain loops and other libraries."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

import pkexplain as pk
from pkexplain.baselines import (
    BM25,
    ArnoldiInfluenceFunction,
    GradientNorm,
    NearestNeighbours,
    Random,
    Setting,
    SimilarityInfluence,
    TracInCP,
    TracInCPFast,
    TracInCPFastRandProj,
    TrainingLoss,
)
from pkexplain.baselines._captum_inputs import has_samplewise_rules
from pkexplain.errors import ConfigurationError, QueryError
from tests.conftest import batches, digits, mlp, train

COUNT, ASKED = 24, 4


def record(model, inputs, targets, *, loss=F.cross_entropy, optimizer=None):
    store = pk.MemoryStore()
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05)
    recorder = pk.Recorder(store, model, optimizer, num_examples=COUNT, projection=pk.SparseSign(64), dtype=DTYPE)
    train(model, optimizer, inputs, targets, batches(COUNT, 8, 2), recorder=recorder, loss=loss)
    return pk.Explainer(store, model)


DTYPE = torch.float64


class Small:
    """A tiny recorded run and the setting of some queries."""

    def __init__(self, model, *, image=False, optimizer=None):
        inputs, self.targets = digits(COUNT + ASKED, DTYPE, image)
        self.inputs, self.model = inputs, model
        self.dataset = TensorDataset(inputs[:COUNT], self.targets[:COUNT])
        self.explainer = record(model, inputs, self.targets, optimizer=optimizer)
        self.setting = Setting.of(self.explainer, inputs[COUNT:], self.targets[COUNT:], dataset=self.dataset)

    def gradients(self, t, names=None):
        """The loss gradient of every example and query at a checkpoint, by a loop, ``(examples + queries, D)``."""
        model = self.setting.copy_model()
        named = dict(model.named_parameters())
        flat, at = self.explainer.trajectory.checkpoint(t).parameters, 0
        for block in self.explainer.trajectory.fingerprint.blocks:
            for name in block.parameters:
                named[name].data = flat[at : at + named[name].numel()].reshape(named[name].shape).clone()
                at += named[name].numel()
        chosen = [value for name, value in named.items() if names is None or name in names]
        rows = []
        for x, y in zip(self.inputs, self.targets, strict=True):
            found = torch.autograd.grad(F.cross_entropy(model(x[None]), y[None]), chosen)
            rows.append(torch.cat([g.flatten() for g in found]))
        return torch.stack(rows)

    def tracin(self, names=None):
        """Σ_t η_t ⟨g, g'⟩ of everything with everything."""
        total = 0
        for t, summary in enumerate(self.explainer.trajectory.summaries, start=1):
            rows = self.gradients(t, names)
            total = total + summary.learning_rate_sum[0] / COUNT * (rows @ rows.T)
        return total.numpy()


@pytest.fixture(scope="module")
def small():
    return Small(mlp())


def test_tracincp_is_the_sum_over_checkpoints(small):
    assert has_samplewise_rules(small.model)
    oracle = small.tracin()
    np.testing.assert_allclose(TracInCP().scores(small.setting), oracle[COUNT:, :COUNT], rtol=1e-9)
    np.testing.assert_allclose(TracInCP().self_influence(small.setting), oracle.diagonal()[:COUNT], rtol=1e-9)


def test_tracincp_where_captum_goes_one_by_one():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 6), nn.LayerNorm(6), nn.Linear(6, 10)).double()
    assert not has_samplewise_rules(model)
    odd = Small(model)
    np.testing.assert_allclose(TracInCP().scores(odd.setting), odd.tracin()[COUNT:, :COUNT], rtol=1e-9)


@pytest.mark.parametrize(
    ("layer", "together"),
    [
        (nn.Conv2d(1, 2, 3), True),
        (nn.Conv2d(2, 2, 3, groups=2), False),
        (nn.Conv2d(1, 2, 3, padding="same"), False),
        (nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), False),
        (nn.GRU(3, 3), False),
    ],
)
def test_layers_that_captum_gets_wrong_at_once_are_taken_one_by_one(layer, together):
    assert has_samplewise_rules(nn.Sequential(layer, nn.Flatten(), nn.Linear(4, 4))) is together


def test_shared_parameters_are_taken_one_by_one():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    assert not has_samplewise_rules(nn.Sequential(first, second))


def test_the_fast_method_sees_the_last_weight_alone(small):
    oracle = small.tracin(["2.weight"])[COUNT:, :COUNT]
    np.testing.assert_allclose(TracInCPFast().scores(small.setting), oracle, rtol=1e-9)
    np.testing.assert_allclose(TracInCPFastRandProj().scores(small.setting), oracle, rtol=1e-9)  # it fits as it is
    rough = TracInCPFastRandProj(projection_dim=64).scores(small.setting)
    assert np.corrcoef(rough.ravel(), oracle.ravel())[0, 1] > 0.5


def test_convolutions_and_frozen_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 10)).double()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[3].parameters(), lr=0.05)
    frozen = Small(model, image=True, optimizer=optimizer)
    oracle = frozen.tracin(["3.weight", "3.bias"])[COUNT:, :COUNT]
    np.testing.assert_allclose(TracInCP().scores(frozen.setting), oracle, rtol=1e-9)
    arnoldi = ArnoldiInfluenceFunction(arnoldi_dim=5).scores(frozen.setting)
    assert arnoldi.shape == (ASKED, COUNT)


def test_a_layer_that_is_partly_frozen_is_refused():
    model = mlp()
    model[2].bias.requires_grad_(False)
    partly = Small(model, optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05))
    with pytest.raises(ConfigurationError, match=r"one is partly frozen\. Got 2; expected layers"):
        TracInCP().scores(partly.setting)


def test_rates_know_momentum_and_units(small):
    assert small.setting.has_units
    assert small.setting.rates == pytest.approx([3 * 0.05 / COUNT] * 2)  # three batches of eight an epoch
    model = mlp()
    heavy = Small(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, dampening=0.5))
    assert heavy.setting.rates == pytest.approx([5 * 3 * 0.05 / COUNT] * 2)
    model = mlp()
    adam = Small(model, optimizer=torch.optim.Adam(model.parameters(), lr=0.01))
    assert not adam.setting.has_units
    assert not TracInCP().adds_up(adam.setting)
    assert TracInCP().adds_up(small.setting)
    assert not SimilarityInfluence().adds_up(small.setting)


def test_influence_functions_are_near_those_of_the_hessian():
    torch.manual_seed(0)
    model = nn.Linear(2, 2).double()
    inputs, targets = torch.randn(COUNT + ASKED, 2, dtype=DTYPE), torch.arange(COUNT + ASKED) % 2
    explainer = record(model, inputs, targets)
    dataset = TensorDataset(inputs[:COUNT], targets[:COUNT])
    setting = Setting.of(explainer, inputs[COUNT:], targets[COUNT:], dataset=dataset)

    def loss(flat, x, y):
        return F.cross_entropy(x @ flat[:4].reshape(2, 2).T + flat[4:], y, reduction="sum")

    at = torch.cat([model.weight.detach().flatten(), model.bias.detach()])
    hessian = torch.autograd.functional.hessian(lambda flat: loss(flat, inputs[:COUNT], targets[:COUNT]), at)
    rows = [torch.autograd.functional.jacobian(lambda f, x=x, y=y: loss(f, x[None], y[None]), at)
            for x, y in zip(inputs, targets, strict=True)]  # fmt: skip
    inverse = torch.linalg.pinv(hessian, rcond=1e-6)
    oracle = (torch.stack(rows) @ inverse @ torch.stack(rows).T).numpy()
    method = ArnoldiInfluenceFunction(arnoldi_dim=10)
    scores, own = method.scores(setting), method.self_influence(setting)
    # Captum drops the last vector of its basis, so that its H is never whole
    assert np.corrcoef(scores.ravel(), oracle[COUNT:, :COUNT].ravel())[0, 1] > 0.9
    assert np.corrcoef(own, oracle.diagonal()[:COUNT])[0, 1] > 0.9


def test_neighbours_are_those_of_another_library(small):
    with torch.no_grad():
        features = small.model[:2](small.inputs).numpy()
    oracle = cosine_similarity(features[COUNT:], features[:COUNT])
    np.testing.assert_allclose(NearestNeighbours().scores(small.setting), oracle, rtol=1e-9)
    np.testing.assert_allclose(SimilarityInfluence().scores(small.setting), oracle, rtol=1e-6)
    np.testing.assert_allclose(SimilarityInfluence(batch_size=7).scores(small.setting), oracle, rtol=1e-6)


def test_sizes_and_losses_are_those_of_a_loop(small):
    sizes = sum(small.gradients(t).norm(dim=1) for t in (1, 2)).numpy()[:COUNT]
    with torch.no_grad():
        losses = [float(F.cross_entropy(small.model(x[None]), y[None])) for x, y in small.dataset]
    for method, oracle in ((GradientNorm(batch_size=5), sizes), (TrainingLoss(batch_size=5), losses)):
        np.testing.assert_allclose(method.scores(small.setting), np.tile(oracle, (ASKED, 1)), rtol=1e-9)


def test_chance_has_a_seed(small):
    first, again, other = (Random(seed).scores(small.setting) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert first.shape == (ASKED, COUNT)
    assert not np.array_equal(first, other)


def test_bm25_by_hand(small):
    texts = ["the red hen and the red fox", "a fox", *["nothing"] * (COUNT - 2)]
    queries = ["RED fox!", "hen hen", "absent", "nothing"]
    scores = BM25(texts, queries).scores(small.setting)
    mean = (7 + 2 + COUNT - 2) / COUNT

    def weight(times, length, holders):
        idf = math.log(1 + (COUNT - holders + 0.5) / (holders + 0.5))
        return idf * times * 2.2 / (times + 1.2 * (0.25 + 0.75 * length / mean))

    assert scores[0, 0] == pytest.approx(weight(2, 7, 1) + weight(1, 7, 2))
    assert scores[0, 1] == pytest.approx(weight(1, 2, 2))
    assert scores[1, 0] == pytest.approx(2 * weight(1, 7, 1))
    assert not scores[2].any()
    assert not scores[:3, 2:].any()
    with pytest.raises(ConfigurationError, match="Got 0 and 0; expected 24 and 4"):
        BM25().scores(small.setting)


class Sequences(nn.Module):
    """A model without a Linear at its end."""

    def __init__(self):
        super().__init__()
        self.cell = nn.GRU(8, 10, batch_first=True)

    def forward(self, x):
        return self.cell(x.reshape(-1, 8, 8))[0][:, -1]


def test_a_model_that_does_not_end_in_a_linear_layer_is_refused_by_those_that_need_one():
    torch.manual_seed(0)
    odd = Small(Sequences().double())
    for method in (TracInCPFast(), TracInCPFastRandProj(), SimilarityInfluence(), NearestNeighbours()):
        with pytest.raises(ConfigurationError, match=r"the model has no Linear layer that runs\. Got Sequences"):
            method.scores(odd.setting)
    np.testing.assert_allclose(TracInCP().scores(odd.setting), odd.tracin()[COUNT:, :COUNT], rtol=1e-9)


def test_a_linear_layer_that_is_not_the_prediction_is_refused():
    torch.manual_seed(0)
    odd = Small(nn.Sequential(nn.Linear(64, 10), nn.Tanh()).double())
    with pytest.raises(ConfigurationError, match="what the last Linear layer returns is not the prediction"):
        TracInCPFast().scores(odd.setting)
    assert SimilarityInfluence().scores(odd.setting).shape == (ASKED, COUNT)


def test_what_captum_raises_is_said(small):
    setting = Setting.of(small.explainer, small.inputs[:1], [3], dataset=Wrong(small.dataset))
    with pytest.raises(ConfigurationError, match=r"Captum could not run it\. Got \w+: .*expected a model") as caught:
        TracInCPFast().scores(setting)
    assert caught.value.__cause__ is not None


def test_queries_are_asked_in_parts_that_fit_in_memory(small, monkeypatch):
    expected = TracInCP().scores(small.setting)
    each = small.setting.parameters * 2 * 8
    monkeypatch.setattr("pkexplain.baselines._captum_inputs.available_bytes", lambda device: 4.5 * each)
    np.testing.assert_allclose(TracInCP().scores(small.setting), expected, rtol=1e-9)
    monkeypatch.setattr("pkexplain.baselines._captum_inputs.available_bytes", lambda device: 1.5 * each)
    with pytest.raises(ConfigurationError, match="there is not enough memory"):
        TracInCP().scores(small.setting)


class Wrong(Dataset):
    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, position):
        return self.dataset[position][0], torch.zeros(3)


def test_nothing_random_and_nothing_of_the_users_is_changed(small):
    state, before = torch.get_rng_state(), [p.clone() for p in small.model.parameters()]
    for method in (TracInCP(), TracInCPFastRandProj(), ArnoldiInfluenceFunction(arnoldi_dim=4), SimilarityInfluence()):
        method.scores(small.setting)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before, small.model.parameters(), strict=True))
    assert not any(hasattr(p, "sample_grad") for p in small.model.parameters())


@pytest.mark.parametrize("form", ["numbered", "mapping", "nested mapping"])
def test_rows_come_in_several_forms(small, form):
    rows = {
        "numbered": [(i, x, y) for i, (x, y) in enumerate(small.dataset)],
        "mapping": [{"0": x.numpy(), "label": int(y), "other": "text"} for x, y in small.dataset],
        "nested mapping": [({"0": x}, y) for x, y in small.dataset],
    }[form]
    setting = Setting.of(small.explainer, small.inputs[COUNT:], small.targets[COUNT:], dataset=rows)
    (values, targets) = (setting.rows[3][0], setting.rows[3][1])
    assert torch.equal(values, small.inputs[3])
    assert int(targets) == int(small.targets[3])


def test_what_does_not_fit_is_refused(small):
    x, y = small.inputs[COUNT:], small.targets[COUNT:]
    with pytest.raises(QueryError, match=r"there must be one for each query\. Got shape \(3,\); expected 4 targets"):
        Setting.of(small.explainer, x, y[:3], dataset=small.dataset)
    with pytest.raises(ConfigurationError, match="Got 5 examples; expected 24"):
        Setting.of(small.explainer, x, y, dataset=[small.dataset[0]] * 5)
    with pytest.raises(ConfigurationError, match="its rows have no target"):
        Setting.of(small.explainer, x, y, dataset=[{"0": 1}] * COUNT)
    with pytest.raises(ConfigurationError, match=r"its rows are not inputs and a target\. Got Tensor"):
        Setting.of(small.explainer, x, y, dataset=small.inputs[:COUNT])
