"""Recording a training by skorch."""

from __future__ import annotations

import os
from typing import Any

from skorch.callbacks import Callback

from pkexplain.integrations._following import FollowingRecorder
from pkexplain.record.loaders import DrawnIds
from pkexplain.store.base import Store

__all__ = ["RecordingCallback"]


class RecordingCallback(Callback):
    """Records a training: ``NeuralNet(module, …, callbacks=[RecordingCallback("runs/x")])``.

    Ids are row numbers of the data that ``fit`` was given, also if skorch keeps some of them for validation. The
    trained parameters are those without the callback, to the last bit. ``partial_fit`` continues the run.

    Args:
        run: A directory that does not hold a run yet, or a `pkexplain.MemoryStore`.
        options: Of `pkexplain.Recorder`: ``projection``, ``segments``, ``augmented``, ``overwrite``, …

    Raises:
        ConfigurationError: The training data have no row numbers.
    """

    def __init__(self, run: str | os.PathLike[str] | Store, **options: Any) -> None:
        """Record nothing yet."""
        self.run, self.options = run, options
        self._following: FollowingRecorder | None = None
        self._drawn: DrawnIds | None = None
        self._net: Any = None

    def on_train_begin(self, net: Any, X: Any = None, y: Any = None, **kwargs: Any) -> None:
        """Listen to the loader that skorch makes for the training."""
        self._leave(RuntimeError("another training began"))
        make, count, changed = net.get_iterator, len(net.get_dataset(X, y)), vars(net)

        def get_iterator(dataset: Any, training: bool = False) -> Any:
            loader = make(dataset, training=training)
            if training:
                self._drawn = DrawnIds(loader, count)
                resumes = bool(net.history) and getattr(self, "_optimizer", None) is net.optimizer_
                self._following = FollowingRecorder(
                    self.run, self._drawn, net.module_, net.optimizer_, resumes, self.options
                )
            return loader

        changed["get_iterator"] = get_iterator
        self._net = net

    def on_epoch_begin(self, net: Any, dataset_train: Any = None, dataset_valid: Any = None, **kwargs: Any) -> None:
        """Follow the loader from its beginning."""
        if self._following is not None:
            self._following.begin_epoch()

    def on_batch_begin(self, net: Any, batch: Any = None, training: Any = None, **kwargs: Any) -> None:
        """Begin a step."""
        if training and self._following is not None:
            self._following.begin()

    def on_batch_end(self, net: Any, batch: Any = None, training: Any = None, **kwargs: Any) -> None:
        """End the step."""
        if training and self._following is not None:
            self._following.end()

    def on_epoch_end(self, net: Any, dataset_train: Any = None, dataset_valid: Any = None, **kwargs: Any) -> None:
        """End the segment: another callback may load a checkpoint next."""
        if self._following is not None:
            self._following.end_epoch(stopped=False)

    def on_train_end(self, net: Any, X: Any = None, y: Any = None, **kwargs: Any) -> None:
        """Finish the run, so that it can be continued."""
        if self._following is not None and self._following.between_steps:
            self._following.recorder.save()
            self._optimizer = net.optimizer_
        self._leave(None)

    def _leave(self, error: BaseException | None) -> None:
        following, self._following = self._following, None
        if self._net is not None:
            vars(self._net).pop("get_iterator", None)
            self._net = None
        if following is not None:
            following.close(error if following.between_steps else error or KeyboardInterrupt())
        if self._drawn is not None:
            self._drawn.remove()
            self._drawn = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a training that goes on: a net is copied and pickled with its callbacks."""
        return {"run": self.run, "options": self.options, "_following": None, "_drawn": None, "_net": None}
