"""The replay reading: the exact derivative of an output by every example's weight, through the run as it was.

In step s the loss is Σ_i w_i ℓ_i / batch, with w_i = 1. The contribution of example i is ∂f/∂w_i: to first order, how
much the output would lose if the example's loss had been left out of every batch, with the same batches, the same order
and the same random numbers. It is computed backwards (Maclaurin et al. 2015, *Gradient-based hyperparameter
optimization through reversible learning*; Ilyas and Engstrom 2025, *MAGIC*): the steps are taken again from the start,
which gives θ and what the optimizer remembers at every step, and cotangents λ of these are carried from the last step
to the first,

    u = λ' ∂(θ', m', v')/∂g,   c_i += ⟨u, ∇ℓ_i⟩ / batch,   λ = λ' ∂(θ', m', v')/∂(θ, m, v) + H u,

H being the Hessian of the step's loss. Nothing is approximated but the difference by its derivative, and whether that
is good is measured: the run is trained again with some examples left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pkexplain.errors import ConfigurationError
from pkexplain.explain._replay_scan import carry_back
from pkexplain.explain._replay_training import ReplayedTraining
from pkexplain.explain._trajectory_model import TrajectoryModel
from pkexplain.explain.outputs import Output
from pkexplain.explain.queries import QueryBatch
from pkexplain.gradients.model_copy import copy_model
from pkexplain.progress import Progress
from pkexplain.results.explanation import Check
from pkexplain.store.trajectory import Trajectory

__all__ = ["Replay", "Replayed", "Replayer"]

_LEFT_OUT = 0.1
"""The share of the examples that a trial leaves out."""
_GAP, _ERROR = 1e-2, 0.5
"""Tolerances of the two checks."""
_REFUSED_GAP = 0.1
_COTANGENTS = 1 << 26
"""The most numbers of θ's cotangents that are carried at once; there are about five vectors of that size."""


@dataclass(frozen=True, eq=False)
class Replay:
    """Settings of the replay reading, for a run that was recorded with ``Recorder(replay=True)``.

    Attributes:
        dataset: The training set, in the order of the recorded ids.
        loss: Computes each example's loss, ``(batch,)``: ``loss(model, batch)``, with a batch of the data set's rows.
            Its mean is what was back-propagated. None for cross-entropy of rows ``(inputs, label)``; where a row has
            several labels, as one for each word, the mean over them.
        collate: Makes a batch of a list of rows; None for `torch.utils.data.default_collate`.
        clip: The ``max_norm`` of `torch.nn.utils.clip_grad_norm_`, if the gradient was clipped.
        trials: How often the run is trained again without a tenth of the examples, to see how far the derivative
            predicts the difference; at the first question only. 0 for no such check.

    Raises:
        ConfigurationError: A number is invalid.
    """

    dataset: Any
    loss: Callable[[nn.Module, Any], Tensor] | None = None
    collate: Callable[[list[Any]], Any] | None = None
    clip: float | None = None
    trials: int = 4

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.trials < 0 or (self.clip is not None and not self.clip > 0):
            got, expected = f"clip={self.clip!r}, trials={self.trials!r}", "a positive number or None, 0 or more trials"
            fix = "Leave them out"
            raise ConfigurationError("Replay", "a number is invalid", got, expected, "the replay reading", fix)

    @property
    def key(self) -> tuple[Any, ...]:
        """What two settings have in common that are the same: for the same data and functions, not equal ones."""
        return id(self.dataset), self.loss, self.collate, self.clip, self.trials


@dataclass(frozen=True)
class Replayed:
    """The replay reading of a batch of queries.

    Attributes:
        contributions: c_i of each segment, in output units, ``(queries, segments, num_examples)``.
        checks: The checks of each query.
        trials: How many trainings without some examples the contributions were compared with.
    """

    contributions: Tensor
    checks: tuple[tuple[Check, ...], ...]
    trials: int


class Replayer:
    """Answers queries by replaying one run; the first question trains it again, later ones go backwards only.

    Args:
        trajectory: The run.
        model: The model; it is copied.
        replay: The settings.
        progress: Told the progress.

    Raises:
        ConfigurationError: The run cannot be replayed, or not with this data and loss.
    """

    def __init__(self, trajectory: Trajectory, model: nn.Module, replay: Replay, progress: Progress) -> None:
        """Train the run again, keeping what is needed to go backwards, and try how well derivatives predict."""
        self._replay, self._progress = replay, progress  # the settings are kept, so that their key stays their own
        self._training = ReplayedTraining(trajectory, copy_model(model), replay, progress)
        worst = self._training.gap
        if not worst <= _REFUSED_GAP:
            raise _another_training(worst)
        random = torch.Generator(device="cpu").manual_seed(0)
        examples = trajectory.num_examples
        count = max(1, round(_LEFT_OUT * examples))
        self._left_out = [torch.randperm(examples, generator=random)[:count] for _ in range(replay.trials)]
        self._without = [
            self._training.without(ids, f"training without {count:,} examples, trial {trial + 1}")
            for trial, ids in enumerate(self._left_out)
        ]

    def answer(self, model: TrajectoryModel, queries: QueryBatch, output: Output, segments: int) -> Replayed:
        """Replay a batch of queries.

        Args:
            model: Computes f and its gradient.
            queries: The queries.
            output: What is explained, resolved on the final prediction.
            segments: The number of segments.
        """
        model.move_to_checkpoint(segments)
        final = model.gradients(queries, output)
        at_once = max(1, _COTANGENTS // model.parameters)
        found = [carry_back(self._training, part, self._progress) for part in final.split(at_once)]
        contributions = torch.cat(found)
        before = model.value(queries, output).cpu()
        falls = []
        for point in self._without:
            model.move_to_point(point, segments)
            falls.append(before - model.value(queries, output).cpu())
        sums = contributions.sum(1, dtype=torch.float64)
        predicted = [sums[:, ids].sum(1) for ids in self._left_out]
        return Replayed(contributions, self._checks(falls, predicted, len(sums)), len(self._without))

    def _checks(self, falls: list[Tensor], predicted: list[Tensor], queries: int) -> tuple[tuple[Check, ...], ...]:
        gap = Check("replay gap", self._training.gap, _GAP, _GAP_MEANING)
        if not falls:
            return ((gap,),) * queries
        measured, expected = torch.stack(falls, 1), torch.stack(predicted, 1)
        size = measured.norm(dim=1).clamp_min(torch.finfo(measured.dtype).tiny)
        errors = ((expected - measured).norm(dim=1) / size).tolist()
        meaning = _ERROR_MEANING.format(trials=len(falls))
        return tuple((gap, Check("replay error", error, _ERROR, meaning)) for error in errors)


_GAP_MEANING = (
    "How far the steps, taken again, end from the recorded checkpoints, relative to ‖Δθ‖, in the worst segment. If it "
    "fails, the training did something that was not repeated: other inputs (random augmentation), another loss, a "
    "gradient that was changed before the step."
)
_ERROR_MEANING = (
    "How far the contributions are from what leaving examples out did, relative to it, in {trials} trainings with the "
    "same order and random numbers, each without a tenth of the examples. If it fails, a derivative does not predict "
    "differences here, as in networks that are far from smooth: read the removal reading."
)


def _another_training(gap: float) -> ConfigurationError:
    return ConfigurationError(
        "pkexplain.Replay",
        "the steps, taken again, do not lead along the recorded run, so derivatives through them would be of another "
        "training",
        got=f"{gap:.2g} of ‖Δθ‖ from a recorded checkpoint, in the worst segment",
        expected=f"{_GAP:g} or less",
        source="the run's checkpoints",
        fix="Pass Replay the loss that was back-propagated, loss=…, the training set with the inputs as they were, and "
        "clip=… if the gradient was clipped; a training with random augmentation cannot be replayed",
    )
