"""What does an explanation cost? 100 queries in a batch, beside Captum's TracInCP on the same checkpoints.

About three minutes.
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
model, run = build_cnn(), pk.MemoryStore()
train_cnn(model, train, run=run)
trajectory = run.trajectory()


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


def timed(work, repeats: int) -> tuple[list[float], object]:
    seconds, found = [], None
    for _ in range(repeats):
        start = time.perf_counter()
        found = work()
        seconds.append((time.perf_counter() - start) / len(queries))
    return seconds, found


explainer = pk.Explainer(run, model)
start = time.perf_counter()
_ = explainer.index
building = time.perf_counter() - start
ours, _ = timed(lambda: explainer.explain(queries, output=pk.Logit()), 5)
one, _ = timed(lambda: [explainer.explain(q, output=pk.Logit()) for q in queries[:10]] * 10, 1)
every, _ = timed(lambda: explainer.contributions(queries, output=pk.Logit()), 5)
checkpoints = [str(t) for t in range(1, len(trajectory) + 1)]
net = build_cnn().eval()
loss = torch.nn.CrossEntropyLoss(reduction="sum")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    tracin = TracInCP(net, train, checkpoints, load, loss_fn=loss, batch_size=256, sample_wise_grads_per_batch=True)
    theirs, _ = timed(lambda: tracin.influence((queries, labels), k=10), 2)
ratio = np.median(theirs) / np.median(ours)
rows = [
    ["`explain`, batch of 100, index warm", f"{np.median(ours) * 1e3:.1f} ms", "1"],
    ["`explain`, one at a time (10 of them)", f"{one[0] * 10 * 1e3:.0f} ms", f"{one[0] * 10 / np.median(ours):.1f}"],
    [
        "`contributions` of all 4,500, batch of 100",
        f"{np.median(every) * 1e3:.1f} ms",
        f"{np.median(every) / np.median(ours):.1f}",
    ],
    ["Captum `TracInCP`, batch of 100", f"{np.median(theirs) * 1e3:.0f} ms", f"{ratio:.0f}"],
]
write(
    "explaining",
    f"The demo run: {len(trajectory)} checkpoints, 4,500 examples; the index was built in {building:.1f} s. "
    f"{machine()}.\n\n{table(['', 'a query', 'relative to the first'], rows)}",
)
