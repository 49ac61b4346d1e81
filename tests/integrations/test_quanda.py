"""Contributions under quanda's interface, judged by its own metrics."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

import pkexplain as pk
from pkexplain.errors import ConfigurationError, MissingDependencyError, ModelMismatchError
from tests.conftest import RecordedTraining, mlp

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what quanda imports warns of its own doing
    from pkexplain.integrations.quanda import PathKernelExplainer

    quanda = importlib.import_module("quanda") if importlib.util.find_spec("quanda") else None

needs_quanda = pytest.mark.skipif(quanda is None, reason="quanda is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # quanda's own, and those of Lightning


@pytest.fixture(scope="module")
def dataset(run):
    return TensorDataset(run.inputs[: run.examples], run.targets[: run.examples])


@pytest.mark.skipif(quanda is not None, reason="quanda is installed")
def test_without_quanda_it_says_how_to_install_it(run, dataset):
    with pytest.raises(MissingDependencyError, match="pip install quanda"):
        PathKernelExplainer(run.model, dataset, run.store)


@needs_quanda
def test_it_takes_what_quandas_own_explainers_take():
    theirs = quanda.Explainer
    assert issubclass(PathKernelExplainer, theirs)
    for method in ("explain", "self_influence"):
        ours = inspect.signature(getattr(PathKernelExplainer, method)).parameters
        assert list(ours) == list(inspect.signature(getattr(theirs, method)).parameters)
    ours = inspect.signature(PathKernelExplainer.__init__).parameters
    assert set(inspect.signature(theirs.__init__).parameters) - {"kwargs"} <= set(ours)


@needs_quanda
@pytest.mark.parametrize("kind", [list, torch.tensor])
@pytest.mark.parametrize(("output", "reading"), [(pk.LogProbability, "path"), (pk.Margin, "removal")])
def test_scores_are_the_contributions(run, dataset, kind, output, reading):
    explainer = PathKernelExplainer(run.model, dataset, run.store, output=output, reading=reading)
    scores = explainer.explain(test_data=run.queries[:5], targets=kind(run.answers[:5].tolist()))
    plain = pk.Explainer(run.store, run.model)
    expected = plain.contributions(run.queries[:5], output=output(run.answers[:5]), reading=reading)
    assert (scores.dtype, scores.shape) == (torch.float32, (5, 240))
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-6, atol=1e-9)


@needs_quanda
def test_self_influence_is_the_diagonal_that_quanda_would_take(run, dataset):
    explainer = PathKernelExplainer(run.model, dataset, run.store)
    ours, theirs = explainer.self_influence(batch_size=50), quanda.Explainer.self_influence(explainer, batch_size=50)
    np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-4, atol=1e-6)
    assert explainer.self_influence() is ours


@needs_quanda
def test_class_detection_counts_the_strongest_proponents_of_the_same_class(run, dataset):
    explainer = PathKernelExplainer(run.model, dataset, run.store)
    metric = quanda.ClassDetectionMetric(run.model, dataset, s=5)
    for some in torch.arange(len(run.queries)).split(20):
        scores = explainer.explain(run.queries[some], run.answers[some])
        metric.update(scores, run.answers[some])
    plain = pk.Explainer(run.store, run.model)
    contributions = plain.contributions(run.queries, output=pk.LogProbability(run.answers))
    top = np.argsort(-contributions, axis=1)[:, :5]
    expected = (run.targets.numpy()[top] == run.answers.numpy()[:, None]).mean()
    assert metric.compute()["score"] == pytest.approx(expected, abs=1e-6)
    assert expected > 0.5  # chance is 0.1


@needs_quanda
def test_mislabelling_detection_makes_the_explainer_itself():
    training = RecordedTraining(mlp(dtype=torch.float64), examples=240, projection=pk.Identity())
    flipped, mask = pk.evaluation.flip_labels(training.targets.numpy(), fraction=0.1, classes=10, seed=0)
    training.targets = torch.as_tensor(flipped)
    training.train(epochs=30, size=24)
    dataset, wrong = TensorDataset(training.inputs, training.targets), np.flatnonzero(mask).tolist()
    metric = quanda.MislabelingDetectionMetric(
        training.model,
        dataset,
        wrong,
        explainer_cls=PathKernelExplainer,
        expl_kwargs={"run": training.store, "output": pk.Margin, "reading": "removal"},
    )
    found = metric.compute()
    own = pk.Explainer(training.store, training.model).self_contributions(
        training.inputs, range(240), output=pk.Margin(training.targets)
    )
    order = np.argsort(-(own + 1e-4 * np.arange(240)), kind="stable")  # quanda adds the row number to break ties
    curve = np.isin(order, wrong).cumsum() / len(wrong)
    assert found["score"] == pytest.approx(np.trapezoid(curve) / 240, abs=1e-6)
    assert found["score"] > 0.7  # chance is 0.5


@needs_quanda
def test_weights_that_were_not_recorded_are_refused(run, dataset, tmp_path):
    torch.save(run.model.state_dict(), tmp_path / "trained.pt")
    randomised, trained = copy.deepcopy(run.model), str(tmp_path / "trained.pt")
    with pytest.raises(ConfigurationError, match="ModelRandomizationMetric cannot be used"):
        quanda.ModelRandomizationMetric(
            randomised,
            "digits",
            str(tmp_path),
            dataset,
            trained,
            PathKernelExplainer,
            expl_kwargs={"run": run.store},
        )
    other = copy.deepcopy(run.model)
    with torch.no_grad():
        next(other.parameters()).mul_(2)
    with pytest.raises(ConfigurationError, match="not those that the run ended with"):
        PathKernelExplainer(other, dataset, run.store)
    PathKernelExplainer(other, dataset, run.store, checkpoints=trained)
    with pytest.raises(ModelMismatchError):
        PathKernelExplainer(torch.nn.Linear(64, 10), dataset, run.store)


@needs_quanda
def test_another_data_set_or_task_is_refused(run, dataset):
    with pytest.raises(ConfigurationError, match="the data set is not the one that was recorded"):
        PathKernelExplainer(run.model, TensorDataset(run.queries, run.answers), run.store)
    with pytest.raises(ValueError, match="Task causal_lm not supported"):
        PathKernelExplainer(run.model, dataset, run.store, task="causal_lm")


@needs_quanda
def test_columns_that_the_model_was_not_given_are_left_out(run, dataset):
    class Named(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp(dtype=torch.float64)

        def forward(self, pixels):
            return self.inner(pixels)

    model, x, y = Named(), run.inputs[:24].double(), run.targets[:24]
    store, optimizer = pk.MemoryStore(), torch.optim.SGD(model.parameters(), lr=0.1)
    with pk.Recorder(store, model, optimizer, num_examples=24, dtype=torch.float64) as recorder:
        for _ in range(3):
            with recorder.step(range(24)):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(pixels=x), y).backward()
                optimizer.step()
    explainer = PathKernelExplainer(model, TensorDataset(x, y), store, task="text_classification")
    scores = explainer.explain({"pixels": x[:3], "idx": torch.arange(3)}, y[:3])
    expected = pk.Explainer(store, model).contributions({"pixels": x[:3]}, output=pk.LogProbability(y[:3]))
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-9, atol=1e-12)
