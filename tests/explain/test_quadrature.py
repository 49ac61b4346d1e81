"""Integrals over a segment: the rule, its refinement, its budget."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

import pkexplain as pk
from pkexplain.errors import ConfigurationError
from pkexplain.explain import dense as exact
from pkexplain.explain.quadrature import Interval, Quadrature
from tests.conftest import batches, digits, mlp, train

COUNT = 48
NEVER = 1e9
"""A tolerance that no refinement is needed for."""


def record(model, epochs=2):
    inputs, targets = digits(COUNT + 8)
    store = pk.MemoryStore()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options = {"num_examples": COUNT, "projection": pk.Identity(), "dtype": torch.float64}
    recorder = pk.Recorder(store, model, optimizer, **options)
    train(model, optimizer, inputs, targets, batches(COUNT, 8, epochs), recorder=recorder)
    return store, model, inputs[COUNT:]


@pytest.fixture(scope="module")
def smooth():
    return record(mlp())


@pytest.fixture(scope="module")
def kinked():
    return record(mlp(activation=nn.ReLU))


def explain(run, tolerance=0.01, **quadrature):
    store, model, queries = run
    explainer = pk.Explainer(store, model, tolerance=tolerance, quadrature=Quadrature(**quadrature))
    return explainer.explain(queries, output=pk.Logit(0))


def gap(explanation):
    return next(check for check in explanation.checks if check.name == "quadrature gap")


# --------------------------------------------------------------------------------------------------------- the rule


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_a_rule_is_exact_for_polynomials_of_twice_its_nodes(count):
    nodes, weights = Quadrature(nodes=count).rule()
    assert ((nodes > 0) & (nodes < 1)).all()
    for degree in range(2 * count):
        assert weights @ nodes**degree == pytest.approx(1 / (degree + 1), rel=1e-13)
    assert abs(weights @ nodes ** (2 * count) - 1 / (2 * count + 1)) > 1e-11


def test_halves_make_up_their_part():
    part = Interval(3, 2, 1)
    first, second = part.halves()
    assert (part.start, part.end, part.width) == (0.25, 0.5, 0.25)
    assert (first.start, first.end) == (0.25, 0.375)
    assert (second.start, second.end) == (0.375, 0.5)
    assert first.segment == second.segment == 3
    assert first.width + second.width == part.width


def test_parts_cover_a_segment_without_overlap_however_they_are_halved():
    random = np.random.default_rng(0)
    parts = [Interval(0, 0, 0)]
    for _ in range(30):
        parts += parts.pop(int(random.integers(len(parts)))).halves()
    edges = sorted((part.start, part.end) for part in parts)
    assert edges[0][0] == 0
    assert edges[-1][1] == 1
    assert all(a[1] == b[0] for a, b in itertools.pairwise(edges))


def test_errors_that_cancel_are_not_settled():
    rule = Quadrature()
    assert not rule.unsettled([0.3, -0.3], 0.5)
    assert rule.unsettled([0.6, -0.6], 0.5)
    assert rule.unsettled([0.3, 0.3], 0.5)
    assert not rule.unsettled([0.0], 0.0)


def test_the_worst_parts_are_halved_first_and_within_the_budget():
    rule = Quadrature(nodes=2)
    errors = {Interval(0, 0, 0): 0.1, Interval(1, 0, 0): -0.5, Interval(2, 0, 0): 0.0, Interval(3, 0, 0): 0.3}
    every = [Interval(1, 0, 0), Interval(3, 0, 0), Interval(0, 0, 0)]
    assert rule.worst(errors, 0.1, 100) == every  # an even share is 0.05
    assert rule.worst(errors, 0.4, 100) == every[:2]
    assert rule.worst(errors, 0.1, 11) == every[:2]  # halving takes four gradients each
    assert rule.worst(errors, 0.1, 3) == []
    assert rule.worst(errors, 100.0, 100) == every[:1]  # never nothing, while there is budget


@pytest.mark.parametrize(("nodes", "budget"), [(0, 8), (4, 3), (-1, 0)])
def test_a_rule_that_cannot_be_is_refused(nodes, budget):
    match = rf"Quadrature\(nodes=…, budget=…\): .* Got nodes={nodes}, budget={budget}; expected 1 ≤ nodes ≤ budget"
    with pytest.raises(ConfigurationError, match=match):
        Quadrature(nodes=nodes, budget=budget)


# ------------------------------------------------------------------------------------------------------ on real runs


def test_the_gap_of_a_smooth_model_shrinks_as_nodes_are_added(smooth):
    worst = [max(gap(e).value for e in explain(smooth, NEVER, nodes=nodes)) for nodes in (1, 2, 4, 8)]
    assert all(later < earlier / 3 for earlier, later in itertools.pairwise(worst))
    assert worst[-1] < 1e-7


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("budget", [2, 3, 7, 16])
def test_the_budget_is_never_exceeded(kinked, nodes, budget):
    segments = len(kinked[0].trajectory())
    for explanation in explain(kinked, 1e-12, nodes=nodes, budget=budget):
        cost = explanation.cost
        assert cost.budget == budget * segments
        assert cost.budget - 2 * nodes < cost.backward_passes <= cost.budget
        assert cost.backward_passes % nodes == 0
        assert not gap(explanation).passed
        assert "its tolerance was not met within the budget" in gap(explanation).meaning


@pytest.mark.parametrize("budget", [2, 3, 7, 16])
def test_the_budget_is_never_exceeded_where_nodes_are_shared(kinked, budget):
    segments = len(kinked[0].trajectory())
    for explanation in explain(kinked, 1e-12, budget=budget):
        cost = explanation.cost
        assert cost.budget == budget * segments
        assert cost.budget - 2 < cost.backward_passes <= cost.budget
        assert not gap(explanation).passed


def test_gradients_at_the_ends_are_shared_and_those_of_refinement_are_never_computed_twice(kinked):
    segments = len(kinked[0].trajectory())
    for explanation in explain(kinked, NEVER):
        assert explanation.cost.backward_passes == segments + 1
        assert explanation.cost.forward_passes == 0
    for explanation in explain(kinked, 1e-3, budget=4096):
        assert gap(explanation).passed
        assert explanation.cost.forward_passes == 0
    shared, apart = (
        sum(e.cost.backward_passes for e in explain(kinked, 1e-2, budget=4096, nodes=nodes)) for nodes in (None, 2)
    )
    assert shared < apart


def test_simpson_is_of_fourth_order(smooth):
    rough, fine = (max(gap(e).value for e in explain(smooth, 1e-12, budget=budget)) for budget in (2, 16))
    assert fine < rough / 500


def test_shared_nodes_give_the_contributions_of_a_fine_rule(smooth):
    store, model, queries = smooth
    fine = exact.path_kernel(store, model, queries, output=pk.Logit(0), nodes=8, pieces=16)
    explainer = pk.Explainer(store, model, tolerance=1e-7, quadrature=Quadrature(budget=512))
    found = explainer.contributions(queries, output=pk.Logit(0))
    assert np.abs(found - fine.contributions).max() < 1e-5 * np.abs(fine.contributions).max()


def test_one_gradient_a_segment(smooth):
    store, model, queries = smooth
    fast = pk.Explainer(store, model, quadrature=Quadrature.fast()).explain(queries, output=pk.Logit(0))
    assert {e.cost.backward_passes for e in fast} == {len(store.trajectory())}


@pytest.mark.parametrize("tolerance", [1e-2, 1e-3])
def test_kinks_are_refined_until_the_gap_meets_the_tolerance(kinked, tolerance):
    coarse = explain(kinked, NEVER, nodes=2)
    assert max(gap(e).value for e in coarse) > 1e-2  # there is something to refine
    for explanation in explain(kinked, tolerance, nodes=2, budget=4096):
        assert gap(explanation).passed
        assert 0 <= gap(explanation).value <= tolerance
        assert "its tolerance was met." in gap(explanation).meaning
        assert explanation.cost.backward_passes < explanation.cost.budget


def test_a_tighter_tolerance_takes_more_gradients_and_no_more_than_it_needs(kinked):
    costs = [
        [e.cost.backward_passes for e in explain(kinked, tolerance, nodes=2, budget=4096)]
        for tolerance in (NEVER, 1e-1, 1e-3)
    ]
    segments = len(kinked[0].trajectory())
    assert costs[0] == [2 * segments] * len(costs[0])
    assert all(a <= b <= c for a, b, c in zip(*costs, strict=True))
    assert sum(costs[1]) < sum(costs[2])


def test_refined_contributions_are_those_of_a_fine_rule(kinked):
    store, model, queries = kinked
    fine = exact.path_kernel(store, model, queries, output=pk.Logit(0), nodes=1, pieces=400)
    rough = pk.Explainer(store, model, tolerance=NEVER).contributions(queries, output=pk.Logit(0))
    explainer = pk.Explainer(store, model, tolerance=1e-4, quadrature=Quadrature(budget=4096))
    refined = explainer.contributions(queries, output=pk.Logit(0))
    size = np.abs(fine.contributions).max()
    assert np.abs(refined - fine.contributions).max() < 3e-3 * size
    assert np.abs(refined - fine.contributions).mean() < 0.5 * np.abs(rough - fine.contributions).mean()


def test_forward_passes_are_counted(kinked):
    segments = len(kinked[0].trajectory())
    for explanation in explain(kinked, NEVER, nodes=2):
        assert explanation.cost.forward_passes == segments + 1
    for explanation in explain(kinked, 1e-12, nodes=2, budget=8):
        assert explanation.cost.forward_passes > segments + 1


def test_a_linear_model_needs_no_refinement():
    torch.manual_seed(0)
    run = record(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double())
    segments = len(run[0].trajectory())
    for explanation in explain(run, 1e-9, nodes=1, budget=64):
        assert explanation.cost.backward_passes == segments
        assert gap(explanation).value < 1e-13
        assert math.isclose(explanation.total, explanation.final - explanation.initial, rel_tol=1e-12)
