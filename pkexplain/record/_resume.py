"""Going on with a run: where in it the model and the optimizer stand, and what was in flight there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pkexplain.distributed import ProcessGroup
from pkexplain.errors import ConfigurationError, ModelMismatchError, RunDamagedError, warn
from pkexplain.files import checksum
from pkexplain.optimizers.base import RecordingSpec
from pkexplain.optimizers.displacement import RowSum
from pkexplain.optimizers.segment_accountant import SegmentAccountant
from pkexplain.record._optimizers import Optimizers
from pkexplain.record._state import deserialise
from pkexplain.store.base import Store, damaged
from pkexplain.store.manifest import OptimizerEntry, StateEntry
from pkexplain.store.trajectory import Trajectory

_SAVED_CLASSES = (RowSum,)
"""Every class that a saved state may contain; a file that names another one is refused."""


def checksum_optimizers(optimizers: Optimizers, parameters: Sequence[nn.Parameter]) -> str | None:
    """Return the SHA-256 of the optimizers' state for some parameters; None if they have no state."""
    lines = []
    for index, parameter in enumerate(parameters):
        state = optimizers.state(parameter)
        for name in sorted(state):
            value = state[name]
            if value is None:
                continue
            lines.append(f"{index} {name} {checksum(value) if isinstance(value, Tensor) else repr(value)}\n")
    return checksum(*lines) if lines else None


def recorded_arguments(store: Store, trajectory: Trajectory, num_examples: int | None) -> dict[str, Any]:
    """Return the arguments of a recorder that continues a run.

    Args:
        store: The run.
        trajectory: What it holds.
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
        "unsplit": settings.unsplit,
        "augmented": settings.augmented,
        "replay": bool(settings.replay),
        "dtype": trajectory.dtype,
    }


@dataclass(frozen=True)
class Standpoint:
    """The point of a run from which training continues.

    Attributes:
        segments: Finished segments that stay.
        state: The saved state at this point; None if the optimizer starts from scratch.
        file: The file that holds the state.
    """

    segments: int
    state: Mapping[str, Any] | None
    file: str = ""


def find_standpoint(
    store: Store,
    trajectory: Trajectory,
    point: Tensor,
    optimizer: str | None,
    settings: OptimizerEntry,
    group: ProcessGroup,
) -> Standpoint:
    """Find the last point of a run from which this model and optimizer can continue.

    Args:
        store: The run.
        trajectory: What it holds.
        point: The model's current θ, ``(parameters,)``.
        optimizer: Checksum of the optimizer's state, or None.
        settings: The optimizer's class and options.
        group: The processes that train.

    Raises:
        ModelMismatchError: The model is at none of the run's checkpoints.
        ConfigurationError: The optimizer's state is from another point, or no state was saved at this one.
    """
    states = {state.segments: state for state in trajectory.manifest.states}
    order, now = range(len(trajectory), 0, -1), point.cpu()

    def is_at(t: int) -> bool:
        return torch.equal(trajectory.checkpoint(t).parameters, now)

    if optimizer is None:
        fitting = next(filter(is_at, order), None)
        if fitting is None:
            raise _no_checkpoint(store, trajectory, states)
        _warn_of_new_optimizer(trajectory, states.get(fitting), settings)
        return Standpoint(fitting, None)
    wanted = (t for t in order if t in states and states[t].optimizer == optimizer)
    fitting = next(filter(is_at, wanted), None)
    if fitting is None:
        raise _unknown_state(store, trajectory, states, list(filter(is_at, order)))
    _compare_settings(store, states[fitting].settings or trajectory.manifest.optimizer, settings)
    files = states[fitting].files
    if len(files) != group.world_size:
        raise ConfigurationError(
            f"resuming the run in {store}",
            "every process saved its own state",
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


def _compare_settings(store: Store, then: OptimizerEntry, now: OptimizerEntry) -> None:
    """Compare an optimizer that goes on with the one that was saved.

    Raises:
        ConfigurationError: It is of another class.
    """
    if then.kind != now.kind:
        raise ConfigurationError(
            f"resuming the run in {store}",
            "the optimizer's state is that of another kind of optimizer",
            got=now.kind,
            expected=then.kind,
            source="the run's saved state",
            fix=f"Load the state into {then.kind}, or resume with a new optimizer, without a state",
        )
    changed = _changed_options(then, now)
    if changed:
        warn(f"pkexplain: resuming with other options of {now.kind} than were saved: {changed}.")


def _changed_options(then: OptimizerEntry, now: OptimizerEntry, scheduled: bool = False) -> str:
    """Name the options that differ, of the first parameter group that differs.

    Args:
        then: The optimizer before.
        now: The optimizer now.
        scheduled: Whether a schedule may have changed the learning rate since the first was described.
    """
    left_out = {"lr", "initial_lr"} if scheduled else set()
    if len(then.groups) != len(now.groups):
        return f"{len(then.groups)} parameter groups then, {len(now.groups)} now"
    for position, (before, after) in enumerate(zip(then.groups, now.groups, strict=True)):
        names = [n for n in {**before, **after} if before.get(n) != after.get(n) and n not in left_out]
        if names:
            where = f" (in parameter group {position})" if len(now.groups) > 1 else ""
            return ", ".join(f"{n} {before.get(n, 'none')} then, {after.get(n, 'none')} now" for n in names) + where
    return ""


def _warn_of_new_optimizer(trajectory: Trajectory, saved: StateEntry | None, now: OptimizerEntry) -> None:
    """Warn that training goes on with an optimizer without a state where there was one with a state, or another kind.

    That can be meant; if loading was forgotten, the momentum of all examples so far is lost.
    """
    then = (saved and saved.settings) or trajectory.manifest.optimizer
    if then.kind != now.kind:
        warn(f"pkexplain: resuming with {now.kind}; the run was recorded with {then.kind}.")
    elif (saved is None or not saved.optimizer) and (changed := _changed_options(then, now, saved is None)):
        warn(f"pkexplain: resuming with other options of {now.kind} than before: {changed}.")
    elif saved is not None and saved.optimizer:
        warn(
            f"pkexplain: resuming with a new {now.kind}, without a state, where the state of one was saved: "
            "its momentum starts again from nothing. If that is not meant, load what you saved of the optimizer right "
            "after recorder.save()."
        )


def _no_checkpoint(store: Store, trajectory: Trajectory, states: Mapping[int, Any]) -> ModelMismatchError:
    steps = [trajectory.boundaries[t] for t in sorted(states) or range(1, len(trajectory) + 1)]
    return ModelMismatchError(
        f"resuming the run in {store}",
        "the model is at none of its checkpoints",
        got="other parameters",
        expected=f"those after step {', '.join(map(str, steps))}",
        source="the run's checkpoints",
        fix="Load the model and the optimizer from what you saved right after recorder.save()",
    )


def _unknown_state(
    store: Store, trajectory: Trajectory, states: Mapping[int, Any], here: Sequence[int]
) -> ModelMismatchError | ConfigurationError:
    """Make the error for an optimizer whose state matches none that was saved at the model's checkpoints."""
    if not here:
        return _no_checkpoint(store, trajectory, states)
    step = trajectory.boundaries[here[0]]
    if any(t in states for t in here):
        wrong, expected = "the optimizer's state is from another step", f"the state it had at step {step}"
        fix = "Load the optimizer from what you saved right after recorder.save()"
    else:
        known = ", ".join(f"step {trajectory.boundaries[t]}" for t in sorted(states)) or "none"
        wrong = "the momentum buffer at this step was not saved"
        expected = f"a call of recorder.save() at that step (there are {len(states)} states: {known})"
        fix = "Resume from a step with a saved state, or with a new optimizer, whose momentum buffer is empty"
    return ConfigurationError(
        f"resuming the run in {store}",
        wrong,
        got=f"an optimizer with a state, after step {step}",
        expected=expected,
        source="the run's states",
        fix=fix,
    )


def restore_state(
    store: Store, standpoint: Standpoint, spec: RecordingSpec, accountant: SegmentAccountant
) -> tuple[dict[str, bool], int]:
    """Restore an accountant's saved state.

    Args:
        store: The run.
        standpoint: The point from which it continues, with a state.
        spec: What is recorded, and in which dtype.
        accountant: The accountant, new.

    Returns:
        What was found about the gradients (`GradientSums.state_dict`), and the steps since the optimizer began.

    Raises:
        RunDamagedError: The state does not fit the run.
    """
    try:
        state = dict(standpoint.state or {})
        accounts = state["accounts"]
        full = (accounts["accumulator"] or {}).get("full") or (None, ())
        if {*accounts["weight_decay"][1], *full[1]} - spec.spans.keys():
            raise ValueError("blocks that the model does not have")
        accountant.load_state_dict(accounts)
        return {name: bool(state["sums"][name]) for name in ("apart", "missing")}, int(state["age"])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise _no_state(store, standpoint.file, error) from error


def _no_state(store: Store, name: str, error: Exception) -> RunDamagedError:
    return damaged(store, name, "it is not a state", f"{error}", "a recorder's saved state")
