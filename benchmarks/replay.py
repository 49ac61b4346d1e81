"""Does the exact derivative through a run predict what leaving a tenth of its examples out does, with the same seed?

40 trainings of each model, with the batches, order and dropout of the recorded one, each without the loss of a random
tenth. Two models are smooth in what they learn, or learn little; two are not. Some minutes each, but for the GPT (an
hour and a half); ``replay.py text`` measures one of ``text``, ``smooth``, ``mlp`` and ``gpt`` again. What was measured
is kept in build/benchmarks.
"""

from __future__ import annotations

import json
import resource
import sys
import time

import numpy as np
import torch
from _figures import machine, table, write
from _retraining import ADAMW, LANGUAGE, ROOT, SMOOTH, TEXT, Protocol, left_out, train
from prediction import token_loss

import pkexplain as pk

KEPT = ROOT / "replay.json"
TRAININGS, QUERIES = 40, 50
PARTS = {"text": TEXT, "smooth": SMOOTH, "mlp": ADAMW, "gpt": LANGUAGE}
LABELS = {
    "text": "text classifier, AdamW 2e-3, batches of 64",
    "smooth": "MLP with GELU, AdamW 5e-4, batches of 500",
    "mlp": "MLP with ReLU, AdamW 1e-3, batches of 64",
    "gpt": "GPT, AdamW 2e-3, batches of 32",
}


def measure(protocol: Protocol) -> dict[str, float]:
    data, test = protocol.data(0)
    queries, labels = test[0][:QUERIES], test[1][:QUERIES]
    everything = torch.arange(len(data[1]))
    train(protocol, data, everything[: len(everything) // 10], 0)  # the first training pays for what torch loads
    start = time.process_time()
    train(protocol, data, everything, 0)
    once = time.process_time() - start
    run = pk.MemoryStore()
    model = train(protocol, data, everything, 0, run=run, replay=True)
    explainer = pk.Explainer(run, model)
    output = pk.Margin(labels) if labels.ndim == 1 else token_loss(labels)
    sign = 1 if labels.ndim == 1 else -1
    reading = pk.Replay(torch.utils.data.TensorDataset(*data))
    start = time.process_time()
    explainer.prepare(reading)
    prepared, start = time.process_time() - start, time.process_time()
    explained = explainer.explain(queries, output=output, reading=reading)
    each = (time.process_time() - start) / QUERIES
    errors = [check.value for e in explained for check in e.checks if check.name == "replay error"]
    replay = sign * np.stack([e.contributions for e in explained])
    removal = sign * explainer.contributions(queries, output=output, reading="removal")
    truth = left_out(protocol, TRAININGS)
    truth = pk.evaluation.SubsetOutputs(truth.masks, truth.repeats[:, :, :QUERIES])
    scores = {n: pk.evaluation.linear_datamodelling_score(c, truth).mean for n, c in (("", replay), ("r", removal))}
    found = {f"{n}{end}": getattr(s, end) for n, s in scores.items() for end in ("value", "low", "high")}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return found | {
        "error": float(np.median(errors)), "each": each / once, "once": prepared / once, "seconds": once,
        "failed": float(np.mean([e > 0.5 for e in errors])), "memory": memory,
    }  # fmt: skip


def main() -> None:
    ROOT.mkdir(parents=True, exist_ok=True)
    found = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
    for name in sys.argv[1:] or PARTS:
        found[name] = measure(PARTS[name])
        print(name, found[name], flush=True)
        KEPT.write_text(json.dumps(found, indent=1), encoding="utf-8")

    def shown(row: dict[str, float], which: str) -> str:
        return f"{row[f'{which}value']:.3f} ({row[f'{which}low']:.3f} to {row[f'{which}high']:.3f})"

    rows = [
        [
            LABELS[name], shown(row, ""), shown(row, "r"), f"{row['error']:.2f}", f"{row['failed']:.0%}",
            f"{row['once']:.1f}", f"{row['each']:.2f}", f"{row['memory']:.1f} GiB",
        ]
        for name, row in found.items()
    ]  # fmt: skip
    head = [
        "model", "replay", "removal reading", "replay error (median)", "check failed", "first question: trainings",
        "each query: trainings", "memory, whole process",
    ]  # fmt: skip
    note = f"Linear datamodelling scores, {TRAININGS} trainings, {QUERIES} queries in one batch; processor time in "
    write("replay", f"{note}trainings of the model without recording. {machine()}.\n\n{table(head, rows)}")


if __name__ == "__main__":
    main()
