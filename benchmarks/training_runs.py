"""Does it add up in the training runs that people do? One row for each kind of run, all or those named as arguments.

Rows are kept in build/benchmarks/training_runs.json, so that one can be measured again alone. It takes a
quarter of an hour.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _figures import machine, table, write
from _models import GPT, ResNet, VisionTransformer, load_sentences, load_text, minilm, seeded, token_loss
from _runs import Job, Run, make, overhead
from scipy.stats import spearmanr
from torch import Tensor, nn

import pkexplain as pk
from pkexplain.demo import build_cnn, load_digits

KEPT = Path(__file__).parent.parent / "build" / "benchmarks" / "training_runs.json"
HEAD = [
    "training run",
    "right",
    "displacement gap, largest",
    "optimizer share, median (95th percentile)",
    "quadrature gap, median (95th percentile)",
    "projection gap before correction, median",
    "audit error, median",
    "left after correction, largest",
    "gradients a query",
    "bytes an example and segment",
    "recorded / plain time",
]
EMPTY = "–"


def check(explanations: list[pk.Explanation], name: str) -> np.ndarray:
    """Read a check off every explanation; nan where it was not made."""
    return np.array([next((c.value for c in e.checks if c.name == name), np.nan) for e in explanations])


def measure(name: str, explanations: list[pk.Explanation]) -> list[str]:
    """Make the row's cells that come from the explanations."""

    def both(values: np.ndarray) -> str:
        return f"{np.median(values):.2g} ({np.quantile(values, 0.95):.2g})"

    def percent(values: np.ndarray) -> str:
        return f"{np.median(values):.2%} ({np.quantile(values, 0.95):.2%})"

    changes = np.array([e.final - e.initial for e in explanations])
    accounted = np.array([e.contributions.sum() + sum(e.ledger.remainders.values()) for e in explanations])
    audit = check(explanations, "audit error")
    return [
        name,
        f"{check(explanations, 'displacement gap').max():.1e}",
        both(check(explanations, "optimizer share")),
        percent(check(explanations, "quadrature gap")),
        f"{np.median(check(explanations, 'projection gap')):.1%}",
        EMPTY if np.isnan(audit).all() else f"{np.nanmedian(audit):.1%}",
        f"{np.max(np.abs((accounted - changes) / changes)):.1e}",
        f"{np.mean([e.cost.backward_passes for e in explanations]):.0f}",
    ]


def row(job: Job, run: Run, ratio: str = EMPTY) -> list[str]:
    name, *cells = measure(job.name, run.explanations)
    return [name, f"{run.accuracy:.1%}", *cells, f"{run.row_bytes:,.0f}", ratio]


def bare_row(job: Job, ratio: str) -> list[str]:
    """Make a row of which the overhead alone is known."""
    return [job.name, *[EMPTY] * (len(HEAD) - 2), ratio]


# ------------------------------------------------------------------------------------------------------------- kinds


@functools.cache
def digits() -> tuple[tuple[Any, Tensor], tuple[Any, Tensor]]:
    train, test = load_digits()
    return train.tensors, test.tensors  # pyright: ignore[reportReturnType]


@functools.cache
def sentences() -> tuple[tuple[Any, Tensor], tuple[Any, Tensor]]:
    return load_sentences(1500, 200)


@functools.cache
def text() -> tuple[tuple[Any, Tensor], tuple[Any, Tensor]]:
    return load_text(960, 100)


def small_cnn() -> nn.Module:
    return build_cnn(channels=(16, 32))


def using(kind: str, **options: Any) -> Callable[..., torch.optim.Optimizer]:
    return functools.partial(getattr(torch.optim, kind), **options)


def small(name: str, kind: str, **options: Any) -> Job:
    """A small CNN, a few epochs."""
    return Job(f"small CNN, {name}", small_cnn, using(kind, **options), digits, epochs=3)


def tuned(name: str, trained: str, rate: float) -> Job:
    build = functools.partial(seeded, functools.partial(minilm, trained))
    optimizer = using("AdamW", lr=rate)
    return Job(
        f"MiniLM (pretrained), {name}", build, optimizer, sentences, epochs=2, batch=16, segments=24, queries=50,
        at_once=10,
    )  # fmt: skip


ADAMW = Job(
    "CNN, AdamW, clipped, cosine schedule", build_cnn, using("AdamW", lr=1e-2, weight_decay=1e-2), digits, epochs=6,
    clip=1.0, cosine=True,
)  # fmt: skip
JOBS = {
    "sgd": Job("CNN, SGD with momentum", build_cnn, using("SGD", lr=0.02, momentum=0.9), digits, epochs=6),
    "adamw": ADAMW,
    "bf16": replace(ADAMW, name="the same in bfloat16 autocast", autocast=True),
    "overhead_cnn": replace(ADAMW, name="CNN, AdamW", clip=None, cosine=False),
    "adam": small("Adam", "Adam", lr=1e-3),
    "amsgrad": small("AMSGrad", "Adam", lr=1e-3, amsgrad=True),
    "nadam": small("NAdam", "NAdam", lr=1e-3),
    "radam": small("RAdam", "RAdam", lr=1e-3),
    "adamax": small("Adamax", "Adamax", lr=2e-3),
    "rmsprop": small("RMSprop", "RMSprop", lr=1e-3),
    "adagrad": small("Adagrad", "Adagrad", lr=1e-2),
    "compression": small("AdamW", "AdamW", lr=3e-3),
    "vit": Job(
        "vision transformer, AdamW, tolerance 0.2%", functools.partial(seeded, VisionTransformer),
        using("AdamW", lr=5e-4), digits,
        epochs=8, queries=200, tolerance=2e-3,
    ),
    "batchnorm": Job(
        "ResNet with BatchNorm, SGD with momentum", functools.partial(seeded, ResNet),
        using("SGD", lr=0.02, momentum=0.9), digits, epochs=6,
    ),
    "batchnorm_adamw": Job(
        "ResNet with BatchNorm, AdamW", functools.partial(seeded, ResNet), using("AdamW", lr=1e-3), digits, epochs=6
    ),
    "gpt": Job(
        "GPT, AdamW with warm-up", functools.partial(seeded, GPT), using("AdamW", lr=5e-4), text, epochs=3, batch=16,
        queries=50, at_once=10, loss=token_loss, output=lambda labels: pk.TokenLogProbability(labels[:, -8:], 121),
    ),
    "minilm": tuned("all parameters, AdamW", "all", 5e-5),
    "minilm_head": tuned("frozen but for the head, AdamW", "head", 1e-3),
    "minilm_lora": tuned("LoRA of rank 8, AdamW", "lora", 5e-4),
}  # fmt: skip

Result = dict[str, Any]
"""A row of the table, or none, and notes below it."""


def account(job: Job) -> Result:
    return {"row": row(job, make(job))}


def overhead_only(job: Job, steps: int, pairs: int, skip: int) -> Result:
    return {"row": bare_row(job, overhead(job, steps, pairs, skip))}


def vision_transformer(job: Job) -> Result:
    run = make(job, with_displaced=True)
    final = np.array([e.final for e in run.explanations])
    summed = np.array([e.initial for e in run.explanations]) + run.displaced
    found = np.corrcoef(final, summed)[0, 1]
    note = (
        f"{job.name}: over {len(final)} test digits, f_T and f_0 + Σ_t ⟨φ_t, Δθ_t⟩ before any correction have a "
        f"Pearson correlation of {found:.5f}."
    )
    return {"row": row(job, run), "notes": [note]}


def batch_norm(job: Job) -> Result:
    run = make(job, with_displaced=True)
    changes = np.array([e.final - e.initial for e in run.explanations])
    without = np.abs(changes - run.displaced) / np.abs(changes)
    line = np.array([e.ledger.remainders.get("buffers", 0.0) for e in run.explanations])
    note = (
        f"{job.name}: without the ledger's line `buffers` (what the running statistics moved; median size "
        f"{np.median(np.abs(line / changes)):.1%} of the change) the quadrature gap would be {np.median(without):.1%} "
        f"(median; 95th percentile {np.quantile(without, 0.95):.1%})."
    )
    return {"row": row(job, run), "notes": [note]}


def compression(job: Job) -> Result:
    exact, stored = (
        np.stack([e.contributions for e in make(replace(job, projection=projection)).explanations])
        for projection in (pk.Identity(), None)
    )
    ranks = [spearmanr(a, b).statistic for a, b in zip(stored, exact, strict=True)]
    tops = [[set(np.argsort(-values)[:10]) for values in rows] for rows in (stored, exact)]
    shared = [len(a & b) / 10 for a, b in zip(*tops, strict=True)]
    note = (
        f"{job.name}: contributions from compressed rows (the default) against those from whole ones: rank correlation "
        f"{np.median(ranks):.4f}, shared of the ten strongest proponents {np.median(shared):.2f} (medians over "
        f"{len(ranks)} test digits; mean {np.mean(shared):.3f})."
    )
    return {"row": None, "notes": [note]}


def sentence_encoder(job: Job) -> Result:
    ratio = overhead(job, steps=24, pairs=2, skip=24)
    return {"row": row(job, make(job), ratio)}


def language_model(job: Job) -> Result:
    ratio = overhead(job, steps=20, pairs=3, skip=60)
    return {"row": row(job, make(job), ratio)}


SPECIAL: dict[str, Callable[[Job], Result]] = {
    "overhead_cnn": functools.partial(overhead_only, steps=71, pairs=5, skip=71),
    "vit": vision_transformer,
    "batchnorm": batch_norm,
    "batchnorm_adamw": batch_norm,
    "compression": compression,
    "gpt": language_model,
    "minilm": sentence_encoder,
    "minilm_head": functools.partial(overhead_only, steps=24, pairs=5, skip=24),
    "minilm_lora": functools.partial(overhead_only, steps=24, pairs=3, skip=48),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(JOBS)}; all without any")
    names = parser.parse_args().names or list(JOBS)
    if unknown := set(names) - set(JOBS):
        parser.error(f"there is no {', '.join(sorted(unknown))}")
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        start = time.perf_counter()
        result = SPECIAL.get(name, account)(JOBS[name])
        kept = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
        kept[name] = {**result, "machine": machine(), "seconds": round(time.perf_counter() - start)}
        KEPT.write_text(json.dumps(kept, indent=1, ensure_ascii=False), encoding="utf-8")
        print(f"{name}: {kept[name]['seconds']} s", flush=True)
    ordered = [kept[name] for name in JOBS if name in kept]
    notes = "\n".join(f"- {note}" for result in ordered for note in result.get("notes", []))
    machines = "; ".join(dict.fromkeys(result["machine"] for result in ordered))
    rows = [result["row"] for result in ordered if result["row"]]
    write("training_runs", f"{machines}.\n\n{table(HEAD, rows)}" + (f"\n\n{notes}" if notes else ""))


if __name__ == "__main__":
    main()
