"""Recording a training by `transformers.Trainer`, or by a trainer that inherits from it, as TRL's do."""

from __future__ import annotations

import math
import os
import threading
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pkexplain.errors import ConfigurationError, warn
from pkexplain.integrations._following import FollowingRecorder
from pkexplain.record.loaders import DrawnIds
from pkexplain.store.base import Store

__all__ = ["RecordingCallback"]

_RECORDING: dict[int, RecordingCallback] = {}
"""The callback that records in each thread: an error ends a training without a word to its callbacks."""


class RecordingCallback(TrainerCallback):
    """Records a training: ``Trainer(…, callbacks=[RecordingCallback("runs/x")])``.

    Which examples are in a batch is read from the sampler, so data set, collator and columns stay as they are. The
    trained parameters are those without the callback, to the last bit. Whenever the trainer saves a checkpoint, the run
    is saved, too; ``trainer.train(resume_from_checkpoint=…)`` continues both.

    Args:
        run: A directory that does not hold a run yet, or a `pkexplain.MemoryStore`.
        options: Of `pkexplain.Recorder`: ``projection``, ``segments``, ``augmented``, ``overwrite``, …

    Raises:
        ConfigurationError: The trainer's data have no row numbers, or it trains in a way that cannot be recorded.

    Example:
        ``trainer = Trainer(model, args, train_dataset=train, callbacks=[RecordingCallback("runs/x")])``
    """

    def __init__(self, run: str | os.PathLike[str] | Store, **options: Any) -> None:
        """Record nothing yet."""
        self._run, self._options = run, options
        self._following: FollowingRecorder | None = None
        self._skips = 0
        self._saved: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin or continue the run."""
        again = self._following is not None  # the last attempt ended in an error, for want of memory, say
        self.close(RuntimeError("another training began"))
        earlier = _RECORDING.pop(threading.get_ident(), None)
        if earlier is not None:  # its hooks would take this training for its own
            earlier.close(RuntimeError("another training began"))
            warn("pkexplain: an earlier training did not come to its end; its recording was ended, too.")
        if args.n_gpu > 1:
            raise ConfigurationError(
                "Trainer(callbacks=[RecordingCallback(…)])",
                "one process trains on several GPUs (DataParallel), whose copies of the model hooks do not reach",
                got=f"{args.n_gpu} GPUs",
                expected="one GPU a process",
                source="TrainingArguments.n_gpu",
                fix="Start it with torchrun or accelerate launch, or let it see one GPU: CUDA_VISIBLE_DEVICES=0",
            )
        loader, steps = kwargs["train_dataloader"], args.gradient_accumulation_steps
        kept = args.save_total_limit and max(2, args.save_total_limit)  # the one before, if this one is never finished
        options = {"keep_states": kept, **self._options}
        if again:
            options["overwrite"] = True
        if args.world_size > 1:
            options["group"] = torch.distributed.group.WORLD
        drawn = DrawnIds(loader)
        resumes = state.global_step > 0
        try:
            self._following = FollowingRecorder(
                self._run, drawn, kwargs["model"], kwargs["optimizer"], resumes, options
            )
        except BaseException:
            drawn.remove()
            raise
        _RECORDING[threading.get_ident()] = self
        skipped = state.global_step % max(1, math.ceil(len(loader) / steps)) * steps
        self._skips = 0 if args.ignore_data_skip else skipped
        self._saved = state.global_step if resumes else None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Follow the loader from its beginning."""
        if self._following is not None:
            self._following.begin_epoch(self._skips)
            self._skips = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin the first batch of a step."""
        if self._following is not None:
            self._following.begin()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End a batch whose gradient waits for others, and begin the next."""
        if self._following is not None:
            self._following.end()
            self._following.begin()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the step."""
        if self._following is not None:
            self._following.end()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End the step, and save the run before the trainer saves its own checkpoint."""
        if self._following is not None:
            self._following.end()
            if control.should_save:
                self._save(state)

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End the segment: the trainer may load its best checkpoint next."""
        if self._following is not None:
            self._following.end_epoch(control.should_epoch_stop or control.should_training_stop)
            if control.should_save:
                self._save(state)

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Save the run, if it was not known before that the trainer would save."""
        if self._following is not None:
            self._save(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Finish the run."""
        self.close()

    def close(self, error: BaseException | None = None) -> None:
        """Finish the run, also after an error that ended the training: the trainer tells its callbacks nothing of it.

        Args:
            error: What ended the training; None if it is over.
        """
        following, self._following = self._following, None
        for thread in [each for each, callback in _RECORDING.items() if callback is self]:
            del _RECORDING[thread]
        if following is not None:
            following.close(error)

    def _save(self, state: TrainerState) -> None:
        if self._following is not None and self._saved != state.global_step:
            self._following.recorder.save()
            self._saved = state.global_step
