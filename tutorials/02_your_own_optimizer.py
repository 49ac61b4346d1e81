# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Your own optimizer
#
# pkexplain has to know how an optimizer turns a gradient into a step; otherwise it could not attribute the step to
# examples. It supports those of `torch.optim` that are linear in the gradient once their state is taken as recorded. This
# page shows what that means for AdamW, and how to add another optimizer in ten lines. It runs in seconds on one core.

# %%
import warnings

import torch
from sklearn.datasets import load_digits
from torch import nn

import pkexplain as pk

torch.set_num_threads(1)
data = load_digits()
x = torch.tensor(data.data, dtype=torch.float64) / 8 - 1
y = torch.tensor(data.target)
train_x, train_y, query = x[:600], y[:600], x[600:601]


def record(make_optimizer, segments="epoch", projection=None, epochs=3):
    """Train a small network, recorded, and explain one prediction."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.GELU(), nn.Linear(16, 10)).double()
    optimizer = make_optimizer(model.parameters())
    run = pk.MemoryStore()
    shuffled = torch.Generator().manual_seed(0)
    options = {"segments": segments, "projection": projection, "dtype": torch.float64}
    with pk.Recorder(run, model, optimizer, num_examples=600, **options) as recorder:
        for _ in range(epochs):
            for ids in torch.randperm(600, generator=shuffled).split(30):
                with recorder.step(ids):
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(model(train_x[ids]), train_y[ids]).backward()
                    optimizer.step()
    return pk.Explainer(run, model).explain(query)[0]


def show(explanation):
    """Print the ledger's named lines, and the check on the optimizer's."""
    change = explanation.final - explanation.initial
    for name, value in explanation.ledger.remainders.items():
        print(f"{name:10} {value:+.1e}   ({abs(value / change):.1e} of f_T − f_0)")
    check = next(check for check in explanation.checks if check.name == "optimizer share")
    print(f"optimizer share: {'passed' if check.passed else 'FAILED'}, tolerance {check.tolerance:g}")
    return check


# %% [markdown]
# ## AdamW
#
# AdamW divides by √v̂, a running mean of squared gradients, different for each coordinate and step. The rows take it as one
# vector for a whole segment. What that misses is measured, on the ledger's `optimizer` line, and shorter segments miss less.
# (The first segments under AdamW are short by default, as √v̂ changes fast at first.) With `Identity` rows are whole, and
# nothing is missed.

# %%
for segments, projection in (("epoch", None), (5, None), ("epoch", pk.Identity())):
    print(f"segments={segments!r}, projection={projection}")
    adamw = show(record(lambda p: torch.optim.AdamW(p, lr=1e-2), segments, projection))

assert adamw.value < 1e-9  # exact is exact, up to rounding

# %% [markdown]
# ## An optimizer that is not in torch
#
# Here is an optimizer similar to NovoGrad: a running mean of squares *for each layer*, a single number, by which the
# gradient is divided before it enters the momentum buffer.


# %%
class LayerScaled(torch.optim.Optimizer):
    """Momentum over gradients that are divided by the root of a running mean of their squared norm, tensor by tensor."""

    def __init__(self, params, lr=1e-2, momentum=0.9, beta=0.95, eps=1e-8):
        super().__init__(params, {"lr": lr, "momentum": momentum, "beta": beta, "eps": eps})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state["second"], state["moment"] = p.grad.square().sum(), torch.zeros_like(p)
                state["second"].mul_(group["beta"]).add_((1 - group["beta"]) * p.grad.square().sum())
                state["moment"].mul_(group["momentum"]).add_(p.grad / (state["second"].sqrt() + group["eps"]))
                p.sub_(group["lr"] * state["moment"])


# %% [markdown]
# A recorder refuses optimizers that it does not know.

# %%
try:
    record(LayerScaled)
except pk.PkexplainError as error:
    print(error)
else:
    raise AssertionError("it was taken without a word")

# %% [markdown]
# A rule is a class with the optimizer's type and one method, which reads the numbers of a step that was just taken:
#
#     m ← momentum · m + gain · g,        Δθ = −(buffer_step · m + gradient_step · g)


# %%
class LayerScaledRule:
    optimizer = LayerScaled

    def read(self, group, state, first):
        return pk.LinearStep(
            momentum=group["momentum"],
            gain=1 / (state["second"].sqrt() + group["eps"]),
            buffer_step=group["lr"],
        )


pk.register_update_rule(LayerScaledRule())
right = show(record(LayerScaled, projection=pk.Identity()))
assert right.passed
assert right.value < 1e-9

# %% [markdown]
# Every number here is a scalar, so nothing has to wait: the displacements are exact, and as cheap as with SGD. A number may
# also be a tensor of the parameter's shape, like AdamW's `buffer_step`; then gradients wait.
#
# ## A wrong rule is detected
#
# Suppose the rule mistook the momentum buffer for a running mean, a factor of 1 − momentum too small.


# %%
class WrongRule(LayerScaledRule):
    def read(self, group, state, first):
        step = super().read(group, state, first)
        return pk.LinearStep(step.weight_decay, step.gain * (1 - group["momentum"]), step.buffer_step)


pk.register_update_rule(WrongRule())
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    wrong = show(record(LayerScaled, epochs=2))
print(said[0].message)
assert not wrong.passed
pk.register_update_rule(LayerScaledRule())

# %% [markdown]
# What the rule does not explain stays on the `optimizer` line, and its check fails; while recording, a warning names the
# parameter. The check's tolerance is 1% of f_T − f_0, so test a new rule with `projection=pk.Identity()` and all options
# switched on: what is left should be rounding error.
#
# ## What a rule can express, and what it cannot
#
# - `momentum`, `gain`, `buffer_step`, `gradient_step`: scalars, or tensors of the parameter's shape.
# - `weight_decay`: the multiple of θ that is added to the gradient; `decoupled_weight_decay`: the multiple that is
#   subtracted from θ itself.
# - `first`: whether the parameter had no state before the step, for optimizers whose first step differs.
# - State that depends on the gradient (a second moment) is taken as recorded, after the step.
#
# An update that is not linear in the gradient becomes so with a factor as recorded: Lion's sign of c is c times 1 / |c|, with
# the |c| of that step (`kept` gives a rule what was there before it). An update that multiplies by a matrix, such as Muon's
# and Shampoo's, is not such a recursion. Any rule for it would be wrong, and the check would fail.
