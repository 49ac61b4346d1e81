"""Does an output fall without the examples that are said to support it? A CNN, 50 queries, every method, 3 seeds.

For each method, query, count (50, 200) and seed a CNN is trained again: some 3,000 trainings, most of an hour on two
cores, which two processes share. What was trained is kept in build/benchmarks, so that an interrupted run goes on.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from _figures import machine, table, write
from _retraining import CNN, digits, train

import pkexplain as pk
from pkexplain import baselines
from pkexplain.baselines.compare import BASELINES

QUERIES, COUNTS, SEEDS = 50, (50, 200), (11, 12, 13)
FOLDER = Path(__file__).parent.parent / "build" / "benchmarks" / "subset_removal"

torch.set_num_threads(1)
data, (test_inputs, test_labels) = digits()
queries, labels = test_inputs[:QUERIES], test_labels[:QUERIES]


def scores() -> dict[str, np.ndarray]:
    """Train once, recorded, and let every method score the training set for each query."""
    run = pk.MemoryStore()
    model = train(CNN, data, torch.arange(len(data[1])), 0, run=run)
    explainer = pk.Explainer(run, model)
    found = {
        f"pkexplain, {reading} reading": explainer.contributions(queries, output=pk.Margin(labels), reading=reading)
        for reading in ("removal", "path")
    }
    dataset = torch.utils.data.TensorDataset(*data)
    setting = baselines.Setting.of(explainer, queries, labels, dataset=dataset)
    for method in BASELINES:
        found[method.name] = np.asarray(method.scores(setting), dtype=np.float64)
        print(method.name, "done", flush=True)
    return found


def removal(found: dict[str, np.ndarray], *, backwards: bool) -> pk.evaluation.SubsetRemoval:
    retraining = pk.evaluation.Retraining(
        lambda ids, seed: train(CNN, data, ids, seed),
        queries,
        output=pk.Margin(labels),
        num_examples=len(data[1]),
        kept=FOLDER / "retrained",
        progress=None if backwards else _say,
        backwards=backwards,
    )
    return pk.evaluation.subset_removal(retraining, found, counts=COUNTS, seeds=SEEDS)


def _say(what: str, done: int, total: int) -> None:
    if done % 100 == 0 or done == total:
        print(f"{what}: {done} of {total}", flush=True)


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    kept = FOLDER / "scores.npz"
    if not kept.exists():
        np.savez(kept, **scores())
    with np.load(kept) as loaded:
        found = {name: loaded[name] for name in loaded.files}
    if "--backwards" in sys.argv:
        removal(found, backwards=True)
        return
    with subprocess.Popen([sys.executable, __file__, "--backwards"]) as helper:
        result = removal(found, backwards=False)
        helper.wait()
    flips = result.flip_means or {}
    rows = []
    for method in sorted(result.methods, key=lambda name: -result.means[name][1].value):
        cells = [f"{e.value:.2f} ({e.low:.2f} to {e.high:.2f})" for e in result.means[method]]
        rows.append([method, *cells, *(f"{e.value:.0%}" for e in flips[method])])
    head = ["left out: the strongest by", *(f"{c}: fall of the margin" for c in COUNTS)]
    head += [f"{c}: class changed" for c in COUNTS]
    write(
        "subset removal",
        f"{QUERIES} test digits, retrained with seeds {', '.join(map(str, SEEDS))} (the recorded run has seed 0); "
        f"means, with 95% of the means on resampled queries. {machine()}.\n\n{table(head, rows)}",
    )


if __name__ == "__main__":
    main()
