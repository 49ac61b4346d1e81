"""Recording a training by Lightning's ``Trainer``."""

from __future__ import annotations

import os
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from pkexplain.errors import ConfigurationError
from pkexplain.integrations._following import FollowingRecorder
from pkexplain.record.loaders import DrawnIds
from pkexplain.store.base import Store

__all__ = ["RecordingCallback"]


class RecordingCallback(Callback):
    """Records a training: ``Trainer(…, callbacks=[RecordingCallback("runs/x")])``.

    Which examples are in a batch is read from the sampler, so data and module stay as they are. The trained parameters
    are those without the callback, to the last bit. Whenever Lightning saves a checkpoint, the run is saved, too;
    ``trainer.fit(module, ckpt_path=…)`` continues both. The run is explained with the `LightningModule`; if its
    ``training_step`` does not call its ``forward``, but one part that holds all its parameters, that part's inputs and
    outputs are taken for the module's.

    Args:
        run: A directory that does not hold a run yet, or a `pkexplain.MemoryStore`.
        options: Of `pkexplain.Recorder`: ``projection``, ``segments``, ``augmented``, ``overwrite``, …

    Raises:
        ConfigurationError: The training data have no row numbers, or come from several loaders.
    """

    def __init__(self, run: str | os.PathLike[str] | Store, **options: Any) -> None:
        """Record nothing yet."""
        self._run, self._options = run, options
        self._following: FollowingRecorder | None = None
        self._found: dict[int, DrawnIds | ConfigurationError] = {}
        self._strategy: Any = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to the loaders that Lightning makes: it draws the first batch before the training starts."""
        self._leave(RuntimeError("another training began"))
        strategy: Any = trainer.strategy
        process = strategy.process_dataloader

        def listening(loader: Any) -> Any:
            made = process(loader)
            try:
                self._found[id(made)] = DrawnIds(made)
            except ConfigurationError as error:  # of the validation's loader, maybe
                self._found[id(made)] = error
            return made

        strategy.process_dataloader = listening
        self._strategy = strategy

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin or continue the run."""
        options = {"keep_states": None, **self._options}
        drawn, optimizers = self._drawn(trainer), trainer.optimizers
        optimizer = optimizers[0] if len(optimizers) == 1 else optimizers
        model: Any = trainer.strategy.model or pl_module
        self._following = FollowingRecorder(self._run, drawn, model, optimizer, trainer.global_step > 0, options)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow the loader from its beginning."""
        if self._following is not None:
            self._following.drawn = self._drawn(trainer)  # it may have been loaded anew
            self._following.begin_epoch()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin a step."""
        if self._following is not None:
            self._following.begin()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End the step."""
        if self._following is not None:
            self._following.end()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the segment: another callback may change the weights next."""
        if self._following is not None:
            self._following.end_epoch(stopped=True)  # limit_train_batches leaves a loader before its end

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the run."""
        if self._following is not None:
            self._following.recorder.save()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish the run."""
        self._leave(None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Finish the run as far as it came."""
        self._leave(exception)

    def _drawn(self, trainer: Trainer) -> DrawnIds:
        loader: Any = trainer.train_dataloader
        found = self._found.get(id(loader))
        if isinstance(found, DrawnIds):
            return found
        raise found or ConfigurationError(
            "Trainer(callbacks=[RecordingCallback(…)])",
            "the training data do not come from one data loader",
            got=type(loader).__name__,
            expected="a torch.utils.data.DataLoader",
            source="trainer.train_dataloader",
            fix="Train from one loader, or write the loop by hand with recorder.step(ids)",
        )

    def _leave(self, error: BaseException | None) -> None:
        if self._strategy is not None:
            self._strategy.__dict__.pop("process_dataloader", None)
            self._strategy = None
        following, self._following = self._following, None
        try:
            if following is not None:
                following.close(error)
        finally:
            for drawn in self._found.values():
                if isinstance(drawn, DrawnIds):
                    drawn.remove()
            self._found = {}
