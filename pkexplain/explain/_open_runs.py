"""The runs that an explainer has open: one thread asks at a time, and always of the run as it is now."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from pkexplain.errors import ConfigurationError, RunBusyError, RunDamagedError, RunError, RunNotFoundError
from pkexplain.explain._ensemble import check_alike
from pkexplain.explain._run_notes import Note, note_on_mean, notes_on_model, warn_of
from pkexplain.explain._single_run import RunExplainer, Setting
from pkexplain.gradients.torch_state import own_torch_state
from pkexplain.store.base import Store
from pkexplain.store.directory import DirectoryStore
from pkexplain.store.index_files import find_obsolete

__all__ = ["OpenRuns", "asked_alone"]

_ATTEMPTS = 5
_Answer = TypeVar("_Answer")
_Method = TypeVar("_Method", bound=Callable[..., object])


class OpenRuns:
    """One or several runs, opened again when examples were withdrawn from them or their files were replaced.

    A run that only grew is not opened again: its explainer keeps seeing the segments that it saw.

    Attributes:
        all: Each run's explainer.

    Args:
        stores: The runs.
        model: The model; it is copied.
        setting: How they are explained.

    Raises:
        RunNotFoundError: There is no run, or it holds no finished segment.
        RunDamagedError: A file of a run is missing, truncated or altered.
        ModelMismatchError: The model is not the one that was recorded.
        ConfigurationError: The runs cannot be averaged.
    """

    def __init__(self, stores: Sequence[Store], model: nn.Module, setting: Setting) -> None:
        """Open them."""
        self._stores, self._setting = stores, setting
        self.stores = tuple(stores)
        self._new_lock()
        self._opened: list[tuple[str, int, str]] = []
        self.all: list[RunExplainer] = []
        self._on_model: list[Note] = []
        self._open(model)

    def __str__(self) -> str:
        """Name the runs."""
        some = ", ".join(f"the run in {store}" for store in self._stores[:3])
        return some if len(self._stores) <= 3 else f"{some} and {len(self._stores) - 3} more"

    def warn(self) -> None:
        """Warn of what is alarming about the runs and the model."""
        warn_of(self._notes(), str(self))

    @property
    def about(self) -> dict[str, Any]:
        """What every explanation says about the runs: fields of `pkexplain.Explanation`."""
        first = self.all[0]
        about = {"mode": self.mode, "run_segments": first.run_segments, "notes": self.notes}
        return about | {"input_digests": first.trajectory.manifest.digests}

    @property
    def notes(self) -> tuple[str, ...]:
        """What every explanation should say about the runs and the model."""
        return tuple(note.text for note in self._notes())

    def _notes(self) -> list[Note]:
        if len(self.all) == 1:
            return [*self.all[0].notes, *self._on_model]
        named = [
            replace(note, text=f"Run {position}: {note.text}")
            for position, run in enumerate(self.all)
            for note in run.notes
        ]
        return [*note_on_mean(len(self.all)), *named]

    @property
    def mode(self) -> int | None:
        """Permissions that all of the runs' files have; None if none is on disk."""
        modes = [m for store in self._stores if isinstance(store, DirectoryStore) and (m := store.mode) is not None]
        return functools.reduce(lambda one, other: one & other, modes) if modes else None

    def ask(self, question: Callable[[], _Answer]) -> _Answer:
        """Answer a question of one thread after the other, in a torch state of its own.

        The runs are explained on private copies of the model, whose parameters every answer moves.
        """
        if self._process != os.getpid():
            self._new_lock()  # a fork: the thread that held the lock is not here
        if self._asking == threading.get_ident():
            raise _asked_by_itself()
        with self._lock, own_torch_state():
            self._asking = threading.get_ident()
            try:
                return self._answer(question)
            finally:
                self._asking = None

    def _new_lock(self) -> None:
        self._lock, self._process, self._asking = threading.Lock(), os.getpid(), None

    def _answer(self, question: Callable[[], _Answer]) -> _Answer:
        self._refresh()
        for _ in range(_ATTEMPTS):
            try:
                return question()
            except RunDamagedError:  # unless somebody replaced the run's files while they were read
                if self.all[0].ranking.group.world_size > 1 or not self._refresh():
                    raise
            except BaseException:  # an interrupt, say: nothing of ours may listen to the user's backward passes
                for run in self.all:
                    run.trajectory_model.release()
                raise
        return question()

    def _open(self, model: nn.Module) -> None:
        for _ in range(_ATTEMPTS):
            before = [store.identity() for store in self._stores]
            try:
                runs = [RunExplainer(store, model, self._setting) for store in self._stores]
                on_model = self._on_model if self.all else _notes_on(model, runs)
            except RunDamagedError:
                if before == [store.identity() for store in self._stores]:
                    raise
                continue
            if before == [store.identity() for store in self._stores]:
                check_alike(runs)
                self.all, self._opened, self._on_model = runs, before, on_model
                for store in self._stores:
                    _sweep_obsolete(store)
                return
        raise RunBusyError(
            f"reading the run in {self._stores[0]}",
            "its files are replaced again and again",
            got=f"{_ATTEMPTS} attempts",
            expected="a run that stands still for a moment",
            source="the run's revision",
            fix="Wait until the merge or withdrawal is done",
        )

    def _refresh(self) -> bool:
        """Open the runs again if they changed since; say whether they did, in any process that shares the rows."""
        changed = False
        for store, opened in zip(self._stores, self._opened, strict=True):
            now = store.identity()
            changed = changed or now != opened
            if now[0] != opened[0]:
                raise RunNotFoundError(
                    f"reading the run in {store}",
                    "it was replaced by another run since the explainer was made",
                    got=f"run {now[0]}",
                    expected=f"run {opened[0]}",
                    source="the run's manifest",
                    fix="Make a new Explainer",
                )
        group = self.all[0].ranking.group
        if any(group.all_gather(changed)):
            self._open(self.all[0].model)
            return True
        return False


def _notes_on(model: nn.Module, runs: Sequence[RunExplainer]) -> list[Note]:
    """Take note of the user's model; several runs have different weights, and for a part of a run the user asked."""
    alone = len(runs) == 1 and runs[0].run_segments is None
    return notes_on_model(runs[0].trajectory, model) if alone else []


def _asked_by_itself() -> ConfigurationError:
    return ConfigurationError(
        "asking an explainer",
        "it is answering a question in this thread already, which moves its model",
        got="a question from its own output function or progress callback",
        expected="one question at a time",
        source="Explainer",
        fix="Ask before or after, or make a second Explainer",
    )


def _sweep_obsolete(store: Store) -> None:
    """Delete kept indices of other rows than the run's, which may hold examples that were withdrawn."""
    if isinstance(store, DirectoryStore):
        with contextlib.suppress(OSError, RunError):  # a reader may not delete; the next writer does
            for file in find_obsolete(store.path, store.manifest(), unfinished=False):
                file.unlink(missing_ok=True)


def asked_alone(method: _Method) -> _Method:
    """Let a method of an object with ``_open_runs`` be called by one thread at a time; see `OpenRuns.ask`."""

    @functools.wraps(method)
    def ask(self: Any, *args: object, **kwargs: object) -> object:
        return self._open_runs.ask(lambda: method(self, *args, **kwargs))

    return ask  # pyright: ignore[reportReturnType] - the same signature
