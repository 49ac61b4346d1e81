"""How columns are shared out: what comes back with an example counts, and every step has its say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pkexplain as pk
from pkexplain.gradients.capture import Capture
from pkexplain.gradients.compressed import CompressedGradient
from pkexplain.gradients.factors import FormedGradient, LinearGradient
from pkexplain.gradients.layers import Block, find_layers
from pkexplain.projection import _principal
from pkexplain.projection.base import WarmUp
from pkexplain.projection.maps import TwoSidedMap, random_signs
from tests.conftest import cnn
from tests.projection.test_projection import Seen

ROWS, COLUMNS, EXAMPLES, VISITS, K = 24, 40, 64, 6, 60


def visits() -> tuple[list[Block], list[LinearGradient], Tensor]:
    """Six visits of 64 examples: x is always the same, of δ only three directions of 24 are. With their sum."""
    blocks = find_layers(nn.Linear(COLUMNS, ROWS, bias=False).double(), {"weight": 0})[1]
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(EXAMPLES, COLUMNS) * torch.arange(1, COLUMNS + 1) ** -0.5
    stays = normal(EXAMPLES, 3) @ normal(3, ROWS)
    found = [
        LinearGradient(x[:, None], (stays + 2.5 * normal(EXAMPLES, ROWS))[:, None], True, False) for _ in range(VISITS)
    ]
    return blocks, found, torch.stack([gradients.sketch(None, None) for gradients in found]).sum(0)


def held(left: Tensor, right: Tensor, sums: Tensor) -> float:
    return float((left @ sums @ right.T).square().sum() / sums.square().sum())


def best(sums: Tensor) -> float:
    """The most energy that a two-sided map along the sums' own directions holds, by trying every size."""
    left = torch.linalg.eigh(torch.einsum("nij,nkj->ik", sums, sums))[1].flip(1).T
    right = torch.linalg.eigh(torch.einsum("nji,njk->ik", sums, sums))[1].flip(1).T
    return max(held(left[:a], right[: K // a], sums) for a in range(1, ROWS + 1))


def test_directions_that_come_back_get_the_columns(monkeypatch: pytest.MonkeyPatch):
    blocks, found, sums = visits()
    shares = {}
    for power in (1, 2):
        monkeypatch.setattr(_principal, "_SHARPENED", power)
        warm_up = WarmUp([[(0, gradients)] for gradients in found])
        projector = pk.Kronecker(K, wide=K).bind(blocks, torch.empty(0, dtype=torch.float64), warm_up)
        kept = projector.tensors()
        shares[power] = held(kept["0.left"], kept["0.right"], sums)
    assert shares[2] > 0.95 * best(sums)
    assert shares[2] > shares[1] + 0.05  # by the energies of single gradients it would be this much less


def test_a_formed_gradient_remembers_its_positions():
    seen = Seen(cnn)
    before = [g for _, g in seen.pieces if getattr(g, "positions", 1) > 1]
    formed = [g.compact() for g in before]
    assert any(isinstance(g, FormedGradient) for g in formed)
    assert [g.positions for g in formed] == [g.positions for g in before]


def test_gradients_added_up_by_example_count_their_rows():
    class Patches(nn.Module):
        """Its layers see four rows for each example."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(7, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(F.relu(self.first(x.flatten(0, 1)))).unflatten(0, x.shape[:2]).sum(1)

    torch.manual_seed(0)
    model = Patches().double()
    layers, blocks = find_layers(model, {name: 0 for name, _ in model.named_parameters()})
    pieces = []
    with Capture(layers, blocks).during_backward(6, lambda *piece: pieces.append(piece)):
        F.cross_entropy(model(torch.randn(6, 4, 7).double()), torch.arange(6) % 3, reduction="sum").backward()
    assert {gradients.positions for _, gradients in pieces} == {4}


@pytest.mark.parametrize("most", [1, 3, 8, 1000])
def test_fewer_examples_of_every_batch(most: int):
    _, found, _ = visits()
    some = WarmUp([[(0, gradients)] for gradients in found]).thinned(most)
    sizes = [len(pieces[0][1]) for pieces in some]
    assert len(sizes) == VISITS
    assert min(sizes) >= 1
    assert sum(sizes) <= max(2 * most, VISITS)
    assert torch.equal(some[2][0][1].inputs[0], found[2].inputs[0])


def test_what_random_signs_hold_does_not_grow_when_it_is_carried_over():
    signs = random_signs(0, 1, (32, 5000))
    whole = TwoSidedMap(slice(0, 96), signs.clone(), torch.eye(3, dtype=signs.dtype), False)
    rows = torch.randn(4, 96, dtype=signs.dtype)
    carried = rows
    for _ in range(5):  # five segments
        carried = whole.from_columns_of(whole.backwards(), carried)
    torch.testing.assert_close(carried, rows)
    assert whole.from_columns_of(whole, rows).norm() > 100 * rows.norm()  # the transpose alone is no inverse


@pytest.mark.parametrize("side", [0, 1])
def test_few_vectors_have_the_second_moments_of_many(side: int):
    torch.manual_seed(0)
    shape = {"weight": True, "bias": False}
    kept = CompressedGradient(torch.randn(9, 3, 4), torch.randn(3, 7), torch.randn(4, 6), **shape)
    weights, mixer = torch.rand(9), torch.randn(5, (6, 7)[side])
    full = torch.einsum("ca,ncd,de->nae", kept.left, kept.output_gradients, kept.right)
    vectors = full @ mixer.T if side == 0 else full.transpose(1, 2) @ mixer.T
    expected = torch.einsum("n,nac,nbc->ab", weights.square(), vectors, vectors)
    found = kept.few_vectors(side, mixer, weights)
    assert found.shape == ((7, 3), (6, 4))[side]
    torch.testing.assert_close(found @ found.T, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_a_vocabulary_has_principal_directions():
    """Random signs of so wide a side were off by many times what they should have shown."""
    generator = torch.Generator().manual_seed(0)
    frequent = torch.arange(1, 5001).double().reciprocal()
    inputs = torch.multinomial(frequent, 96 * 12, replacement=True, generator=generator).view(96, 12)
    labels = (inputs[:, 0] % 3).long()

    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(5000, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.words(x).mean(1))

    found = []
    for projection in (pk.Identity(), pk.Kronecker(512, wide=512)):
        torch.manual_seed(0)
        model, run = Bag(), pk.MemoryStore()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        with pk.Recorder(run, model, optimizer, num_examples=96, projection=projection) as recorder:
            for _ in range(3):
                for ids in torch.arange(96).split(16):
                    with recorder.step(ids):
                        optimizer.zero_grad()
                        F.cross_entropy(model(inputs[ids]), labels[ids]).backward()
                        optimizer.step()
        explanations = pk.Explainer(run, model).explain(inputs[:8], output=pk.Margin(labels[:8]))
        gaps = [check.value for e in explanations for check in e.checks if check.name == "projection gap"]
        found.append((torch.tensor(np.stack([e.contributions for e in explanations])), float(np.median(gaps))))
    (exact, _), (stored, gap) = found
    error = torch.linalg.vector_norm(stored - exact, dim=1) / torch.linalg.vector_norm(exact, dim=1)
    assert float(error.median()) < 0.1
    assert gap < 0.1
