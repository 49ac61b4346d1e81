"""Likely wrong labels: the score by hand, what it ignores, and the page."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pkexplain as pk

N, CLASSES = 120, 4


def data(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Four clouds of points, a tenth of them with another cloud's label."""
    random = torch.Generator().manual_seed(seed)
    truth = torch.arange(N) % CLASSES
    inputs = 2 * torch.eye(CLASSES)[truth] + 0.5 * torch.randn(N, CLASSES, generator=random)
    labels, wrong = pk.evaluation.flip_labels(truth, fraction=0.1, classes=CLASSES, seed=seed)
    return inputs, torch.as_tensor(labels), wrong


def record(run, inputs, labels, *, reduction="mean", batch=32, epochs=6, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(CLASSES, 16), nn.Tanh(), nn.Linear(16, CLASSES))
    rate = 0.3 if reduction == "mean" else 0.3 / batch
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    seen = []
    with pk.Recorder(run, model, optimizer, num_examples=N) as recorder:
        for _ in range(epochs):
            sizes = torch.full((N,), torch.nan)
            for ids in torch.randperm(N).split(batch):
                with recorder.step(ids):
                    optimizer.zero_grad()
                    scores = model(inputs[ids])
                    sizes[ids] = (scores.softmax(1) - F.one_hot(labels[ids], CLASSES)).norm(dim=1).detach()
                    F.cross_entropy(scores, labels[ids], reduction=reduction).backward()
                    optimizer.step()
            seen.append(sizes)
    return model, torch.stack(seen).double().numpy()


def test_the_score_is_the_mean_of_the_derivatives_weighted_by_their_variance() -> None:
    inputs, labels, wrong = data()
    run = pk.MemoryStore()
    _, sizes = record(run, inputs, labels, batch=30)  # every batch is whole
    shares = sizes / 2**0.5
    weights = shares.var(1, ddof=1)
    found = pk.suspects(run, k=12)
    np.testing.assert_allclose(found.scores, (weights[:, None] * shares).sum(0) / weights.sum(), rtol=1e-4)
    assert list(found.ids) == list(np.argsort(-found.scores)[:12])
    assert [s.score for s in found] == sorted((s.score for s in found), reverse=True)
    assert wrong[found.ids].mean() > 0.8


def test_a_smaller_last_batch_and_a_summed_loss_do_not_change_the_order() -> None:
    inputs, labels, _ = data()
    scores = []
    for reduction in ("mean", "sum"):
        run = pk.MemoryStore()
        record(run, inputs, labels, reduction=reduction, batch=32)  # the last one has 24
        scores.append(pk.suspects(run).scores)
    assert all(((s >= 0) & (s <= 1)).all() for s in scores)
    assert np.corrcoef(*scores)[0, 1] > 0.99


def test_centred_scores_have_no_mean_in_any_label() -> None:
    inputs, labels, _ = data()
    run = pk.MemoryStore()
    record(run, inputs, labels)
    plain, centred = pk.suspects(run).scores, pk.suspects(run, labels=labels).scores
    for label in range(CLASSES):
        mine = labels.numpy() == label
        assert centred[mine].mean() == pytest.approx(0, abs=1e-12)
        np.testing.assert_allclose(plain[mine] - plain[mine].mean(), centred[mine])


def test_runs_are_averaged_and_examples_that_are_gone_are_not_suspected(tmp_path) -> None:
    inputs, labels, _ = data()
    stores = [tmp_path / "one", tmp_path / "two"]
    for seed, store in enumerate(stores):
        record(store, inputs, labels, seed=seed)
    each = [pk.suspects(store).scores for store in stores]
    np.testing.assert_allclose(pk.suspects(stores).scores, np.mean(each, axis=0))
    worst = int(pk.suspects(stores[0]).ids[0])
    pk.withdraw(stores[0], [worst])
    found = pk.suspects(stores[0], k=N)
    assert worst not in found.ids
    assert np.isnan(found.scores[worst])
    assert len(found) == N - 1


def test_neighbours_and_what_the_model_says(tmp_path) -> None:
    inputs, labels, wrong = data()
    model, _ = record(tmp_path / "run", inputs, labels)
    dataset = torch.utils.data.TensorDataset(inputs, labels)
    explainer = pk.Explainer(tmp_path / "run", model)
    found = explainer.suspects(8, dataset=dataset)
    rows = torch.cat([explainer.trajectory.segment(t).read_rows(slice(0, N)) for t in range(6)], dim=1).double()
    cosines = F.normalize(rows, dim=1) @ F.normalize(rows, dim=1).T
    cosines.fill_diagonal_(-2)
    for each in found:
        assert each.prediction == int(model(inputs[each.id]).argmax())
        best = cosines[each.id].topk(8)
        assert [i for i, _ in each.neighbours] == best.indices.tolist()
        np.testing.assert_allclose([c for _, c in each.neighbours], best.values, atol=2e-3)
    assert wrong[found.ids].all()
    assert "model says" in str(found)
    assert list(found.to_pandas()["id"]) == list(found.ids)
    page = found.write_report(tmp_path / "page.html", dataset=dataset, label_names="abcd").read_text(encoding="utf-8")
    assert page.count('class="card') == 8 + 1  # the list's own class, too
    assert f"example {found[0].id}" in page


def test_what_does_not_fit_is_refused(tmp_path) -> None:
    inputs, labels, _ = data()
    run = pk.MemoryStore()
    record(run, inputs, labels)
    with pytest.raises(pk.PkexplainError, match="nothing to rank"):
        pk.suspects(run, k=0)
    with pytest.raises(pk.PkexplainError, match="another shape"):
        pk.suspects(run, labels=labels[:-1])
    with pytest.raises(pk.PkexplainError, match="not the one that was recorded"):
        pk.suspects(run).write_report(tmp_path / "page.html", dataset=[1, 2])
