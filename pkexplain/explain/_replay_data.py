"""The data and the loss of a replay: the loss that is assumed, and what cannot be replayed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pkexplain.errors import ConfigurationError
from pkexplain.store.trajectory import Trajectory


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy of rows ``(inputs, label)``."""
    if not isinstance(batch, (list, tuple)) or len(batch) != 2:
        raise ConfigurationError(
            "Replay(loss=None)",
            "cross-entropy of what is not known: the data set's rows are not (inputs, label)",
            got=type(batch).__name__,
            expected="rows (inputs, label)",
            source="the data set",
            fix="Pass loss=…: a function of the model and a batch that returns each example's loss",
        )
    scores, labels = model(batch[0]), batch[1]
    if not isinstance(scores, Tensor) or scores.ndim != labels.ndim + 1 or labels.is_floating_point():
        raise ConfigurationError(
            "Replay(loss=None)",
            "the model's output and the labels do not fit cross-entropy",
            got=f"an output {getattr(scores, 'shape', type(scores).__name__)} for labels {tuple(labels.shape)}",
            expected="scores (batch, …, classes) for class numbers (batch, …)",
            source="the model and the data set",
            fix="Pass loss=…: a function of the model and a batch that returns each example's loss",
        )
    losses = F.cross_entropy(scores.movedim(-1, 1), labels, reduction="none")
    return losses.flatten(1).mean(1) if losses.ndim > 1 else losses


def refuse_unfit(trajectory: Trajectory, replay: Any) -> None:
    """Refuse a run that cannot be replayed.

    Raises:
        ConfigurationError: Its steps were not noted, examples were withdrawn, buffers moved, or the data do not fit.
    """
    asked, source = "pkexplain.Replay", "the run"
    manifest = trajectory.manifest
    if not manifest.recording.replay or not all(trajectory.segment(t).steps for t in range(len(trajectory))):
        fix = "Record with Recorder(…, replay=True)"
        raise ConfigurationError(asked, "the run's steps were not noted", "no steps", "steps", source, fix)
    if manifest.withdrawn:
        wrong, fix = "the run was trained with examples that were withdrawn since", "Record a training without them"
        raise ConfigurationError(asked, wrong, f"{len(manifest.withdrawn)} withdrawn", "none", source, fix)
    if len(replay.dataset) != trajectory.num_examples:
        fix = "Pass the training set in the order of the recorded ids"
        raise ConfigurationError(
            asked, "the data set has another length", len(replay.dataset), trajectory.num_examples, source, fix
        )
    first, last = trajectory.checkpoint(0).buffers, trajectory.checkpoint(len(trajectory)).buffers
    moved = [name for name in first if not torch.equal(first[name], last[name])]
    if moved:
        fix = "Use the path or the removal reading"
        wrong = "the output depends on buffers that moved in training, and derivatives through them are not computed"
        raise ConfigurationError(asked, wrong, ", ".join(moved[:3]), "buffers that stay as they are", source, fix)
