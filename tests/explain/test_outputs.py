"""Outputs: what each computes, how it is settled, selected and named."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional as F

import pkexplain as pk
from pkexplain.errors import QueryError
from pkexplain.explain.outputs import as_output, settle_output

torch.manual_seed(0)
PREDICTION = torch.randn(4, 5, dtype=torch.float64)
CLASSES = [3, 0, 4, 4]
CHOSEN = PREDICTION[torch.arange(4), CLASSES]
PROBABILITIES = PREDICTION.softmax(1)[torch.arange(4), CLASSES]
SEQUENCES = torch.randn(3, 6, 8, dtype=torch.float64)  # queries, positions, vocabulary
SPANS = [[1, 7], [0, 2], [5, 5]]


def compute(output, prediction=PREDICTION):
    return as_output(output).settle(prediction)(prediction)


@pytest.mark.parametrize("classes", [CLASSES, tuple(CLASSES), torch.tensor(CLASSES), torch.tensor(CLASSES).int()])
def test_outputs_of_a_class(classes):
    torch.testing.assert_close(compute(pk.Logit(classes)), CHOSEN)
    torch.testing.assert_close(compute(pk.LogProbability(classes)), PROBABILITIES.log())
    torch.testing.assert_close(compute(pk.Margin(classes)), (PROBABILITIES / (1 - PROBABILITIES)).log())
    torch.testing.assert_close(compute(pk.Loss(list(map(int, classes)))), -PROBABILITIES.log())


@pytest.mark.parametrize("kind", [pk.Logit, pk.LogProbability, pk.Margin])
def test_one_class_serves_all_queries_and_none_is_that_of_the_prediction(kind):
    torch.testing.assert_close(compute(kind(2)), compute(kind([2, 2, 2, 2])))
    torch.testing.assert_close(compute(kind()), compute(kind(PREDICTION.argmax(1))))


def test_the_class_of_the_prediction_stays_when_the_prediction_changes():
    settled = pk.Logit().settle(PREDICTION)
    other = -PREDICTION
    torch.testing.assert_close(settled(other), other[torch.arange(4), PREDICTION.argmax(1)])


def test_a_margin_of_a_sure_prediction_is_finite():
    sure = torch.tensor([[200.0, 0.0, -200.0]])
    assert compute(pk.Margin(0), sure).item() == 200.0
    assert compute(pk.Margin(1), sure).item() == -200.0


def test_losses_of_other_kinds():
    targets = torch.randn(4, 5, dtype=torch.float64)
    torch.testing.assert_close(compute(pk.Loss(targets, F.mse_loss)), (PREDICTION - targets).square().mean(1))
    binary = PREDICTION[:, :1]
    found = compute(pk.Loss(torch.ones(4, 1).double(), F.binary_cross_entropy_with_logits), binary)
    torch.testing.assert_close(found, -F.logsigmoid(binary[:, 0]))


def test_values_of_any_shape_are_counted_through():
    grid = torch.arange(24.0).reshape(2, 3, 4)
    assert compute(pk.Value(5), grid).tolist() == [5.0, 17.0]
    assert compute(pk.Value(), torch.tensor([7.0, 8.0])).tolist() == [7.0, 8.0]


def test_a_function_is_an_output():
    assert isinstance(as_output(lambda y: y.sum(1)), pk.Custom)
    output = pk.Logit(1)
    assert as_output(output) is output
    torch.testing.assert_close(compute(lambda y: y.sum(1)), PREDICTION.sum(1))


@pytest.mark.parametrize(
    "output",
    [pk.Logit(), pk.Logit(CLASSES), pk.LogProbability(1), pk.Margin(CLASSES), pk.Loss(CLASSES), pk.Loss(2), pk.Value(3),
     pk.Loss(torch.ones(4, 5).double(), F.mse_loss), pk.Custom(lambda y: y.square().sum(1))],
    ids=lambda output: type(output).__name__,
)  # fmt: skip
def test_a_selection_computes_what_the_whole_does(output):
    settled, positions = output.settle(PREDICTION), torch.tensor([2, 0])
    found = settled.select(positions)(PREDICTION[positions])
    torch.testing.assert_close(found, settled(PREDICTION)[positions])


def log_probabilities(spans, starts, normalized=False):
    """An independent plain loop."""
    found = []
    for query, (span, start) in enumerate(zip(spans, starts, strict=True)):
        total = 0.0
        for j, token in enumerate(span):
            scores = SEQUENCES[query, start - 1 + j].tolist()
            total += scores[token] - math.log(sum(math.exp(score) for score in scores))
        found.append(total / len(span) if normalized else total)
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize(
    ("tokens", "start", "spans", "starts"),
    [
        (4, None, [[4]] * 3, [5] * 3),
        ([4], 1, [[4]] * 3, [1] * 3),
        (torch.tensor(4), 6, [[4]] * 3, [6] * 3),
        ([3, 0, 3], None, [[3, 0, 3]] * 3, [3] * 3),
        ((3, 0, 3), torch.tensor(2), [[3, 0, 3]] * 3, [2] * 3),
        ([3, 0, 3, 1, 2, 7], 1, [[3, 0, 3, 1, 2, 7]] * 3, [1] * 3),
        (SPANS, None, SPANS, [4] * 3),
        (torch.tensor(SPANS).int(), [1, 5, 3], SPANS, [1, 5, 3]),
    ],
)
def test_tokens_against_a_plain_loop(tokens, start, spans, starts, normalized):
    output = pk.TokenLogProbability(tokens, start, normalized)
    settled = output.settle(SEQUENCES)
    truth = log_probabilities(spans, starts, normalized)
    torch.testing.assert_close(settled(SEQUENCES), truth)
    torch.testing.assert_close(output(SEQUENCES), truth)
    positions = torch.tensor([2, 0])
    torch.testing.assert_close(settled.select(positions)(SEQUENCES[positions]), truth[positions])


def test_padding_on_the_left_only_moves_the_start():
    padded = torch.cat([torch.randn(3, 2, 8).double(), SEQUENCES], dim=1)
    truth = compute(pk.TokenLogProbability(SPANS, 3), SEQUENCES)
    torch.testing.assert_close(compute(pk.TokenLogProbability(SPANS, 5), padded), truth)
    at_the_end = [compute(pk.TokenLogProbability(SPANS), prediction) for prediction in (padded, SEQUENCES)]
    torch.testing.assert_close(*at_the_end)


def test_a_completion_of_the_whole_vocabulary_has_probability_one():
    each = [compute(pk.TokenLogProbability([a, b], 2), SEQUENCES).exp() for a in range(8) for b in range(8)]
    torch.testing.assert_close(torch.stack(each).sum(0), torch.ones(3).double())


@pytest.mark.parametrize(
    ("tokens", "start", "match"),
    [
        (4, 0, "are not predicted from the input.*expected a start from 1 to 6"),
        (4, -1, "are not predicted from the input"),
        (4, 7, "are not predicted from the input"),
        ([4, 4], 6, "are not predicted from the input.*expected a start from 1 to 5"),
        ([[4, 4]] * 3, [1, 1, 6], "are not predicted from the input"),
        ([1] * 6, None, r"6 token\(s\) from position \[0, 0, 0\] on are not predicted"),
        ([1] * 9, None, "expected at most 6 tokens"),
        (8, None, "there is no such token.*expected tokens from 0 to 7"),
        ([1, -1], None, "there is no such token"),
        ([1.0, 2.0], None, "does not fit the queries.*a token is an integer"),
        (True, None, "a token is an integer"),
        (4, 1.5, "a start is an integer"),
        ([], None, "does not fit the queries"),
        ([[1, 2], [3]], None, "does not fit the queries"),
        ([[1, 2]] * 2, None, "does not fit the queries"),
        ([[[1]]] * 3, None, "does not fit the queries"),
        (4, [1, 2], "does not fit the queries"),
    ],
)
def test_a_span_that_is_not_there_is_refused(tokens, start, match):
    with pytest.raises(QueryError, match=match):
        pk.TokenLogProbability(tokens, start).settle(SEQUENCES)


def test_tokens_need_a_sequence():
    with pytest.raises(QueryError, match=r"it needs scores for each position.*expected shape \(queries, positions"):
        pk.TokenLogProbability(1).settle(PREDICTION)


@pytest.mark.parametrize("output", [None, pk.Logit(), pk.LogProbability(2), pk.Margin()])
def test_what_to_explain_of_a_sequence_is_said_where_a_class_was_asked_for(output):
    with pytest.raises(
        QueryError, match=r"Got a prediction of shape \(3, 6, 8\).*pkexplain\.TokenLogProbability\(tokens\)"
    ):
        settle_output(output, SEQUENCES)


def test_names_of_tokens():
    assert pk.TokenLogProbability(42, 5).names(2) == ["log_probability[token 42 at 5]"] * 2
    assert pk.TokenLogProbability([[1, 2, 3, 4]], [5]).names(1) == ["log_probability[tokens 5:9]"]
    assert pk.TokenLogProbability(SPANS, [1, 4, 2], normalized=True).names(3)[1] == "mean_log_probability[tokens 4:6]"
    assert pk.TokenLogProbability(SPANS).settle(SEQUENCES).names(3) == ["log_probability[tokens 4:6]"] * 3
    assert pk.TokenLogProbability(3).settle(SEQUENCES).names(3) == ["log_probability[token 3 at 5]"] * 3
    assert pk.TokenLogProbability(3).names(1) == ["log_probability[token 3 at -1]"]
    assert pk.TokenLogProbability([3, 4]).names(1) == ["log_probability[tokens -2:]"]


def test_names():
    assert pk.Logit().settle(PREDICTION).names(4) == [f"logit[{int(c)}]" for c in PREDICTION.argmax(1)]
    assert pk.LogProbability(3).names(2) == ["log_probability[3]"] * 2
    assert pk.Margin([1, 2]).names(2) == ["margin[1]", "margin[2]"]
    assert pk.Loss(2).names(2) == ["loss[2]"] * 2
    assert pk.Loss([0.5, 2.0], F.mse_loss).names(2) == ["loss[0.5]", "loss[2]"]
    assert pk.Loss(torch.ones(2, 3), F.mse_loss).names(2) == ["loss"] * 2
    assert pk.Value(4).names(3) == ["value[4]"] * 3
    assert pk.Custom(torch.sum).names(1) == ["sum"]


@pytest.mark.parametrize("shape", [(4,), (4, 5, 6)])
@pytest.mark.parametrize("kind", [pk.Logit, pk.LogProbability, pk.Margin])
def test_a_class_of_a_prediction_without_classes_is_refused(kind, shape):
    match = (
        rf"output={kind.__name__}\(2\): it needs one row of classes for each query\. Got a prediction of shape \(4, ?"
    )
    with pytest.raises(QueryError, match=match):
        kind(2).settle(torch.zeros(shape))


def test_results_are_frozen():
    for output in (pk.Logit(1), pk.Loss(1), pk.Value(1), pk.Custom(torch.sum)):
        with pytest.raises(AttributeError):
            output.index = 2


# ---------------------------------------------------------------------------------------------- what would go unnoticed


def squares(prediction, target, reduction):
    """A loss of one's own, which says nothing when it broadcasts."""
    return (prediction - target).square()


MIXED = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
COLUMN, SQUARE = PREDICTION[:, :1], PREDICTION[:, :4]


@pytest.mark.parametrize("function", [F.mse_loss, F.l1_loss, F.huber_loss, F.poisson_nll_loss, F.kl_div, squares])
@pytest.mark.parametrize("prediction", [COLUMN, SQUARE, SQUARE[:1], SQUARE[:2, :2]], ids=lambda p: str(p.shape))
def test_a_target_that_would_be_broadcast_is_refused(function, prediction):
    """Two of these shapes, (N, N) with (N,) and (1, C) with (1,), keep the number of losses."""
    rows, columns = prediction.shape
    shapes = rf"a prediction of shape \({rows}, {columns}\) and targets of shape \({rows},\)"
    fix = rf"Give the targets the shape of the prediction, \({rows}, {columns}\)\."
    refused = rf"output=Loss\(…\): the loss failed \(.*\)\. Got {shapes}.*{fix}|depends on the other queries"
    with pytest.raises(QueryError, match=refused):
        pk.Loss(MIXED[:rows], function).settle(prediction)


@pytest.mark.parametrize("function", [F.mse_loss, F.l1_loss, F.huber_loss, squares])
def test_a_target_of_the_predictions_shape_is_taken(function):
    for prediction in (COLUMN, SQUARE, COLUMN[:1], PREDICTION[:, 0]):
        target = MIXED[: len(prediction)].reshape(-1, *[1] * (prediction.ndim - 1)).expand(prediction.shape)
        losses = [function(p, t, reduction="none").mean() for p, t in zip(prediction, target, strict=True)]
        torch.testing.assert_close(compute(pk.Loss(target, function), prediction), torch.stack(losses))


def test_the_target_of_one_query_needs_no_batch_dimension():
    target = torch.randn(5, dtype=torch.float64)
    truth = (PREDICTION[:1] - target).square().mean(1)
    for given in (target, target[None], target.tolist(), target.numpy(), [target]):
        torch.testing.assert_close(compute(pk.Loss(given, F.mse_loss), PREDICTION[:1]), truth)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_classes_of_any_integers_are_those_of_int64(dtype):
    torch.testing.assert_close(compute(pk.Loss(torch.tensor(CLASSES).to(dtype))), -PROBABILITIES.log())


@pytest.mark.parametrize(
    ("output", "prediction", "match"),
    [
        (pk.Loss([1.0, 0.0, 2.0, 1.0]), PREDICTION, r"targets of shape \(4,\), torch\.float32.* or, for regression"),
        (pk.Loss([True, False, True, True]), PREDICTION, r"targets of shape \(4,\), torch\.bool.* as integers"),
        (pk.Loss("three"), PREDICTION, r"the loss failed \(a text\)\. Got .* and no targets"),
        (pk.Loss(None), PREDICTION, r"Got .* and no targets"),
        (pk.Loss(0), COLUMN, r"the cross-entropy of a single class is always 0"),
        (pk.Loss([[0.5]] * 4), COLUMN, r"the cross-entropy of a single class is always 0.*\(target, F\.mse_loss\)"),
        (pk.Loss([[1] * 6] * 3), SEQUENCES, r"For the tokens of a sequence, .* cross_entropy\(p\.transpose\(1, 2\)"),
        (pk.Loss(1, lambda p, t: p), PREDICTION, r"called as function\(prediction, target, reduction=\"none\"\)"),
        (pk.Loss(1, lambda p, t, reduction: F.cross_entropy(p, t)), PREDICTION, r"it returned losses of shape \(\)"),
        (pk.Loss(1, lambda p, t, reduction: p[:2, 0]), PREDICTION, r"it returned losses of shape \(2,\)"),
        (pk.Logit([[3], [0], [4], [4]]), PREDICTION, r"the classes do not fit the queries"),
        (pk.Margin(0), COLUMN, r"a margin needs a second class\. .*output=pkexplain\.Value\(\)"),
        (pk.Value(1.5), PREDICTION, r"the position is not an integer"),  # pyright: ignore[reportArgumentType]
        (pk.Value([1, 2]), PREDICTION, r"the position is not an integer"),  # pyright: ignore[reportArgumentType]
        (lambda y: y.argmax(1), PREDICTION, r"a Tensor of shape \(4,\), torch\.int64\. .*a floating-point tensor"),
        (lambda y: y[:2, 0], PREDICTION, r"a Tensor of shape \(2,\), torch\.float64"),
        (lambda y: y[:, 9], PREDICTION, r"it fails \(IndexError: index 9 is out of bounds"),
        (lambda y: y.squeeze(), COLUMN[:1], r"a Tensor of shape \(\)"),
        (lambda y: y.squeeze(), COLUMN, r"it fails \(IndexError|it does not return|invalid"),
        (lambda y: y[:, 0] - y[:, 0].mean(), PREDICTION, r"its number for a query depends on the other queries"),
        (lambda y: y.softmax(0)[:, 1], PREDICTION, r"its number for a query depends on the other queries"),
        (lambda y: y[:, 0].sub(y[0, 0]).log(), PREDICTION, r"output=<lambda>: "),
        (lambda y: y[:, 0] / 0, PREDICTION, r"output=<lambda>: it is -?inf for query 0.*finite there"),
    ],
)  # fmt: skip
def test_an_output_that_means_something_else_is_refused(output, prediction, match):
    with pytest.raises(QueryError, match=match):
        settle_output(output, prediction)


def test_what_is_given_for_some_queries():
    places = torch.tensor([2, 0])
    assert pk.Logit([5, 6, 7]).given_for(places, 3).index == [7, 5]
    assert pk.Logit(4).given_for(places, 3) == pk.Logit(4)
    assert pk.Logit().given_for(places, 3) == pk.Logit()
    assert [t.tolist() for t in pk.Loss(torch.tensor([[1, 2], [3, 4], [5, 6]])).given_for(places, 3).target] == [
        [5, 6],
        [1, 2],
    ]
    assert pk.Loss(torch.tensor(3)).given_for(places, 3).target.item() == 3
    assert pk.TokenLogProbability([8, 9]).given_for(places, 3).tokens == [8, 9]
    assert pk.TokenLogProbability([[8], [9, 1], [2]], start=4).given_for(places, 3).tokens == [[2], [8]]
    assert pk.TokenLogProbability(torch.tensor([8, 9]), start=[1, 2, 3]).given_for(places, 3).start == [3, 1]
    with pytest.raises(
        QueryError, match=r"output=Loss\(…\): there must be one of target for each query\. Got 2 for 3 queries"
    ):
        pk.Loss([1, 2]).given_for(places, 3)


@dataclass(frozen=True)
class Norm(pk.Output):
    power: int

    def __call__(self, prediction):
        return prediction.norm(p=self.power, dim=1)

    def names(self, queries):
        return ["norm"] * queries


def test_an_output_of_the_users_own_needs_no_more_than_it_did():
    assert Norm(2).of is None
    torch.testing.assert_close(settle_output(Norm(2), PREDICTION)(PREDICTION), PREDICTION.norm(dim=1))
