"""Are wrong labels found? A tenth of them flipped, to any class or from class to class, five times; three models.

Ours beside Captum's self-influence, cheap scores and confident learning (cleanlab, if it is installed: three-fold
cross-validation). Twenty minutes; what was measured is kept in build/benchmarks, so that an interrupted run goes on.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from _figures import machine, table, write
from _retraining import CNN, MLP, ROOT, TEXT, Data, Protocol, train

import pkexplain as pk
from pkexplain import baselines

KEPT = ROOT / "mislabels.json"
SEEDS, FOLDS = range(5), 3
STEPS = {"MLP": 355}  # of a segment; otherwise an epoch
KINDS = {"any": "to any class", "class": "from class to class"}
MODELS = {"MLP": MLP, "CNN": CNN, "text": TEXT}


def flipped(labels: np.ndarray, kind: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Flip a tenth of the labels: to any other class, or each class to the next; of two classes, only 1 to 0."""
    classes = int(labels.max()) + 1
    if kind == "any":
        return pk.evaluation.flip_labels(labels, fraction=0.1, classes=classes, seed=seed)
    random, new = np.random.default_rng(seed), labels.copy()
    from_which = np.arange(len(labels)) if classes > 2 else np.flatnonzero(labels == 1)
    changed = random.choice(from_which, len(labels) // 10, replace=False)
    new[changed] = (new[changed] + 1) % classes
    return new, new != labels


def confident_learning(protocol: Protocol, data: Data) -> np.ndarray | None:
    """One minus cleanlab's quality of each label, from predictions out of sample."""
    try:
        from cleanlab.rank import get_label_quality_scores
    except ImportError:
        return None
    inputs, labels = data
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    chances = torch.zeros(len(labels), int(labels.max()) + 1)
    for fold in range(FOLDS):
        held = order[fold::FOLDS]
        rest = torch.ones(len(labels), dtype=torch.bool)
        rest[held] = False
        model = train(protocol, data, rest.nonzero()[:, 0], fold)
        with torch.no_grad():
            chances[held] = model(inputs[held]).softmax(1)
    return 1 - get_label_quality_scores(labels.numpy(), chances.double().numpy())


def scores(protocol: Protocol, data: Data) -> Iterator[tuple[str, Callable[[], Any]]]:
    inputs, labels = data
    run, everything = pk.MemoryStore(), torch.arange(len(labels))
    segments = STEPS.get(protocol.name, "epoch")
    model = train(protocol, data, everything, 0, run=run, segments=segments)
    explainer = pk.Explainer(run, model)
    dataset = torch.utils.data.TensorDataset(inputs, labels)
    setting = baselines.Setting.of(explainer, inputs[:1], labels[:1], dataset=dataset)
    yield "pkexplain, `suspects`", lambda: pk.suspects(run).scores
    yield "pkexplain, `suspects`, centred by label", lambda: pk.suspects(run, labels=labels).scores
    yield "Captum `TracInCP.self_influence`", lambda: baselines.TracInCP().self_influence(setting)
    yield "gradient norm", lambda: baselines.GradientNorm().scores(setting)[0]
    yield "loss at the end of training", lambda: baselines.TrainingLoss().scores(setting)[0]
    yield "cleanlab, confident learning", lambda: confident_learning(protocol, data)


def measure(protocol: Protocol, kind: str, seed: int) -> dict[str, list[float]]:
    inputs, labels = protocol.data(0)[0]
    new, wrong = flipped(labels.numpy(), kind, seed)
    found = {}
    for name, work in scores(protocol, (inputs, torch.as_tensor(new))):
        start = time.perf_counter()
        result = work()
        if result is not None:
            seconds = time.perf_counter() - start
            detection = pk.evaluation.mislabel_detection(np.asarray(result, np.float64), wrong, resamples=10)
            found[name] = [detection.auroc.value, detection.precision, seconds]
    return found


def main() -> None:
    torch.set_num_threads(1)
    ROOT.mkdir(parents=True, exist_ok=True)
    found = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
    for seed in SEEDS:
        for model in sys.argv[1:] or MODELS:
            for kind in KINDS:
                key = f"{model} {kind} {seed}"
                if key not in found:
                    found[key] = measure(MODELS[model], kind, seed)
                    print(key, {name: round(row[0], 4) for name, row in found[key].items()}, flush=True)
                    KEPT.write_text(json.dumps(found, indent=1), encoding="utf-8")
    columns = [(model, kind) for model in MODELS for kind in KINDS]
    names = list(dict.fromkeys(name for row in found.values() for name in row))
    rows = []
    for name in names:
        cells = []
        for model, kind in columns:
            got = [found[f"{model} {kind} {s}"][name] for s in SEEDS if name in found.get(f"{model} {kind} {s}", {})]
            areas = [area for area, _, _ in got]
            cells.append(f"{np.mean(areas):.3f} ({min(areas):.3f} to {max(areas):.3f})" if areas else "–")
        took = [row[name][2] for key, row in found.items() if key.startswith("MLP") and name in row]
        rows.append([name, *cells, f"{np.median(took):.1f} s" if took else "–"])
    head = ["AUROC", *(f"{model}, {KINDS[kind]}" for model, kind in columns), "time, MLP"]
    note = f"A tenth of the labels flipped; means, least and most of {len(SEEDS)} draws. {machine()}."
    write("mislabels", f"{note}\n\n{table(head, rows)}")


if __name__ == "__main__":
    main()
