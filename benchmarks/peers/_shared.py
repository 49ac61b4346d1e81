"""What the scripts of all peers share: the exported digits and models that they read, and what they write.

Nothing here, and nothing that a peer runs, imports pkexplain.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


def build(name: str) -> nn.Module:
    """The model of a protocol in `_retraining.py`, with the same names of parameters, in evaluation mode."""
    if name == "LR":
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).eval()
    parts = [nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 64), nn.ReLU()]
    return nn.Sequential(*parts, nn.Dropout(0.1), nn.Linear(64, 10)).eval()


@dataclass(frozen=True)
class Exported:
    """What `export.py` wrote for one model.

    Attributes:
        name: LR or MLP.
        train: The 4,500 digits.
        test: The digits that are asked about.
        final: Ten trained models, of seeds 0 to 9; the first is the one that is explained.
        epochs: That first model after each of its last ten epochs.
        rate: The learning rate.
    """

    name: str
    train: TensorDataset
    test: TensorDataset
    final: list[dict[str, Tensor]]
    epochs: list[dict[str, Tensor]]
    rate: float

    def model(self) -> nn.Module:
        """The model that is explained."""
        model = build(self.name)
        model.load_state_dict(self.final[0])
        return model


def read(path: Path, queries: int) -> Exported:
    kept = torch.load(path, weights_only=True)
    train, test = TensorDataset(*kept["train"]), TensorDataset(*(part[:queries] for part in kept["test"]))
    return Exported(kept["name"], train, test, kept["final"], kept["epochs"], kept["rate"])


def batches(data: TensorDataset, size: int | None = None) -> DataLoader:
    """The examples in their order, in one batch unless a size is given."""
    return DataLoader(data, batch_size=size or len(data), shuffle=False)


def megabytes() -> float:
    """The most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


Method = Callable[[Exported], Callable[[], Tensor]]


def main(methods: dict[str, Method]) -> None:
    """Run one method and save its scores ``(train, queries)``, with what they cost.

    Args:
        methods: By name; each does what needs no query, and returns what then scores the queries. A score is higher
            where an example raises the output, minus the loss, of a query.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("exported", type=Path)
    parser.add_argument("method", choices=methods)
    parser.add_argument("out", type=Path)
    parser.add_argument("--queries", type=int, default=500)
    args = parser.parse_args()
    torch.manual_seed(0)
    exported = read(args.exported, args.queries)
    before, begin = megabytes(), time.perf_counter()
    score = methods[args.method](exported)
    ready = time.perf_counter()
    scores = score().detach().float().clone()
    end = time.perf_counter()
    expected = (len(exported.train), len(exported.test))
    if scores.shape != expected:
        raise SystemExit(f"{args.method}: scores of shape {tuple(scores.shape)}, expected {expected}")
    costs = {"set_up_s": ready - begin, "queries_s": end - ready, "before_mb": before, "peak_mb": megabytes()}
    torch.save({"scores": scores, "costs": costs}, args.out)
