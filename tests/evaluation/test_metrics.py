"""The metrics against scipy, scikit-learn and plain loops, and on models that are really trained again."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import roc_auc_score
from torch import nn

import pkexplain as pk
from pkexplain.errors import EvaluationError
from pkexplain.evaluation import figures
from pkexplain.evaluation._statistics import correlations, draw_weights, roc_areas
from tests.conftest import digits

ev = pk.evaluation
RANDOM = np.random.default_rng(0)
COUNT, QUERIES = 60, 12
INPUTS, LABELS = digits(COUNT + QUERIES)
PIXELS = INPUTS[:, 20:26]
RIDGE = 1.0


def gram(ids):
    x = PIXELS[ids]
    return x.T @ x + RIDGE * torch.eye(x.shape[1], dtype=x.dtype)


def model_of(weights):
    model = nn.Linear(len(weights), 1, bias=False).double()
    model.weight.data = weights[None].clone()
    return model


class Ridge:
    """Closed-form ridge regression of the label; counts how often it is called, and can be killed."""

    def __init__(self, noise=0.0, kill_after=None):
        self.calls, self.noise, self.kill_after = 0, noise, kill_after

    def __call__(self, ids, seed):
        if self.calls == self.kill_after:
            raise KeyboardInterrupt
        self.calls += 1
        assert ids.dtype == np.int64
        assert (np.diff(ids) > 0).all()
        weights = torch.linalg.solve(gram(ids), PIXELS[ids].T @ LABELS[ids].double())
        return model_of(weights + self.noise * torch.tensor(np.random.default_rng(seed).normal(size=len(weights))))


def additive(ids, seed):
    """A model whose output is a sum over its training examples."""
    return model_of(PIXELS[ids].T @ LABELS[ids].double())


def judge(retrain, **options):
    options = {"output": pk.Value(), "num_examples": COUNT, **options}
    return ev.Retraining(retrain, PIXELS[COUNT:], **options)


def additive_contributions():
    return (PIXELS[COUNT:] @ (PIXELS[:COUNT] * LABELS[:COUNT, None]).T).numpy()


def ridge_leave_one_out():
    """f(all) − f(without i) = x·A⁻¹ x_i (y_i − f(x_i)) / (1 − h_i), the textbook formula."""
    everything = np.arange(COUNT)
    inverse = torch.linalg.inv(gram(everything))
    x, y = PIXELS[:COUNT], LABELS[:COUNT].double()
    residual = y - x @ inverse @ x.T @ y
    leverage = torch.tensor([float(row @ inverse @ row) for row in x])
    return (PIXELS[COUNT:] @ inverse @ x.T * (residual / (1 - leverage))).numpy()


@pytest.mark.parametrize("ties", [False, True])
def test_correlations_are_those_of_the_resampled_units(ties):
    x, y = RANDOM.normal(size=(2, 30))
    x = x.round() if ties else x
    weights = draw_weights(30, 20, 1)
    for column, ranked, plain in ((c, r, spearmanr if r else pearsonr) for c in range(20) for r in (False, True)):
        drawn = np.repeat(np.arange(30), weights[:, column].astype(int))
        found = correlations(x, y, weights, ranked=ranked)[column]
        assert found == pytest.approx(plain(x[drawn], y[drawn])[0], abs=1e-12)


def test_score_is_scipys_and_compares_pairs():
    masks = RANDOM.random((25, 40)) < 0.5
    repeats, contributions = RANDOM.normal(size=(4, 25, 3)), RANDOM.normal(size=(3, 40))
    outputs = ev.SubsetOutputs(masks, repeats)
    score = ev.linear_datamodelling_score(contributions, outputs, resamples=50)
    for q in range(3):
        sums = [sum(contributions[q, i] for i in range(40) if mask[i]) for mask in masks]
        assert score.per_query[q] == pytest.approx(spearmanr(sums, repeats.mean(0)[:, q])[0])
    halves = [spearmanr(repeats[:2].mean(0)[:, q], repeats[2:].mean(0)[:, q])[0] for q in range(3)]
    assert outputs.agreement == pytest.approx(np.mean(halves))
    assert score.minus(score).high == 0.0
    other = ev.linear_datamodelling_score(contributions, outputs, resamples=50, seed=1)
    with pytest.raises(EvaluationError, match="not of the same subset outputs and resamples"):
        score.minus(other)
    assert "25 subsets" in str(score)


def test_additive_outputs_score_one_and_shuffled_contributions_nothing():
    outputs = ev.retrain_subsets(judge(additive), count=60)
    contributions = additive_contributions()
    score = ev.linear_datamodelling_score(contributions, outputs)
    assert score.mean.low == pytest.approx(1.0, abs=1e-3)  # pixels are integers: rounding parts sums that tie
    shuffled = contributions[:, RANDOM.permutation(COUNT)]
    assert abs(ev.linear_datamodelling_score(shuffled, outputs).mean.value) < 0.3
    assert outputs.ceiling is None


def test_leave_one_out_of_ridge_is_the_closed_form():
    left_out = ev.leave_one_out(judge(Ridge()), range(0, 60, 3))
    exact = ridge_leave_one_out()
    np.testing.assert_allclose(left_out.differences, exact[:, ::3], atol=1e-10)
    found = ev.leave_one_out_correlation(exact, left_out)
    assert found.pearson.low == pytest.approx(1.0)
    shuffled = exact[:, RANDOM.permutation(COUNT)]
    assert ev.leave_one_out_correlation(shuffled, left_out).pearson.value < 0.5
    assert "20 examples left out" in str(found)


def test_removal_is_that_of_plain_loops():
    retrain = Ridge(noise=0.01)
    exact = ridge_leave_one_out()
    removal = ev.subset_removal(judge(retrain), {"exact": exact, "again": exact}, counts=(3,), seeds=(0, 1))
    assert retrain.calls == 2 * (1 + len({tuple(sorted(np.argsort(-row)[:3])) for row in exact}))
    for q in range(QUERIES):
        rest = np.sort(np.argsort(-exact[q])[3:])
        x = PIXELS[COUNT + q]
        drops = [Ridge(0.01)(np.arange(COUNT), s)(x) - Ridge(0.01)(rest, s)(x) for s in (0, 1)]
        assert removal.drops[0, 0, q] == pytest.approx(sum(drops).item() / 2)
    assert removal.means["exact"][0].low > 0.0
    assert removal.flips is None
    assert "left out" in str(removal)


def test_detection_is_scikit_learns_and_averages_ties():
    labels = RANDOM.integers(0, 5, size=200)
    flipped, mask = ev.flip_labels(labels, classes=5)
    assert mask.sum() == 20
    assert ((flipped != labels) == mask).all()
    scores = (RANDOM.normal(size=200) + mask).round(1)
    found = ev.mislabel_detection(scores, mask, resamples=200)
    assert found.auroc.value == pytest.approx(roc_auc_score(mask, scores))
    assert found.auroc.low < found.auroc.value < found.auroc.high
    assert len(roc_areas(scores, mask, 5, 0)) == 5
    orders = [np.argsort(-scores + 1e-6 * RANDOM.random(200)) for _ in range(2000)]
    np.testing.assert_allclose(found.found[1:], np.mean([mask[o].cumsum() / 20 for o in orders], 0), atol=0.02)
    assert ev.mislabel_detection(scores, np.flatnonzero(mask)).precision == found.precision == found.found[20]
    assert "20 of 200" in str(found)


def test_an_interrupted_evaluation_goes_on(tmp_path):
    killed, rest = Ridge(0.1, kill_after=7), Ridge(0.1)
    with pytest.raises(KeyboardInterrupt):
        ev.retrain_subsets(judge(killed, kept=tmp_path), count=10, seeds=2)
    resumed = ev.retrain_subsets(judge(rest, kept=tmp_path, backwards=True), count=10, seeds=2)
    assert rest.calls == 21 - 7
    whole = ev.retrain_subsets(judge(Ridge(0.1)), count=10, seeds=2)
    np.testing.assert_array_equal(resumed.repeats, whole.repeats)
    assert 0.0 < (resumed.ceiling or 0.0) <= 1.0
    victim = sorted(tmp_path.glob("?" * 32 + ".json"))[0]
    victim.write_text(victim.read_text()[:-9])
    again = Ridge(0.1)
    with pytest.warns(RuntimeWarning, match=re.escape(victim.name)):
        ev.retrain_subsets(judge(again, kept=tmp_path), count=10, seeds=2)
    assert again.calls == 1
    with pytest.raises(EvaluationError, match=r"it holds answers of another setting \(output\)"):
        judge(Ridge(), kept=tmp_path, output=pk.Loss(LABELS[COUNT:], nn.functional.mse_loss))


def subset_outputs():
    return ev.SubsetOutputs(RANDOM.random((12, 8)) < 0.5, RANDOM.normal(size=(1, 12, 2)))


def constant_outputs():
    return ev.SubsetOutputs(RANDOM.random((12, 8)) < 0.5, np.ones((1, 12, 2)))


@pytest.mark.parametrize(
    ("ask", "text"),
    [
        (lambda: ev.retrain_subsets(judge(Ridge()), count=9), "too few subsets for an interval. Got 9; expected 10"),
        (lambda: ev.retrain_subsets(judge(lambda i, s: model_of(PIXELS[0]))), "so it ignores them"),
        (lambda: ev.retrain_subsets(judge(Ridge()), seeds=2), "so it ignores its seed"),
        (lambda: ev.retrain_subsets(judge(lambda i, s: None)), "it did not return a model. Got NoneType"),
        (lambda: ev.retrain_subsets(judge(lambda i, s: model_of(PIXELS[0] * torch.nan))), "12 of 12, queries [0, 1"),
        (lambda: judge(Ridge(), output=pk.Margin()), "Pass output=pkexplain.Margin(labels)"),
        (lambda: ev.linear_datamodelling_score(np.ones((2, 7)), subset_outputs()), "Got shape (2, 7)"),
        (lambda: ev.linear_datamodelling_score(np.zeros((2, 8)), subset_outputs()), "2 of 2 queries: [0, 1]"),
        (lambda: ev.linear_datamodelling_score(np.eye(2, 8), constant_outputs()), "the same for all subsets"),
        (lambda: ev.linear_datamodelling_score(np.full((2, 8), np.nan), subset_outputs()), "at (0, 0), (0, 1)"),
        (lambda: ev.leave_one_out(judge(Ridge()), [1, 1]), "ids are repeated. Got [1]"),
        (lambda: ev.leave_one_out(judge(Ridge()), [60]), "ids are out of range. Got [60]"),
        (lambda: ev.subset_removal(judge(Ridge()), {"a": [[0]]}, counts=[60]), "Got [60]; expected 1 to 59"),
        (lambda: ev.mislabel_detection([1.0, 2.0], [True, True]), "all are mislabelled"),
        (lambda: ev.mislabel_detection([1.0, 2.0], [False, False]), "none are mislabelled"),
        (lambda: ev.mislabel_detection([1.0, np.inf], [0]), "1 that are not, at 1"),
        (lambda: ev.flip_labels([0, 1], fraction=0.0), "none or all would change"),
    ],
)
def test_what_cannot_be_judged_is_refused(ask, text):
    with pytest.raises(EvaluationError, match=re.escape(text)):
        ask()


def test_figures_show_the_results():
    outputs = ev.retrain_subsets(judge(Ridge(0.1)), count=10, seeds=2)
    score = ev.linear_datamodelling_score(additive_contributions(), outputs, resamples=20)
    assert [t.get_text() for t in figures.plot_scores({"a": score}).get_yticklabels()] == [f"a  {score.mean.value:.3f}"]
    detection = ev.mislabel_detection(RANDOM.normal(size=30), [1, 5], resamples=20)
    np.testing.assert_array_equal(figures.plot_detection({"a": detection}).lines[0].get_ydata(), detection.found)
    left_out = ev.leave_one_out(judge(Ridge()), range(10))
    points = figures.plot_leave_one_out(ridge_leave_one_out(), left_out, query=2).collections[0].get_offsets()
    np.testing.assert_allclose(np.asarray(points)[:, 1], left_out.differences[2])
    removal = ev.subset_removal(judge(Ridge(0.1)), {"a": ridge_leave_one_out()}, counts=(1, 3), seeds=(0, 1))
    assert figures.plot_removal(removal).get_xlabel() == "examples left out"
