"""The arithmetic of results."""

from __future__ import annotations

import dataclasses
import math
import pickle
import re

import numpy as np
import pytest
import torch

import pkexplain as pk
from pkexplain.errors import QueryError
from tests.explanations import make_comparison, make_explanation


@pytest.fixture
def explanation():
    return make_explanation(num_examples=60, k=4)


def test_a_ledger_adds_up():
    ledger = pk.Ledger(initial=1.0, final=4.0, examples=2.5, remainders={"weight_decay": -0.25, "optimizer": 0.5})
    assert ledger.gap == 0.25


def test_an_explanation_shows_its_ledger(explanation):
    ledger = explanation.ledger
    assert (explanation.initial, explanation.final) == (ledger.initial, ledger.final)
    assert (explanation.total, explanation.gap) == (ledger.examples, ledger.gap)
    assert explanation.gap == pytest.approx(1e-6, rel=1e-6)


@pytest.mark.parametrize(
    ("value", "passed"),
    [(0.5, True), (0.1, True), (-0.5, True), (0.500001, False), (-0.6, False), (math.nan, False), (math.inf, False)],
)
def test_a_check_passes_up_to_its_tolerance(value, passed):
    assert pk.Check("gap", value, 0.5, "what it is").passed is passed


def test_an_explanation_passes_where_every_check_does(explanation):
    assert explanation.passed
    assert not make_explanation(failing=True).passed


def test_gross_is_what_was_pushed_either_way(explanation):
    assert explanation.gross == pytest.approx(np.abs(explanation.contributions).sum())
    assert explanation.gross > abs(explanation.total)


def test_the_share_of_what_is_shown_counts_an_example_once(explanation):
    shown = (*explanation.proponents, *explanation.opponents)
    expected = sum(abs(c.contribution) for c in shown) / explanation.gross
    assert explanation.shown_share == pytest.approx(expected)
    twice = dataclasses.replace(explanation, opponents=explanation.proponents)
    assert twice.shown_share == pytest.approx(sum(c.contribution for c in twice.proponents) / twice.gross)
    nothing = dataclasses.replace(explanation, all_contributions=np.zeros(60))
    assert nothing.shown_share == 0.0


def test_all_contributions_are_computed_once_and_only_when_asked_for(explanation):
    calls = []

    class Counted:
        def __array__(self, dtype=None, copy=None):
            calls.append(1)
            return np.ones(60)

    counted = dataclasses.replace(explanation, all_contributions=Counted())
    assert calls == []
    _ = counted.contributions, counted.gross, counted.by_group([0] * 60)
    assert calls == [1]


@pytest.mark.parametrize(
    "labels",
    [[i % 3 for i in range(60)], np.arange(60) % 3, torch.arange(60) % 3, tuple("abc"[i % 3] for i in range(60))],
    ids=["list", "numpy", "torch", "text"],
)
def test_groups_are_summed_in_order_of_their_label(explanation, labels):
    groups = explanation.by_group(labels)
    assert [g.group for g in groups] in ([0, 1, 2], ["a", "b", "c"])
    for start, group in enumerate(groups):
        part = explanation.contributions[start::3]
        assert group.count == 20
        assert group.net == pytest.approx(part.sum())
        assert group.gross == pytest.approx(np.abs(part).sum())
    assert sum(g.net for g in groups) == pytest.approx(explanation.total)


def test_labels_that_cannot_be_compared_are_ordered_as_text(explanation):
    labels = [None, "x", 3] * 20
    assert {g.group for g in explanation.by_group(labels)} == {None, "x", 3}
    assert [g.group for g in explanation.by_group(labels)] == sorted([None, "x", 3], key=str)


@pytest.mark.parametrize("count", [0, 59, 61])
def test_another_number_of_labels_than_examples_is_refused(explanation, count):
    match = rf"^by_group\(groups\): there must be one label per training example\. Got {count} labels; expected 60 "
    with pytest.raises(QueryError, match=match):
        explanation.by_group([0] * count)


def test_results_are_frozen(explanation):
    for result, name in (
        (explanation, "output"), (explanation.ledger, "final"), (explanation.proponents[0], "weight"),
        (explanation.checks[0], "value"), (explanation.cost, "budget"), (explanation.by_group([0] * 60)[0], "net"),
    ):  # fmt: skip
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(result, name, 1)


def test_an_explanation_prints_as_a_table(explanation):
    text = str(explanation)
    for part in ("logit[3]", "weight_decay", "optimizer", "quadrature gap", f"{explanation.proponents[0].id}"):
        assert part in text


def test_an_explanation_is_a_line_where_it_is_one_of_many(explanation):
    wanted = r"<Explanation logit\[3\]: -0\.\d+ before training, \S+ after; 60 examples \S+; all 2 checks passed>"
    assert re.fullmatch(wanted, repr(explanation))
    assert "1 of 2 checks failed: quadrature gap>" in repr(make_explanation(failing=True))
    assert ", removal reading; " in repr(make_explanation(reading="removal"))
    assert len(repr(make_explanation(output="o" * 500))) < 200


def test_a_comparison_is_a_line():
    wanted = "<Comparison of 3 methods, 3 queries, 50 examples: TracIn 0, TracIn 1, TracIn 2>"
    assert repr(make_comparison(methods=3, name="TracIn")) == wanted


def test_explanations_are_a_list(explanation):
    everyone = pk.Explanations([explanation, make_explanation(failing=True), explanation, explanation])
    assert isinstance(everyone, list)
    assert everyone == [everyone[0], everyone[1], everyone[2], everyone[3]]
    assert everyone[0] is explanation
    assert isinstance(everyone[1:], pk.Explanations)
    assert not everyone.passed
    assert everyone[2:].passed
    assert repr(everyone) == "<Explanations of 4 queries: logit[3], logit[3], logit[3], …; 1 with failed checks>"
    assert repr(everyone[2:]) == "<Explanations of 2 queries: logit[3], logit[3]; all checks passed>"
    assert repr(everyone[:0]) == "<Explanations of 0 queries>"


def test_a_batch_is_answered_with_such_a_list(run):
    explainer = pk.Explainer(run.store, run.model)
    found = explainer.explain(run.queries[:2])
    assert type(found) is pk.Explanations
    assert len(found) == 2
    assert type(explainer.explain(run.queries[0])) is pk.Explanation


def test_an_explanation_survives_pickling(explanation):
    again = pickle.loads(pickle.dumps(explanation))
    assert again == explanation
    assert str(again) == str(explanation)
    np.testing.assert_array_equal(again.contributions, explanation.contributions)
