"""A training run with its options, recorded and explained, for `training_runs.py`."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import pkexplain as pk
from pkexplain.explain.queries import as_queries


@dataclass(frozen=True)
class Job:
    """A training run and what is asked of it.

    Attributes:
        name: The row's name.
        build: Makes the model.
        optimizer: Makes its optimizer from its parameters.
        data: Makes the training and the test set, each the inputs (a tensor, or tensors by name) and the labels.
        epochs: Passes over the training set.
        batch: Examples a step.
        queries: How many test examples are explained.
        at_once: How many of them in one call.
        segments: As the recorder takes it.
        clip: Largest norm of a step's gradient.
        cosine: Whether the learning rate falls along a cosine to zero.
        autocast: Whether the model runs in bfloat16, its parameters staying in float32.
        projection: As the recorder takes it.
        tolerance: Of the quadrature, as the explainer takes it.
        loss: The training loss, of a prediction and labels.
        output: Makes what is explained from the queries' labels.
    """

    name: str
    build: Callable[[], nn.Module]
    optimizer: Callable[..., torch.optim.Optimizer]
    data: Callable[[], tuple[tuple[Any, Tensor], tuple[Any, Tensor]]]
    epochs: int
    batch: int = 64
    queries: int = 100
    at_once: int = 100
    segments: str | int = "epoch"
    clip: float | None = None
    cosine: bool = False
    autocast: bool = False
    projection: Any = None
    tolerance: float = 0.01
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy
    output: Callable[[Tensor], pk.Output] = lambda labels: pk.Logit()


def take(inputs: Any, ids: Any) -> Any:
    return inputs[ids] if isinstance(inputs, Tensor) else {name: value[ids] for name, value in inputs.items()}


def predict(model: nn.Module, inputs: Any) -> Tensor:
    return model(inputs) if isinstance(inputs, Tensor) else model(**inputs)


def training(job: Job, model: nn.Module, run: Any = None) -> Iterator[int]:
    """Train step by step, recorded where a run is given; yields the number of steps done."""
    (inputs, labels), _ = job.data()
    optimizer = job.optimizer([p for p in model.parameters() if p.requires_grad])
    total = job.epochs * -(-len(labels) // job.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total) if job.cosine else None
    recorder = None
    if run is not None:
        recorder = pk.Recorder(
            run, model, optimizer, num_examples=len(labels), projection=job.projection, segments=job.segments
        )
    torch.manual_seed(0)  # of dropout
    generator, done = torch.Generator().manual_seed(0), 0
    model.train()
    with recorder or contextlib.nullcontext():
        for _ in range(job.epochs):
            for ids in torch.randperm(len(labels), generator=generator).split(job.batch):
                with recorder.step(ids) if recorder else contextlib.nullcontext():
                    optimizer.zero_grad()
                    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=job.autocast):
                        loss = job.loss(predict(model, take(inputs, ids)), labels[ids])
                    loss.backward()
                    if job.clip is not None:
                        nn.utils.clip_grad_norm_(model.parameters(), job.clip)
                    optimizer.step()
                if schedule:
                    schedule.step()
                done += 1
                yield done


def advance(run: Iterator[int], steps: int) -> float:
    """Train a number of steps; return how long it took."""
    start = time.perf_counter()
    for _ in range(steps):
        next(run)
    return time.perf_counter() - start


def overhead(job: Job, steps: int, pairs: int, skip: int) -> str:
    """Compare recorded and plain training, in turn, ``steps`` at a time, after the first ``skip``."""
    with tempfile.TemporaryDirectory() as folder:
        plain, recorded = training(job, job.build()), training(job, job.build(), Path(folder) / "run")
        for run in (plain, recorded):
            advance(run, skip)
        ratios = []
        for _ in range(pairs):
            alone = advance(plain, steps)
            ratios.append(advance(recorded, steps) / alone)
        for run in (plain, recorded):
            run.close()  # pyright: ignore[reportAttributeAccessIssue]
    return f"{np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


@dataclass
class Run:
    """A finished run, and the explanations of its queries."""

    explanations: list[pk.Explanation]
    accuracy: float
    row_bytes: float
    displaced: np.ndarray | None


def displaced(explainer: pk.Explainer, x: Any, output: pk.Output) -> np.ndarray:
    """Compute Σ_t ⟨φ_t, Δθ_t⟩ by the quadrature, before any correction, ``(queries,)``."""
    queries = as_queries(x, explainer.trajectory.inputs, explainer._first.trajectory_model.device)
    found = [
        explainer._first.corrected(some, settled).covectors.displacement.sum(1)
        for some, settled, _ in explainer._chunks(queries, output)
    ]
    return torch.cat(found).numpy()


def make(job: Job, *, with_displaced: bool = False) -> Run:
    """Train, record to disk, and explain each query: the logit of the predicted class, or what the job asks."""
    (_, labels), (tests, truth) = job.data()
    model = job.build()
    with tempfile.TemporaryDirectory() as folder:
        for _ in training(job, model, Path(folder) / "run"):
            pass
        model.eval()
        with torch.no_grad():
            parts = [predict(model, take(tests, part)) for part in torch.arange(len(truth)).split(100)]
        accuracy = float((torch.cat(parts).argmax(-1) == truth).float().mean())
        explainer = pk.Explainer(Path(folder) / "run", model, tolerance=job.tolerance)
        size = sum(file.stat().st_size for file in (Path(folder) / "run").rglob("*") if file.is_file())
        segments = len(explainer.trajectory)
        explanations: list[pk.Explanation] = []
        for part in torch.arange(job.queries).split(job.at_once):
            found = explainer.explain(take(tests, part), output=job.output(truth[part]))
            for explanation in found:
                _ = explanation.contributions
            explanations += found
        queries = take(tests, torch.arange(job.queries))
        moved = displaced(explainer, queries, pk.Logit()) if with_displaced else None
    return Run(explanations, accuracy, size / segments / len(labels), moved)
