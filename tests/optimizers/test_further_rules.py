"""Rules of less common optimizers, other libraries' too: the account leaves nothing to the optimizer line."""

import pytest
import torch
from lion_pytorch import Lion
from prodigyopt import Prodigy
from torch import nn
from torch.nn import functional as F
from transformers.optimization import Adafactor

import pkexplain as pk
from pkexplain.optimizers.registry import rule_for, unwrapped
from pkexplain.optimizers.rules import AdamW

N = 12
X = torch.randn(N, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Inherits(torch.optim.AdamW):
    """No ``step`` of its own."""


class Around:
    """As libraries put around an optimizer."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self):
        self.optimizer.step()


CASES = {
    "Adadelta": (torch.optim.Adadelta, {"lr": 1.0}),
    "Adadelta, L2, maximize": (torch.optim.Adadelta, {"lr": 0.5, "weight_decay": 0.1, "maximize": True}),
    "ASGD": (torch.optim.ASGD, {"lr": 0.1, "lambd": 0.05, "t0": 2}),
    "ASGD, L2": (torch.optim.ASGD, {"lr": 0.1, "weight_decay": 0.1, "foreach": True}),
    "Rprop": (torch.optim.Rprop, {"lr": 0.01}),
    "Rprop, maximize": (torch.optim.Rprop, {"lr": 0.01, "maximize": True}),
    "Adafactor": (torch.optim.Adafactor, {"lr": 0.1}),
    "Adafactor, decay": (torch.optim.Adafactor, {"lr": 0.1, "weight_decay": 0.1, "d": 2.0}),
    "Adafactor, foreach": (torch.optim.Adafactor, {"lr": 0.1, "foreach": True}),
    "Lion": (Lion, {"lr": 0.01}),
    "Lion, decay": (Lion, {"lr": 0.01, "weight_decay": 0.1, "betas": (0.95, 0.98)}),
    "Prodigy": (Prodigy, {"lr": 1.0, "d0": 1e-3}),
    "Prodigy, decay": (Prodigy, {"d0": 1e-3, "weight_decay": 0.1, "use_bias_correction": True}),
    "Prodigy, L2": (Prodigy, {"d0": 1e-3, "weight_decay": 0.1, "decouple": False, "betas": (0.0, 0.99)}),
    "Adafactor of transformers": (Adafactor, {"weight_decay": 0.1}),
    "Adafactor of transformers, fixed rate": (
        Adafactor,
        {"lr": 0.05, "relative_step": False, "scale_parameter": False, "beta1": 0.9, "clip_threshold": 0.5},
    ),
    "inherits": (Inherits, {"lr": 0.01}),
}


@pytest.mark.parametrize("kind", CASES)
def test_examples_and_decay_explain_every_step(kind):
    torch.manual_seed(0)
    model, run = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double(), pk.MemoryStore()
    make, options = CASES[kind]
    optimizer = make(model.parameters(), **options)
    recording = {"num_examples": N, "projection": pk.Identity(), "dtype": torch.float64}
    with pk.Recorder(run, model, optimizer, segments=3, **recording) as recorder:
        for _ in range(3):
            for ids in torch.arange(N).split(4):
                with recorder.step(ids):
                    optimizer.zero_grad()
                    F.cross_entropy(model(X[ids]), ids % 3).backward()
                    optimizer.step()
    for summary in run.trajectory().summaries:
        assert summary.optimizer_share < 1e-9
        assert summary.displacement_gap < 1e-9
    segment = run.trajectory().segment(0)
    assert segment.read_rows(slice(None), torch.float64).norm() > 1e-4
    decays = options.get("weight_decay", 0) or options.get("lambd", 0) or kind in ("inherits", "ASGD, L2")
    assert bool(segment.weight_decay.any()) == bool(decays)


DIVIDING = {
    name: CASES[name]
    for name in ("Adadelta", "Rprop", "Adafactor", "Lion", "Prodigy", "Adafactor of transformers", "inherits")
} | {
    "Adam, amsgrad": (torch.optim.Adam, {"amsgrad": True}),
    "NAdam": (torch.optim.NAdam, {}),
    "RAdam": (torch.optim.RAdam, {}),
    "Adamax": (torch.optim.Adamax, {}),
    "RMSprop": (torch.optim.RMSprop, {}),
    "RMSprop, centered, momentum": (torch.optim.RMSprop, {"centered": True, "momentum": 0.9}),
    "Adagrad": (torch.optim.Adagrad, {}),
}


@pytest.mark.parametrize("kind", DIVIDING)
def test_rounded_gradients_that_cancel_exactly_are_not_divided_by_epsilon(kind):
    model, run = nn.Linear(3, 1, bias=False).bfloat16(), pk.MemoryStore()
    nn.init.zeros_(model.weight)  # where bfloat16 rounds the least
    make, options = DIVIDING[kind]
    optimizer = make(model.parameters(), **options)
    inputs = torch.tensor([[1, 1, 0], [2**-9, 1, 0], [-1, 1, 0]]).bfloat16()  # 1 + 2⁻⁹ is 1 in bfloat16
    with pk.Recorder(run, model, optimizer, num_examples=3, projection=pk.Identity(), segments=8) as recorder:
        for size in range(1, 9):
            optimizer.zero_grad()
            with recorder.step([0, 1], accumulate=True):
                (size * model(inputs[:2]).sum()).backward()
            with recorder.step([2]):
                (size * model(inputs[2:]).sum()).backward()
                optimizer.step()
    segment = run.trajectory().segment(0)
    rows = segment.read_rows(slice(None), torch.float32)
    assert rows[:, 1].abs().min() > 0
    assert rows[:, 0].abs().max() <= 2 * rows[:, 1].abs().max()
    for summary in run.trajectory().summaries:
        assert summary.optimizer_share < 0.1  # the rounding of the parameters


def test_a_subclass_that_inherits_its_step_has_its_parents_rule():
    parameters = [nn.Parameter(torch.zeros(1))]
    assert type(rule_for(Inherits(parameters))) is AdamW


def test_a_wrapped_optimizer_is_found():
    inner = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    assert unwrapped(Around(Around(inner))) is inner
