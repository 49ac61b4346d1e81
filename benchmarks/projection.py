"""How much does compression lose? Projections against Identity on a CNN small enough for it. About two minutes."""

from __future__ import annotations

import numpy as np
from _figures import machine, table, write
from scipy.stats import spearmanr

import pkexplain as pk
from pkexplain.demo import build_cnn, load_digits, train_cnn

CHANNELS, EPOCHS = (16, 32), 6
train, test = load_digits()
queries = test.tensors[0][:100]


def contributions(projection: pk.Identity | pk.SparseSign | pk.Kronecker) -> np.ndarray:
    model, run = build_cnn(channels=CHANNELS), pk.MemoryStore()
    train_cnn(model, train, run=run, projection=projection, epochs=EPOCHS)
    explainer = pk.Explainer(run, model)
    return explainer.contributions(queries, output=pk.Logit())


def overlap(found: np.ndarray, truth: np.ndarray) -> list[float]:
    tops = [[set(np.argsort(-row)[:10]) for row in rows] for rows in (found, truth)]
    return [len(a & b) / 10 for a, b in zip(*tops, strict=True)]


truth = contributions(pk.Identity())
parameters = sum(p.numel() for p in build_cnn(channels=CHANNELS).parameters())
rows = []
for projection in (
    pk.Kronecker(k=512, wide=512),
    pk.Kronecker(k=2048, wide=2048),
    pk.Kronecker(k=4096, wide=4096),
    pk.Kronecker(k=128),
    pk.Kronecker(k=256),
    pk.Kronecker(),
    pk.Kronecker(k=1024),
    pk.Kronecker(wide=4096),
    pk.Kronecker(wide=8192),
    pk.Kronecker(warm_up_examples=256),
    pk.SparseSign(k=1024),
    pk.SparseSign(k=2048),
    pk.SparseSign(),
):
    found = contributions(projection)
    ranks = [spearmanr(a, b).statistic for a, b in zip(found, truth, strict=True)]
    error = np.linalg.norm(found - truth, axis=1) / np.linalg.norm(truth, axis=1)
    default = " (default)" if projection == pk.Kronecker() else ""
    warm_up = ""
    if isinstance(projection, pk.Kronecker):
        from_wide = f" from {projection.wide:,}" if projection.wide > projection.k else ", one stage"
        warm_up = f"{from_wide}, {projection.warm_up_examples} examples"
    both = [overlap(found, truth), overlap(-found, -truth)]
    rows.append(
        [
            f"{projection.kind}{warm_up}{default}",
            str(projection.k),
            f"{np.median(ranks):.4f}",
            *(f"{np.median(values):.2f} (mean {np.mean(values):.3f})" for values in both),
            f"{np.median(error):.1%}",
        ]
    )
head = ["projection", "k", "rank correlation", "top-10 proponents", "top-10 opponents", "relative error"]
write(
    "projection",
    f"ReLU CNN with {parameters:,} parameters, {EPOCHS} segments, fp16 rows, medians over {len(queries)} test digits. "
    f"{machine()}.\n\n{table(head, rows)}",
)
