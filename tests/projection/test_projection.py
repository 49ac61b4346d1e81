"""Projections: unbiased, exact where they may be, the same for the same seed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pkexplain as pk
from pkexplain.errors import ConfigurationError
from pkexplain.gradients.capture import Capture
from pkexplain.gradients.layers import find_layers
from pkexplain.projection.base import WarmUp
from pkexplain.projection.kinds import projection_from_description
from pkexplain.projection.maps import hashed, random_signs
from tests.conftest import cnn, digits, mlp
from tests.golden import projection as golden

PROJECTIONS = [pk.Identity(), pk.SparseSign(120), pk.Kronecker(120)]
CPU = torch.device("cpu")


class Tokens(nn.Module):
    """An embedding wider than principal directions are computed for, a bare parameter, a layer and a norm."""

    def __init__(self):
        super().__init__()
        self.embedding, self.scale = nn.Embedding(5000, 4), nn.Parameter(torch.randn(4))
        self.out = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.embedding((x.flatten(1) * 600 + 500).long().clamp(0, 4999)).mean(1) * self.scale)


MODELS = {"mlp": mlp, "cnn": cnn, "tokens": lambda: Tokens().double()}


class Seen:
    """Captured gradients of a batch of digits, and the same without structure."""

    def __init__(self, make, groups=None, count=12, dtype=torch.float64):
        torch.manual_seed(0)
        self.count, self.dtype = count, dtype
        model = make().to(dtype)
        groups = groups or {name: 0 for name, _ in model.named_parameters()}
        layers, self.blocks = find_layers(model, groups)
        inputs, targets = digits(count, dtype, image=make is not mlp)
        self.pieces = []
        with Capture(layers, self.blocks).during_backward(count, lambda *piece: self.pieces.append(piece)):
            F.cross_entropy(model(inputs), targets, reduction="sum").backward()
        self.dense = torch.zeros(count, sum(block.numel for block in self.blocks), dtype=dtype)
        for position, gradients in self.pieces:
            self.dense[:, self.blocks[position].span] += gradients.dense()

    def bind(self, projection):
        return projection.bind(self.blocks, torch.empty(0, dtype=self.dtype), WarmUp([self.pieces]))


def two_groups(model):
    return {name: int("bias" in name) for name, _ in model.named_parameters()}


@pytest.fixture(params=MODELS)
def seen(request):
    return Seen(MODELS[request.param])


@pytest.mark.parametrize("projection", PROJECTIONS, ids=lambda p: p.kind)
def test_factors_are_projected_as_their_dense_gradients(projection, seen):
    projector = seen.bind(projection)
    rows = projector.project(seen.pieces, seen.count)
    torch.testing.assert_close(rows, projector.project_displacements(seen.dense), rtol=1e-10, atol=1e-12)
    assert rows.shape == (seen.count, projector.columns)


@pytest.mark.parametrize("projection", PROJECTIONS, ids=lambda p: p.kind)
def test_a_projection_is_linear(projection, seen):
    projector = seen.bind(projection)
    a, b = torch.randn(2, 1, seen.dense.shape[1], dtype=torch.float64)
    image = projector.project_displacements(3 * a - b)
    expected = 3 * projector.project_displacements(a) - projector.project_displacements(b)
    torch.testing.assert_close(image, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("projection", PROJECTIONS, ids=lambda p: p.kind)
def test_a_stored_projection_is_the_same_again(projection, seen):
    projector = seen.bind(projection)
    described = json.loads(json.dumps(projection.describe()))
    again = projection_from_description(described)
    assert again == projection
    restored = again.restore(seen.blocks, torch.empty(0, dtype=seen.dtype), projector.tensors())
    assert torch.equal(restored.project_displacements(seen.dense), projector.project_displacements(seen.dense))
    assert torch.equal(restored.project(seen.pieces, seen.count), projector.project(seen.pieces, seen.count))
    assert [m.columns for m in restored.maps] == [m.columns for m in projector.maps]


@pytest.mark.parametrize("projection", [pk.SparseSign(120), pk.Kronecker(40, wide=40)], ids=lambda p: p.kind)
def test_the_same_seed_makes_the_same_numbers_and_another_seed_others(projection):
    seen = Seen(MODELS["cnn"])
    other = projection_from_description({**projection.describe(), "seed": 1})
    first, again, another = (seen.bind(p).project_displacements(seen.dense) for p in (projection, projection, other))
    assert torch.equal(first, again)
    assert first.shape != another.shape or (first - another).abs().max() > 1e-3


@pytest.mark.parametrize("projection", PROJECTIONS, ids=lambda p: p.kind)
def test_single_precision_agrees_with_double(projection):
    single, double = Seen(mlp, dtype=torch.float32), Seen(mlp)
    kept = double.bind(projection)
    of_single = projection.restore(single.blocks, torch.empty(0), kept.tensors())
    found = of_single.project(single.pieces, single.count)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), kept.project(double.pieces, double.count), rtol=1e-4, atol=1e-5)


def test_seeds_mean_what_they_always_meant():
    assert golden.numbers() == json.loads(golden.FILE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("projection", PROJECTIONS, ids=lambda p: p.kind)
def test_blocks_have_columns_of_their_own(projection):
    seen = Seen(cnn, two_groups(cnn()))
    projector = seen.bind(projection)
    columns = {position: part.columns for position, part in enumerate(projector.maps)}
    for position, block in enumerate(seen.blocks):
        one = torch.zeros_like(seen.dense)
        one[:, block.span] = seen.dense[:, block.span]
        outside = projector.project_displacements(one)
        outside[:, columns[position]] = 0
        assert not outside.any()
    assert [c for part in columns.values() for c in range(part.start, part.stop)] == list(range(projector.columns))


# ------------------------------------------------------------------------------------------------------- SparseSign


def inner_products(u, v, k, nonzeros, seeds):
    tables = (hashed(slice(0, k), len(u), nonzeros, seed, 0) for seed in range(seeds))
    images = (table.vectors(torch.stack([u, v])) for table in tables)
    return np.array([float(a @ b) for a, b in images])


@pytest.mark.parametrize(("k", "nonzeros"), [(16, 4), (12, 1), (10, 3)])
def test_sparse_signs_are_unbiased_with_the_variance_of_theory(k, nonzeros):
    generator = torch.Generator().manual_seed(0)
    u, v = torch.randn(2, 20, generator=generator, dtype=torch.float64)
    v = v + u  # correlated, so that the mean is not zero
    seeds = 3000
    found = inner_products(u, v, k, nonzeros, seeds)
    # independent signs; two coordinates meet in one of the `nonzeros` blocks with probability nonzeros / k
    pairs = float(u.square().sum() * v.square().sum() + (u @ v) ** 2 - 2 * (u.square() * v.square()).sum())
    widths = np.diff(np.linspace(0, k, nonzeros + 1).astype(int))
    variance = pairs * (1 / widths).sum() / nonzeros**2
    assert abs(found.mean() - float(u @ v)) < 4 * (variance / seeds) ** 0.5
    assert found.var() == pytest.approx(variance, rel=0.15)


def test_norms_survive_sparse_signs_of_one_coordinate():
    table = hashed(slice(0, 16), 30, 4, 0, 0)
    images = table.vectors(torch.eye(30, dtype=torch.float64))
    torch.testing.assert_close(images.square().sum(1), torch.ones(30, dtype=torch.float64))
    assert ((images != 0).sum(1) == 4).all()


def test_random_signs_are_orthonormal_on_average():
    grams = [s.T @ s for s in (random_signs(seed, 0, (32, 6)) for seed in range(500))]
    mean = torch.stack(grams).mean(0)
    assert (mean - torch.eye(6, dtype=torch.float64)).abs().max() < 5 / (32 * 500) ** 0.5


@pytest.mark.parametrize("k", [1, 7, 64, 4096])
def test_sparse_signs_fill_k_columns(k):
    for seen in (Seen(mlp), Seen(cnn, two_groups(cnn()))):
        blocks = len(seen.blocks)
        columns = seen.bind(pk.SparseSign(k)).columns
        assert min(k, seen.dense.shape[1]) - blocks <= columns <= max(k, blocks)  # each block is rounded, and gets one


# -------------------------------------------------------------------------------------------------------- Kronecker


@pytest.mark.parametrize("make", [mlp, cnn], ids=["mlp", "cnn"])
def test_kronecker_with_room_for_everything_is_exact(make):
    seen = Seen(make)
    rows = seen.bind(pk.Kronecker(16 * seen.dense.shape[1])).project(seen.pieces, seen.count)
    torch.testing.assert_close(rows @ rows.T, seen.dense @ seen.dense.T, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("k", [8, 20, 64, 300, 2048])
def test_kronecker_takes_no_more_than_k_columns(seen, k):
    enough = max(k, 200) if any(block.numel > 4096 for block in seen.blocks) else k
    assert seen.bind(pk.Kronecker(k, wide=enough)).columns <= enough
    assert pk.Kronecker(k, wide=enough).columns(seen.blocks) <= k or k < enough == 200


@pytest.mark.parametrize("k", [8, 200])
def test_a_layer_that_has_not_been_seen_takes_no_more_than_its_share(k):
    seen = Seen(cnn)
    pieces = [piece for piece in seen.pieces if seen.blocks[piece[0]].name != "6"]
    projector = pk.Kronecker(k, wide=k).bind(seen.blocks, torch.empty(0, dtype=seen.dtype), WarmUp([pieces]))
    assert projector.columns <= k
    rows = projector.project(seen.pieces, seen.count)
    torch.testing.assert_close(rows, projector.project_displacements(seen.dense), rtol=1e-10, atol=1e-12)


def test_kronecker_never_exceeds_what_it_projects():
    seen = Seen(cnn)
    rows = seen.bind(pk.Kronecker(60, wide=60)).project(seen.pieces, seen.count)
    columns = torch.zeros(rows.shape[1], dtype=torch.bool)
    held = torch.zeros(seen.count, dtype=torch.float64)
    for part, block in zip(seen.bind(pk.Kronecker(60, wide=60)).maps, seen.blocks, strict=True):
        if block.matrix:  # in orthonormal directions; the others have random signs
            columns[part.columns] = True
            held += seen.dense[:, block.span].square().sum(1)
    assert (rows[:, columns].square().sum(1) <= held * (1 + 1e-12)).all()


class LowRank:
    """Gradients of a layer whose inputs span three directions."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        few, mix = torch.randn(3, 40, generator=generator), torch.randn(64, 3, generator=generator)
        torch.manual_seed(0)
        model = nn.Linear(40, 30, bias=False)
        layers, self.blocks = find_layers(model, {"weight": 0})
        self.pieces = []
        with Capture(layers, self.blocks).during_backward(64, lambda *piece: self.pieces.append(piece)):
            (model(mix @ few)[:, :2].exp()).sum().backward()  # and two outputs that matter
        self.dense = self.pieces[0][1].dense()

    def error(self, projection):
        projector = projection.bind(self.blocks, torch.empty(0), WarmUp([self.pieces]))
        rows = projector.project(self.pieces, 64)
        exact = self.dense @ self.dense.T
        return float((rows @ rows.T - exact).norm() / exact.norm())


def test_principal_directions_beat_random_ones_at_the_same_k():
    case = LowRank()
    principal, sparse = case.error(pk.Kronecker(6, wide=6)), case.error(pk.SparseSign(6))
    assert principal < 1e-4
    assert sparse > 0.1


def test_a_larger_k_errs_less():
    seen = Seen(cnn)
    exact = seen.dense @ seen.dense.T
    errors = []
    for k in (10, 60, 300, 5000):
        rows = seen.bind(pk.Kronecker(k, wide=k)).project(seen.pieces, seen.count)
        errors.append(float((rows @ rows.T - exact).norm() / exact.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.05


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("kind", [pk.SparseSign, pk.Kronecker])
@pytest.mark.parametrize("k", [0, -3, 2.5])
def test_a_size_that_makes_no_map_is_refused(kind, k):
    match = rf"^{kind.kind}\(k=…\): the value is invalid\. Got {k}; expected an integer from 1 up"
    with pytest.raises(ConfigurationError, match=match):
        kind(k=k)


def test_other_sizes_are_refused_too():
    with pytest.raises(ConfigurationError, match=r"SparseSign\(nonzeros=…\)"):
        pk.SparseSign(nonzeros=0)
    with pytest.raises(ConfigurationError, match=r"Kronecker\(warm_up_examples=…\)"):
        pk.Kronecker(warm_up_examples=0)
    with pytest.raises(ConfigurationError, match=r"Kronecker\(warm_up_mib=…\)"):
        pk.Kronecker(warm_up_mib=0)


def test_a_kind_of_another_version_is_refused():
    match = r"projection: this kind is unknown\. Got 'Fourier'; expected Identity, SparseSign, Kronecker \(from"
    with pytest.raises(ConfigurationError, match=match):
        projection_from_description({"kind": "Fourier", "k": 8})


def test_nothing_projects_to_zero():
    projector = Seen(mlp).bind(pk.SparseSign(k=32))
    assert torch.equal(projector.project([], 3), torch.zeros(3, 32, dtype=projector.dtype))


def test_rows_are_stored_in_half_precision_except_exact_ones():
    assert pk.Identity().row_dtype(torch.float32) == torch.float32
    assert pk.Kronecker().row_dtype(torch.float32) == torch.float16
    assert pk.Kronecker().row_dtype(torch.float64) == torch.float64
    assert (pk.Identity().warm_up, pk.SparseSign().warm_up) == (0, 0)
    assert pk.Kronecker(warm_up_examples=9).warm_up == 9
    assert pk.Kronecker(warm_up_mib=3).warm_up_bytes(10) == 3 << 20
    assert pk.Kronecker().warm_up_bytes(511) == 1 << 30
    assert pk.Kronecker().warm_up_bytes(512) == 192 << 20
