"""The ledger's line for buffers: exact differences of the output, whatever kind of buffer moved."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

import pkexplain as pk
from pkexplain.explain.dense import path_kernel
from tests.conftest import RecordedTraining, batches


class Centred(nn.Module):
    """Subtracts a moving average of its inputs, kept in a buffer that no norm knows of."""

    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.zeros(12, dtype=torch.float64), persistent=False)
        self.register_buffer("batches", torch.tensor(0))

    def forward(self, x):
        if self.training:
            self.average.lerp_(x.detach().mean(0), 0.2)
            self.batches += 1
        return x - self.average


def trained(middle: nn.Module) -> RecordedTraining:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 12), middle, nn.Tanh(), nn.Linear(12, 10)).double()
    loop = RecordedTraining(model.train(), queries=3, segments=4)
    with loop:
        for ids in batches(24, 8, 4):
            loop.step(ids)
    return loop


def output_at(loop: RecordedTraining, t: int, tau: float, buffers: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logit 0 of the queries with parameters between two checkpoints and any buffers."""
    named = [(name, p.shape, p.numel()) for name, p in loop.model.named_parameters()]
    start, end = (loop.store.trajectory().checkpoint(at).parameters for at in (t, t + 1))
    flat = start + tau * (end - start)
    pieces = flat.split([numel for _, _, numel in named])
    values = {name: piece.view(shape) for (name, shape, _), piece in zip(named, pieces, strict=True)}
    return functional_call(loop.model.eval(), {**values, **buffers}, (loop.queries,))[:, 0]


@pytest.mark.parametrize("middle", [lambda: nn.BatchNorm1d(12), Centred], ids=["BatchNorm", "a buffer of its own"])
def test_the_line_is_what_the_output_changes_where_the_buffers_jump(middle):
    loop = trained(middle())
    run = loop.store.trajectory()
    expected = torch.zeros(3, dtype=torch.float64)
    for t in range(len(run)):
        before, after = run.checkpoint(t).buffers, run.checkpoint(t + 1).buffers
        between = [
            {n: b + share * (after[n] - b) if b.is_floating_point() else b for n, b in before.items()}
            for share in (1 / 8, 3 / 8, 5 / 8, 7 / 8)
        ]
        jumps = [before, *between, after]
        for jump, (left, right) in enumerate(itertools.pairwise(jumps)):
            expected += output_at(loop, t, jump / 4, right) - output_at(loop, t, jump / 4, left)
    explained = pk.Explainer(loop.store, loop.model).explain(loop.queries, output=pk.Logit(0))
    found = [explanation.ledger.remainders["buffers"] for explanation in explained]
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-9)
    assert expected.abs().min() > 1e-3
    assert all(explanation.passed for explanation in explained)


@pytest.mark.parametrize("middle", [lambda: nn.BatchNorm1d(12), Centred], ids=["BatchNorm", "a buffer of its own"])
def test_the_exact_path_follows_buffers_too(middle):
    loop = trained(middle())
    before = {name: buffer.clone() for name, buffer in loop.model.named_buffers()}
    account = path_kernel(loop.store, loop.model, loop.queries, output=pk.Logit(0), nodes=4, pieces=4)
    assert np.abs(account.gap).max() < 1e-9
    assert all(torch.equal(before[name], buffer) for name, buffer in loop.model.named_buffers())
    fine = pk.Explainer(loop.store, loop.model, tolerance=1e-8, quadrature=pk.Quadrature(4, 256))
    for q, explanation in enumerate(fine.explain(loop.queries, output=pk.Logit(0))):
        scale = np.abs(account.contributions[q]).max()
        np.testing.assert_allclose(explanation.contributions, account.contributions[q], atol=1e-6 * scale)
        assert explanation.ledger.remainders["buffers"] == pytest.approx(account.buffers[q], rel=1e-9)


def test_a_model_without_moving_buffers_has_no_such_line():
    assert "buffers" not in trained(nn.LayerNorm(12)).explain().ledger.remainders
