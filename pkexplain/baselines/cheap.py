"""Baselines that are cheap and hard to beat: nearest neighbours, gradient norms, losses, chance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pkexplain.baselines.baseline import Baseline
from pkexplain.baselines.setting import Setting
from pkexplain.explain.queries import QueryBatch
from pkexplain.gradients.capture import Capture
from pkexplain.gradients.collect import collect
from pkexplain.gradients.layers import find_layers

__all__ = ["GradientNorm", "NearestNeighbours", "Random", "TrainingLoss"]


def _losses(setting: Setting, model: nn.Module, inputs: QueryBatch, targets: Tensor) -> Tensor:
    return setting.losses(inputs.run(model), targets)


def _for_every_query(setting: Setting, scores: np.ndarray) -> Callable[[], np.ndarray]:
    return lambda: np.tile(scores, (len(setting.queries), 1))


@dataclass(frozen=True)
class NearestNeighbours(Baseline):
    """Cosine of the last Linear layer's input activations, at the end of training.

    Args:
        layer: Name of the Linear layer; by default the last that runs.
        batch_size: Training examples at a time.
    """

    name: ClassVar[str] = "nearest neighbours"
    layer: str | None = None
    batch_size: int = 256

    def prepare(self, setting: Setting) -> Callable[[], np.ndarray]:
        """Run the model on the training set."""
        model = setting.copy_model()

        def activations(inputs: QueryBatch) -> Tensor:
            seen = setting.final_layer(model, inputs, self.layer).inputs
            return F.normalize(seen.flatten(1).double(), dim=1)

        known = torch.cat([activations(inputs) for inputs, _ in setting.batches(self.batch_size)])
        return lambda: (activations(setting.queries) @ known.T).cpu().numpy()


@dataclass(frozen=True)
class GradientNorm(Baseline):
    """‖∇ℓ_i‖ summed over the checkpoints at the ends of the segments: the same for every query.

    Args:
        batch_size: Training examples at a time.
    """

    name: ClassVar[str] = "gradient norm"
    batch_size: int = 64

    def prepare(self, setting: Setting) -> Callable[[], np.ndarray]:
        """Differentiate the loss of every training example at every checkpoint."""
        model = setting.copy_model()
        groups = {name: block.group for block in setting.trajectory.fingerprint.blocks for name in block.parameters}
        capture = Capture(*find_layers(model, groups), setting.trajectory.dtype)
        norms = np.zeros(len(setting.rows))
        for t in range(1, len(setting.trajectory) + 1):
            setting.load(model, t)
            position = 0
            for inputs, targets in setting.batches(self.batch_size):
                pieces = collect(capture, len(inputs), partial(_losses, setting, model, inputs, targets))
                blocks: dict[int, Tensor] = {}
                for block, piece in pieces:  # a layer that is used twice occurs twice
                    blocks[block] = blocks[block] + piece.dense() if block in blocks else piece.dense()
                squares = torch.stack([block.double().square().sum(1) for block in blocks.values()]).sum(0)
                norms[position : position + len(inputs)] += squares.sqrt().cpu().numpy()
                position += len(inputs)
        return _for_every_query(setting, norms)


@dataclass(frozen=True)
class TrainingLoss(Baseline):
    """The training example's own loss at the end of training: the same for every query.

    Args:
        batch_size: Training examples at a time.
    """

    name: ClassVar[str] = "training loss"
    batch_size: int = 256

    def prepare(self, setting: Setting) -> Callable[[], np.ndarray]:
        """Run the model on the training set."""
        model = setting.copy_model()
        with torch.no_grad():
            losses = [setting.losses(x.run(model), y).double().cpu() for x, y in setting.batches(self.batch_size)]
        return _for_every_query(setting, torch.cat(losses).numpy())


@dataclass(frozen=True)
class Random(Baseline):
    """Gaussian scores: chance level.

    Args:
        seed: Seed of the scores.
    """

    name: ClassVar[str] = "random"
    seed: int = 0

    def prepare(self, setting: Setting) -> Callable[[], np.ndarray]:
        """Do nothing."""
        shape = len(setting.queries), len(setting.rows)
        return lambda: np.random.default_rng(self.seed).standard_normal(shape)
