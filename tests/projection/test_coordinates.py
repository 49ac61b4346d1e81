"""A sample of coordinates: what it holds, and audits that use one against audits of everything."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import pkexplain as pk
from pkexplain.gradients.layers import Block
from pkexplain.projection import base
from pkexplain.projection.coordinates import Coordinates
from tests.conftest import RecordedTraining, cnn

SIZES = (7, 40_000, 96, 1, 2_500)
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3),
    "adam, two groups": lambda p: torch.optim.Adam([{"params": [w]} for w in p], lr=3e-3, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
}


def blocks(sizes=SIZES):
    starts = itertools.accumulate(sizes, initial=0)
    return [Block(str(n), ("w",), ((n,),), 0, start, None) for start, n in zip(starts, sizes, strict=False)]


def places(coordinates, sizes=SIZES):
    return coordinates.of(torch.arange(sum(sizes)))


def test_small_blocks_are_whole_and_no_more_are_chosen_than_allowed():
    sample = Coordinates(blocks(), 1000)
    counts = [span.stop - span.start for span in sample.spans.values()]
    assert [counts[0], counts[3]] == [7, 1]
    assert counts[1] / counts[4] == pytest.approx((40_000 / 2_500) ** 0.5, rel=0.01)
    assert counts[1] / counts[2] == pytest.approx((40_000 / 96) ** 0.5, rel=0.03)
    assert 990 < len(sample) == sum(counts) <= 1000
    assert not sample.complete
    chosen = places(sample)
    assert bool((chosen.diff() > 0).all())
    assert torch.equal(chosen, places(Coordinates(blocks(), 1000)))


@pytest.mark.parametrize("most", [None, sum(SIZES), 10**9])
def test_a_sample_of_everything_changes_nothing(most):
    sample, vectors = Coordinates(blocks(), most), torch.randn(2, sum(SIZES))
    assert sample.complete
    assert sample.of(vectors) is vectors
    assert sample.weighted(vectors) is vectors


def test_each_choice_stands_for_one_stretch_and_all_stretches_are_everything():
    sample = Coordinates(blocks(), 1000)
    weights = sample.weighted(torch.ones(len(sample), dtype=torch.float64))
    for size, span in zip(SIZES, sample.spans.values(), strict=True):
        lengths, start = weights[span], sum(SIZES[: SIZES.index(size)])
        ends = start + lengths.cumsum(0)
        assert ends[-1] == start + size
        chosen = places(sample)[span]
        assert bool(((chosen >= ends - lengths) & (chosen < ends)).all())


def test_products_are_estimated_without_bias():
    """Each place of a stretch is as likely: with smooth values the error is far below that of a stretch's first."""
    sample = Coordinates(blocks((1_000_000,)), 20_000)
    value = torch.linspace(0, 1, 1_000_000, dtype=torch.float64)
    found = float(sample.weighted(sample.of(value)).sum())
    assert found == pytest.approx(float(value.sum()), rel=1e-6)  # the first of each stretch: 5e-5
    noise = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert abs(float(sample.weighted(sample.of(noise)).sum())) < 4 * 1_000_000 / 20_000**0.5


@pytest.mark.parametrize("cut", [0, 1, 777, 39_999, 40_000])
def test_parts_of_a_block_hold_the_coordinates_of_the_whole(cut):
    sample = Coordinates(blocks(), 1000)
    values = torch.randn(2, 40_000)
    found = torch.zeros(2, len(sample))
    for part in (slice(0, cut), slice(cut, 40_000)):
        columns, at = sample.within(1, part)
        found[:, columns] += values[:, part][:, at]
    assert torch.equal(found[:, sample.spans[1]], sample.of_block(1, values))
    assert int((found != 0).any(0).sum()) == sample.spans[1].stop - sample.spans[1].start


def record(optimizer, **options):
    options = {"examples": 40, "segments": 6, "projection": pk.Kronecker(40), **options}
    return RecordedTraining(cnn(), optimizer, image=True, **options).train(epochs=3)


def audits(run):
    trajectory = run.store.trajectory()
    return [trajectory.segment(t).audit_rows for t in range(len(trajectory))], trajectory.coordinates


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_sampled_displacements_are_those_of_whole_ones(monkeypatch, kind):
    whole, everything = audits(record(OPTIMIZERS[kind]))
    monkeypatch.setattr(base, "_AUDITED_COORDINATES", 300)
    sampled, sample = audits(record(OPTIMIZERS[kind]))
    assert everything.complete
    assert 250 < len(sample) <= 300
    for mine, theirs in zip(sampled, whole, strict=True):
        assert mine.shape == (16, len(sample))
        torch.testing.assert_close(mine, sample.of(theirs), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reading", ["path", "removal"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_samples_audit_error_is_near_that_of_everything(monkeypatch, kind, reading):
    found = []
    for most in (10**9, 1_200, 600):  # of 1,240; the fewer, the more error of its own a sample has
        monkeypatch.setattr(base, "_AUDITED_COORDINATES", most)
        run = record(OPTIMIZERS[kind], queries=20)
        explanations = pk.Explainer(run.store, run.model).explain(run.queries, reading=reading)
        values = [{check.name: check.value for check in one.checks}["audit error"] for one in explanations]
        found.append(np.median(values))
    assert abs(found[1] - found[0]) < 0.05
    assert found[2] < 0.5


def test_exact_rows_are_audited_everywhere(monkeypatch):
    monkeypatch.setattr(base, "_AUDITED_COORDINATES", 300)
    run = record(OPTIMIZERS["adamw"], projection=pk.Identity())
    assert run.store.trajectory().coordinates.complete
    assert run.values()["audit error"] < 1e-6
