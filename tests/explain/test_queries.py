"""Ids, input shapes, queries and loss derivatives."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pkexplain.errors import ExampleIdError, QueryError
from pkexplain.explain.queries import QueryBatch, as_queries
from pkexplain.gradients.capture import Capture
from pkexplain.ids import PredictionRule, check_ids
from pkexplain.record._observers import InputShapes, LossDerivatives
from pkexplain.store.manifest import InputEntry

CPU = torch.device("cpu")
SHAPES = {"0": InputEntry(shape=(3, None), dtype="float32"), "mask": InputEntry(shape=(), dtype="int64")}


@pytest.mark.parametrize(
    "ids", [[2, 0], (2, 0), np.array([2, 0]), torch.tensor([2, 0], dtype=torch.uint8), iter([2, 0])]
)
def test_ids_become_a_tensor_of_row_numbers(ids):
    found = check_ids(ids, 3)
    assert found.dtype == torch.int64
    assert found.tolist() == [2, 0]


def test_the_first_ids_that_are_wrong_are_shown():
    with pytest.raises(ExampleIdError, match=r"out of range\. Got \[9, 8, 7, 6, 5\]; expected .* from 0 to 2 \("):
        check_ids([9, 8, 7, 6, 5, 4, 3, 1], 3)


LOGITS, OTHER = torch.ones(2, 3), torch.zeros(2)


@dataclass
class Outcome:
    hidden: torch.Tensor
    scores: torch.Tensor


@pytest.mark.parametrize(
    ("output", "rule", "stated"),
    [
        (LOGITS, PredictionRule(), ""),
        (LOGITS, PredictionRule(""), ""),
        ({"loss": None, "scores": LOGITS}, PredictionRule(), "output.scores, its only floating-point tensor"),
        ((torch.zeros(2, dtype=torch.long), torch.tensor(1.0), LOGITS), PredictionRule(), "output[2], its only"),
        (SimpleNamespace(other=OTHER, logits=LOGITS), PredictionRule(), "output.logits, chosen by its name"),
        ((OTHER, LOGITS), PredictionRule("1"), "output[1], from which the training's loss was computed"),
        ((LOGITS, OTHER), PredictionRule("1", asked="0"), "output[0], as asked"),
        (Outcome(OTHER, LOGITS), PredictionRule("scores"), "output.scores, from which"),
        ({"heads": [OTHER, LOGITS]}, PredictionRule(asked="heads.1"), "output.heads[1], as asked"),
        ((OTHER, LOGITS), PredictionRule("1", unsure=False), "output[1], from which"),
        ({"a": OTHER, "b": LOGITS}, PredictionRule("b", unsure=True), "output.b, from which"),
        (((), LOGITS), PredictionRule("0"), "output[1], its only"),
    ],
)
def test_the_prediction_is_chosen_by_a_rule_that_is_stated(output, rule, stated):
    assert rule.choose(output, 2) is LOGITS
    assert rule.stated.startswith(stated)
    assert bool(rule.stated) == bool(stated)


@pytest.mark.parametrize(
    ("output", "rule", "match"),
    [
        ((OTHER, LOGITS), PredictionRule(), r"which is the prediction is not known\. Got '0' of shape \(2,\), '1' of"),
        (Outcome(OTHER, LOGITS), PredictionRule(), r"Got 'hidden' of .*output=pkexplain\.Logit\(of=\"scores\"\)"),
        ((OTHER, LOGITS), PredictionRule("2"), r"the training's loss was computed from output\[2\], which is gone"),
        (
            (OTHER, LOGITS),
            PredictionRule("1", unsure=True),
            r"output\[1\], which may be another one: the query lacks an",
        ),
        (
            (OTHER, LOGITS),
            PredictionRule("1", asked="2"),
            r"the model's output has no tensor '2' with one row per query",
        ),
        (
            LOGITS,
            PredictionRule(asked="logits"),
            r"has no tensor 'logits'.* The model returns one tensor: leave of= out",
        ),
        (tuple(torch.ones(2) for _ in range(11)), PredictionRule(), r"'7' of shape \(2,\) and 3 more"),
    ],
)
def test_of_several_tensors_none_is_guessed(output, rule, match):
    with pytest.raises(QueryError, match=match):
        rule.choose(output, 2)


class Sum(nn.Module):
    def forward(self, *args, **kwargs):
        return sum(value.float().flatten(1).sum(1) for value in (*args, *kwargs.values()))


def test_shapes_of_inputs_are_noted_and_sizes_that_vary_left_open():
    model, shapes = Sum(), InputShapes(Sum())
    shapes = InputShapes(model)
    for length in (4, 6):
        with shapes.noting(2):
            model(torch.zeros(2, 3, length), mask=torch.zeros(2, 5, dtype=torch.long))
    model(torch.zeros(2, 99))
    with shapes.noting(2):
        model(torch.zeros(7, 3, 1))  # of another batch: a forward pass in between
    assert shapes.seen == {
        "0": InputEntry(shape=(3, None), dtype="float32"),
        "mask": InputEntry(shape=(5,), dtype="int64"),
    }
    assert not model._forward_pre_hooks


WATCHED = Capture((), ())
WATCHED.running = True


@pytest.mark.parametrize("size", [1, 4])
def test_loss_derivatives_are_those_of_the_loss_as_it_was_back_propagated(size):
    torch.manual_seed(0)
    model = nn.Linear(3, size)
    x, target = torch.randn(5, 3), torch.randn(5, size)
    batch = SimpleNamespace(ids=torch.arange(5), derivatives=None)
    with LossDerivatives(model, WATCHED).noting(batch):
        y = model(x)
        y.retain_grad()
        F.mse_loss(y, target).backward()
    expected = y.grad[:, 0] if size == 1 else -y.grad.norm(dim=1)
    torch.testing.assert_close(batch.derivatives, expected)
    torch.testing.assert_close(y.grad, 2 * (y - target).detach() / y.numel())
    assert not model._forward_hooks


def test_a_model_that_runs_twice_in_a_step_adds_its_derivatives_up():
    model = nn.Linear(3, 2)
    x = torch.randn(4, 3)
    batch = SimpleNamespace(ids=torch.arange(4), derivatives=None)
    with LossDerivatives(model, WATCHED).noting(batch):
        (3 * model(x).sum() + 4 * model(x).sum()).backward()
    torch.testing.assert_close(batch.derivatives, torch.full((4,), -5.0 * 2**0.5))


def test_a_model_without_a_prediction_leaves_no_derivative():
    class Texts(nn.Module):
        def forward(self, x):
            return ["text"] * len(x)

    batch = SimpleNamespace(ids=torch.arange(2), derivatives=None)
    model = Texts()
    with LossDerivatives(model, WATCHED).noting(batch):
        model(torch.zeros(2, 3))
    assert batch.derivatives is None


def test_queries_of_any_recorded_length():
    single = as_queries(torch.zeros(3, 8), SHAPES, CPU)
    assert single.single
    assert single.args[0].shape == (1, 3, 8)
    several = as_queries(torch.zeros(2, 3, 9), SHAPES, CPU)
    assert not several.single
    assert len(several) == 2


def test_named_queries_and_numbers():
    single = as_queries({"0": np.zeros((3, 8)), "mask": 7}, SHAPES, CPU)
    assert single.single
    assert single.kwargs["mask"].tolist() == [7]
    assert single.args[0].dtype == torch.float32
    several = as_queries({"0": torch.zeros(2, 3, 8), "mask": [7, 8]}, SHAPES, CPU)
    assert len(several) == 2
    assert several.row(1)["mask"] == 8


def test_queries_without_recorded_shapes_are_batches():
    assert len(as_queries(torch.zeros(4, 2), {}, CPU)) == 4
    with pytest.raises(QueryError, match="there is none"):
        as_queries((), {}, CPU)


def test_a_query_comes_back_as_it_was_given():
    batch = QueryBatch((torch.arange(6).reshape(3, 2),), {}, single=False)
    assert batch.row(1).tolist() == [2, 3]
    pair = QueryBatch((torch.arange(3), torch.arange(3) * 10), {}, single=False)
    assert [value.item() for value in pair.row(2)] == [2, 20]
    assert pair.select(torch.tensor([2, 0])).args[1].tolist() == [20, 0]


@pytest.mark.parametrize("output", ["text", torch.tensor(1.0), torch.zeros(3, 2), [torch.zeros(3)]])
def test_a_model_without_one_row_per_query_is_refused(output):
    batch = QueryBatch((torch.zeros(2, 3),), {}, single=False)
    match = r"the model's output does not have one row per query\. Got .*; expected 2 rows \(from the number of queries"
    with pytest.raises(QueryError, match=match):
        batch.run(lambda x: output)
