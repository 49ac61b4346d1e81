"""What does an explanation cost, in both readings, beside Captum's TracInCP on the same checkpoints?

About ten minutes.
"""

from __future__ import annotations

import time
import warnings

import numpy as np
import torch
from _figures import machine, table, write
from captum.influence import TracInCP

import pkexplain as pk
from pkexplain.demo import build_cnn, load_digits, train_cnn

train, test = load_digits()
queries, labels = (part[:100] for part in test.tensors)


def load(net: torch.nn.Module, checkpoint: str) -> float:
    """Set the parameters to a checkpoint of the run; return the learning rate summed over the segment before it."""
    flat = trajectory.checkpoint(int(checkpoint)).parameters
    named, at = dict(net.named_parameters()), 0
    for block in trajectory.fingerprint.blocks:
        for name in block.parameters:
            size = named[name].numel()
            named[name].data.copy_(flat[at : at + size].view_as(named[name]))
            at += size
    return trajectory.summaries[int(checkpoint) - 1].learning_rate_sum[0]


def timed(work, repeats: int, queries: int) -> float:
    """Seconds a query, the median of some repeats."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append((time.perf_counter() - start) / queries)
    return float(np.median(seconds))


start = time.perf_counter()
train_cnn(build_cnn(), train)
plain = time.perf_counter() - start
start = time.perf_counter()
model, run = build_cnn(), pk.MemoryStore()
train_cnn(model, train, run=run)
recorded = time.perf_counter() - start
trajectory = run.trajectory()
explainer = pk.Explainer(run, model)
start = time.perf_counter()
explainer.prepare()
building = time.perf_counter() - start
start = time.perf_counter()
explainer.prepare("removal")
curving = time.perf_counter() - start
logit = pk.Logit()
path = timed(lambda: explainer.explain(queries, output=logit), 5, 100)
removal = timed(lambda: explainer.explain(queries, output=logit, reading="removal"), 5, 100)
path_one = timed(lambda: [explainer.explain(q, output=logit) for q in queries[:10]], 3, 10)
removal_one = timed(lambda: [explainer.explain(q, output=logit, reading="removal") for q in queries[:10]], 3, 10)
every = timed(lambda: explainer.contributions(queries, output=logit), 5, 100)
thousand = torch.cat([test.tensors[0], train.tensors[0][:500]])
thousand_labels = torch.cat([test.tensors[1], train.tensors[1][:500]])
path_thousand = timed(lambda: explainer.explain(thousand, output=logit), 1, 1000)
removal_thousand = timed(lambda: explainer.explain(thousand, output=logit, reading="removal"), 1, 1000)

checkpoints = [str(t) for t in range(1, len(trajectory) + 1)]
net = build_cnn().eval()
loss = torch.nn.CrossEntropyLoss(reduction="sum")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    tracin = TracInCP(net, train, checkpoints, load, loss_fn=loss, batch_size=256, sample_wise_grads_per_batch=True)
    theirs_one = timed(lambda: tracin.influence((queries[:1], labels[:1]), k=10), 3, 1)
    theirs = timed(lambda: tracin.influence((queries, labels), k=10), 2, 100)
    theirs_thousand = timed(lambda: tracin.influence((thousand, thousand_labels), k=10), 1, 1000)


def line(name: str, path: float, removal: float | None, theirs: float) -> list[str]:
    mine = [f"{path * 1e3:.0f} ms", "–" if removal is None else f"{removal * 1e3:.0f} ms"]
    ratios = [f"{theirs / path:.1f}", "–" if removal is None else f"{theirs / removal:.1f}"]
    return [name, *mine, f"{theirs * 1e3:,.0f} ms", *ratios]


rows = [
    line("one at a time", path_one, removal_one, theirs_one),
    line("in batches of 100", path, removal, theirs),
    line("1,000 in one call", path_thousand, removal_thousand, theirs_thousand),
]
head = [
    "a query",
    "path reading",
    "removal reading",
    "Captum `TracInCP`",
    "path: times faster",
    "removal: times faster",
]
spent = recorded - plain + building
even = [int(np.ceil((spent + more) / (theirs_one - mine))) for more, mine in ((0, path_one), (curving, removal_one))]
write(
    "explaining",
    f"The demo run: {len(trajectory)} checkpoints, 4,500 examples, 83,466 parameters; index and checkpoints warm. "
    f"{machine()}.\n\n{table(head, rows)}\n\n"
    f"Recording took {recorded - plain:.0f} s more than training ({plain:.0f} s), the index {building:.1f} s, the "
    f"curvature of the removal reading {curving:.0f} s. For queries that come one at a time that is earned back by "
    f"query {even[0]} (path) and {even[1]} (removal). A removal explanation costs {removal / path:.2f} times a path "
    f"one in a batch, {removal_one / path_one:.2f} times alone. All 4,500 contributions of a query, in a batch of "
    f"100: {every * 1e3:.0f} ms.",
)
