"""Trainings that save their own checkpoints, can be killed at any moment, and go on where they stood."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import pkexplain as pk
from pkexplain.errors import RunExistsError, RunNotFoundError
from tests.conftest import RecordedTraining, batches

EXAMPLES, EPOCHS = 32, 6
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=1e-2),
}


def small_model(norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    middle = nn.BatchNorm1d(8) if norm else nn.Identity()
    return nn.Sequential(nn.Linear(64, 8), middle, nn.GELU(), nn.Linear(8, 10)).double()


class Training(RecordedTraining):
    """A training loop as a user would write it who wants to continue after a crash.

    Args:
        directory: Where the run and the user's own checkpoint go.
        kind: Which optimizer.
        every: Epochs between two checkpoints.
        norm: Whether the model holds a BatchNorm.
        projection: How rows are compressed.
    """

    def __init__(
        self,
        directory: Path,
        kind: str = "sgd",
        *,
        every: int = 1,
        norm: bool = False,
        projection: pk.Projection | None = None,
    ) -> None:
        self.run, self.checkpoint, self.every = directory / "run", directory / "checkpoint.pt", every
        super().__init__(
            small_model(norm),
            OPTIMIZERS[kind],
            examples=EXAMPLES,
            queries=8,
            store=pk.DirectoryStore(self.run),
            projection=projection or pk.Kronecker(64, warm_up_examples=20),
            segments=3,
        )

    def resumed(self) -> tuple[pk.Recorder, int]:
        """Continue where the checkpoint says, or start."""
        if self.checkpoint.exists():
            kept = torch.load(self.checkpoint, weights_only=True)
            self.model.load_state_dict(kept["model"])
            self.optimizer.load_state_dict(kept["optimizer"])
            return pk.Recorder.resume(self.store, self.model, self.optimizer), kept["epoch"]
        return self.new_recorder(), 0

    def epoch(self, recorder: pk.Recorder, epoch: int) -> None:
        for ids in batches(EXAMPLES, 7, 1, seed=epoch):
            with recorder.step(ids):
                self.optimizer.zero_grad()
                F.cross_entropy(self.model(self.inputs[ids]), self.targets[ids]).backward()
                self.optimizer.step()

    def save(self, recorder: pk.Recorder, epoch: int) -> None:
        recorder.save()
        kept = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "epoch": epoch + 1}
        torch.save(kept, self.checkpoint.with_suffix(".tmp"))
        os.replace(self.checkpoint.with_suffix(".tmp"), self.checkpoint)

    def go(self, epochs: int = EPOCHS, until: int | None = None) -> None:
        """Train from where it stands to the end; stop without leaving a trace after ``until`` epochs of this call."""
        recorder, start = self.resumed()
        with recorder:
            for epoch in range(start, epochs):
                self.epoch(recorder, epoch)
                if (epoch + 1) % self.every == 0:
                    self.save(recorder, epoch)

    def go_with_patience(self) -> None:
        """Go on, or start anew where nothing was finished."""
        try:
            self.go()
        except (RunExistsError, RunNotFoundError):
            import shutil

            shutil.rmtree(self.run)
            self.go()


def killed_at_random(work: Callable[[], None], chance: random.Random, longest: float) -> bool:
    """Run some work in a process that is killed after a random time.

    Returns:
        Whether it was done before.
    """
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    deadline = time.monotonic() + chance.uniform(0, longest)
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0, "the work failed by itself"
            return True
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL), "the work failed by itself"
    return os.waitstatus_to_exitcode(status) == 0
