"""Contributions under Captum's interface: one line of a Captum script changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from captum.influence import DataInfluence, TracInCP
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pkexplain as pk
from pkexplain.baselines import Setting
from pkexplain.errors import ConfigurationError
from pkexplain.integrations.captum import PathKernelInfluence

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Captum's own


@pytest.fixture(scope="module")
def dataset(run):
    return TensorDataset(run.inputs[: run.examples], run.targets[: run.examples])


@pytest.fixture(scope="module")
def influence(run, dataset):
    return PathKernelInfluence(run.model, dataset, run.store, loss_fn=nn.CrossEntropyLoss())


@pytest.fixture(scope="module")
def oracle(run):
    explainer = pk.Explainer(run.store, run.model)
    return -explainer.contributions(run.queries[:5], output=pk.Loss(run.answers[:5]))


def test_one_line_of_a_captum_script_changes(run, dataset):
    setting = Setting.of(pk.Explainer(run.store, run.model), run.queries[:1], run.answers[:1], dataset=dataset)

    def load(model, checkpoint):
        setting.load(model, int(checkpoint))
        return 0.05

    model, loss = setting.copy_model(), nn.CrossEntropyLoss(reduction="sum")
    answers = []
    for made in (
        TracInCP(model, dataset, ["1", "2"], load, loss_fn=loss, batch_size=64, sample_wise_grads_per_batch=True),
        PathKernelInfluence(model, dataset, run.store, loss_fn=loss, batch_size=64),
    ):
        assert isinstance(made, DataInfluence)
        scores = made.influence((run.queries[:3], run.answers[:3]))
        top = made.influence((run.queries[:3], run.answers[:3]), k=4, proponents=True)
        assert scores.shape == (3, 240)
        assert top.indices.shape == top.influence_scores.shape == (3, 4)
        answers.append(scores.double().numpy())
    assert np.corrcoef(answers[0][0], answers[1][0])[0, 1] > 0.7


def test_scores_are_the_contributions_to_minus_the_loss(run, influence, oracle):
    scores = influence.influence((run.queries[:5], run.answers[:5]))
    np.testing.assert_allclose(scores.numpy(), oracle, rtol=1e-6, atol=1e-9)
    loader = DataLoader(TensorDataset(run.queries[:5], run.answers[:5]), batch_size=2)
    np.testing.assert_allclose(influence.influence(loader).numpy(), oracle, rtol=1e-4, atol=1e-7)
    total = influence.influence((run.queries[:5], run.answers[:5]), aggregate=True)
    np.testing.assert_allclose(total.numpy(), oracle.sum(0, keepdims=True), rtol=1e-4, atol=1e-7)
    assert influence.get_name() == "PathKernelInfluence"


@pytest.mark.parametrize("proponents", [True, False])
def test_the_first_k_are_in_order(run, influence, oracle, proponents):
    found = influence.influence((run.queries[:5], run.answers[:5]), k=6, proponents=proponents)
    order = np.argsort(-oracle if proponents else oracle, axis=1)[:, :6]
    np.testing.assert_array_equal(found.indices.numpy(), order)
    np.testing.assert_allclose(
        found.influence_scores.numpy(), np.take_along_axis(oracle, order, 1), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize(
    "loss",
    [
        None,
        nn.CrossEntropyLoss(reduction="none"),
        nn.functional.cross_entropy,
        lambda prediction, targets: nn.functional.cross_entropy(prediction, targets, reduction="none"),
    ],
)
def test_every_kind_of_loss_that_captum_takes(run, dataset, oracle, loss):
    made = PathKernelInfluence(run.model, dataset, pk.Explainer(run.store, run.model), loss_fn=loss)
    np.testing.assert_allclose(made.influence((run.queries[:5], run.answers[:5])).numpy(), oracle, rtol=1e-6, atol=1e-9)


def test_self_influence_is_each_examples_contribution_to_its_own_loss(run, influence, dataset):
    own = influence.self_influence()
    assert own.shape == (240,)
    x, y = dataset[:3]
    expected = -influence.explainer.contributions(x, output=pk.Loss(y))[:, :3].diagonal()
    np.testing.assert_allclose(own[:3].numpy(), expected, rtol=1e-3, atol=1e-5)
    last = -influence.explainer.contributions(dataset[239][0], output=pk.Loss(dataset[239][1]))
    assert float(own[239]) == pytest.approx(last[0, 239], rel=1e-3)
    with pytest.raises(ConfigurationError, match="only training examples contributed to training"):
        influence.self_influence((x, y))


def test_another_training_set_is_refused(run, dataset):
    with pytest.raises(ConfigurationError, match=r"Got 3 examples; expected 240"):
        PathKernelInfluence(run.model, torch.utils.data.Subset(dataset, range(3)), run.store)
