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


class Run:
    """A recorded run of a ReLU MLP on digits in float32, as a user would record it."""

    def __init__(self, store, projection=None, epochs=3, count=240):
        self.store = store
        self.inputs, self.targets = digits(count + 60, torch.float32)
        self.model = mlp(activation=nn.ReLU, dtype=torch.float32)
        self.start = [p.detach().clone() for p in self.model.parameters()]
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        recorder = pk.Recorder(store, self.model, optimizer, num_examples=count, projection=projection)
        train(self.model, optimizer, self.inputs, self.targets, batches(count, 32, epochs), recorder=recorder)
        self.queries, self.answers = self.inputs[count:], self.targets[count:]
        self.count = count


@pytest.fixture(scope="session")
def run():
    return Run(pk.MemoryStore())


@pytest.fixture(scope="session")
def identity_run():
    return Run(pk.MemoryStore(), pk.Identity())


@pytest.fixture
def disk_run(tmp_path):
    return Run(tmp_path / "run", epochs=2, count=96)
