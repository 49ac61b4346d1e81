"""What does a step cost while it is recorded, and what do the coded passes add? Two minutes, on an idle machine."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import numpy as np
import torch
from _figures import machine, table, write
from torch import nn
from torch.nn import functional as F

import pkexplain as pk
from pkexplain.demo import build_cnn
from pkexplain.gradients import _step_capture

STEPS, TIMED, BLOCKS, BATCH = 200, 30, 3, 16


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(128, 4, 256, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 4), nn.Flatten(), nn.Linear(128 * 32, 5))


class Text(nn.Module):
    """A small language model with learnt positions and dropout, of torch's own layers."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(128, 4, 512, batch_first=True, norm_first=True)
        self.words, self.places = nn.Embedding(500, 128), nn.Embedding(64, 128)
        self.body = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.out = nn.Linear(128, 500)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.body(self.words(x) + self.places(torch.arange(x.shape[1])))).transpose(1, 2)


CASES: dict[str, tuple[Any, torch.Tensor, torch.Tensor]] = {
    "the demo's CNN": (build_cnn, torch.randn(BATCH, 1, 28, 28), torch.randint(10, (BATCH,))),
    "nn.TransformerEncoder, its dropout": (encoder, torch.randn(BATCH, 32, 128), torch.randint(5, (BATCH,))),
    "a language model, learnt positions, dropout": (
        Text,
        torch.randint(500, (BATCH, 64)),
        torch.randint(500, (BATCH, 64)),
    ),
}


def step_times(build: Any, x: torch.Tensor, y: torch.Tensor, record: bool, steps: int = TIMED) -> np.ndarray:
    torch.manual_seed(0)
    model = build().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    recorder = pk.Recorder(pk.MemoryStore(), model, optimizer, num_examples=BATCH, segments=70) if record else None
    times = []
    with recorder or contextlib.nullcontext():
        for _ in range(steps):
            start = time.perf_counter()
            with recorder.step(range(BATCH)) if recorder else contextlib.nullcontext():
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
            times.append(time.perf_counter() - start)
    return np.array(times)


def coded_share(build: Any, x: torch.Tensor, y: torch.Tensor) -> float:
    """The share of 200 recorded steps that goes into learning and checking the split."""
    spent, learn, verify = [], _step_capture.learn_split, _step_capture.verify_split

    def timed(function: Any) -> Any:
        def run(*arguments: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                spent.append(time.perf_counter() - start)

        return run

    _step_capture.learn_split, _step_capture.verify_split = timed(learn), timed(verify)
    try:
        whole = step_times(build, x, y, True, STEPS).sum()
    finally:
        _step_capture.learn_split, _step_capture.verify_split = learn, verify
    return sum(spent) / whole


torch.set_num_threads(1)
rows = []
for name, case in CASES.items():
    step_times(*case, True)
    ratios, plain = [], []
    for _ in range(BLOCKS):
        plain.append(float(np.median(step_times(*case, False))))
        ratios.append(float(np.median(step_times(*case, True))) / plain[-1])
    spread = f"{np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    rows.append([name, f"{np.median(plain) * 1e3:.1f} ms", spread, f"{coded_share(*case):.1%}"])
head = ["model", "plain step", "a recorded step, times a plain one", "learning and checking the split, of 200 steps"]
write("capture", f"{table(head, rows)}\n\nBatch {BATCH}, one thread, in memory. {machine()}.")
