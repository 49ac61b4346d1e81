"""Where a run is kept: what every store can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from torch import Tensor

from pkexplain.errors import RunBusyError, RunDamagedError, RunExistsError, RunNotFoundError
from pkexplain.store._validation import Layout, MisfitError
from pkexplain.store.manifest import FileEntry, Manifest
from pkexplain.store.trajectory import Trajectory

__all__ = ["Store", "busy", "damaged", "exists", "not_found"]


class Store(ABC):
    """Where a run's manifest and tensors are kept."""

    @abstractmethod
    def create(self, manifest: Manifest) -> None:
        """Start a run.

        Raises:
            RunExistsError: There is one already.
            RunError: The place cannot be written to.
        """

    @abstractmethod
    def put(self, name: str, tensors: Mapping[str, Tensor]) -> FileEntry:
        """Write tensors under a name; they count once `commit` has named them.

        Returns:
            The size and checksum of the file, for the manifest.

        Raises:
            RunError: The file cannot be written.
        """

    @abstractmethod
    def note(self, name: str, entry: FileEntry) -> None:
        """Take a file into the next manifest that another process has put."""

    @abstractmethod
    def drop(self, names: Iterable[str]) -> None:
        """Leave files out of the next manifest; they are removed once it is there."""

    @abstractmethod
    def reopen(self) -> Manifest:
        """Take up a run that is there, to write on in it; return its manifest."""

    @abstractmethod
    def lock(self) -> AbstractContextManager[object]:
        """Keep every other writer out until the context is left.

        Raises:
            RunBusyError: There is one already.
        """

    @abstractmethod
    def commit(self, manifest: Manifest) -> None:
        """Replace the manifest, in one step; the store fills in its files."""

    @abstractmethod
    def manifest(self) -> Manifest:
        """Read the manifest.

        Raises:
            RunNotFoundError: There is no run.
            RunDamagedError: The manifest was altered or is of another format.
        """

    @abstractmethod
    def read(self, name: str) -> Mapping[str, Tensor]:
        """Read the tensors under a name, checked against the manifest.

        Raises:
            RunDamagedError: The file is missing, truncated or altered.
        """

    def trajectory(self) -> Trajectory:
        """Read the run.

        Raises:
            RunNotFoundError: There is no run, or it holds no finished segment.
            RunDamagedError: The manifest is not that of a run; files are checked against it as they are read.
        """
        manifest = self.manifest()
        if not manifest.segments:
            raise RunNotFoundError(
                f"reading the run in {self}",
                "it holds no finished segment",
                got="0 segments",
                expected="at least 1",
                source="the run's manifest",
                fix="Let the training loop finish one segment (an epoch, by default)",
            )
        try:
            trajectory = Trajectory.of(manifest, self.read)
        except (TypeError, ValueError, OverflowError) as error:
            raise damaged(self, "manifest.json", "it is not that of a run", f"{error!r}", "a run's manifest") from error
        layout = Layout.of(trajectory)

        def read(name: str) -> Mapping[str, Tensor]:
            tensors = self.read(name)
            try:
                layout.check(name, tensors)
            except MisfitError as misfit:
                raise damaged(self, name, misfit.wrong, misfit.got, misfit.expected) from misfit
            return tensors

        return replace(trajectory, read=read)


def damaged(store: Store, name: str, wrong: str, got: Any, expected: Any) -> RunDamagedError:
    """Say what is wrong with a file of a run."""
    return RunDamagedError(
        f"reading {name} of the run in {store}",
        wrong,
        got=got,
        expected=expected,
        source="the run's manifest",
        fix="Restore the file from a copy, or record the run again",
    )


def busy(store: Store) -> RunBusyError:
    """Say that somebody else writes to a run."""
    return RunBusyError(
        f"writing to the run in {store}",
        "it is being written already",
        got="a second writer",
        expected="one at a time",
        source="the run's lock",
        fix="Wait until the other recorder, merge or withdrawal is done, or choose another directory",
    )


def exists(store: Store) -> RunExistsError:
    """Say that there is a run already."""
    return RunExistsError(
        f"recording into {store}",
        "it already holds a run",
        got="a manifest",
        expected="an empty place",
        source="manifest.json",
        fix="Choose another directory, go on with this run by Recorder.resume, or delete it first",
    )


def not_found(store: Store) -> RunNotFoundError:
    """Say that there is no run."""
    return RunNotFoundError(
        f"reading the run in {store}",
        "there is no run",
        got="no manifest.json",
        expected="a recorded run",
        source="the path given",
        fix="Give the directory that was passed to pkexplain.Recorder",
    )
