"""Optimizers of torch and others, on a small network of dense layers and a convolution."""

from __future__ import annotations

from typing import Any

import torch
from lion_pytorch import Lion
from prodigyopt import Prodigy
from torch import nn
from torch.nn import functional as F
from transformers.optimization import Adafactor

from cases import Case


def build() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 8), nn.Tanh(), nn.Linear(8, 3))


def matrices() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12, bias=False), nn.Tanh(), nn.Linear(12, 3, bias=False))


def images(count: int) -> Any:
    return (torch.randn(count, 1, 8, 8, dtype=torch.float64),)


def classes(output: Any, batch: Any) -> torch.Tensor:
    return F.cross_entropy(output, torch.arange(len(output)) % 3, reduction="none")


class Renamed(torch.optim.AdamW):
    """A subclass that does not override ``step``."""


def optimizer(name: str, **options: Any) -> Any:
    return lambda parameters: getattr(torch.optim, name)(parameters, **{"lr": 1e-2, **options})


KINDS: dict[str, Any] = {
    "SGD": optimizer("SGD"), "SGD, momentum": optimizer("SGD", momentum=0.9, dampening=0.1),
    "SGD, Nesterov": optimizer("SGD", momentum=0.9, nesterov=True, weight_decay=0.01),
    "SGD, maximize": optimizer("SGD", maximize=True), "SGD, foreach": optimizer("SGD", foreach=True, momentum=0.9),
    "SGD, fused": optimizer("SGD", fused=True, momentum=0.9), "Adam": optimizer("Adam"),
    "Adam, L2": optimizer("Adam", weight_decay=0.01), "Adam, AMSGrad": optimizer("Adam", amsgrad=True),
    "Adam, fused": optimizer("Adam", fused=True), "AdamW": optimizer("AdamW"), "AdamW, AMSGrad": optimizer("AdamW", amsgrad=True),
    "AdamW, foreach": optimizer("AdamW", foreach=True), "NAdam": optimizer("NAdam"), "RAdam": optimizer("RAdam"),
    "Adamax": optimizer("Adamax"), "RMSprop": optimizer("RMSprop"), "RMSprop, centered": optimizer("RMSprop", centered=True, momentum=0.5),
    "Adagrad": optimizer("Adagrad"), "Adadelta": optimizer("Adadelta"), "ASGD": optimizer("ASGD"), "Rprop": optimizer("Rprop"),
    "Adafactor": optimizer("Adafactor"), "SparseAdam": optimizer("SparseAdam"), "LBFGS": optimizer("LBFGS"),
    "Lion": lambda parameters: Lion(parameters, lr=1e-2), "Prodigy": lambda parameters: Prodigy(parameters),
    "Adafactor of transformers": lambda parameters: Adafactor(parameters),
    "a subclass of AdamW": lambda parameters: Renamed(parameters, lr=1e-2),
}  # fmt: skip
CASES = {name: Case(build, images, classes, kind) for name, kind in KINDS.items()}
CASES["Muon"] = Case(matrices, images, classes, optimizer("Muon"))
