"""What every explanation says about its run: how recording ended, what was never visited, which model was passed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pkexplain.errors import warn
from pkexplain.gradients.compiled import named_parameters
from pkexplain.store.trajectory import Segment, Trajectory

_ROUNDED = 1e-3
"""Below this share of the distance that training covered, weights differ as after a change of dtype or device."""
_TRAINED = 0.9
"""A model is taken for one that was trained along this run if it is nearer to the run's last weights than this share of
the distance that training covered. A new model of another seed is farther away than training covered."""


@dataclass(frozen=True)
class Note:
    """A sentence about the run.

    Attributes:
        text: The sentence.
        alarming: Whether the explainer also warns of it, once.
    """

    text: str
    alarming: bool = True


def notes_on_run(trajectory: Trajectory, segments: Iterable[Segment]) -> list[Note]:
    """Take note of a recording that did not finish, and of examples that were never visited.

    Args:
        trajectory: The run.
        segments: Its segments.
    """
    notes, manifest, step = [], trajectory.manifest, f"step {trajectory.boundaries[-1]:,}"
    if manifest.ended != "finished":
        killed = "killed" in manifest.ended
        state = "is still being recorded, or its process was killed" if killed else f"was {manifest.ended}"
        notes.append(Note(f"The run {state}; the model is explained as it was after {step}."))
    count = unvisited(trajectory, segments)
    if count:
        examples = f"{count:,} of {trajectory.num_examples:,} training examples"
        notes.append(Note(f"Never visited in this run: {examples}. They contribute nothing."))
    return notes


def unvisited(trajectory: Trajectory, segments: Iterable[Segment]) -> int:
    """Count the examples that no segment has a row of, apart from those that were withdrawn."""
    seen = torch.zeros(trajectory.num_examples, dtype=torch.bool, device="cpu")
    for segment in segments:
        start = 0
        for shard in segment.shards:
            seen[shard.ids + start] = True
            start += len(shard)
        if seen.all():
            return 0
    seen[torch.tensor(trajectory.manifest.withdrawn, dtype=torch.long, device="cpu")] = True
    return int((~seen).sum())


def notes_on_model(trajectory: Trajectory, model: nn.Module) -> list[Note]:
    """Take note of a model whose weights are not the run's last ones, which are explained whatever is passed.

    An untrained model is a legitimate way to pass the architecture. One that was trained along this run, but stands
    elsewhere (trained further, an earlier checkpoint), was probably meant to be explained itself.

    Args:
        trajectory: The run.
        model: The user's model.
    """
    last = trajectory.checkpoint(len(trajectory)).parameters
    if _equal(trajectory, model, last):
        return []
    explained = "the recorded weights are explained"
    first = trajectory.checkpoint(0).parameters
    if _equal(trajectory, model, first):
        return [Note(f"The model that was passed has the weights from before training; {explained}.", alarming=False)]
    distance, covered = _distance(trajectory, model, last), float((last - first).double().norm())
    share = f"its distance is {distance / covered if covered else 0.0:.2g} times what training covered"
    if distance < _ROUNDED * covered:
        text = (
            f"The model that was passed differs from the run's last weights as if by rounding ({share}); {explained}."
        )
        return [Note(text, alarming=False)]
    if distance < _TRAINED * covered:
        return [
            Note(
                f"The model that was passed is near the run's last weights, but not at them ({share}): was it trained "
                f"further, or is it an earlier checkpoint? {explained.capitalize()}."
            )
        ]
    return [Note(f"The model that was passed has other weights than the run's last ones; {explained}.", alarming=False)]


def note_on_mean(runs: int) -> list[Note]:
    """Say what the numbers of several runs are."""
    text = f"All numbers are means over {runs} runs, and each check shows the run in which it is worst."
    return [Note(text, alarming=False)] if runs > 1 else []


def warn_of(notes: Sequence[Note], name: str) -> None:
    """Warn once of all that is alarming."""
    alarming = [note.text for note in notes if note.alarming]
    if alarming:
        warn(f"pkexplain: explaining {name}: {' '.join(alarming)}")


def _equal(trajectory: Trajectory, model: nn.Module, vector: Tensor) -> bool:
    return all(torch.equal(mine, recorded) for mine, recorded in _pairs(trajectory, model, vector))


def _distance(trajectory: Trajectory, model: nn.Module, vector: Tensor) -> float:
    pairs = _pairs(trajectory, model, vector)
    return sum(float((mine - recorded).double().square().sum()) for mine, recorded in pairs) ** 0.5


def _pairs(trajectory: Trajectory, model: nn.Module, vector: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """Go through the model's parameters and those of a checkpoint, in its dtype, on the CPU."""
    named = dict(named_parameters(model))
    for block in trajectory.fingerprint.blocks:
        start = block.start
        for name in block.parameters:
            mine = named[name].detach().flatten().to(vector)
            yield mine, vector[start : start + mine.numel()]
            start += mine.numel()
