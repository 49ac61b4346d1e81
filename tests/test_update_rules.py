"""The numbers of an optimizer's step, and the account kept with them, against `torch.optim`."""

from __future__ import annotations

import itertools

import pytest
import torch

from pkexplain.displacement import FullSpaceAccount
from pkexplain.errors import UnsupportedOptimizerError
from pkexplain.update_rules import SGD, LinearStep, rule_for

SIZE = 7
GROUP = {"lr": 0.1, "momentum": 0.0, "dampening": 0.0, "nesterov": False, "weight_decay": 0.0, "maximize": False}
STARTED = {"momentum_buffer": torch.zeros(1)}


@pytest.mark.parametrize(
    ("options", "state", "step"),
    [
        ({}, {}, LinearStep(0, 0, 0, 0.1)),
        ({"momentum": 0.9}, {}, LinearStep(0.9, 1, 0.1, 0)),
        ({"momentum": 0.9, "dampening": 0.25}, {}, LinearStep(0.9, 1, 0.1, 0)),
        ({"momentum": 0.9, "dampening": 0.25}, {"momentum_buffer": None}, LinearStep(0.9, 1, 0.1, 0)),
        ({"momentum": 0.9, "dampening": 0.25}, STARTED, LinearStep(0.9, 0.75, 0.1, 0)),
        ({"momentum": 0.5, "nesterov": True}, STARTED, LinearStep(0.5, 1, 0.05, 0.1)),
        ({"weight_decay": 0.01}, {}, LinearStep(0, 0, 0, 0.1, coupled_decay=0.01)),
        ({"weight_decay": 0.01, "maximize": True}, {}, LinearStep(0, 0, 0, -0.1, coupled_decay=-0.01)),
        ({"momentum": 0.0}, STARTED, LinearStep(1, 0, 0, 0.1)),
        ({"lr": torch.tensor(0.5, dtype=torch.float64)}, {}, LinearStep(0, 0, 0, 0.5)),
    ],
)
def test_numbers_of_a_step(options, state, step):
    group = {**GROUP, **options}
    found = SGD().read(group, state)
    for name, value in vars(step).items():
        expected = float(group["lr"]) if name == "learning_rate" else value
        assert getattr(found, name) == pytest.approx(expected), name


def follow(options, steps=12, changes=lambda step, group: None, close_every=5):
    """Let torch make random steps; return what each segment moved, and what the account says of it."""
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(SIZE, generator=generator, dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], lr=0.1, **options)
    rule, account = rule_for(optimizer), FullSpaceAccount({0: slice(0, SIZE)}, torch.zeros(SIZE, dtype=torch.float64))
    before, segments = parameter.detach().clone(), []
    for step in range(1, steps + 1):
        changes(step, optimizer.param_groups[0])
        parameter.grad = torch.randn(SIZE, generator=generator, dtype=torch.float64)
        numbers = rule.read(optimizer.param_groups[0], optimizer.state.get(parameter, {}))
        account.step({0: numbers}, parameter.grad, parameter.detach().clone())
        optimizer.step()
        if step % close_every == 0 or step == steps:
            segments.append((parameter.detach() - before, *account.close()))
            before = parameter.detach().clone()
    return segments


OPTIONS = [
    {"momentum": momentum, "dampening": dampening, "nesterov": nesterov, "weight_decay": decay, "maximize": maximize}
    for momentum, dampening, nesterov, decay, maximize in itertools.product(
        (0.0, 0.9), (0.0, 0.3), (False, True), (0.0, 0.05), (False, True)
    )
    if not nesterov or (momentum and not dampening)
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(f"{k}{v:g}" for k, v in o.items() if v) or "plain")
def test_examples_and_decay_make_the_whole_step(options):
    with_decay = follow(options)
    without_decay = follow({**options, "weight_decay": 0.0})
    for (moved, examples, decay), (_, plain, nothing) in zip(with_decay, without_decay, strict=True):
        torch.testing.assert_close(examples + decay, moved, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(examples, plain, rtol=1e-11, atol=1e-13)  # the gradients' own, the same ones
        assert not nothing.any()
        assert bool(decay.any()) == bool(options["weight_decay"])


@pytest.mark.parametrize("options", OPTIONS[::3], ids=str)
def test_schedules_of_every_number_are_followed(options):
    def changes(step, group):
        group["lr"] = 0.1 / step
        group["weight_decay"] = options["weight_decay"] * step
        if group["momentum"]:
            group["momentum"] = 0.5 + 0.03 * step

    for moved, examples, decay in follow(options, changes=changes):
        torch.testing.assert_close(examples + decay, moved, rtol=1e-11, atol=1e-13)


def test_momentum_that_stops_and_comes_back():
    def changes(step, group):
        group["momentum"] = 0.0 if step in (4, 5, 6) else 0.9

    for moved, examples, decay in follow({"momentum": 0.9, "weight_decay": 0.05}, changes=changes):
        torch.testing.assert_close(examples + decay, moved, rtol=1e-11, atol=1e-13)


def test_decay_that_starts_and_stops():
    def changes(step, group):
        group["weight_decay"] = 0.1 if 3 <= step <= 6 else 0.0

    segments = follow({"momentum": 0.9}, changes=changes)
    for moved, examples, decay in segments:
        torch.testing.assert_close(examples + decay, moved, rtol=1e-11, atol=1e-13)
    assert segments[-1][2].any()  # its momentum goes on


def test_decoupled_decay_shrinks_the_parameters_alone():
    account = FullSpaceAccount({0: slice(0, 2)}, torch.zeros(2, dtype=torch.float64))
    step = LinearStep(0.5, 1.0, 0.1, 0.0, decoupled_decay=0.01)
    account.step({0: step}, torch.tensor([1.0, 2.0]).double(), torch.tensor([10.0, -10.0]).double())
    examples, decay = account.close()
    torch.testing.assert_close(examples, torch.tensor([-0.1, -0.2]).double())
    torch.testing.assert_close(decay, torch.tensor([-0.1, 0.1]).double())


def test_an_optimizer_without_a_rule_is_refused_with_the_list_of_those_that_have_one():
    adam = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
    match = (
        r"^recording an optimizer: it has no update rule, so its displacements would be wrong\. "
        r"Got torch\.optim\.adam\.Adam; expected torch\.optim\.SGD \(from the optimizers that can be recorded\)\. "
    )
    with pytest.raises(UnsupportedOptimizerError, match=match):
        rule_for(adam)
