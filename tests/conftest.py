"""Small real runs, recorded once for many tests."""

from __future__ import annotations

import contextlib

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import pkexplain as pk


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def cache_of_its_own(tmp_path_factory):
    """No test reads or makes the key of the user who runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PKEXPLAIN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def digits(count: int, dtype: torch.dtype = torch.float64, image: bool = False) -> tuple[Tensor, Tensor]:
    """Real 8x8 digits, scaled to unit variance or so, and their labels."""
    data = load_digits()
    x = (torch.tensor(data.data[:count]) - 4.9) / 6.0
    return x.reshape(-1, 1, 8, 8).to(dtype) if image else x.to(dtype), torch.tensor(data.target[:count])


def mlp(seed: int = 0, activation: type[nn.Module] = nn.GELU, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 12), activation(), nn.Linear(12, 10)).to(dtype)


def cnn(seed: int = 0, activation: type[nn.Module] = nn.GELU, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, stride=2),
        nn.GroupNorm(2, 4),
        activation(),
        nn.Conv2d(4, 6, 3, dilation=2, padding=2),
        activation(),
        nn.Flatten(),
        nn.Linear(96, 10),
    ).to(dtype)


def batches(count: int, size: int, epochs: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    shuffled = [torch.randperm(count, generator=generator).split(size) for _ in range(epochs)]
    return [batch.tolist() for epoch in shuffled for batch in epoch]


def train(model, optimizer, inputs, targets, loop, *, recorder=None, schedule=None, clip_norm=None, loss=None):
    """An ordinary training loop, recorded where a recorder is given."""
    loss = loss or nn.functional.cross_entropy
    scheduler = schedule(optimizer) if schedule else None
    with recorder or contextlib.nullcontext():
        for ids in loop:
            with recorder.step(ids) if recorder else contextlib.nullcontext():
                optimizer.zero_grad()
                loss(model(inputs[ids]), targets[ids]).backward()
                if clip_norm:
                    nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
                optimizer.step()
            if scheduler:
                scheduler.step()
    return model


class RecordedTraining:
    """A model, an optimizer, digits and a recorder: the one harness of all tests that record.

    Args:
        model: The model; by default a small MLP.
        optimizer: An optimizer of it, or what makes one of its parameters.
        examples: How many training examples there are.
        queries: How many more digits are left for queries.
        image: Whether inputs are images.
        dtype: Of the inputs and of the recorder.
        store: Where to record; by default in memory.
        options: Of the recorder; by default without compression.
    """

    def __init__(
        self,
        model=None,
        optimizer=None,
        *,
        examples=24,
        queries=0,
        image=False,
        dtype=torch.float64,
        store=None,
        **options,
    ):
        self.model = mlp(dtype=dtype) if model is None else model
        made = optimizer or (lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9))
        self.optimizer = made if isinstance(made, torch.optim.Optimizer) else made(self.model.parameters())
        self.inputs, self.targets = digits(examples + queries, dtype, image=image)
        self.queries, self.answers = self.inputs[examples:], self.targets[examples:]
        self.examples, self.store = examples, pk.MemoryStore() if store is None else store
        self.options = {"num_examples": examples, "projection": pk.Identity(), "dtype": dtype, **options}
        self.recorder = self.new_recorder()

    def new_recorder(self):
        return pk.Recorder(self.store, self.model, self.optimizer, **self.options)

    def __enter__(self):
        self.recorder.__enter__()
        return self

    def __exit__(self, *error):
        self.recorder.__exit__(*error)

    def backward(self, ids, factor=1.0, loss=nn.functional.cross_entropy):
        self.optimizer.zero_grad()
        (loss(self.model(self.inputs[ids]), self.targets[ids]) * factor).backward()

    def step(self, ids, rows=None, factor=1.0, loss=nn.functional.cross_entropy, **options):
        """Record one step, on the digits ``rows`` where they are not those that ``ids`` say."""
        with self.recorder.step(ids, **options):
            self.backward(ids if rows is None else rows, factor, loss)
            self.optimizer.step()

    def train(self, epochs=3, size=8, on_step=lambda done, training: None, loss=nn.functional.cross_entropy):
        """Train from the beginning to the end."""
        with self:
            for done, ids in enumerate(batches(self.examples, size, epochs)):
                on_step(done, self)
                self.step(ids, loss=loss)
        return self

    def parameters(self):
        return [p.detach().clone() for p in self.model.parameters()]

    def explain(self, output=None, **options):
        options = {"quadrature": pk.Quadrature(4, 64), **options}
        return pk.Explainer(self.store, self.model, **options).explain(self.inputs[0], output=output or pk.Logit(0))

    def values(self, output=None, **options):
        """Explain the first example and return what every check measured."""
        explanation = self.explain(output, tolerance=1e-5, quadrature=pk.Quadrature(4, 128), **options)
        return {check.name: check.value for check in explanation.checks}


def user_run(store, projection=None, epochs=3, examples=240):
    """A recorded run of a ReLU MLP on digits in float32, as a user would record it."""
    model = mlp(activation=nn.ReLU, dtype=torch.float32)
    training = RecordedTraining(
        model,
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3),
        examples=examples,
        queries=60,
        dtype=torch.float32,
        store=store,
        projection=projection,
    )
    training.start = training.parameters()
    return training.train(epochs, 32)


@pytest.fixture(scope="session")
def run():
    return user_run(pk.MemoryStore())


@pytest.fixture(scope="session")
def identity_run():
    return user_run(pk.MemoryStore(), pk.Identity())


@pytest.fixture
def disk_run(tmp_path):
    return user_run(tmp_path / "run", epochs=2, examples=96)
