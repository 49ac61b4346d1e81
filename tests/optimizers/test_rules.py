"""The numbers of an optimizer's step, and the account kept with them, against `torch.optim`."""

from __future__ import annotations

import itertools

import pytest
import torch

from pkexplain.errors import UnsupportedOptimizerError
from pkexplain.optimizers import registry as update_rules
from pkexplain.optimizers.displacement import MomentumBuffer
from pkexplain.optimizers.registry import register_update_rule, rule_for
from pkexplain.optimizers.rules import SGD, LinearStep

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
        ({"weight_decay": 0.01}, {}, LinearStep(0, 0, 0, 0.1, weight_decay=0.01)),
        ({"weight_decay": 0.01, "maximize": True}, {}, LinearStep(0, 0, 0, -0.1, weight_decay=-0.01)),
        ({"momentum": 0.0}, STARTED, LinearStep(1, 0, 0, 0.1)),
        ({"lr": torch.tensor(0.5, dtype=torch.float64)}, {}, LinearStep(0, 0, 0, 0.5)),
    ],
)
def test_numbers_of_a_step(options, state, step):
    group = {**GROUP, **options}
    found = SGD().read(group, state, not any(isinstance(v, torch.Tensor) for v in state.values()))
    for name, value in vars(step).items():
        expected = float(group["lr"]) if name == "learning_rate" else value
        assert getattr(found, name) == pytest.approx(expected), name


def follow(options, steps=12, changes=lambda step, group: None, close_every=5, kind=torch.optim.SGD):
    """Let torch make random steps; return what each segment moved, and what the account says of it."""
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(SIZE, generator=generator, dtype=torch.float64))
    optimizer = kind([parameter], **{"lr": 0.1, **options})
    rule, like = rule_for(optimizer), torch.zeros(SIZE, dtype=torch.float64)
    of_examples, of_decay = (MomentumBuffer({0: slice(0, SIZE)}, like) for _ in range(2))
    start, segments = parameter.detach().clone(), []
    for step in range(1, steps + 1):
        changes(step, optimizer.param_groups[0])
        parameter.grad = torch.randn(SIZE, generator=generator, dtype=torch.float64)
        before = parameter.detach().clone()
        first = not any(isinstance(v, torch.Tensor) for v in optimizer.state.get(parameter, {}).values())
        optimizer.step()
        numbers = {0: rule.read(optimizer.param_groups[0], optimizer.state.get(parameter, {}), first)}
        of_examples.step(numbers, parameter.grad)
        of_decay.step(numbers, before, lambda n: n.weight_decay)
        of_decay.shrink(numbers, before)
        if step % close_every == 0 or step == steps:
            segments.append((parameter.detach() - start, of_examples.close(), of_decay.close()))
            start = parameter.detach().clone()
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
    account = MomentumBuffer({0: slice(0, 2)}, torch.zeros(2, dtype=torch.float64))
    step = {0: LinearStep(0.5, 1.0, 0.1, 0.0, decoupled_weight_decay=0.01)}
    account.step(step, None)
    account.shrink(step, torch.tensor([10.0, -10.0]).double())
    torch.testing.assert_close(account.close(), torch.tensor([-0.1, 0.1]).double())


ADAPTIVE = [
    (torch.optim.Adam, {}),
    (torch.optim.Adam, {"amsgrad": True, "betas": (0.5, 0.6)}),
    (torch.optim.AdamW, {"foreach": True}),
    (torch.optim.AdamW, {"fused": True, "amsgrad": True}),
    (torch.optim.NAdam, {}),
    (torch.optim.NAdam, {"decoupled_weight_decay": True}),
    (torch.optim.RAdam, {}),
    (torch.optim.RAdam, {"decoupled_weight_decay": True, "betas": (0.8, 0.9)}),
    (torch.optim.Adamax, {}),
    (torch.optim.RMSprop, {}),
    (torch.optim.RMSprop, {"centered": True, "momentum": 0.6}),
    (torch.optim.Adagrad, {"lr_decay": 0.1}),
]


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize(("kind", "options"), ADAPTIVE, ids=str)
def test_a_rule_makes_the_whole_step_of_torch(kind, options, decay, maximize):
    def changes(step, group):
        group["lr"] = 0.1 / step

    options = {**options, "weight_decay": decay, "maximize": maximize}
    for moved, examples, shrunk in follow(options, changes=changes, kind=kind):
        torch.testing.assert_close(examples + shrunk, moved, rtol=1e-7, atol=1e-9)
        assert bool(shrunk.any()) == bool(decay)


def test_an_optimizer_without_a_rule_is_refused_with_the_list_of_those_that_have_one():
    lbfgs = torch.optim.LBFGS([torch.nn.Parameter(torch.zeros(1))])
    match = (
        r"^recording an optimizer: it has no update rule, so its displacements would be wrong\. "
        r"Got torch\.optim\.lbfgs\.LBFGS; expected .*Adam, AdamW, .* SGD \(from the optimizers "
        r"that can be recorded\)\. "
    )
    with pytest.raises(UnsupportedOptimizerError, match=match):
        rule_for(lbfgs)


def test_a_rule_of_ones_own_is_found_and_replaced():
    class Heavy(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    class HeavyRule(SGD):
        optimizer = Heavy

    optimizer = Heavy([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(UnsupportedOptimizerError):
        rule_for(optimizer)
    known = list(update_rules._RULES)
    try:
        for rule in (HeavyRule(), HeavyRule()):
            register_update_rule(rule)
            assert rule_for(optimizer) is rule
        assert len(update_rules._RULES) == len(known) + 1
    finally:
        update_rules._RULES[:] = known


def test_a_number_without_dimensions_is_a_scalar_and_one_that_does_not_fit_is_refused():
    like = torch.zeros(0, dtype=torch.float64)
    joined = LinearStep.joined([LinearStep(gain=torch.tensor(0.5)), LinearStep(gain=0.5)], [2, 3], like)
    assert joined.gain == 0.5
    assert not joined.elementwise
    match = r"^reading an optimizer's step: .* Got a tensor of shape \(4,\); expected a scalar, or .* \(3 numbers\)"
    with pytest.raises(UnsupportedOptimizerError, match=match):
        LinearStep.joined([LinearStep(gain=torch.ones(4))], [3], like)


def test_steps_of_neighbours_are_joined():
    like = torch.zeros(0, dtype=torch.float64)
    same = LinearStep(0.9, 1.0, 0.1, 0.0)
    assert LinearStep.joined([same, same], [2, 1], like) == same
    other = LinearStep(0.9, torch.tensor([[5.0], [6.0]]), 0.1, 0.0)
    joined = LinearStep.joined([LinearStep.skipped(), other], [1, 2], like)
    assert joined.momentum.tolist() == [1.0, 0.9, 0.9]
    assert joined.gain.tolist() == [0.0, 5.0, 6.0]
    assert joined.gradient_step == 0.0
    assert joined.elementwise
    assert not same.elementwise
