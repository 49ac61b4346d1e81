"""The trainings that attributions are judged by: MNIST, three models, each recorded once and retrained on subsets.

Logistic regression and the MLP follow the public benchmark of dattri (Deng et al. 2024); the CNN is small, so that it
can be retrained thousands of times.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import pkexplain as pk
from pkexplain.demo import load_digits


@dataclass(frozen=True)
class Protocol:
    """A model and how it is trained, with SGD.

    Attributes:
        name: What the tables call it.
        build: Makes the model, from torch's global random state.
        epochs: Passes over the examples.
        batch: Examples a step.
        learning_rate: Of every step.
        momentum: Of SGD.
    """

    name: str
    build: Callable[[], nn.Module]
    epochs: int
    batch: int
    learning_rate: float
    momentum: float


def _mlp() -> nn.Module:
    parts = [nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 64), nn.ReLU()]
    return nn.Sequential(*parts, nn.Dropout(0.1), nn.Linear(64, 10))


def _cnn() -> nn.Module:
    first = [nn.Conv2d(1, 8, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(8, 16, 5, stride=2, padding=2), nn.ReLU()]
    return nn.Sequential(*first, nn.Flatten(), nn.Linear(16 * 7 * 7, 10))


LR = Protocol("LR", lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), 20, 32, 0.01, 0.0)
MLP = Protocol("MLP", _mlp, 50, 64, 0.01, 0.9)
CNN = Protocol("CNN", _cnn, 6, 64, 0.02, 0.9)


def digits(seed: int = 0) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Load 4,500 training and 500 test digits; every figure of a table is of split 0, every choice of another."""
    train, test = load_digits(seed)
    return (train.tensors[0], train.tensors[1]), (test.tensors[0], test.tensors[1])


def train(
    protocol: Protocol,
    data: tuple[Tensor, Tensor],
    ids: Any,
    seed: int,
    *,
    run: Any = None,
    projection: Any = None,
    segments: str | int = "epoch",
) -> nn.Module:
    """Train on some of the examples, recorded where a run is given; the global random state is left as it was.

    Args:
        protocol: The model and its training.
        data: All training inputs and labels.
        ids: The examples to train on.
        seed: Of the initial parameters, the order of the examples and dropout.
        run: Where to record.
        projection: As the recorder takes it.
        segments: As the recorder takes it.
    """
    inputs, labels = data
    ids = torch.as_tensor(ids)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = protocol.build()
        optimizer = torch.optim.SGD(model.parameters(), lr=protocol.learning_rate, momentum=protocol.momentum)
        recorder = None
        if run is not None:
            recorder = pk.Recorder(
                run, model, optimizer, num_examples=len(labels), projection=projection, segments=segments
            )
        with recorder or contextlib.nullcontext():
            for _ in range(protocol.epochs):
                for batch in ids[torch.randperm(len(ids))].split(protocol.batch):
                    with recorder.step(batch) if recorder else contextlib.nullcontext():
                        optimizer.zero_grad()
                        nn.functional.cross_entropy(model(inputs[batch]), labels[batch]).backward()
                        optimizer.step()
    return model.eval()


def minus_loss(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    """Minus the cross-entropy of each example, ``(examples,)``."""
    with torch.no_grad():
        return -nn.functional.cross_entropy(model(data[0]), data[1], reduction="none")
