"""Outputs: what each computes, how it is settled, selected and named."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import pkexplain as pk
from pkexplain.errors import QueryError
from pkexplain.outputs import as_output

torch.manual_seed(0)
PREDICTION = torch.randn(4, 5, dtype=torch.float64)
CLASSES = [3, 0, 4, 4]
CHOSEN = PREDICTION[torch.arange(4), CLASSES]
PROBABILITIES = PREDICTION.softmax(1)[torch.arange(4), CLASSES]


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
