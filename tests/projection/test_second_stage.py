"""The second stage, and the direction of a segment's sum: checked against dense linear algebra."""

from __future__ import annotations

import pytest
import torch

import pkexplain as pk
from pkexplain.distributed import ProcessGroup
from pkexplain.projection.base import WarmUp
from pkexplain.projection.maps import TwoSidedMap
from tests.conftest import RecordedTraining, cnn, mlp
from tests.projection.test_projection import Seen

GENERATOR = torch.Generator()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR.manual_seed(seed), dtype=torch.float64)


def bound(k: int, wide: int, seen: Seen | None = None):
    """A projection before its second stage, and what chooses that stage from made rows."""
    seen, projection = seen or Seen(cnn), pk.Kronecker(k, wide=wide)
    projector = seen.bind(projection)
    rates = normal(len(seen.blocks), seed=5).abs() + 0.1

    def stage(rows: torch.Tensor):
        found = projection.second_stage(projector, rows, rows.sum(0), rates, ProcessGroup())
        assert found is not None
        return projector.with_second_stage(found), found

    return projector, stage


def decaying(rows: int, width: int) -> torch.Tensor:
    """Rows whose energy falls off along random directions."""
    turn = torch.linalg.qr(normal(width, width, seed=1))[0]
    return normal(rows, width, seed=2) * 0.9 ** torch.arange(width) @ turn


def missed(rows: torch.Tensor, basis: torch.Tensor) -> float:
    """The share of the rows' energy outside of some orthonormal directions, large rows held back."""
    held = rows / rows.norm(dim=1, keepdim=True) ** 0.5
    return 1 - float((held @ basis.T).square().sum() / held.square().sum())


def test_short_rows_of_few_examples_multiply_as_wide_ones_do():
    seen = Seen(cnn)
    projector, stage = bound(30, 300, seen)
    rows = projector.project(seen.pieces, seen.count)
    shortened, _ = stage(rows)
    covectors = normal(4, projector.width, seed=3)
    assert shortened.columns == 30 < projector.width
    products = shortened.short_rows(rows) @ shortened.short_covectors(covectors).T
    torch.testing.assert_close(products, rows @ covectors.T, rtol=1e-9, atol=1e-10)


def test_the_sum_of_the_rows_is_kept_whatever_else_is_lost():
    projector, stage = bound(5, 300)
    rows = decaying(400, projector.width)
    shortened, covector = stage(rows)[0], normal(1, projector.width, seed=4)
    by_short = float(shortened.short_rows(rows).sum(0) @ shortened.short_covectors(covector)[0])
    assert by_short == pytest.approx(float(rows.sum(0) @ covector[0]), rel=1e-9)
    lost = (shortened.short_rows(rows) @ shortened.short_covectors(covector).T - rows @ covector.T).norm()
    assert lost > 0.05 * (rows @ covector.T).norm()


@pytest.mark.parametrize("count", [60, 3000], ids=["all rows", "drawn"])
def test_its_directions_are_nearly_the_best(count):
    projector, stage = bound(20, 300)
    rows = decaying(count, projector.width)
    _, second = stage(rows)
    torch.testing.assert_close(second.basis @ second.basis.T, torch.eye(20, dtype=torch.float64))
    scaled = rows / second.scale
    held = scaled / scaled.norm(dim=1, keepdim=True) ** 0.5
    best = torch.linalg.svd(held, full_matrices=False)[2]
    assert missed(scaled, best[:20]) <= missed(scaled, second.basis) < missed(scaled, best[:13])


def test_rows_are_scaled_by_the_root_of_their_blocks_rates():
    projector, stage = bound(20, 300)
    scale = stage(decaying(60, projector.width))[1].scale
    rates = normal(len(projector.blocks), seed=5).abs() + 0.1
    for rate, span in zip(rates, projector.spans.values(), strict=True):
        torch.testing.assert_close(scale[span], torch.full_like(scale[span], float(rate) ** 0.5))


def test_no_second_stage_without_need():
    projector = Seen(mlp).bind(pk.Kronecker(100_000))
    projection = pk.Kronecker(40, wide=8)
    assert projection.wide == 40
    assert pk.Kronecker(100_000).columns(projector.blocks) == projector.width
    for each in (pk.Kronecker(100_000), pk.Identity(), pk.SparseSign(50)):
        bind = Seen(mlp).bind(each)
        rows = normal(3, bind.width)
        assert each.second_stage(bind, rows, rows.sum(0), torch.ones(9), ProcessGroup()) is None


@pytest.mark.parametrize(("k", "room", "times"), [(1, 10**9, 8), (1, 100, 2), (1, 0, 1), (38, 10**9, 1)])
def test_rows_are_gathered_wider_where_that_is_cheap_beside_the_training_and_there_is_room(k, room, times):
    seen, projection = Seen(cnn), pk.Kronecker(k, wide=40)
    warm = WarmUp([seen.pieces], room=room)
    projector = projection.bind(seen.blocks, torch.empty(0, dtype=torch.float64), warm)
    assert 40 * (times - 1) < projector.width <= 40 * times
    restored = projection.restore(seen.blocks, torch.empty(0, dtype=torch.float64), projector.tensors())
    assert restored.width == projector.width
    rows = restored.project(seen.pieces, seen.count)
    torch.testing.assert_close(rows, projector.project_plain(seen.dense), rtol=1e-9, atol=1e-10)


def test_a_run_with_wider_rows_is_explained(tmp_path):
    run = RecordedTraining(
        cnn(),
        lambda p: torch.optim.AdamW(p, lr=3e-3),
        projection=pk.Kronecker(3, wide=20),
        examples=48,
        queries=4,
        segments=12,
        image=True,
        store=pk.DirectoryStore(tmp_path / "run"),
    ).train(epochs=2)
    explainer = pk.Explainer(run.store, run.model)
    trajectory = explainer.trajectory
    projectors = [trajectory.projector(t, torch.device("cpu")) for t in range(len(trajectory))]
    assert max(projector.width for projector in projectors) > 20
    assert {projector.columns for projector in projectors} == {3}
    for explanation in explainer.explain(run.queries, output=pk.Logit(3)):
        named = sum(explanation.ledger.remainders.values())
        change = explanation.final - explanation.initial
        assert explanation.contributions.sum() + named == pytest.approx(change, rel=1e-6)


# ------------------------------------------------------------------------------------------- the direction of the sum


def maps(seed: int, beside: bool) -> TwoSidedMap:
    """A map of a matrix of 6 × 5 with a bias, and a direction that L and R do not hold."""
    left, right = (torch.linalg.qr(normal(n, n, seed=seed + n))[0][:k] for n, k in ((6, 3), (5, 2)))
    made = TwoSidedMap(slice(0, 6), left, right, split=True)
    if not beside:
        return made
    direction = made.left_of(normal(30, seed=seed))
    return TwoSidedMap(slice(0, 7), left, right, split=True, beside=direction / direction.norm())


@pytest.mark.parametrize("mine", [True, False])
@pytest.mark.parametrize("its", [True, False])
@pytest.mark.parametrize("multiplied", [True, False])
def test_covectors_change_directions_as_dense_vectors_do(mine, its, multiplied):
    here, there = maps(1, mine), maps(2, its)
    if multiplied:
        there = there.of_multiples((normal(6, seed=7).exp(), normal(5, seed=8).exp()))
    table = there.vectors(torch.eye(30, dtype=torch.float64))  # what each column multiplies, (30, columns)
    columns = normal(4, table.shape[1], seed=9)
    torch.testing.assert_close(here.from_columns_of(there, columns), here.vectors(columns @ table.T))


def test_the_direction_of_the_sum_is_orthogonal_to_the_others_and_projects_gradients_like_vectors():
    seen = Seen(cnn)
    projection = pk.Kronecker(40, wide=40)
    total = seen.dense.sum(0)
    like = torch.empty(0, dtype=torch.float64)
    projector = projection.bind(seen.blocks, like, WarmUp([seen.pieces], total=total))
    rows = projector.project(seen.pieces, seen.count)
    torch.testing.assert_close(rows, projector.project_plain(seen.dense), rtol=1e-9, atol=1e-10)
    found = {p: part for p, part in enumerate(projector.maps) if isinstance(part, TwoSidedMap)}
    assert found
    for position, part in found.items():
        assert part.beside is not None
        span = seen.blocks[position].span
        kept = part.vectors(total[None, span])  # nothing of the sum is lost
        assert float(kept.square().sum()) == pytest.approx(float(total[span].square().sum()), rel=1e-9)
    assert projector.width <= projection.wide


def test_there_is_no_such_direction_where_no_column_is_free():
    seen = Seen(mlp)
    for projection in (pk.Kronecker(len(seen.blocks)), pk.Kronecker(100_000)):
        projection = pk.Kronecker(projection.k, wide=projection.k)
        warm = WarmUp([seen.pieces], total=seen.dense.sum(0))
        projector = projection.bind(seen.blocks, torch.empty(0, dtype=torch.float64), warm)
        assert not any(name.endswith("beside") for name in projector.tensors())
