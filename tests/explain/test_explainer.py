"""Explanations of real runs: invariances, outputs, refusals, indexes."""

from __future__ import annotations

import copy
import json
import pickle
import sys

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

import pkexplain as pk
from pkexplain.errors import (
    ConfigurationError,
    MissingDependencyError,
    ModelMismatchError,
    QueryError,
)
from pkexplain.explain import dense as exact
from pkexplain.index.faiss_index import CompressedSearch
from pkexplain.store.rows import Rows
from tests.conftest import batches, digits, mlp, train

NEVER = 1e9
"""A tolerance that no refinement is needed for, so that every query is integrated at the same nodes."""


@pytest.fixture(scope="module")
def explainer(run):
    return pk.Explainer(run.store, run.model)


@pytest.fixture(scope="module")
def coarse(identity_run):
    return pk.Explainer(identity_run.store, identity_run.model, tolerance=NEVER)


def value_of(explanation, name):
    return next(check.value for check in explanation.checks if check.name == name)


def close(found, expected, rtol=1e-4):
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


# ------------------------------------------------------------------------------------------------------ invariances


def test_a_batch_is_explained_as_its_queries_alone(run, explainer):
    together = explainer.explain(run.queries[:6], output=pk.Logit(3))
    assert isinstance(together, list)
    for query, expected in zip(run.queries, together, strict=False):
        alone = explainer.explain(query, output=pk.Logit(3))
        assert isinstance(alone, pk.Explanation)
        close(alone.contributions, expected.contributions)
        assert alone.cost == expected.cost
        assert [p.id for p in alone.proponents] == [p.id for p in expected.proponents]
        assert alone.initial == pytest.approx(expected.initial, rel=1e-5)
        assert alone.final == pytest.approx(expected.final, rel=1e-5)


def test_the_order_of_queries_does_not_matter(run, explainer):
    order = torch.tensor([4, 0, 3, 1, 2])
    close(explainer.contributions(run.queries[order]), explainer.contributions(run.queries[:5])[order.numpy()])


def test_more_queries_than_fit_at_once_are_cut_and_put_together(run, explainer, monkeypatch):
    expected = explainer.contributions(run.queries[:7], output=pk.Logit([0, 1, 2, 3, 4, 5, 6]))
    monkeypatch.setattr("pkexplain.explain.explainer._MOST_QUERIES_AT_ONCE", 3)
    close(explainer.contributions(run.queries[:7], output=pk.Logit([0, 1, 2, 3, 4, 5, 6])), expected)
    names = [e.output for e in explainer.explain(run.queries[:7], output=pk.Logit([0, 1, 2, 3, 4, 5, 6]))]
    assert names == [f"logit[{c}]" for c in range(7)]


def test_a_batch_of_one_is_still_a_batch(run, explainer):
    assert len(explainer.explain(run.queries[:1])) == 1
    assert explainer.contributions(run.queries[0]).shape == (1, run.examples)


def test_the_model_is_left_as_it_was(run):
    model = mlp(activation=nn.ReLU, dtype=torch.float32)
    model.load_state_dict(run.model.state_dict())
    model.train()
    model[0].weight.requires_grad_(False)
    model[2].bias.grad = torch.ones(10)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    pk.Explainer(run.store, model).explain(run.queries[0])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert [p.grad is None for p in model.parameters()] == [True, True, True, False]
    assert torch.equal(model[2].bias.grad, torch.ones(10))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_no_random_number_is_drawn(run, explainer):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    explainer.explain(run.queries[0])
    assert torch.equal(state, torch.get_rng_state())


def test_any_state_of_the_recorded_parameters_gives_the_same_numbers(run, explainer):
    other = mlp(seed=9, activation=nn.ReLU, dtype=torch.float32)
    found = pk.Explainer(run.store, other).contributions(run.queries[:2])
    assert np.array_equal(found, explainer.contributions(run.queries[:2]))


# -------------------------------------------------------------------------------------------------- what adds up


@pytest.mark.parametrize("which", ["run", "identity_run"])
def test_contributions_add_up_to_the_change_of_the_output(which, request):
    run = request.getfixturevalue(which)
    for explanation in pk.Explainer(run.store, run.model).explain(run.queries[:10]):
        ledger = explanation.ledger
        change = explanation.final - explanation.initial
        named = sum(ledger.remainders.values())
        assert set(ledger.remainders) == {"weight_decay", "optimizer"}
        assert abs(explanation.contributions.sum() + named - change) < 1e-4 * abs(change)
        assert explanation.contributions.sum() == pytest.approx(explanation.total, rel=1e-4)
        assert sum(explanation.segment_sums) == pytest.approx(explanation.total, rel=1e-9)
        assert abs(explanation.gap) < 1e-4 * abs(change)
        assert explanation.checkpoint_outputs[0] == explanation.initial
        assert explanation.checkpoint_outputs[-1] == explanation.final
        assert explanation.passed, explanation.checks


def test_groups_add_up_to_the_total(run, explainer):
    explanation = explainer.explain(run.queries[0])
    groups = explanation.by_group(run.targets[: run.examples])
    assert [g.group for g in groups] == list(range(10))
    assert sum(g.count for g in groups) == run.examples
    assert sum(g.net for g in groups) == pytest.approx(explanation.contributions.sum(), rel=1e-9)
    assert sum(g.gross for g in groups) == pytest.approx(explanation.gross, rel=1e-9)


def test_contributions_are_those_of_the_explanations(run, explainer):
    table = explainer.contributions(run.queries[:4], output=pk.LogProbability(2))
    assert table.shape == (4, run.examples)
    for row, explanation in zip(table, explainer.explain(run.queries[:4], output=pk.LogProbability(2)), strict=True):
        close(row, explanation.contributions, rtol=1e-9)


def test_proponents_and_opponents_are_the_ends_of_the_ranking(run, explainer):
    for explanation in explainer.explain(run.queries[:8], k=7):
        order = np.argsort(explanation.contributions)
        assert [p.id for p in explanation.proponents] == order[::-1][:7].tolist()
        assert [p.id for p in explanation.opponents] == order[:7].tolist()
        for shown in (*explanation.proponents, *explanation.opponents):
            assert shown.contribution == pytest.approx(explanation.contributions[shown.id], rel=1e-4)
            assert shown.weight * shown.kernel == pytest.approx(shown.contribution, rel=1e-6)
            assert sum(shown.segments) == pytest.approx(shown.contribution, rel=1e-6)


def test_more_examples_asked_for_than_there_are(run, explainer):
    explanation = explainer.explain(run.queries[0], k=10_000)
    signs = explanation.contributions
    assert len(explanation.proponents) == (signs > 0).sum()
    assert len(explanation.opponents) == (signs < 0).sum()
    assert explanation.shown_share == pytest.approx(1.0, rel=1e-5)


def test_rows_are_stored_in_half_precision_and_still_add_up(run):
    segment = run.store.trajectory().segment(0)
    assert segment.shards[0].rows.dtype == torch.float16
    exact_sum = segment.read_rows(slice(None), torch.float64).sum(0)
    torch.testing.assert_close(segment.row_sum, exact_sum, rtol=1e-12, atol=1e-15)


def test_rounding_to_half_precision_costs_little():
    rows = torch.randn(40, 200) * 10.0 ** torch.linspace(-15, 15, 40)[:, None]
    kept = Rows.pack(rows, torch.zeros(len(rows)), torch.float16)
    error = (kept.read(slice(None)) - rows).norm(dim=1) / rows.norm(dim=1)
    assert error.max() < 2**-8  # each is the only one of its size, and takes what the larger ones leave
    assert torch.isfinite(kept.rows).all()


def test_a_sum_of_rows_that_cancel_keeps_its_digits():
    torch.manual_seed(0)
    rows = torch.randn(400, 20) * 10.0 ** torch.linspace(-1, 1, 400)[:, None]
    rows[-1] -= rows.sum(0)
    kept = Rows.pack(rows, torch.zeros(len(rows)), torch.float16)
    error = (kept.read(slice(None)) - rows).norm(dim=1) / rows.norm(dim=1)
    assert error.median() < 2**-11
    assert error.max() < 2**-8
    plain = rows.half().double().sum(0) - rows.double().sum(0)
    assert (kept.sum() - rows.double().sum(0)).abs().median() < 0.05 * plain.abs().median()


def test_the_exact_path_kernel_agrees(identity_run):
    queries = identity_run.queries[:4]
    account = exact.path_kernel(identity_run.store, identity_run.model, queries, output=pk.Logit(0), nodes=2, pieces=64)
    change = account.final - account.initial
    assert (np.abs(account.gap) < 2e-2 * np.abs(change)).all()
    fine = pk.Explainer(identity_run.store, identity_run.model, tolerance=1e-4, quadrature=pk.Quadrature(2, 4096))
    found = fine.explain(queries, output=pk.Logit(0))
    for q, explanation in enumerate(found):
        scale = np.abs(account.contributions[q]).max()
        assert np.abs(explanation.contributions - account.contributions[q]).max() < 0.02 * scale
        assert explanation.initial == pytest.approx(account.initial[q], rel=1e-5)
        assert explanation.final == pytest.approx(account.final[q], rel=1e-5)
        assert explanation.ledger.remainders["weight_decay"] == pytest.approx(account.weight_decay[q], rel=2e-2)
        kernel = np.abs(account.kernels[q]).max()
        for shown in (*explanation.proponents, *explanation.opponents):
            assert shown.kernel == pytest.approx(account.kernels[q, shown.id], abs=0.02 * kernel)


def test_the_exact_path_kernel_wants_rows_as_they_are(run):
    with pytest.raises(ConfigurationError, match=r"path_kernel\(run\): .* Got projection Kronecker\(.*Identity"):
        exact.path_kernel(run.store, run.model, run.queries[0])


@pytest.fixture(scope="module")
def wide():
    """The same training of a wider model, recorded with each projection; parameters and contributions."""
    found = {}
    inputs, targets = digits(260, torch.float32)
    for projection in (pk.Identity(), pk.Kronecker(), pk.SparseSign()):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10))
        optimizer, store = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), pk.MemoryStore()
        recorder = pk.Recorder(store, model, optimizer, num_examples=240, projection=projection)
        train(model, optimizer, inputs, targets, batches(240, 24, 3), recorder=recorder)
        explainer = pk.Explainer(store, model, tolerance=NEVER)
        assert explainer.explain(inputs[240]).passed or projection != pk.Kronecker()
        found[projection.kind] = store.trajectory(), explainer.contributions(inputs[240:])
    return found


def top_ten(contributions):
    return set(np.argsort(-contributions)[:10].tolist())


@pytest.mark.parametrize(("kind", "least"), [("Kronecker", 0.95), ("SparseSign", 0.8)])
def test_projected_contributions_rank_as_those_without_projection(wide, kind, least):
    trajectory, found = wide[kind]
    assert trajectory.manifest.columns < 0.6 * sum(block.numel for block in trajectory.fingerprint.blocks)
    _, expected = wide["Identity"]
    correlations = [spearmanr(a, b).statistic for a, b in zip(found, expected, strict=True)]
    overlap = [len(top_ten(a) & top_ten(b)) / 10 for a, b in zip(found, expected, strict=True)]
    assert np.median(correlations) >= least
    assert np.median(overlap) >= (0.9 if kind == "Kronecker" else 0.5)
    sums = np.abs(found.sum(1) - expected.sum(1))
    assert (sums < 0.02 * np.abs(expected).sum(1)).all()


# ---------------------------------------------------------------------------------------------------------- outputs


def margin_of_two(prediction: Tensor) -> Tensor:
    return prediction[:, 0] - prediction[:, 1]


ROWS = torch.arange(5)
OUTPUTS = {
    "default": (None, lambda y, final: y.gather(1, final.argmax(1)[:, None])[:, 0]),
    "logit of the prediction": (pk.Logit(), lambda y, final: y.gather(1, final.argmax(1)[:, None])[:, 0]),
    "logit": (pk.Logit(3), lambda y, final: y[:, 3]),
    "logits": (pk.Logit([4, 0, 0, 9, 1]), lambda y, final: y[ROWS, torch.tensor([4, 0, 0, 9, 1])]),
    "logits of a tensor": (pk.Logit(torch.arange(5)), lambda y, final: y[ROWS, ROWS]),
    "log-probability": (pk.LogProbability(2), lambda y, final: y.log_softmax(1)[:, 2]),
    "margin": (
        pk.Margin(2),
        lambda y, final: y.log_softmax(1)[:, 2] - torch.log1p(-y.softmax(1)[:, 2]),
    ),
    "loss": (pk.Loss(7), lambda y, final: F.cross_entropy(y, torch.full((5,), 7), reduction="none")),
    "losses": (pk.Loss([1, 2, 3, 4, 5]), lambda y, final: F.cross_entropy(y, ROWS + 1, reduction="none")),
    "squared loss": (pk.Loss(torch.ones(5, 10), F.mse_loss), lambda y, final: (y - 1).square().mean(1)),
    "value": (pk.Value(6), lambda y, final: y[:, 6]),
    "function": (margin_of_two, lambda y, final: y[:, 0] - y[:, 1]),
    "custom": (pk.Custom(lambda y: y.square().sum(1)), lambda y, final: y.square().sum(1)),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_both_ends_of_every_output_are_those_of_the_model(run, explainer, name):
    output, direct = OUTPUTS[name]
    queries = run.queries[:5]
    with torch.no_grad():
        final = run.model(queries)
        named = dict(zip(dict(run.model.named_parameters()), run.start, strict=True))
        initial = torch.func.functional_call(run.model, named, (queries,))
    expected_initial, expected_final = direct(initial, final).tolist(), direct(final, final).tolist()
    options = {} if output is None else {"output": output}
    found = explainer.explain(queries, **options)
    assert [e.initial for e in found] == pytest.approx(expected_initial, rel=1e-4, abs=1e-5)
    assert [e.final for e in found] == pytest.approx(expected_final, rel=1e-4, abs=1e-5)
    assert all(abs(e.gap) < 1e-4 * max(abs(e.final - e.initial), 1e-3) for e in found)


def test_outputs_are_named(run, explainer):
    def names(output):
        return [e.output for e in explainer.explain(run.queries[:2], output=output)]

    assert names(pk.Logit([3, 4])) == ["logit[3]", "logit[4]"]
    assert names(pk.LogProbability(1)) == ["log_probability[1]"] * 2
    assert names(pk.Loss([3, 4])) == ["loss[3]", "loss[4]"]
    assert names(margin_of_two) == ["margin_of_two"] * 2
    assert names(pk.Value(2)) == ["value[2]"] * 2


@pytest.mark.parametrize("which", ["run", "identity_run"])
def test_contributions_are_linear_in_the_output(which, request):
    run = request.getfixturevalue(which)
    explainer = pk.Explainer(run.store, run.model, tolerance=NEVER)
    of = lambda output: explainer.contributions(run.queries[:4], output=output)  # noqa: E731 - one line
    close(of(margin_of_two), of(pk.Logit(0)) - of(pk.Logit(1)))
    close(of(lambda y: -2.5 * y[:, 4]), -2.5 * of(pk.Logit(4)))
    nothing = of(lambda y: 0.0 * y[:, 0])
    assert not nothing.any()


def test_an_output_that_does_not_depend_on_the_model_has_no_contributions(run, explainer):
    found = explainer.explain(run.queries[0], output=lambda y: torch.ones(len(y)))
    assert (found.initial, found.final, found.total) == (1.0, 1.0, 0.0)
    assert not found.contributions.any()


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("query", "wrong"),
    [
        (torch.zeros(63), r"forward pass fails on it \(RuntimeError: mat1 and mat2 .*\)\. Got '0' of shape \(63,\); "),
        (
            torch.zeros(3, 63),
            r"Got '0' of shape \(63,\) in a batch of 3; expected '0' of shape \(64,\) \(from the inputs seen",
        ),
        (torch.zeros(1), r"it has another shape\. Got shape \(1,\)"),
        (torch.zeros(2, 3, 64), r"it has another shape\. Got shape \(2, 3, 64\)"),
        (torch.zeros(()), r"it has another shape\. Got shape \(\)"),
        (torch.zeros(0, 64), r"it has another shape\. Got shape \(0, 64\)"),
        (torch.zeros(64, dtype=torch.long), r"it has another dtype\. Got torch\.int64; .* float32"),
        (["a"] * 64, r"it is not a tensor but a text\. Got list"),
        (None, r"it is not a tensor\. Got NoneType"),
        ((), r"there is none\. Got nothing"),
        ((torch.zeros(64), torch.zeros(64)), r"input '1': no such input was seen while recording"),
        ({"x": torch.zeros(64)}, r"input 'x': no such input was seen while recording\. Got 'x' next to 0 \(input\)"),
        ([], r"there is none\. Got nothing"),
        ({}, r"there is none\. Got nothing"),
        ("a text", r"it is not a tensor but a text\. Got str; .*Tokenise it, as for training"),
        (
            [torch.zeros(2, 64), torch.zeros(2)],
            r"it is in a list of queries, and has a batch dimension\. Got a batch of 2",
        ),
    ],
)
def test_a_query_that_does_not_fit_is_refused(explainer, query, wrong):
    with pytest.raises(QueryError, match=rf"^explaining (a )?query.*{wrong}"):
        explainer.explain(query)
    with pytest.raises(QueryError, match=wrong):
        explainer.contributions(query)


def test_a_query_that_is_not_a_number_is_refused(run, explainer):
    queries = run.queries[:3].clone()
    queries[1, 5] = float("nan")
    with pytest.raises(QueryError, match=r"the model's prediction is not a number\. Got nan for query 1; "):
        explainer.explain(queries)


@pytest.mark.parametrize(
    "query", [[0.5] * 64, np.zeros(64), np.zeros((64,), dtype=np.float32), torch.zeros(64).double()]
)
def test_a_query_may_be_anything_that_makes_a_tensor(explainer, query):
    expected = explainer.contributions(torch.as_tensor(query).float())
    assert np.array_equal(explainer.contributions(query), expected)


@pytest.mark.parametrize(
    ("output", "wrong"),
    [
        (pk.Logit(10), r"output=Logit\(10\): there is no such class\. Got a prediction of shape \(3, 10\); .* 0 to 9"),
        (pk.Margin(-1), r"output=Margin\(-1\): there is no such class"),
        (pk.Logit([1, 2]), r"output=Logit\(\[1, 2\]\): the classes do not fit the queries\. .* one class, or 3"),
        (pk.Logit(1.5), r"the classes do not fit the queries"),
        (pk.LogProbability(True), r"the classes do not fit the queries"),
        (pk.Logit("three"), r"the classes do not fit the queries"),
        (pk.Value(10), r"output=Value\(10\): there is no such value\. .* expected 0 to 9"),
        (pk.Value(-1), r"there is no such value"),
        (pk.Loss(10), r"output=Loss\(…\): the loss failed \(.*\)\. .* expected targets that this loss takes"),
        (pk.Loss([1, 2]), r"output=Loss\(…\): the loss failed"),
        (lambda y: y, r"it does not return one number for each query but a Tensor of shape \(3, 10\)"),
        (lambda y: 1.0, r"it does not return one number for each query but a float of shape \(\)"),
        ("logit:3", r"output=…: this is not an output\. Got 'logit:3'; expected Logit\(c\), .*pkexplain\.Logit\(c\)"),
        (3, r"this is not an output\. Got 3; "),
        (pk.Logit, r"this is not an output\. Got <class .*Logit'>"),
    ],
)  # fmt: skip
def test_an_output_that_does_not_exist_is_refused(run, explainer, output, wrong):
    with pytest.raises(QueryError, match=wrong):
        explainer.explain(run.queries[:3], output=output)


@pytest.mark.parametrize("reading", ["REMOVAL", "PATH", None])
def test_a_reading_that_is_not_there_is_refused(run, explainer, reading):
    expected = r"expected \"path\", \"removal\", a Removal or a Replay"
    match = rf"^Explainer\.explain: there is no such reading\. Got {reading!r}; {expected}"
    with pytest.raises(ConfigurationError, match=match):
        explainer.explain(run.queries[0], reading=reading)
    with pytest.raises(ConfigurationError, match="there is no such reading"):
        explainer.contributions(run.queries[0], reading=reading)


@pytest.mark.parametrize("k", [0, -1, 2.5, "ten"])
def test_a_number_of_examples_that_cannot_be_is_refused(run, explainer, k):
    with pytest.raises(
        ConfigurationError, match=rf"this many examples cannot be shown\. Got {k!r}; expected an integer"
    ):
        explainer.explain(run.queries[0], k=k)


@pytest.mark.parametrize("tolerance", [0, -0.1, float("nan")])
def test_a_tolerance_that_cannot_be_is_refused(run, tolerance):
    with pytest.raises(ConfigurationError, match=r"^Explainer\(tolerance=…\): it must be positive\. Got "):
        pk.Explainer(run.store, run.model, tolerance=tolerance)


def mismatch(name, got, expected):
    match = rf"^explaining with parameter '{name}': the model is not .* Got {got}; expected {expected} \(from the run"
    return pytest.raises(ModelMismatchError, match=match)


def test_another_model_is_refused(run):
    with mismatch(r"0\.weight", r"\(13, 64\)", r"\(12, 64\)"):
        pk.Explainer(run.store, nn.Sequential(nn.Linear(64, 13), nn.ReLU(), nn.Linear(13, 10)))
    with mismatch(r"2\.weight", "no such parameter", r"\(10, 12\)"):
        pk.Explainer(run.store, nn.Sequential(nn.Linear(64, 12)))
    with mismatch(r"3\.weight", r"\(3, 10\)", "no such parameter"):
        pk.Explainer(run.store, nn.Sequential(*run.model, nn.Linear(10, 3)))


def test_other_frozen_values_and_buffers_are_refused():
    class Shifted(nn.Module):
        def __init__(self, shift=1.0):
            super().__init__()
            self.frozen, self.out = nn.Linear(64, 12), nn.Linear(12, 10)
            self.frozen.requires_grad_(False)
            self.register_buffer("shift", torch.full((10,), shift))

        def forward(self, x):
            return self.out(self.frozen(x)) + self.shift

    inputs, targets = digits(24, torch.float32)
    model, store = Shifted(), pk.MemoryStore()
    optimizer = torch.optim.SGD(model.out.parameters(), lr=0.1)
    recorder = pk.Recorder(store, model, optimizer, num_examples=24)
    train(model, optimizer, inputs, targets, batches(24, 8, 1), recorder=recorder)
    expected = pk.Explainer(store, model).explain(inputs[0], output=pk.Logit(0))
    assert expected.passed
    other = Shifted(0.0)
    with mismatch(r"frozen\.weight", "other values", "the values it was frozen at"):
        pk.Explainer(store, other)
    other.frozen.load_state_dict(model.frozen.state_dict())
    found = pk.Explainer(store, other).explain(inputs[0], output=pk.Logit(0))  # buffers come from the checkpoints
    assert found.final == pytest.approx(expected.final, rel=1e-6)
    with mismatch("shift", "no such buffer", r"\(10,\)"):
        del other.shift
        pk.Explainer(store, other)


def test_a_model_that_is_random_in_evaluation_mode_is_refused(run):
    class ReLU(nn.Module):  # of the recorded type by name
        def forward(self, x):
            return x + torch.rand_like(x)

    model = nn.Sequential(run.model[0], ReLU(), run.model[2])
    with pytest.raises(
        ConfigurationError, match=r"the model draws random numbers in evaluation mode\. .* self\.training"
    ):
        pk.Explainer(run.store, model).explain(run.queries[0])


def test_dropout_is_off_for_queries():
    inputs, targets = digits(24, torch.float32)
    torch.manual_seed(0)
    model, store = nn.Sequential(nn.Linear(64, 12), nn.Dropout(0.5), nn.Linear(12, 10)), pk.MemoryStore()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = pk.Recorder(store, model, optimizer, num_examples=24)
    train(model, optimizer, inputs, targets, batches(24, 8, 2), recorder=recorder)
    assert model.training
    found = pk.Explainer(store, model, tolerance=1e-3).explain(inputs[0], output=pk.Logit(0))
    assert found.passed, found.checks
    assert found.final == pytest.approx(model.eval()(inputs[:1])[0, 0].item(), rel=1e-5)


def test_an_in_place_activation_changes_no_number(run):
    model = nn.Sequential(run.model[0], nn.ReLU(inplace=True), run.model[2])
    found = pk.Explainer(run.store, model).contributions(run.queries[:3])
    close(found, pk.Explainer(run.store, run.model).contributions(run.queries[:3]), rtol=1e-6)


def test_named_inputs_are_explained_as_they_were_recorded():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(32, 10), nn.Linear(32, 10)

        def forward(self, left, *, right):
            return {"ignored": None, "logits": torch.tanh(self.a(left)) + self.b(right)}

    inputs, targets = digits(24, torch.float32)
    model, store = Pair(), pk.MemoryStore()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pk.Recorder(store, model, optimizer, num_examples=24) as recorder:
        for ids in torch.arange(24).split(8):
            with recorder.step(ids):
                optimizer.zero_grad()
                output = model(left=inputs[ids, :32], right=inputs[ids, 32:])
                F.cross_entropy(output["logits"], targets[ids]).backward()
                optimizer.step()
    explainer = pk.Explainer(store, model)
    query = {"left": inputs[:2, :32], "right": inputs[:2, 32:]}
    one, _ = explainer.explain(query, output=pk.Logit(1))
    assert one.passed
    alone = explainer.explain({name: value[0] for name, value in query.items()}, output=pk.Logit(1))
    close(alone.contributions, one.contributions)
    assert set(alone.query) == {"left", "right"}
    with pytest.raises(QueryError, match="some inputs have a batch dimension and some do not"):
        explainer.explain({"left": inputs[:2, :32], "right": inputs[0, 32:]})
    with pytest.raises(QueryError, match=r"the inputs hold different numbers of queries\. Got \[2, 3\]"):
        explainer.explain({"left": inputs[:2, :32], "right": inputs[:3, 32:]})


# ------------------------------------------------------------------------------------------------------------ index


def test_how_to_get_faiss_is_said_where_it_is_missing(run, monkeypatch):
    explainer = pk.Explainer(run.store, run.model, index="SQ8")
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingDependencyError, match=r"faiss does not load .*pip install 'pkexplain\[cpu\]'"):
        explainer.explain(run.queries[0])
    assert explainer.contributions(run.queries[0]).any()  # a scan needs no index
    assert pk.Explainer(run.store, run.model).explain(run.queries[0]).passed  # nor does exact search


@pytest.mark.parametrize("factory", ["Nonsense", "IVF,Flat", "", "PQ7x3x"])
def test_a_factory_string_that_faiss_refuses(run, factory):
    match = rf"^Explainer\(index={factory!r}\): faiss refuses this factory string\. Got .* Use index=\"Flat\""
    with pytest.raises(ConfigurationError, match=match):
        pk.Explainer(run.store, run.model, index=factory).explain(run.queries[0])


def test_an_index_that_needs_more_examples_than_there_are(run):
    match = r"faiss cannot train this index on so few rows\. Got 240 examples: .* Use a smaller index"
    with pytest.raises(ConfigurationError, match=match):
        pk.Explainer(run.store, run.model, index="IVF300,Flat").explain(run.queries[0])


@pytest.mark.parametrize("factory", ["SQ8", "IVF4,Flat", "HNSW16", "SQfp16"])
def test_what_an_approximate_index_finds_is_ranked_by_the_stored_rows(run, explainer, factory):
    exact_ones = explainer.explain(run.queries[:5], k=5)
    approximate = pk.Explainer(run.store, run.model, index=factory).explain(run.queries[:5], k=5)
    for found, expected in zip(approximate, exact_ones, strict=True):
        assert found.proponents
        for shown in (*found.proponents, *found.opponents):
            assert shown.contribution == pytest.approx(expected.contributions[shown.id], rel=1e-4)
        ranked = [p.contribution for p in found.proponents]
        assert ranked == sorted(ranked, reverse=True)
        assert found.total == pytest.approx(expected.total, rel=1e-6)  # the sum does not depend on the index
        if factory.startswith("SQ"):
            assert [p.id for p in found.proponents] == [p.id for p in expected.proponents]


def explain_with(run, factory):
    return pk.Explainer(run.store, run.model, index=factory).explain(run.queries[0])


def kept(run):
    return sorted(file for file in (run.store / "index").iterdir() if file.suffix == ".faiss")


def test_an_index_is_kept_beside_the_run_and_used_again(disk_run, monkeypatch):
    first = explain_with(disk_run, "SQ8")
    (file,) = kept(disk_run)
    content = file.read_bytes()
    built = []
    build = CompressedSearch.build
    watched = lambda self, *given: built.append(self.factory) or build(self, *given)  # noqa: E731 - a name for a patch
    monkeypatch.setattr(CompressedSearch, "build", watched)
    assert explain_with(disk_run, "SQ8") == first
    assert built == []
    explain_with(disk_run, "SQfp16")
    assert built == ["SQfp16"]
    assert len(kept(disk_run)) == 2
    assert file.read_bytes() == content


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "description", "no description", "of another run"])
def test_a_damaged_index_is_made_again(disk_run, damage):
    first = explain_with(disk_run, "SQ8")
    (file,) = kept(disk_run)
    content, description = file.read_bytes(), file.with_suffix(".json")
    told = description.read_text()
    if damage == "flipped":
        file.write_bytes(content[:-9] + bytes([content[-9] ^ 64]) + content[-8:])
    if damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    if damage == "empty":
        file.write_bytes(b"")
    if damage == "description":
        description.write_text("{")
    if damage == "no description":
        description.unlink()
    if damage == "of another run":
        description.write_text(json.dumps({**json.loads(told), "state": "another"}))
    assert explain_with(disk_run, "SQ8") == first
    assert file.read_bytes() == content
    assert description.read_text() == told
    assert not list(file.parent.glob("*.tmp"))


def test_a_flat_index_is_the_rows_once_more_and_not_kept(disk_run):
    explain_with(disk_run, "Flat")
    assert not (disk_run.store / "index").exists()


def test_a_run_that_cannot_be_written_to_keeps_its_index_in_memory(disk_run):
    (disk_run.store / "index").write_text("in the way")
    assert explain_with(disk_run, "SQ8").proponents
    assert (disk_run.store / "index").read_text() == "in the way"


def test_progress_is_told(run):
    told = []
    explainer = pk.Explainer(run.store, run.model, index="SQ8", progress=lambda *what: told.append(what))
    explainer.explain(run.queries[:2])
    assert {what for what, _, _ in told} == {"index", "covectors"}
    assert ("index", 240, 240) in told
    of = [(done, total) for what, done, total in told if what == "covectors"]
    assert [done for done, _ in of] == list(range(1, len(of) + 1))
    assert of[-1][0] == of[-1][1]


def test_a_model_of_another_number_format_is_refused(run):
    with pytest.raises(ModelMismatchError, match=r"'0\.weight'.*Got torch\.float64; expected torch\.float32"):
        pk.Explainer(run.store, copy.deepcopy(run.model).double())


def test_a_model_of_other_modules_is_refused(run):
    with pytest.raises(ModelMismatchError, match=r"module '1': .* Got GELU; expected ReLU"):
        pk.Explainer(run.store, mlp(activation=torch.nn.GELU, dtype=torch.float32))


def test_a_model_of_one_number_is_explained_by_its_value():
    inputs, _ = digits(40, torch.float32)
    model, store = torch.nn.Sequential(torch.nn.Linear(64, 1)), pk.MemoryStore()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with pk.Recorder(store, model, optimizer, num_examples=32) as recorder, recorder.step(range(32)):
        model(inputs[:32]).square().mean().backward()
        optimizer.step()
    explanation = pk.Explainer(store, model).explain(inputs[35])
    assert explanation.output == "value[0]"
    assert explanation.final == pytest.approx(model(inputs[35]).item(), rel=1e-5)


def test_a_budget_that_runs_out_is_said_also_where_some_of_it_is_left(run):
    hasty = pk.Quadrature(nodes=2, budget=5)  # 15 gradients for 3 segments: 6 at first, then 4 a halving
    spent = pk.Explainer(run.store, run.model, tolerance=1e-12, quadrature=hasty).explain(run.queries[0])
    assert spent.cost.backward_passes == 14
    assert spent.cost.budget == 15
    assert spent.cost.exhausted
    assert not pk.Explainer(run.store, run.model, tolerance=0.5).explain(run.queries[0]).cost.exhausted


@pytest.mark.parametrize("index", ["Flat", "SQ8"])
def test_explanations_are_plain_data_that_can_be_kept(run, index, tmp_path):
    explanation = pk.Explainer(run.store, run.model, index=index).explain(run.queries[0], k=3)
    again = pickle.loads(pickle.dumps(explanation))
    assert again == explanation
    assert str(again) == str(explanation)
    assert isinstance(again.all_contributions, np.ndarray)
    np.testing.assert_array_equal(again.contributions, explanation.contributions)
    assert torch.equal(again.query, explanation.query)
    assert pk.write_report(again, tmp_path / "again.html").stat().st_size > 10_000
