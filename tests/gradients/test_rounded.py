"""Gradients in twelve bits: right on average, close in every form, and more of them in the same memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import pkexplain as pk
from pkexplain.gradients._embedding import EmbeddingGradient
from pkexplain.gradients.along import along
from pkexplain.gradients.compressed import CompressedGradient
from pkexplain.gradients.factors import DenseGradient, FormedGradient, LinearGradient
from pkexplain.gradients.rounded import RoundedGradient, rounded

EXAMPLES, LENGTH, WIDTH = 64, 32, 48


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


GRADIENTS = {
    "linear": lambda: LinearGradient(normal(5, 7, 20), normal(5, 7, 30, seed=1), True, True),
    "linear in bfloat16": lambda: LinearGradient(
        normal(5, 7, 20).bfloat16(), normal(5, 7, 30, seed=1).bfloat16(), True, False
    ),
    "formed": lambda: FormedGradient(normal(5, 30, 21), True, True),
    "embedding": lambda: EmbeddingGradient(torch.arange(35).view(5, 7) % 11, normal(5, 7, 30), 11),
    "padded": lambda: LinearGradient(normal(5, 7, 20), unpadded(normal(5, 7, 30, seed=1)), True, True),
    "padded embedding": lambda: EmbeddingGradient(torch.arange(35).view(5, 7) % 11, unpadded(normal(5, 7, 30)), 11),
}


def unpadded(gradients):
    """Zero where the examples, of 7, 2, 3, 1 and 4 positions, are padded: at the end, and one at the beginning."""
    real = torch.arange(7) < torch.tensor([7, 2, 3, 1, 4])[:, None]
    real[2] = real[2].flip(0)
    return gradients * real[..., None]


def test_padding_takes_no_memory():
    whole, padded = (rounded(GRADIENTS[kind](), 0) for kind in ("linear", "padded"))
    assert padded.nbytes - padded.kept.nbytes == pytest.approx(17 / 35 * (whole.nbytes - whole.kept.nbytes), rel=1e-9)


def relative(found, true):
    return float((found.double() - true.double()).norm() / true.double().norm())


@pytest.mark.parametrize("kind", GRADIENTS)
def test_every_form_is_near_that_of_what_was_rounded(kind):
    plain = GRADIENTS[kind]()
    found = rounded(plain, 3)
    assert isinstance(found, RoundedGradient)
    assert (len(found), found.matrix, found.positions) == (5, plain.matrix, plain.positions)
    assert found.nbytes < (0.45 if kind in ("linear", "formed") else 0.9) * plain.nbytes
    rows, columns = plain.matrix
    left, right = normal(4, rows).to(plain.output_gradients), normal(6, columns).to(plain.output_gradients)
    weights, some = torch.arange(5.0), torch.tensor([4, 1])
    pairs = {
        "dense": (found.dense(), plain.dense()),
        "sketch": (found.sketch(left.to(found.output_gradients), right.to(found.output_gradients)),
                   plain.sketch(left, right)),
        "total": (found.total(), plain.total()),
        "gross": (found.gross(), plain.gross()),
        "weighted": (found.weighted(weights), plain.weighted(weights)),
        "selected": (found.select(some).dense(), plain.select(some).dense()),
        "parts": (torch.cat(found.parts(), 1), torch.cat(plain.parts(), 1)),
        "every second": (found.select(slice(None, None, 2)).dense(), plain.select(slice(None, None, 2)).dense()),
        "compact": (found.compact().dense(), plain.dense()),
    }  # fmt: skip
    for name, (mine, theirs) in pairs.items():
        assert mine.shape == theirs.shape, name
        assert relative(mine, theirs) < (0.01 if "16" in kind else 0.001), name


@pytest.mark.parametrize("kind", GRADIENTS)
def test_inner_products_with_a_vector_are_those_of_the_formed_gradients(kind):
    plain = GRADIENTS[kind]()
    rows, columns = plain.matrix
    sides = normal(3, rows, seed=7).to(plain.output_gradients), normal(4, columns, seed=8).to(plain.output_gradients)
    kept = CompressedGradient(plain.sketch(*sides), *sides, plain.weight, plain.bias)
    for gradients in (plain, rounded(plain, 3), DenseGradient(plain.dense()), kept):
        formed = gradients.dense()
        direction = normal(formed.shape[1], seed=5).to(formed)
        found = along(gradients, direction)
        assert found.shape == (5,)
        assert relative(found, formed @ direction) < (0.02 if "16" in kind else 1e-5)


def test_rounding_is_right_on_average():
    """Numbers of a hundredth of a step: rounding to the nearest would lose them all."""
    values = torch.full((1, 200, 400), 0.01)
    values[..., 0] = 2046.0
    found = rounded(FormedGradient(values, True, False), 0).dense().view(200, 400)[:, 1:]
    assert float(found.mean()) == pytest.approx(0.01, rel=5 / (0.01 * found.numel()) ** 0.5)
    assert float(found.max()) == pytest.approx(1.0)


def test_some_gradients_stay_as_they_are():
    exact = LinearGradient(normal(2, 3, 4, dtype=torch.float64), normal(2, 3, 5, dtype=torch.float64), True, True)
    assert rounded(exact, 0) is exact
    dense = DenseGradient(normal(2, 9))
    assert rounded(dense, 0) is dense
    zeros = rounded(FormedGradient(torch.zeros(2, 3, 4), True, False), 0)
    assert not zeros.dense().any()


def test_torchs_random_numbers_are_left_alone():
    before = torch.get_rng_state()
    rounded(GRADIENTS["linear"](), 1)
    assert torch.equal(torch.get_rng_state(), before)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.inner = nn.Embedding(30, WIDTH), nn.Linear(WIDTH, 4 * WIDTH)
        self.outer, self.head = nn.Linear(4 * WIDTH, WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, tokens):
        x = self.table(tokens)
        return self.head((x + self.outer(torch.relu(self.inner(x)))).tanh().mean(1))


def record(kind, monkeypatch, choosing, mib=1):
    monkeypatch.setattr(pk.Kronecker, "choosing", choosing)
    torch.manual_seed(0)
    model, tokens = Tokens(), torch.randint(30, (EXAMPLES + 20, LENGTH))
    labels = tokens[:, 0] % 5
    optimizer = {"sgd": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.5),
                 "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3)}[kind](model.parameters())  # fmt: skip
    store, projection = pk.MemoryStore(), pk.Kronecker(400, wide=400, warm_up_mib=mib)
    with pk.Recorder(store, model, optimizer, num_examples=EXAMPLES, projection=projection, segments=16) as recorder:
        for _ in range(4):
            for ids in torch.arange(EXAMPLES).split(4):
                with recorder.step(ids):
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(model(tokens[ids]), labels[ids]).backward()
                    optimizer.step()
    explanations = pk.Explainer(store, model).explain(tokens[EXAMPLES:])
    return model, [{check.name: check for check in one.checks} for one in explanations]


@pytest.mark.filterwarnings("ignore:pkexplain. .* record shorter segments")
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_where_memory_is_short_rounded_gradients_choose_better_directions(monkeypatch, kind):
    """A gradient takes 60 kB here: 1 MiB holds 15, or 40 that are rounded."""
    found = {}
    for choosing in (0, 512):
        model, found[choosing] = record(kind, monkeypatch, choosing)
        for checks in found[choosing]:
            assert all(checks[name].passed for name in ("displacement gap", "capture gap", "quadrature gap"))
        found[choosing] = np.median([checks["audit error"].value for checks in found[choosing]])
    plain = record(kind, monkeypatch, 512, mib=64)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain[0].parameters(), strict=True))
    everything = np.median([checks["audit error"].value for checks in plain[1]])
    assert found[512] < 0.9 * found[0]
    assert found[512] == pytest.approx(everything, rel=0.25, abs=0.005)
