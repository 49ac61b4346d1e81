"""The step that is being recorded."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pkexplain.optimizers.base import CapturedBatch


@dataclass
class Step:
    """The step being recorded: its batch, and how far the optimizers have come."""

    batch: CapturedBatch
    before: Tensor | None = None  # θ before the step; None if the optimizers skip it, or were not called yet
    factors: list[list[float]] = field(default_factory=list)  # between captured and applied gradients
    begun: list[torch.optim.Optimizer] = field(default_factory=list)
    done: bool = False  # whether all have stepped
