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
# This tutorial trains a small CNN on 4,500 real MNIST digits, records the training, explains one prediction line by line,
# and then questions the explanation: with far too little effort, against a slow computation without any of its shortcuts,
# and by retraining without the examples that it names. You only need to know PyTorch. It takes a quarter of an hour to
# read and less than a minute to run on one core.
#
# Whatever the text claims about the numbers, a line of code asserts. The last digits may differ on your machine; the claims
# should not.

# %%
# %matplotlib inline
import tempfile
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

import pkexplain as pk
from pkexplain.demo import build_cnn, load_digits
from pkexplain.explain import dense as exact
from pkexplain.results import plots

train, test = load_digits()
images, labels = train.tensors
len(train), len(test), tuple(images[0].shape)

# %% [markdown]
# ## Record
#
# An ordinary training loop. Recording adds two `with` lines and needs to know which examples are in a batch: `ids`, their
# row numbers in the training set. The model, the loss and the optimizer stay the same, and so does the training, bit for
# bit. The gradient of each example is taken from the backward pass that happens anyway, so dropout and augmentation are
# recorded as they happened.
#
# A run is kept in a directory; here, a temporary one. Use `pk.MemoryStore()` instead to keep it in memory.

# %%
folder = tempfile.TemporaryDirectory()
run = Path(folder.name) / "run"

model = build_cnn(channels=(16, 32))
optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
generator = torch.Generator().manual_seed(0)

with pk.Recorder(run, model, optimizer, num_examples=len(train)) as recorder:
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
# An explanation is about one number of the model's output. `Margin(3)` is the log-odds of class 3 against all others, in
# nats: 0 is even odds, 10 is practically certain. `Logit`, `LogProbability`, `Loss`, `Value` and any function of the
# output work, too. The query is the first test digit that is a 3 and is classified as one.

# %%
is_three = (scores.argmax(1) == 3) & (test.tensors[1] == 3)
query = test.tensors[0][is_three][0]

explainer = pk.Explainer(run, model)
explanation = explainer.explain(query, output=pk.Margin(3), k=8)
print(explanation)

# %% [markdown]
# The rest of this tutorial reads that page from top to bottom.
#
# ### The ledger
#
# | line | what it is |
# | --- | --- |
# | initial | the margin before training, with random weights |
# | examples | what all 4,500 training examples contributed together |
# | weight_decay | the effect of weight decay; there is none in this run |
# | optimizer | what the optimizer did that belongs to no example; here, rounding error |
# | gap | what none of these lines explains |
# | final | the margin after training |
#
# Everything is in nats, the unit of the margin, not in scores on an arbitrary scale.

# %%
ledger = explanation.ledger
lines = [ledger.initial, ledger.examples, *ledger.remainders.values(), ledger.gap]
assert np.isclose(sum(lines), ledger.final)
assert abs(ledger.gap) < 1e-4 * abs(ledger.final - ledger.initial)
assert np.isclose(explanation.contributions.sum(), ledger.examples, rtol=1e-3)
assert ledger.remainders["weight_decay"] == 0.0
plots.plot_ledger(explanation).figure

# %% [markdown]
# ### Gross and net
#
# The contributions sum to a dozen nats or so, but only after cancelling: their absolute values sum to many times as much.
# Hundreds of examples pushed the margin up and hundreds pushed it down. A single contribution is one push among many, and
# the few that are shown hold a small share of the total. Never read a list of top examples without this line.

# %%
print(
    f"net {explanation.total:+.1f}, gross {explanation.gross:.0f}; those shown hold {explanation.shown_share:.0%} of it"
)
assert np.isclose(explanation.gross, np.abs(explanation.contributions).sum())
assert explanation.gross > 10 * abs(explanation.total)
assert min((explanation.contributions > 0).sum(), (explanation.contributions < 0).sum()) > 500
assert explanation.shown_share < 0.5
plots.plot_contributions(explanation).figure

# %% [markdown]
# Sums over groups are more stable than single examples. By training label: the 3s pushed up, and the classes that must be
# distinguished from a 3 pushed down, most of all the 8s. Any other grouping works, with one name for each training
# example: by source, by annotator, by date.

# %%
by_label = explanation.by_group(labels.tolist())
assert max(by_label, key=lambda group: group.net).group == 3
assert min(by_label, key=lambda group: group.net).group == 8
assert np.isclose(sum(group.net for group in by_label), explanation.total, rtol=1e-3)
assert np.isclose(sum(group.gross for group in by_label), explanation.gross)
plots.plot_groups(explanation, labels.tolist()).figure

# %% [markdown]
# ### Proponents and opponents
#
# Proponents pushed the margin up, opponents down. Almost all of these proponents are 3s. The opponents are mostly digits
# of other classes that look like the query: as training pulled their own scores away from 3, it also pulled the query's.

# %%
shown = [*explanation.proponents, *explanation.opponents]
assert sum(int(labels[c.id]) == 3 for c in explanation.proponents) > len(explanation.proponents) / 2
assert sum(int(labels[c.id]) != 3 for c in explanation.opponents) > len(explanation.opponents) / 2
plots.plot_examples(explanation, train)

# %% [markdown]
# ### Weight and kernel
#
# Each contribution is a product, $c_i = a_i \, K(x, x_i)$:
#
# - the **weight** $a_i$ is how hard the loss pulled at the example's own outputs, on average over training. It is small for
#   an example that was learned early, and large for one that the model got wrong until the end;
# - the **path kernel** $K(x, x_i)$ is how far a pull at the example's outputs moved the query's margin. It carries the sign:
#   positive if the two rise together.
#
# So there are two ways to matter: to look like the query, to this network, or to be hard. ($a_i$ is small in absolute
# terms because the loss is a mean over a batch of 64, and $a_i$ includes the 1/64.)

# %%
print("   id  label  contribution        a_i          K")
for c in shown:
    assert np.isclose(c.weight * c.kernel, c.contribution)
    assert np.isclose(sum(c.segments), c.contribution)
    print(f"{c.id:5d}  {int(labels[c.id]):5d}  {c.contribution:+12.1f}  {c.weight:9.4f}  {c.kernel:+9.0f}")

# %% [markdown]
# A contribution is also a sum over training: `c.segments` holds the part of each epoch. For all examples together, with
# the margin itself as the line:

# %%
assert np.isclose(sum(explanation.segment_sums), explanation.total)
plots.plot_timeline(explanation).figure

# %% [markdown]
# ### The checks
#
# The stored rows are compressed, and the sum over them is *corrected* to be exact. A corrected sum closes by
# construction, so it proves nothing. What can fail is measured before the correction, and printed with its tolerance: the
# integral over training, the capture of gradients, the compression, the optimizer.

# %%
for check in explanation.checks:
    print(f"{check.name:17s} {check.value:8.1e}  {'pass' if check.passed else 'FAIL'}  {check.meaning}\n")
assert explanation.passed

# %% [markdown]
# ## Question it: too little effort
#
# What does a bad explanation look like? Allow one gradient per epoch and no refinement, and explain twenty 3s at once: a
# batch of queries gives a list. Every ledger still closes, because it is corrected. But for most of them the quadrature
# gap, measured before the correction, is above its tolerance, and each reports that the budget was spent.

# %%
hasty = pk.Explainer(run, model, quadrature=pk.Quadrature(nodes=1, budget=1))
quick = hasty.explain(test.tensors[0][is_three][:20], output=pk.Margin(3))
assert all(abs(e.gap) < 1e-4 * abs(e.final - e.initial) for e in quick)
assert all(e.cost.exhausted for e in quick)
failed = [e for e in quick if not e.passed]
assert len(failed) > len(quick) / 2

gap = next(check for check in failed[0].checks if not check.passed)
print(f"{len(failed)} of {len(quick)} explanations failed a check; the first of them:")
print(f"{gap.name} {gap.value:.1e}, tolerance {gap.tolerance:.0e}. {gap.meaning}")

# %% [markdown]
# ## Question it: the slow way
#
# `pkexplain.explain.dense` computes the same kernel densely: no hooks, no compression, no index, no correction, one gradient
# at a time. It needs a run recorded with `Identity()`, which keeps every number, so here is a small one: 300 digits of
# 14 × 14 pixels, a smooth network, 64-bit numbers, and an optimizer with all options switched on.

# %%
small = nn.functional.avg_pool2d(images[:300], 2).double()
tiny = nn.Sequential(nn.Flatten(), nn.Linear(196, 16), nn.GELU(), nn.Linear(16, 10)).double()
optimizer = torch.optim.SGD(tiny.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3, nesterov=True)
store = pk.MemoryStore()

with pk.Recorder(store, tiny, optimizer, num_examples=300, projection=pk.Identity(), dtype=torch.float64) as recorder:
    for _epoch in range(4):
        for ids in torch.randperm(300, generator=generator).split(30):
            with recorder.step(ids):
                optimizer.zero_grad()
                nn.functional.cross_entropy(tiny(small[ids]), labels[ids]).backward()
                optimizer.step()

unseen = nn.functional.avg_pool2d(test.tensors[0][:3], 2).double()
slow = exact.path_kernel(store, tiny, unseen, output=pk.Logit(3))
careful = pk.Explainer(store, tiny, tolerance=1e-7, quadrature=pk.Quadrature(nodes=8, budget=64))
fast = careful.contributions(unseen, output=pk.Logit(3))
difference = np.abs(fast - slow.contributions).max() / np.abs(slow.contributions).max()
print(f"900 contributions; largest difference {difference:.0e} of the largest of them")
print("gap of the slow ledger, without any correction:", slow.gap)
assert difference < 1e-6
assert np.abs(slow.gap).max() < 1e-6

# %% [markdown]
# ## Use it: a suspicious example
#
# A strong proponent with a large weight is one that the model had to be forced to agree with. Sometimes that is because
# its label is wrong, or questionable. So compare the label with the picture, using something that knows nothing about the
# network: the ten nearest training images, pixel by pixel.

# %%
pixels = images.flatten(1)


def neighbours(example: int, count: int = 10) -> torch.Tensor:
    """Find the training images nearest to one of them, without itself."""
    distances = (pixels - pixels[example]).square().sum(1)
    distances[example] = torch.inf
    return distances.argsort()[:count]


suspects = [c for c in explanation.proponents if not (labels[neighbours(c.id)] == labels[c.id]).any()]
assert suspects
figure = Figure(figsize=(9, 1.9 * len(suspects)), layout="constrained")
for row, c in zip(figure.subplots(len(suspects), 6, squeeze=False), suspects, strict=True):
    for axes, example in zip(row, [c.id, *neighbours(c.id, 5).tolist()], strict=True):
        axes.imshow(images[example, 0], cmap="gray")
        axes.axis("off")
        axes.set_title(f"{example}\nlabel {int(labels[example])}", fontsize=9, color="black")
figure

# %% [markdown]
# On the left, proponents with label 3 although none of their ten nearest images is a 3; to the right, the nearest images.
# That is a reason to look, not a verdict: decide for yourself whether they are 3s. Nothing here is special to this query,
# but an example that matters to *some* prediction you care about is a better place to start than a list of all 4,500.

# %% [markdown]
# ## What the numbers do not mean
#
# **Additive is not counterfactual.** The ledger decomposes what happened. It does not say what would have happened without
# an example: the others would have pulled differently, and mostly had the same effect. Try it. Retrain from the same
# weights, in the same order, without all eight proponents. Together they contributed several times as much as the margin
# rose. If that were simply missing, the model would now be sure that this is not a 3.

# %%
gone = torch.tensor([c.id for c in explanation.proponents])
again = build_cnn(channels=(16, 32))
optimizer = torch.optim.SGD(again.parameters(), lr=0.02, momentum=0.9)
generator = torch.Generator().manual_seed(0)
for _epoch in range(6):
    for ids in torch.randperm(len(train), generator=generator).split(64):
        ids = ids[~torch.isin(ids, gone)]
        optimizer.zero_grad()
        nn.functional.cross_entropy(again(images[ids]), labels[ids]).backward()
        optimizer.step()

with torch.no_grad():
    change = float(pk.Margin(3)(again.eval()(query[None]))[0]) - explanation.final
contributed = sum(c.contribution for c in explanation.proponents)
print(f"contributed by the eight: {contributed:+.1f}   margin without them: {change:+.1f}")
assert contributed > 2 * abs(explanation.total)
assert explanation.final - contributed < -5
assert abs(change) < contributed / 4

# %% [markdown]
# It hardly changed: the other 3s took over. Both numbers are true; they answer different questions. Read a contribution as
# *what this example did to this output in this training*, and nothing more. To predict the effect of leaving examples out,
# use `reading="removal"`.
#
# ## Show a colleague
#
# One HTML file that needs no network: the query, the ledger, the examples with their pictures and timelines, the sums by
# label, the checks.

# %%
report = pk.write_report(explanation, Path(folder.name) / "why.html", dataset=train)
assert 'src="http' not in report.read_text(encoding="utf-8")
print(report.name, report.stat().st_size // 1024, "KiB")

# %% [markdown]
# To keep it, pass a path of your own. The command line can inspect a run, too: `pkexplain inspect RUN` shows its contents,
# `pkexplain verify RUN` checks every file and every segment. This run was temporary:

# %%
folder.cleanup()

# %% [markdown]
# ## Read on
#
# The documentation explains why it adds up, with proofs (`docs/mathematics.md`), which models and optimizers can be recorded
# and what is approximate (`docs/limits.md`), and how good and how fast it is, with the scripts that measure it
# (`docs/figures.md`).
