"""Methods side by side: the numbers, the table, the figure, the panel, the command."""

from __future__ import annotations

import html
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn
from torch.utils.data import TensorDataset
from typer.testing import CliRunner

import pkexplain as pk
from pkexplain.baselines import Baseline, NearestNeighbours, Random, Setting, TracInCP, TracInCPFast
from pkexplain.baselines.compare import BASELINES, choose_baselines
from pkexplain.cli import app
from pkexplain.errors import ConfigurationError, QueryError
from pkexplain.results import plots
from pkexplain.results.comparison import rank_correlation, top_overlap
from pkexplain.results.numbers import size, wall_time

PAGE = Path(__file__).parents[2] / "docs" / "comparing.md"
SOURCE = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
from tests.conftest import digits

def build():
    return nn.Sequential(nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))

def load():
    return TensorDataset(*(part[:96] for part in digits(96, torch.float32)))
"""


class Constant(Baseline):
    """The same score for all."""

    name = "constant"

    def prepare(self, setting):
        return lambda: np.ones((len(setting.queries), len(setting.rows)))


class Broken(Constant):
    """Scores of another shape."""

    name = "broken"

    def prepare(self, setting):
        return lambda: np.ones((1, 2))


@pytest.fixture(scope="module")
def asked(run):
    dataset = TensorDataset(run.inputs[: run.examples], run.targets[: run.examples])
    return pk.Explainer(run.store, run.model), run.queries[:6], run.answers[:6], dataset


@pytest.fixture(scope="module")
def comparison(asked):
    explainer, x, targets, dataset = asked
    return pk.compare(explainer, x, targets, dataset=dataset, k=7, metrics={"largest": lambda s: s.max()})


def test_the_path_reading_comes_first_and_adds_up(asked, comparison):
    explainer, x, targets, _ = asked
    path = comparison.methods[0]
    assert path.name == "path reading"
    expected = explainer.contributions(x, output=pk.Loss(targets))
    np.testing.assert_allclose(path.scores, -expected, rtol=1e-4, atol=1e-7)
    assert path.gap < 1e-6
    assert (path.overlap, path.rank_correlation) == (1.0, pytest.approx(1.0))
    assert (comparison.num_queries, comparison.num_examples) == (6, 240)


def test_changes_and_gaps_are_those_of_the_model(run, asked, comparison):
    explainer, x, targets, dataset = asked
    with torch.no_grad():
        final = nn.functional.cross_entropy(run.model(x), targets, reduction="none")
        start = nn.Sequential(nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))
        for parameter, value in zip(start.parameters(), run.start, strict=True):
            parameter.copy_(value)
        changes = (nn.functional.cross_entropy(start(x), targets, reduction="none") - final).double().numpy()
    np.testing.assert_allclose(comparison.changes, changes, rtol=1e-4)
    scores = TracInCP().scores(Setting.of(explainer, x, targets, dataset=dataset))
    gaps = [abs(sum(row) - change) / abs(change) for row, change in zip(scores, changes, strict=True)]
    assert comparison["TracInCP"].gap == pytest.approx(np.median(gaps), rel=1e-3)
    assert math.isnan(comparison["nearest neighbours"].gap)


def first_seven(scores):
    return np.argsort(-scores, kind="stable")[:7].tolist()


def test_agreement_is_that_of_plain_loops(comparison):
    scores = [method.scores for method in comparison.methods]
    for a, first in enumerate(scores):
        for b, second in enumerate(scores):
            pairs = list(zip(first, second, strict=True))
            shared = [
                len({*np.argsort(-p, kind="stable")[:7]} & {*np.argsort(-q, kind="stable")[:7]}) for p, q in pairs
            ]
            assert comparison.overlaps[a, b] == pytest.approx(np.mean(shared) / 7)
            expected = np.mean([spearmanr(p, q)[0] for p, q in pairs])
            assert comparison.rank_correlations[a, b] == pytest.approx(expected, abs=1e-9)
    names = [method.name for method in comparison.methods]
    assert names[:2] == ["path reading", "removal reading"]
    assert comparison["TracInCP"].overlap == comparison.overlaps[names.index("TracInCP"), 0]
    assert comparison["TracInCP"].rank_correlation > 0.5


def test_ties_share_their_rank_and_a_constant_has_none():
    scores = np.array([[3.0, 1.0, 1.0, 2.0, 1.0]]), np.array([[1.0, 5.0, 2.0, 2.0, 0.0]])
    assert rank_correlation(scores)[0, 1] == pytest.approx(spearmanr(scores[0][0], scores[1][0])[0])
    found = rank_correlation([scores[0], np.ones((1, 5))])
    assert math.isnan(found[0, 1])
    assert found[0, 0] == pytest.approx(1.0)
    assert top_overlap(scores, 9)[0, 1] == 1.0


def test_every_method_runs_and_says_what_it_took(comparison):
    assert [m.name for m in comparison.methods[1:] if m.name != "removal reading"] == [b.name for b in BASELINES]
    assert {each.name for each in comparison.left_out} <= {"removal reading"}
    for method in comparison.methods:
        assert 0 < method.query_seconds < math.inf
        assert 0 < method.setup_seconds < math.inf
        assert 0 <= method.peak_bytes < math.inf
        assert method.metrics == {"largest": method.scores.max()}
    with pytest.raises(KeyError, match="'nothing'; there are 'path reading', "):
        comparison["nothing"]


def test_what_cannot_be_used_is_left_out_with_the_reason(asked):
    explainer, x, targets, dataset = asked
    found = pk.compare(
        explainer, x, targets, dataset=dataset, baselines=[Broken(), Constant(), TracInCPFast(layer="9")]
    )
    reasons = {each.name: each.reason for each in found.left_out}
    assert "its scores cannot be compared. Got shape (1, 2); expected numbers, (6, 240)" in reasons["broken"]
    assert "no such layer runs. Got 9" in reasons["TracInCPFast"]
    assert math.isnan(found["constant"].rank_correlation)
    shown = str(found)
    assert "Left out:" in shown
    assert "no such layer runs" in shown
    assert len(plots.plot_comparison(found).axes) == 4


def test_one_query_is_a_batch_of_one(asked):
    explainer, x, targets, dataset = asked
    one = pk.compare(explainer, x[2], targets[2], dataset=dataset, baselines=[Random(), NearestNeighbours()])
    assert one.methods[0].scores.shape == (1, 240)
    assert "of 1 query." in str(one)


def test_the_table_shows_every_method(comparison):
    shown = str(comparison)
    for text in ("top 7", "TracInCPFastRandProj", "ArnoldiInfluenceFunction", "largest", "by chance 2.9%"):
        assert text in shown
    assert wall_time(0.0123) == "12.3 ms"
    assert wall_time(2.5) == "2.50 s"
    assert wall_time(4e-6) == "4.00 µs"
    assert (size(3 * 2**20), size(math.nan)) == ("3 MiB", "–")


def test_the_figure_holds_the_numbers(comparison):
    figure = plots.plot_comparison(comparison)
    matrix, overlaps, times, _ = figure.axes
    assert len(matrix.texts) == len(comparison.methods) ** 2
    assert [bar.get_width() for bar in overlaps.patches] == [method.overlap for method in comparison.methods]
    assert times.patches[0].get_width() == pytest.approx(1e3 * comparison.methods[0].query_seconds)


def test_the_report_has_a_panel(asked, comparison, tmp_path):
    explainer, x, _, dataset = asked
    explanation = explainer.explain(x[0])
    text = pk.write_report(explanation, tmp_path / "with.html", dataset=dataset, comparison=comparison).read_text(
        "utf-8"
    )
    text = html.unescape(text)
    assert "Other methods on the same run" in text
    for method in comparison.methods:
        assert f'<th scope="row">{method.name}</th>' in text
    without = pk.write_report(explanation, tmp_path / "without.html", dataset=dataset).read_text("utf-8")
    assert "Other methods" not in without


@pytest.mark.parametrize("k", [0, 1.5, "ten"])
def test_a_k_that_cannot_be_is_refused(asked, k):
    explainer, x, targets, dataset = asked
    with pytest.raises(ConfigurationError, match="this many examples cannot be compared"):
        pk.compare(explainer, x, targets, dataset=dataset, k=k)


def test_targets_that_do_not_exist_are_refused(asked):
    explainer, x, targets, dataset = asked
    with pytest.raises(QueryError, match="the loss failed"):
        pk.compare(explainer, x, targets + 100, dataset=dataset, baselines=[])


def test_methods_are_chosen_by_name():
    assert choose_baselines(None) == BASELINES
    assert [b.name for b in choose_baselines("random, tracincp")] == ["random", "TracInCP"]
    with pytest.raises(ConfigurationError, match=r"there is no such method\. Got tracin; expected TracInCP, "):
        choose_baselines("tracin")


def test_the_command_compares_and_writes_a_report(disk_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_compared.py").write_text(SOURCE)
    np.save(tmp_path / "query.npy", disk_run.queries[:2].numpy())
    words = ["compare", disk_run.store, "--model", "mine_compared:build", "--data", "mine_compared:load"]
    words += ["--query", tmp_path / "query.npy", "--target", "3,5", "--methods", "TracInCP,random", "--k", 4]
    result = CliRunner().invoke(app, [str(word) for word in (*words, "--report", tmp_path / "why.html")])
    assert result.exit_code == 0, result.exception
    assert "path reading" in result.output
    assert "TracInCP" in result.output
    assert "nearest neighbours" not in result.output
    assert "Other methods on the same run" in (tmp_path / "why.html").read_text("utf-8")
    words[words.index("3,5")] = "three"
    refused = CliRunner().invoke(app, [str(word) for word in words])
    assert isinstance(refused.exception, QueryError)
    assert "these are not classes" in str(refused.exception)


def test_the_code_of_the_page_runs_as_it_stands(disk_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    disk_run.store.rename(tmp_path / "runs" / "mnist")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    blocks = [block for block in blocks if "quanda" not in block]  # tests/integrations/test_quanda.py
    assert len(blocks) == 4
    random = np.random.default_rng(0)
    names = {
        "model": disk_run.model,
        "queries": disk_run.queries[:3],
        "labels": disk_run.answers[:3],
        "train": TensorDataset(disk_run.inputs[:96], disk_run.targets[:96]),
        "outputs": pk.evaluation.SubsetOutputs(random.random((12, 96)) < 0.5, random.random((1, 12, 3))),
        "nn": nn,
    }
    for block in blocks:
        exec(compile(block, "comparing.md", "exec"), names)
    assert "LDS" in str(names["comparison"])
    shown = names["comparison"]._repr_html_()  # in a notebook
    assert html.unescape(shown.removeprefix("<pre>").removesuffix("</pre>")) == str(names["comparison"])
    assert names["top"].indices.shape == (3, 10)
