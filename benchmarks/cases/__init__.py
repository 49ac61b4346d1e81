"""Models of `benchmarks/coverage.py`, by family: each case builds a model, a batch, and the loss of every example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

EXAMPLES = 4


@dataclass(frozen=True)
class Case:
    """A model and how it is trained.

    Attributes:
        build: Makes the model.
        batch: Makes the inputs of some examples, by name or position.
        losses: From the model's output and the batch to each example's loss, ``(examples,)``; None if the model
            returns the loss of the whole batch.
        optimizer: Makes the optimizer; by default SGD at a rate that keeps the training stable.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[int], Any]
    losses: Callable[[Any, Any], Tensor] | None = None
    optimizer: Callable[[Any], torch.optim.Optimizer] | None = None


def tensor_of(output: Any) -> Tensor:
    """The tensor of a model's output that a user would put a loss on."""
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "last_hidden_state", "logits_per_image"):
        found = getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    parts = list(output.values()) if hasattr(output, "values") else list(output)
    return next(tensor_of(part) for part in parts if part is not None)


def square(output: Any, batch: Any) -> Tensor:
    """A loss for any output: how far each example's numbers are from ones of its own."""
    y = tensor_of(output).flatten(1)
    target = torch.linspace(-1, 1, y.shape[1], dtype=y.dtype) * torch.linspace(0.5, 1.5, len(y), dtype=y.dtype)[:, None]
    return (y - target).square().mean(1)
