"""Copies of models whose ``forward`` was replaced: they run themselves, not the original."""

from __future__ import annotations

import functools
from types import MethodType

import pytest
import torch
from torch import nn

from pkexplain.errors import ConfigurationError
from pkexplain.gradients.capture import Capture
from pkexplain.gradients.collect import collect
from pkexplain.gradients.layers import find_layers
from pkexplain.gradients.model_copy import copy_model


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.second(self.first(x).tanh())


X = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))


def by_method(model):
    former = model.forward

    @functools.wraps(type(model).forward)
    def forward(self, x, doubled=False):
        return former(x) * (2 if doubled else 1)

    model.forward = MethodType(forward, model)


def by_function(model):
    former, weight = model.forward, model.first.weight

    def forward(x):
        return former(x) + weight.sum()

    model.forward = forward


def by_partial(model):
    def forward(model, x, former):
        return former(x) + model.second.bias.sum()

    model.forward = functools.partial(forward, model, former=model.forward)


def twice(model):
    by_method(model)
    by_function(model)


def of_a_part(model):
    by_method(model.first)


def of_itself(model):
    former = model.forward

    def forward(x, depth=2):
        return former(x) if not depth else forward(x, depth - 1) * 2

    model.forward = forward


@pytest.mark.parametrize("replace", [by_method, by_function, by_partial, twice, of_a_part, of_itself])
def test_a_copy_with_a_replaced_forward_runs_itself(replace):
    model = Net()
    replace(model)
    expected = model(X)
    copied = copy_model(model)
    assert torch.equal(copied(X), expected)
    copied(X).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in copied.parameters())
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert not copied(X).any()
    assert torch.equal(model(X), expected)
    assert not copy_model(copied)(X).any()  # a copy of a copy


def test_a_copy_is_as_before_accelerate_put_it_under_autocast():
    accelerate = pytest.importorskip("accelerate")
    for prepared in (1, 2):
        model = Net()
        by_method(model)
        plain = model(X)
        for _ in range(prepared):
            accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
        assert not torch.equal(model(X), plain)
        copied = copy_model(model)
        assert torch.equal(copied(X), plain)
        copied(X, doubled=True).sum().backward()
        assert all(p.grad is None for p in model.parameters())


def test_an_output_of_another_model_is_refused_and_its_gradients_left_alone():
    original, model = Net(), Net()
    object.__setattr__(model, "forward", original.forward)  # bound to the other one
    layers, blocks = find_layers(model, dict.fromkeys(dict(model.named_parameters()), 0))
    with pytest.raises(ConfigurationError, match="computed from the parameters of another model"):
        collect(Capture(layers, blocks), len(X), lambda: model(X).sum(1))
    assert all(p.grad is None for p in original.parameters())
