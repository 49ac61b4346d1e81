"""What a recorder's arguments and a training loop must satisfy, and the errors and warnings if they do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pkexplain.errors import ConfigurationError, ExampleIdError, NonFiniteGradientError, RecordingError, warn
from pkexplain.gradients.compiled import compiled_parts
from pkexplain.optimizers.base import CapturedBatch


def check_arguments(model: nn.Module, **given: Any) -> None:
    """Refuse arguments that cannot be recorded.

    Raises:
        ConfigurationError: An argument is invalid.
    """
    n, segments, kept = given["num_examples"], given["segments"], given["keep_states"]
    rules: list[tuple[str, bool, str, str]] = [
        ("num_examples", _is_count(n), "an integer from 1 up", "Give len(train)"),
        ("augmented", isinstance(given["augmented"], bool), "True or False", "Leave it out"),
        ("overwrite", isinstance(given["overwrite"], bool), "True or False", "Leave it out"),
        (
            "keep_states",
            kept is None or _is_count(kept),
            "1, 2, … or None",
            "Leave it out",
        ),
        ("segments", segments == "epoch" or _is_count(segments), '"epoch" or a number of steps', "Leave it out"),
        ("unsplit", given["unsplit"] in ("warn", "refuse"), '"warn" or "refuse"', "Leave it out"),
        ("dtype", given["dtype"] in (torch.float32, torch.float64), "float32 or float64", "Leave it out"),
    ]
    for name, fits, expected, fix in rules:
        if not fits:
            source = "the signature of Recorder"
            wrong = "the value is invalid"
            raise ConfigurationError(
                f"Recorder({name}=…)", wrong, got=repr(given[name]), expected=expected, source=source, fix=fix
            )
    if isinstance(model, nn.DataParallel):
        raise _not_this_model(
            "hooks do not reach the copies of the model that it makes in every forward pass",
            type(model).__name__,
            "the model itself, or its DistributedDataParallel",
            "Train without DataParallel, or with DistributedDataParallel",
        )
    sharded = [name for name, parameter in model.named_parameters() if hasattr(parameter, "device_mesh")]
    if sharded:
        raise _not_this_model(
            "its parameters are sharded over processes (FSDP2, tensor parallel); what is missing is the layers' inputs "
            "and gradients before the reduce-scatter, and sharded checkpoints",
            f"a DTensor, {sharded[0]!r}",
            "a model of which every process holds all",
            "Train with DistributedDataParallel, or freeze the body and record a head or an adapter",
        )
    odd = [name for name, parameter in model.named_parameters() if parameter.is_complex() and parameter.requires_grad]
    if odd:
        raise _not_this_model(
            "complex parameters have no rule: their gradients would lose the imaginary part",
            f"{odd[0]!r}",
            "real parameters",
            "Hold the real and the imaginary part as one real parameter, and use torch.view_as_complex on it",
        )
    mixed = [name for name, part in model.named_modules() if isinstance(part, nn.SyncBatchNorm)]
    if mixed:
        raise _not_this_model(
            "SyncBatchNorm mixes the examples of several processes, and each process sees only its own",
            f"{mixed[0]!r}",
            "BatchNorm of each process's own batch",
            "Leave convert_sync_batchnorm out, or use GroupNorm",
        )


def _not_this_model(wrong: str, got: str, expected: str, fix: str) -> ConfigurationError:
    return ConfigurationError(
        "Recorder(model=…)", wrong, got=got, expected=expected, source="pkexplain.gradients.capture", fix=fix
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def broken(wrong: str, got: str, fix: str) -> RecordingError:
    """Make the error for a training loop that broke the contract of `Recorder.step`."""
    expected = "a forward pass, a backward pass and one optimizer step in each block"
    return RecordingError("recorder.step(ids)", wrong, got=got, expected=expected, source="the training loop", fix=fix)


def not_all_stepped(stepped: Sequence[torch.optim.Optimizer], held: Sequence[torch.optim.Optimizer]) -> RecordingError:
    """Make the error for a block in which some of several optimizers did not step after the backward passes."""
    names = [type(optimizer).__name__ for optimizer in held if optimizer not in stepped]
    return broken(
        f"{len(stepped)} of {len(held)} optimizers stepped",
        f"no step of {', '.join(names)}, or a backward pass before it",
        "Call all backward passes, then step() of each optimizer, in every block; if two models are trained in turns, "
        "make a recorder for each",
    )


def not_all_skipped() -> RecordingError:
    """Make the error for a loss scaler that skips the steps of some optimizers."""
    return broken(
        "a loss scaler skipped the step of one optimizer and not that of another",
        "a gradient that is not finite, in some of the parameters",
        "Skip the steps of both, or train in bfloat16, which needs no loss scaler",
    )


def several_in_one_row(examples: int) -> ExampleIdError:
    """Make the error for a batch whose texts were put into one row (packing, padding-free training)."""
    return ExampleIdError(
        "recorder.step(ids)",
        "packing or padding-free training: one row of the batch holds several examples",
        got=f"{examples} ids, and one row with boundaries inside",
        expected="one row for each id",
        source="the model's inputs (position_ids, cu_seq_lens)",
        fix="Set padding_free=False and packing=False, or packing_strategy='wrapped': then each packed row is an "
        "example; without TRL, use a collator that pads",
    )


def without_backward() -> RecordingError:
    """Make the error for a step without a gradient to record."""
    fix = "Call loss.backward() inside the 'with recorder.step(ids):' block, before optimizer.step()"
    return broken("backward was never called", "no gradient of a recorded parameter", fix)


def not_between_steps(recording: bool) -> RecordingError:
    """Make the error for a `Recorder.save` in the wrong place."""
    got = "an unfinished step" if recording else "a recorder that is not open"
    fix = "Call it between two steps, after optimizer.step()"
    return broken("recorder.save() was called where a run cannot be saved", got, fix)


def grown_since(now: int, then: int) -> RecordingError:
    """Make the error for a run that another recorder has continued since `Recorder.resume` was called."""
    return broken(
        "the run has grown since Recorder.resume was called",
        f"{now} examples, and {then} when it was called",
        "Call Recorder.resume again",
    )


def not_by_a_child() -> RecordingError:
    """Make the error for a forked process that goes on with its parent's recorder."""
    return broken(
        "this process was forked from the one that records",
        "a step or a save of a copy of the recorder",
        "Record in the process that opened the recorder; to train in several, use DistributedDataParallel",
    )


def not_after_a_torn_step() -> RecordingError:
    """Make the error for going on after an error in the middle of a step's accounts."""
    return broken(
        "an earlier step was not recorded as a whole",
        "a step after an error inside the recording of another",
        "Leave the 'with' block; Recorder.resume continues from the last recorder.save()",
    )


def warn_of_compiled(model: nn.Module) -> None:
    """Warn that a compiled model runs as it was written while it is recorded."""
    if compiled_parts(model):
        warn(
            "pkexplain: the model is compiled; while it is recorded it runs eagerly, as hooks do not reach compiled "
            "code. The training is then that of the model without torch.compile: dropout draws other masks than "
            "compiled code would, and a step takes as long as it does without it."
        )


def warn_of_unapplied(examples: int) -> None:
    """Warn that the last gradients were never given to the optimizer."""
    warn(
        f"pkexplain: the gradients of the last {examples} examples were never applied: no optimizer.step() followed "
        "them. They moved nothing, and have no part in any explanation."
    )


def warn_of_torn_step(steps: int) -> None:
    """Warn that an unfinished segment is dropped."""
    warn(
        f"pkexplain: an error came in the middle of recording a step; the {steps} steps since the last segment was "
        "finished are not part of the run."
    )


def unknown_parameter(name: str) -> RecordingError:
    """Make the error for a parameter that was missing or frozen when the recorder was made."""
    return RecordingError(
        f"recording parameter {name!r}",
        "the optimizer updates it, and the recorder does not know it",
        got="a parameter that was added or unfrozen after the recorder was made",
        expected="the parameters that the optimizer held, with requires_grad=True, when the recorder was made",
        source="optimizer.param_groups",
        fix="Give it to the optimizer and keep it trainable until the recorder is made; if it is frozen after that, it "
        "is recorded from the step on which it is unfrozen",
    )


def moved_by_another(name: str) -> RecordingError:
    """Make the error for a parameter that is not recorded and was changed."""
    return RecordingError(
        f"recording beside parameter {name!r}",
        "it changed, and the recorder's optimizer does not hold it",
        got="a parameter that a second optimizer, a moving average or the training loop itself has written to",
        expected="parameters that only the recorder's optimizer changes",
        source="the parameters' version counters after a step",
        fix="Pass all optimizers that move the model, in a list: Recorder(run, model, [first, second], …)",
    )


def not_split(reasons: Mapping[str, str]) -> RecordingError:
    """Make the error for parameters that cannot be split, where that was to be refused; given the reasons."""
    name, why = next(iter(reasons.items()))
    return RecordingError(
        f"recording parameter {name!r}" + (f" and {len(reasons) - 1} others" if len(reasons) > 1 else ""),
        f"its gradient cannot be split among the examples: {why}",
        got='unsplit="refuse"',
        expected="gradients of every parameter that can be split",
        source="a coded pass through the graph, before the first step",
        fix='Freeze it, or record with unsplit="warn": its movement then has a line of its own in the ledger',
    )


def warn_of_unsplit(reasons: Mapping[str, str]) -> None:
    """Warn that some parameters are not split; given the reasons."""
    some = "; ".join(f"{name} ({why})" for name, why in list(reasons.items())[:4])
    more = f" and {len(reasons) - 4} more" if len(reasons) > 4 else ""
    warn(
        f"pkexplain: the gradients of {len(reasons)} parameters cannot be split among the examples: {some}{more}. "
        "Their movement is the ledger's unsplit line; `pkexplain inspect` shows their share of the gradient."
    )


def not_finite(batches: Sequence[CapturedBatch]) -> NonFiniteGradientError:
    """Make the error that names the examples whose loss derivatives are not finite, or else the whole batch."""
    blamed = [
        int(i)
        for batch in batches
        if batch.derivatives is not None
        for i in batch.ids[~torch.isfinite(batch.derivatives).cpu()]
    ]
    ids = blamed or [int(i) for batch in batches for i in batch.ids]
    return NonFiniteGradientError(
        "recorder.step(ids)",
        "the loss or a gradient is not finite; the optimizer did not step",
        got=f"nan or infinity from example{'s' * (len(ids) > 1)} {', '.join(map(str, ids[:8]))}",
        expected="finite gradients",
        source="the backward pass",
        fix="Look at these examples and at the learning rate; skip the batch or lower the rate",
    )


def warn_of_missing(short: Mapping[str, float], rounded: bool) -> None:
    """Warn that examples account for only a share of some parameters' gradients.

    Args:
        short: The missing share of each.
        rounded: Whether that is how far the training's own gradients are rounded.
    """
    worst = max(short, key=lambda name: short[name])
    why = (
        "The training's own gradients are rounded by as much, as they are in half precision or before a BatchNorm."
        if rounded
        else "A penalty on the weights is better passed as weight_decay; a weight used outside its module's forward is "
        "not seen."
    )
    warn(
        f"pkexplain: the examples' gradients do not sum to the gradient of {len(short)} parameters, by up to "
        f"{short[worst]:.1%} ({worst}). What is missing goes to the ledger's optimizer line. {why}"
    )
