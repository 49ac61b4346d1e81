"""A recorder that follows somebody else's training loop: told when a batch begins and ends, it finds out the rest."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pkexplain.errors import RecordingError
from pkexplain.record.loaders import DrawnIds, Draws
from pkexplain.record.recorder import Recorder
from pkexplain.store.base import Store

__all__ = ["FollowingRecorder"]


class FollowingRecorder:
    """Records a training whose parts a library calls.

    Attributes:
        recorder: The recorder.
        drawn: Which examples are in a batch.

    Args:
        run: Where to record.
        drawn: Which examples are in a batch.
        model: The model.
        optimizer: Its optimizer, or several.
        resumes: Whether the training goes on from a checkpoint of the library's.
        options: Of the recorder.
    """

    def __init__(
        self,
        run: str | os.PathLike[str] | Store,
        drawn: DrawnIds,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        resumes: bool,
        options: dict[str, Any],
    ) -> None:
        """Begin or continue the run."""
        self.drawn = drawn
        self._draws: Draws | None = None
        self._skips = 0
        self._open = False
        options = {"num_examples": drawn.num_examples, **options}
        if resumes:
            kept = {name: options[name] for name in ("num_examples", "group", "keep_states") if name in options}
            self.recorder = Recorder.resume(run, model, optimizer, **kept)
        else:
            self.recorder = Recorder(run, model, optimizer, **options)
        self.recorder.__enter__()

    @property
    def between_steps(self) -> bool:
        """Whether no step is open."""
        return not self._open

    def begin_epoch(self, skips: int = 0) -> None:
        """Follow another iteration of the loader.

        Args:
            skips: Batches at its beginning that the loader draws and leaves out.
        """
        self._draws, self._skips = None, skips

    def begin(self) -> None:
        """Begin the step of the next batch."""
        if self._draws is None:
            self._draws = self.drawn.follow()
            self._draws.skip(self._skips)
        self.recorder.begin(self._draws.take())
        self._open = True

    def end(self) -> None:
        """End the step, if one is open."""
        if self._open:
            self._open = False
            self.recorder.end()

    def end_epoch(self, stopped: bool) -> None:
        """End the segment: what comes next may change the weights, an average of them say.

        Args:
            stopped: Whether the loader was left before its end.

        Raises:
            RecordingError: The loader drew other batches than were trained on.
        """
        self.end()
        self.recorder.end_segment()
        left = len(self._draws) if self._draws is not None else 0
        if left and not stopped:
            raise RecordingError(
                "following the data loader",
                "the epoch is over, and batches are left that were drawn and not trained on: the ids are wrong",
                got=f"{left} batches",
                expected="none",
                source="the data loader's batch sampler",
                fix="Write the loop by hand with recorder.step(ids), and please report the loader",
            )

    def close(self, error: BaseException | None = None) -> None:
        """Finish the run."""
        self.drawn.remove()
        self.recorder.__exit__(None if error is None else type(error))
