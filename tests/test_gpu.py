"""The same numbers on a GPU; run with `pytest -m gpu` on a machine with CUDA."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import pkexplain as pk
from tests.conftest import batches, digits, mlp, train

pytestmark = pytest.mark.gpu


def recorded(device: str, projection: pk.Identity | pk.SparseSign | pk.Kronecker):
    inputs, targets = (part.to(device) for part in digits(128, torch.float64))
    model, store = mlp(activation=nn.GELU).to(device), pk.MemoryStore()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)
    recorder = pk.Recorder(
        store, model, optimizer, num_examples=96, projection=projection, segments=4, dtype=torch.float64
    )
    train(model, optimizer, inputs, targets, batches(96, 16, 2), recorder=recorder)
    explainer = pk.Explainer(store, model, tolerance=1e-6, quadrature=pk.Quadrature(nodes=4, budget=64))
    return explainer.contributions(inputs[96:], output=pk.Logit(0)), explainer.explain(inputs[100], output=pk.Logit(0))


@pytest.mark.parametrize("projection", [pk.Identity(), pk.SparseSign(k=256), pk.Kronecker(k=256)], ids=lambda p: p.kind)
def test_the_numbers_are_those_of_the_cpu(projection):
    here, explained = recorded("cpu", projection)
    there, explained_there = recorded("cuda", projection)
    np.testing.assert_allclose(there, here, rtol=1e-6, atol=1e-8 * np.abs(here).max())
    assert [c.id for c in explained_there.proponents] == [c.id for c in explained.proponents]
    assert explained_there.passed == explained.passed
