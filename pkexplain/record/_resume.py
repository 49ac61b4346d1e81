"""Going on with a run: where in it the model and the optimizer stand, and what was in flight there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pkexplain.distributed import ProcessGroup
from pkexplain.errors import ConfigurationError, ModelMismatchError, RunDamagedError
from pkexplain.files import checksum
from pkexplain.gradients.capture import GRADIENT_CLASSES
from pkexplain.gradients.factors import MatrixGradient
from pkexplain.ids import check_ids
from pkexplain.optimizers.adaptive import Pending
from pkexplain.optimizers.base import CapturedBatch, Setting
from pkexplain.optimizers.displacement import RowSum
from pkexplain.optimizers.segment import SegmentAccountant
from pkexplain.record._state import deserialise
from pkexplain.store.base import Store, damaged
from pkexplain.store.trajectory import Trajectory

__all__ = ["Standpoint", "checksum_optimizer", "find_standpoint", "recorded_arguments", "take_up"]

_SAVED_CLASSES = (RowSum, Pending, CapturedBatch, *GRADIENT_CLASSES)
"""All that the state of an optimizer's account is made of; a file that names another class is refused."""


def checksum_optimizer(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> str | None:
    """Return the SHA-256 of what an optimizer remembers of some parameters, or None where it remembers nothing."""
    lines = []
    for place, parameter in enumerate(parameters):
        state = optimizer.state.get(parameter, {})
        for name in sorted(state):
            value = state[name]
            if value is None:
                continue
            lines.append(f"{place} {name} {checksum(value) if isinstance(value, Tensor) else repr(value)}\n")
    return checksum(*lines) if lines else None


def recorded_arguments(store: Store, trajectory: Trajectory, num_examples: int | None) -> dict[str, Any]:
    """Return what a recorder must be given to go on with a run.

    Args:
        store: The run.
        trajectory: The same, read.
        num_examples: How many examples there are now; None for as many as before.

    Raises:
        ConfigurationError: There are fewer than before.
    """
    before, settings = trajectory.num_examples, trajectory.manifest.recording
    if num_examples is not None and num_examples < before:
        raise ConfigurationError(
            "Recorder.resume(num_examples=…)",
            "a training set can grow, not shrink",
            got=num_examples,
            expected=f"{before} or more",
            source="the run's manifest",
            fix="Leave it out; pkexplain.withdraw takes examples out of a run",
        )
    return {
        "num_examples": num_examples or before,
        "projection": trajectory.projection,
        "segments": settings.segments,
        "lookahead": settings.lookahead,
        "dtype": trajectory.dtype,
    }


@dataclass(frozen=True)
class Standpoint:
    """Where in a run its training goes on.

    Attributes:
        segments: Finished segments that stay.
        state: What is in the optimizer's moment there; None where the optimizer starts anew.
        file: The file that says so.
    """

    segments: int
    state: Mapping[str, Any] | None
    file: str = ""


def find_standpoint(
    store: Store, trajectory: Trajectory, point: Tensor, optimizer: str | None, group: ProcessGroup
) -> Standpoint:
    """Find the last place in a run where the model and the optimizer can go on.

    Args:
        store: The run.
        trajectory: What it holds.
        point: θ as the model has it now, ``(parameters,)``.
        optimizer: Checksum of what the optimizer remembers, or None.
        group: The processes that train.

    Raises:
        ModelMismatchError: The model is at none of the run's checkpoints.
        ConfigurationError: The optimizer's state does not belong there, or what was in flight there is not known.
    """
    states = {state.segments: state for state in trajectory.manifest.states}
    order, now = range(len(trajectory), 0, -1), point.cpu()

    def stands(t: int) -> bool:
        return torch.equal(trajectory.checkpoint(t).parameters, now)

    if optimizer is None:
        fitting = next(filter(stands, order), None)
        if fitting is None:
            raise _stands_nowhere(store, trajectory, states)
        return Standpoint(fitting, None)
    wanted = (t for t in order if t in states and states[t].optimizer == optimizer)
    fitting = next(filter(stands, wanted), None)
    if fitting is None:
        raise _unknown_moment(store, trajectory, states, list(filter(stands, order)))
    files = states[fitting].files
    if len(files) != group.world_size:
        raise ConfigurationError(
            f"resuming the run in {store}",
            "every process has its own part of what is in flight",
            got=f"{group.world_size} processes",
            expected=f"{len(files)}",
            source="the run's states",
            fix="Resume with as many processes as before, or with a new optimizer",
        )
    name = files[group.rank]
    device = point.device
    tensors = {key: value.to(device, copy=True) for key, value in store.read(name).items()}
    try:
        found = deserialise(tensors, _SAVED_CLASSES)
    except ValueError as error:
        raise _no_state(store, name, error) from error
    return Standpoint(fitting, found, name)


def _stands_nowhere(store: Store, trajectory: Trajectory, states: Mapping[int, Any]) -> ModelMismatchError:
    steps = [trajectory.boundaries[t] for t in sorted(states) or range(1, len(trajectory) + 1)]
    return ModelMismatchError(
        f"resuming the run in {store}",
        "the model stands at none of its checkpoints",
        got="other parameters",
        expected=f"those after step {', '.join(map(str, steps))}",
        source="the run's checkpoints",
        fix="Load the model and the optimizer from what you saved right after recorder.save()",
    )


def _unknown_moment(
    store: Store, trajectory: Trajectory, states: Mapping[int, Any], here: Sequence[int]
) -> ModelMismatchError | ConfigurationError:
    """Say why an optimizer that remembers something cannot go on: for where the model stands, no state is like it."""
    if not here:
        return _stands_nowhere(store, trajectory, states)
    step = trajectory.boundaries[here[0]]
    if any(t in states for t in here):
        wrong, expected = "the optimizer remembers other steps", f"the state it had at step {step}"
        fix = "Load the optimizer from what you saved right after recorder.save()"
    else:
        known = ", ".join(f"step {trajectory.boundaries[t]}" for t in sorted(states)) or "none"
        wrong = "what is in the optimizer's moment is not known"
        expected = f"a call of recorder.save() at that step (there are {len(states)} states: {known})"
        fix = "Go on from a step with a state, or with a new optimizer, which has nothing in its moment"
    return ConfigurationError(
        f"resuming the run in {store}",
        wrong,
        got=f"an optimizer with a state, after step {step}",
        expected=expected,
        source="the run's states",
        fix=fix,
    )


def take_up(store: Store, standpoint: Standpoint, setting: Setting, accountant: SegmentAccountant) -> bool:
    """Give an accountant what was in flight.

    Args:
        store: The run.
        standpoint: Where it goes on, with something in flight.
        setting: What is recorded.
        accountant: The accountant, new.

    Returns:
        Whether the examples' part of the gradient is followed by itself.

    Raises:
        RunDamagedError: What was in flight does not fit the run.
    """
    try:
        state = dict(standpoint.state or {})
        accounts = state["accounts"]
        book = accounts["book"] or {}
        if {*accounts["weight_decay"][1], *book.get("blocks", ())} - setting.spans.keys():
            raise ValueError("blocks that the model does not have")
        for pending in book.get("pending", ()):
            _check_pending(pending, setting)
        accountant.load_state_dict(accounts)
        return bool(state["attributed"])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise _no_state(store, standpoint.file, error) from error


def _check_pending(pending: Pending, setting: Setting) -> None:
    """Check gradients that wait, so that none is stretched to fit, or of an example that the run does not have.

    Raises:
        ValueError: They do not fit the run.
    """
    blocks = range(len(setting.blocks))
    by_block = [pending.scale, pending.still, pending.carried or {}]
    if pending.place != -1 or pending.gradient.shape != (setting.size,) or any(d.keys() - {*blocks} for d in by_block):
        raise ValueError("steps that did not wait")
    parts = [(b, part) for by in by_block for b, part in by.items() if isinstance(part, Tensor)]
    if any(part.shape != (setting.blocks[b].numel,) for b, part in parts):
        raise ValueError("factors of other parameters")
    for batch in pending.batches:
        everyone = torch.arange(len(check_ids(batch.ids, setting.num_examples)), device=batch.ids.device)
        if batch.derivatives is not None and batch.derivatives.shape != everyone.shape:
            raise ValueError("loss derivatives of other examples")
        for position, gradients in batch.pieces:
            numel = setting.blocks[position].numel if position in blocks else -1
            matrix = gradients.matrix if isinstance(gradients, MatrixGradient) else (numel, 1)
            if len(gradients) != len(everyone) or math.prod(matrix) != numel or gradients.total().shape != (numel,):
                raise ValueError("gradients of other parameters")
            if gradients.select(everyone).nbytes != gradients.nbytes:  # an IndexError where there are too few
                raise ValueError("gradients of other examples")


def _no_state(store: Store, name: str, error: Exception) -> RunDamagedError:
    return damaged(store, name, "it is not a state", f"{error}", "what is in flight")
