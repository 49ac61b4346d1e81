"""Displacement rows gathered lazily, against a simulation that follows every example at every step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pkexplain.optimizers.displacement import RowAccumulator, look_back
from pkexplain.optimizers.rules import LinearStep

EXAMPLES = 5
COLUMNS = {0: slice(0, 3), 1: slice(3, 4)}
WIDTH = 4

numbers = st.integers(-15, 15).map(lambda tenths: tenths / 10)
linear_steps = st.builds(LinearStep, momentum=numbers, gain=numbers, buffer_step=numbers, gradient_step=numbers)
plain_steps = numbers.map(lambda gradient_step: LinearStep(0.0, 0.0, 0.0, gradient_step))
steps = st.fixed_dictionaries({0: linear_steps | plain_steps, 1: linear_steps | plain_steps})
batch = st.lists(st.integers(0, EXAMPLES - 1), unique=True, min_size=1)
visited = st.tuples(steps, st.lists(batch, min_size=1, max_size=2))  # a step of one batch, or of two accumulated ones
segment = st.lists(visited, min_size=1, max_size=5)
runs = st.lists(segment, min_size=1, max_size=3)


def gradients(ids, place):
    """Any numbers that depend on the example and on the place in the run alone."""
    generator = torch.Generator().manual_seed(1000 + place)
    return torch.randn(EXAMPLES, WIDTH, generator=generator, dtype=torch.float64)[torch.tensor(ids)]


class Lazy:
    """Rows that are touched when they are folded, as `pkexplain.optimizers.scalar` does it."""

    def __init__(self):
        self.rows = RowAccumulator(EXAMPLES, COLUMNS, WIDTH, torch.empty(0, dtype=torch.float64))
        self.visits = []

    def add(self, step, *visit):
        self.visits.append((step, visit))

    def fold(self, steps):
        reaches = {b: {r.step: r for r in look_back([s[b] for s in steps])} for b in COLUMNS}

        def factors(place):
            return [{b: getattr(reaches[b][place], name) for b in COLUMNS} for name in ("moved", "buffered")]

        self.rows.pass_on(*factors(-1))
        for step, visit in self.visits:
            self.rows.add(*visit, *factors(step))
        self.visits = []

    def close(self, steps):
        if steps:
            self.fold(steps)
        kept, derivatives, ids = self.rows.close()
        rows, means = kept.new_zeros(EXAMPLES, kept.shape[1]), derivatives.new_zeros(EXAMPLES)
        rows[ids], means[ids] = kept, derivatives
        return rows, means


def accumulator():
    return Lazy()


def gather(run, folds=lambda place: False, order=lambda ids: ids):
    rows, place, found = accumulator(), 0, []
    for part in run:
        unfolded = []
        for taken, visits in part:
            unfolded.append(taken)
            for ids in visits:
                ids = order(ids)
                place += 1
                rows.add(
                    len(unfolded) - 1,
                    torch.tensor(ids),
                    gradients(ids, place),
                    torch.full((len(ids),), -0.5, dtype=torch.float64),
                )
            if folds(place):
                rows.fold(unfolded)
                unfolded = []
        found.append(rows.close(unfolded))
    return found


def simulate(run):
    """Follow a moment of every example at every step, as the rule is written."""
    moment, place, found = torch.zeros(EXAMPLES, WIDTH, dtype=torch.float64), 0, []
    for part in run:
        moved = torch.zeros_like(moment)
        for taken, visits in part:
            fed = torch.zeros_like(moment)
            for ids in visits:
                place += 1
                for row, i in zip(gradients(ids, place), ids, strict=True):
                    fed[i] += row
            for group, columns in COLUMNS.items():
                n = taken[group]
                moment[:, columns] = n.momentum * moment[:, columns] + n.gain * fed[:, columns]
                moved[:, columns] -= n.buffer_step * moment[:, columns] + n.gradient_step * fed[:, columns]
        found.append(moved)
    return found


def assert_same(found, expected):
    for (rows, _), moved in zip(found, expected, strict=True):
        torch.testing.assert_close(rows, moved, rtol=1e-9, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(runs)
def test_rows_are_those_of_a_simulation_step_by_step(run):
    assert_same(gather(run), simulate(run))


@settings(max_examples=40, deadline=None)
@given(runs, st.sets(st.integers(1, 30)))
def test_folding_anywhere_changes_no_row(run, places):
    assert_same(gather(run, folds=lambda place: place in places), simulate(run))


@settings(max_examples=30, deadline=None)
@given(runs, st.randoms(use_true_random=False))
def test_the_order_within_a_batch_does_not_matter(run, random):
    expected = gather(run)
    found = gather(run, order=lambda ids: random.sample(ids, len(ids)))
    for (rows, derivatives), (others, other_derivatives) in zip(found, expected, strict=True):
        torch.testing.assert_close(rows, others, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(derivatives, other_derivatives, rtol=1e-9, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(runs)
def test_a_loss_derivative_that_is_always_the_same_is_that_of_every_row_that_moved(run):
    for rows, derivatives in gather(run):
        moved = derivatives[rows.abs().sum(1) > 0]
        torch.testing.assert_close(moved, torch.full_like(moved, -0.5))


def step(momentum=0.0, gain=0.0, buffer_step=0.0, gradient_step=0.0):
    return {group: LinearStep(momentum, gain, buffer_step, gradient_step) for group in COLUMNS}


def one(rows, place, i, value, derivative=-1.0):
    values = torch.full((1, WIDTH), value, dtype=torch.float64)
    rows.add(place, torch.tensor([i]), values, torch.tensor([derivative], dtype=torch.float64))


def test_a_momentum_tail_belongs_to_the_next_segments():
    rows, momentum = accumulator(), step(momentum=0.5, gain=1.0, buffer_step=0.1)
    one(rows, 0, 2, 8.0)
    sizes = [rows.close([momentum])[0][2, 0].item() for _ in range(4)]
    assert sizes == pytest.approx([-0.8, -0.4, -0.2, -0.1])


def test_a_segment_without_steps_moves_nothing():
    rows = accumulator()
    moved, derivatives = rows.close([])
    assert not moved.any()
    assert not derivatives.any()


def test_groups_move_at_rates_of_their_own():
    rows = accumulator()
    one(rows, 0, 0, 1.0)
    moved, _ = rows.close([{0: LinearStep(0, 0, 0, 0.1), 1: LinearStep(0, 0, 0, 0.5)}])
    assert moved[0].tolist() == pytest.approx([-0.1, -0.1, -0.1, -0.5])


def test_the_loss_derivative_of_a_row_is_weighted_with_the_kernel():
    rows = accumulator()
    one(rows, 0, 1, 3.0, derivative=-0.5)  # weight |3| / 0.5 = 6
    one(rows, 1, 1, 2.0, derivative=-2.0)  # weight |2| / 2 = 1
    _, derivatives = rows.close([step(gradient_step=1.0)] * 2)
    assert derivatives[1].item() == pytest.approx((6 * -0.5 + 1 * -2.0) / 7)
    assert not derivatives[[0, 2, 3, 4]].any()


@settings(max_examples=40, deadline=None)
@given(st.lists(linear_steps, min_size=1, max_size=6))
def test_looking_back_at_some_steps_says_what_looking_at_all_does(taken):
    every = {reach.step: reach for reach in look_back(taken)}
    some = list(look_back(taken, [len(taken) - 1, 0]))
    assert some[-1].step == -1
    assert all(reach == every[reach.step] for reach in some)
