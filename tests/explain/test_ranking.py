"""What a search has left out is bounded, and what it shows is what a scan of all rows finds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import pkexplain as pk
from pkexplain.distributed import ProcessGroup
from pkexplain.explain import _ranking
from pkexplain.explain._ranking import Ranking


@pytest.fixture(scope="module")
def everything(run):
    return pk.Explainer(run.store, run.model).contributions(run.queries[:6])


@pytest.mark.parametrize("factory", ["Flat", "SQ8", "PCA32,PQ16x4", "IVF4,SQ8", "PCA32,SQ8", "HNSW8"])
@pytest.mark.parametrize("k", [1, 7])
def test_no_example_that_is_not_shown_contributes_more_than_the_bound(run, everything, factory, k):
    explanations = pk.Explainer(run.store, run.model, index=factory).explain(run.queries[:6], k=k)
    for explanation, contributions in zip(explanations, everything, strict=True):
        shown = [c.id for c in (*explanation.proponents, *explanation.opponents)]
        others = np.delete(contributions, shown)
        rest = explanation.remainder
        assert np.abs(others).max() <= rest.bound * (1 + 1e-6)
        assert rest.num_rest == len(others)
        assert explanation.num_examples == len(contributions)
        assert rest.shown == pytest.approx(contributions[shown].sum(), rel=1e-5, abs=1e-6)
        assert rest.rest == pytest.approx(others.sum(), rel=1e-5, abs=1e-5)
        assert rest.shown + rest.rest == pytest.approx(explanation.total, rel=1e-9)
        assert rest.exact == (factory == "Flat")
        if rest.exact:  # the next one, and no more
            assert rest.bound <= np.abs(others).max() * (1 + 1e-6)


def test_the_bound_is_that_of_cauchy_and_schwarz(run, monkeypatch):
    monkeypatch.setattr(_ranking, "_BOUNDS_AT_ONCE", 50)
    trajectory, k = run.store.trajectory(), 3
    ranking = Ranking(trajectory, "SQ8", None, torch.device("cpu"), ProcessGroup())
    covectors = torch.randn(4, len(trajectory), len(trajectory.segment(0).row_sum))
    rows = [trajectory.segment(t).read_rows(slice(None)) for t in range(len(trajectory))]
    for known in (0, k):
        parts = [part.norm(dim=1) * covectors[:, t].norm(dim=1)[:, None] for t, part in enumerate(rows)]
        true = torch.stack(parts).sum(0)
        found = ranking.bound([row.topk(known).indices for row in true], covectors)
        expected = true.topk(known + 1, dim=1).values[:, -1]
        assert found == pytest.approx(expected.tolist(), rel=1e-4)
        assert (torch.tensor(found) >= expected).all()


def test_what_a_compressed_index_shows_says_so(run):
    text = str(pk.Explainer(run.store, run.model, index="SQ8").explain(run.queries[0], k=3))
    assert "An index proposed the examples; their own rows ranked them." in text
    assert "The 6 examples below hold " in text
    assert "the other 234 " in text
    assert "by the norms of their rows, each of those contributes at most " in text
    assert "gross" not in text
