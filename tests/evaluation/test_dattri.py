"""The recipe for dattri's metrics, as the documentation prints it: they agree with ours on a recorded run."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import pkexplain as pk
from tests.conftest import RecordedTraining, batches, mlp

metric = pytest.importorskip("dattri.metric")
ev = pk.evaluation
COUNT, QUERIES, EPOCHS = 48, 6, 4


def recipe():
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    section = page.partition("## With dattri's metrics")[2]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]


@pytest.fixture(scope="module")
def judged():
    """A run on digits of which some are mislabelled, and models retrained as it was."""
    training = RecordedTraining(examples=COUNT, queries=QUERIES)
    flipped, mask = ev.flip_labels(training.targets[:COUNT].numpy(), fraction=0.2, classes=10, seed=0)
    training.targets[:COUNT] = torch.as_tensor(flipped)
    training.train(EPOCHS)

    def retrain(ids, seed):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for batch in batches(COUNT, 8, EPOCHS):
            some = [i for i in batch if i in ids]
            if some:
                optimizer.zero_grad()
                (F.cross_entropy(model(training.inputs[some]), training.targets[some], reduction="sum") / 8).backward()
                optimizer.step()
        return model

    output = pk.LogProbability(training.answers)
    judge = ev.Retraining(retrain, training.queries, output=output, num_examples=COUNT)
    explainer = pk.Explainer(training.store, training.model)
    inputs, own = training.inputs[:COUNT], pk.Margin(flipped)
    return {
        "torch": torch,
        "np": np,
        "contributions": explainer.contributions(training.queries, output=output),
        "outputs": ev.retrain_subsets(judge, count=12, fraction=0.5, seeds=1),
        "left_out": ev.leave_one_out(judge, ids=[40, 3, 17, 8, 21, 30, 1, 2, 11, 25, 33, 46], seed=0),
        "scores": explainer.self_contributions(inputs, range(COUNT), output=own),
        "mask": mask,
        "retrain": retrain,
        "training": training,
    }


@pytest.fixture(scope="module")
def found(judged):
    names = dict(judged)
    exec(recipe(), names)
    return names


def test_the_datamodelling_score_is_ours(judged, found):
    ours = ev.linear_datamodelling_score(judged["contributions"], judged["outputs"])
    np.testing.assert_allclose(found["lds_per_query"], ours.per_query, rtol=1e-9)
    assert ours.mean.value > 0.2


def test_the_leave_one_out_correlation_is_ours(judged, found):
    ours = ev.leave_one_out_correlation(judged["contributions"], judged["left_out"])
    np.testing.assert_allclose(found["loo_per_query"], ours.pearson_per_query, rtol=1e-9)
    assert ours.pearson.value > 0.2


def test_the_area_of_mislabel_detection_is_ours(judged, found):
    ours = ev.mislabel_detection(judged["scores"], judged["mask"])
    assert float(found["area"]) == pytest.approx(ours.auroc.value, abs=1e-6)
    assert ours.auroc.value > 0.6


def test_the_signs_are_those_of_dattris_own_ground_truth(judged, found, tmp_path):
    """Models that dattri's layout holds, judged by its own functions with the cross-entropy as the target."""
    training, retrain, outputs, left_out = (judged[name] for name in ("training", "retrain", "outputs", "left_out"))
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(training.queries, training.answers), batch_size=QUERIES
    )
    folders = {}
    for at, mask in enumerate(outputs.masks):
        folder = tmp_path / "lds" / str(at)
        folder.mkdir(parents=True)
        torch.save(retrain(np.flatnonzero(mask), 0).state_dict(), folder / "model_weights_0.pt")
        (folder / "indices.txt").write_text("\n".join(map(str, np.flatnonzero(mask))))
        folders[at] = str(folder)
    about = {"num_subsets": len(folders), "num_runs_per_subset": 1, "subset_dir_map": folders}
    yaml = pytest.importorskip("yaml")
    (tmp_path / "lds" / "metadata.yml").write_text(yaml.safe_dump(about))

    def loss(file, loader):
        model = mlp()
        model.load_state_dict(torch.load(file, weights_only=True))
        ((x, y),) = loader
        with torch.no_grad():
            return F.cross_entropy(model(x), y, reduction="none")

    truth = metric.calculate_lds_ground_truth(loss, tmp_path / "lds", loader)
    np.testing.assert_allclose(truth[0], outputs.repeats[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metric.lds(found["attributions"], truth)[0], found["lds_per_query"], rtol=1e-9)

    differences = []
    for left in left_out.ids:
        torch.save(retrain(np.delete(np.arange(COUNT), left), 0).state_dict(), tmp_path / "without.pt")
        differences.append(loss(tmp_path / "without.pt", loader))
    without = torch.stack(differences), found["removed"]  # what calculate_loo_ground_truth returns of these models
    values, _ = metric.loo_corr(found["attributions"][found["removed"]], without)
    np.testing.assert_allclose(values, found["loo_per_query"], rtol=1e-9)
