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
# # Explain a digit
#
# A network calls an image a 3. *Which training examples made it say so, by how much, and does it add up?*
#
# This tutorial trains a small CNN on 4,500 real MNIST digits, records the training, explains one prediction, and checks
# the explanation against a slow computation that shares none of its shortcuts. It runs in about a minute on one core.

# %%
# %matplotlib inline
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

import pkexplain as pk
from pkexplain import exact, plots
from pkexplain.demo import build_cnn, load_digits

train, test = load_digits()
images, labels = train.tensors
len(train), len(test), tuple(images[0].shape)

# %% [markdown]
# ## Record
#
# An ordinary training loop. Two `with` lines are all that recording adds; the loader must say which examples are in a
# batch (`ids`, their row numbers in the training set). The model, the loss and the optimizer stay as they are: the
# per-example gradients are read off the backward pass that happens anyway, so dropout and augmentation would be recorded
# as they happened.

# %%
model = build_cnn(channels=(16, 32))
optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
folder = Path(tempfile.mkdtemp())
generator = torch.Generator().manual_seed(0)

with pk.Recorder(folder / "run", model, optimizer, num_examples=len(train)) as recorder:
    for _epoch in range(6):
        for ids in torch.randperm(len(train), generator=generator).split(64):
            with recorder.step(ids):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images[ids]), labels[ids]).backward()
                optimizer.step()

model.eval()
with torch.no_grad():
    scores = model(test.tensors[0])
accuracy = float((scores.argmax(1) == test.tensors[1]).float().mean())
assert accuracy > 0.93
print(f"test accuracy {accuracy:.1%}")

# %% [markdown]
# ## Explain
#
# What is explained is one number of the output. `Margin(3)` is the log-odds of class 3 against all others; `Logit`,
# `LogProbability`, `Loss`, `Value` and any function of the model's output do as well.

# %%
right_threes = (scores.argmax(1) == 3) & (test.tensors[1] == 3)
query = test.tensors[0][right_threes][0]

explainer = pk.Explainer(folder / "run", model)
explanation = explainer.explain(query, output=pk.Margin(3), k=8)
print(explanation)

# %% [markdown]
# ### The ledger
#
# The margin before training, plus what all training examples contributed, plus two named remainders (weight decay, of
# which there is none here, and what the optimizer did that no example answers for: rounding), is the margin after
# training. The last line, the gap, is what none of them explains.

# %%
ledger = explanation.ledger
assert abs(ledger.gap) < 1e-4 * abs(ledger.final - ledger.initial)
assert np.isclose(explanation.contributions.sum(), explanation.total, rtol=1e-3)
plots.plot_ledger(explanation).figure

# %% [markdown]
# ### Gross and net
#
# The contributions sum to a few units, but they do so by cancelling: examples push the output up and down by many times
# the net change. A single contribution is one push among many. Sums over groups are steadier; here, by training label:
# the 3s push up, the classes that look like a 3 push down.

# %%
print(f"net {explanation.total:+.1f}, gross {explanation.gross:.0f}; those shown hold {explanation.shown_share:.0%}")
by_label = explanation.by_group(labels.tolist())
assert max(by_label, key=lambda group: group.net).group == 3
assert np.isclose(sum(group.net for group in by_label), explanation.contributions.sum())
plots.plot_groups(explanation, labels.tolist()).figure

# %% [markdown]
# ### Proponents and opponents
#
# Proponents pushed the margin up, opponents down. Each contribution is a product: the weight $a_i$, how strongly the loss
# pulled at the example's own output during training, and the path kernel $K(x, x_i)$, how far a pull at the example's
# output moved the query's. The bars show *when* in training it happened, segment by segment.

# %%
plots.plot_examples(explanation, train)

# %%
top = explanation.proponents[0]
assert np.isclose(top.weight * top.kernel, top.contribution)
assert np.isclose(sum(top.segments), top.contribution)
plots.plot_timeline(explanation).figure

# %% [markdown]
# ### The checks
#
# A sum that is corrected to add up cannot fail, so it proves nothing. What can fail is measured and shown with its
# tolerance: the quadrature over training, the compression of the gradients, the capture of gradients, the optimizer.

# %%
for check in explanation.checks:
    print(f"{check.name:18s} {check.value:8.1e}  {'pass' if check.passed else 'FAIL'}  {check.meaning}")
assert explanation.passed

# %% [markdown]
# Some checks fail when too little is spent. With one gradient for each segment and nothing refined, the quadrature
# gap is what it is, and says so:

# %%
hasty = pk.Explainer(folder / "run", model, tolerance=1e-5, quadrature=pk.Quadrature(nodes=1, budget=1))
quick = hasty.explain(query, output=pk.Margin(3))
gap = next(check for check in quick.checks if check.name == "quadrature gap")
assert not gap.passed
assert quick.cost.exhausted
print(gap.value, gap.meaning)

# %% [markdown]
# ## Check us
#
# `pkexplain.exact` computes the same kernel densely: no hooks, no compression, no index, no correction, one gradient at a
# time. It needs a run recorded with `Identity()`, so here is a small one, on 300 digits shrunk to 14 × 14.

# %%
small = nn.functional.avg_pool2d(images[:300], 2)
tiny = nn.Sequential(nn.Flatten(), nn.Linear(196, 16), nn.GELU(), nn.Linear(16, 10)).double()
optimizer = torch.optim.SGD(tiny.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3, nesterov=True)
store = pk.MemoryStore()
recorder = pk.Recorder(store, tiny, optimizer, num_examples=300, projection=pk.Identity(), dtype=torch.float64)
with recorder:
    for _epoch in range(4):
        for ids in torch.randperm(300, generator=generator).split(30):
            with recorder.step(ids):
                optimizer.zero_grad()
                nn.functional.cross_entropy(tiny(small[ids].double()), labels[ids]).backward()
                optimizer.step()

unseen = nn.functional.avg_pool2d(test.tensors[0][:3], 2).double()
account = exact.path_kernel(store, tiny, unseen, output=pk.Logit(3))
fast = pk.Explainer(store, tiny, tolerance=1e-7, quadrature=pk.Quadrature(nodes=8, budget=64))
ours = fast.contributions(unseen, output=pk.Logit(3))
error = np.abs(ours - account.contributions).max() / np.abs(account.contributions).max()
print(f"largest difference {error:.0e} of the largest contribution; gap of the exact account {account.gap}")
assert error < 1e-6

# %% [markdown]
# ## Show a colleague
#
# One HTML file that opens without a network: the query, the ledger, the examples with their pictures, the sums by label,
# the checks.

# %%
report = pk.write_report(explanation, folder / "why.html", dataset=train)
assert report.stat().st_size > 10_000
print(report.name, report.stat().st_size // 1024, "KiB")

# %% [markdown]
# ## What the numbers do not mean
#
# They account for *this* run: what each example did to this output, in the training that happened. They do not say what
# the model would have answered without an example: the others would then have pulled differently. **Additive is not
# counterfactual.** And a strong proponent is not a mistake, though mistakes are often strong: look at the pictures above
# for a digit whose label you would not have given.
