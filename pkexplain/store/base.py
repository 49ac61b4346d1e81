"""Where a run is kept: what every store can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from numbers import Integral
from typing import Any

from torch import Tensor

from pkexplain.errors import ConfigurationError, RunBusyError, RunDamagedError, RunExistsError, RunNotFoundError
from pkexplain.files import checksum
from pkexplain.store._validation import Layout, MisfitError
from pkexplain.store.manifest import FileEntry, Manifest
from pkexplain.store.trajectory import Trajectory

__all__ = ["Store", "busy", "damaged", "exists", "not_found"]


class Store(ABC):
    """Where a run's manifest and tensors are kept."""

    def __repr__(self) -> str:
        """Name the store in one line, without reading it."""
        return f"<{type(self).__name__} {self}>"

    @abstractmethod
    def create(self, manifest: Manifest, overwrite: bool = False) -> None:
        """Start a run; ``overwrite`` deletes one that is there.

        Raises:
            RunExistsError: There is one already.
            RunError: The run cannot be written.
        """

    @abstractmethod
    def put(self, name: str, tensors: Mapping[str, Tensor]) -> FileEntry:
        """Write tensors under a name; they count once `commit` has listed them.

        Returns:
            The size and checksum of the file, for the manifest.

        Raises:
            RunError: The file cannot be written.
        """

    @abstractmethod
    def note(self, name: str, entry: FileEntry) -> None:
        """List a file that another process has written in the next manifest."""

    @abstractmethod
    def reopen(self) -> Manifest:
        """Open an existing run for writing; return its manifest."""

    @abstractmethod
    def lock(self, wait: float = 0.0) -> AbstractContextManager[object]:
        """Keep every other writer out until the context exits.

        Args:
            wait: How many seconds to wait for another writer.

        Raises:
            RunBusyError: There is one already.
        """

    @abstractmethod
    def commit(self, manifest: Manifest) -> None:
        """Replace the manifest, in one step; the store fills in its files.

        Files that the manifest does not name any more are deleted after that, or by the next writer.
        """

    def forget(self) -> None:  # noqa: B027 - what is in memory need not be read again
        """Read files again, and check them, when they are next asked for."""

    def identity(self) -> tuple[str, int, str]:
        """The run's id, its revision and what tells copies apart: they change when files are replaced, not by growth.

        Raises:
            RunNotFoundError: There is no run.
            RunDamagedError: The manifest was altered.
        """
        manifest = self.manifest()
        first = [f"{n} {manifest.files[n].sha256}" for s in manifest.segments[:1] for n in s.files.names]
        return manifest.run_id, manifest.revision, checksum(f"{manifest.withdrawn} {first}")

    def sweep(self) -> list[str]:
        """Delete what the run does not consist of: files of killed writers, and indices of other rows.

        Call it with the run locked.

        Returns:
            The names of the deleted files.

        Raises:
            RunError: One could not be deleted.
        """
        return []

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

    def trajectory(self, segments: int | None = None) -> Trajectory:
        """Read the run.

        Args:
            segments: Only so many of its first segments.

        Raises:
            ConfigurationError: There are not so many.
            RunNotFoundError: There is no run, or it holds no finished segment.
            RunDamagedError: The manifest is not a run's; files are checked against it when they are read.
        """
        manifest = self.manifest()
        if not manifest.segments:
            raise RunNotFoundError(
                f"reading the run in {self}",
                "it holds no finished segment",
                got="0 segments",
                expected="at least 1",
                source="the run's manifest",
                fix="Let the training loop finish one segment (an epoch, by default); if it was interrupted before, "
                "begin again: Recorder(…) replaces a run without segments",
            )
        if segments is not None:
            known = isinstance(segments, Integral) and not isinstance(segments, bool)
            if not known or not 1 <= segments <= len(manifest.segments):
                raise ConfigurationError(
                    f"reading {segments} segments of the run in {self}",
                    "it does not have so many",
                    got=repr(segments),
                    expected=f"1 to {len(manifest.segments)}",
                    source="the run's manifest",
                    fix="Leave segments out for all",
                )
            manifest = manifest.first(int(segments))
        try:
            trajectory = Trajectory.of(manifest, self.read)
        except (TypeError, ValueError, OverflowError) as error:
            raise damaged(
                self, "manifest.json", "it is not a run's manifest", f"{error!r}", "a manifest that a recorder wrote"
            ) from error
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
    """Make the error for a damaged file of a run."""
    return RunDamagedError(
        f"reading {name} of the run in {store}",
        wrong,
        got=got,
        expected=expected,
        source="the run's manifest",
        fix="Restore the file from a copy, or record the run again"
        if name == "manifest.json"
        else "Restore the file from a copy, or keep the whole segments before it with `pkexplain salvage`",
    )


def busy(store: Store) -> RunBusyError:
    """Make the error for a run that is being written to."""
    return RunBusyError(
        f"writing to the run in {store}",
        "it is already being written to",
        got="a second writer",
        expected="one at a time",
        source="the run's lock",
        fix="Wait until the other recorder, merge or withdrawal, or an explainer that keeps its index, is done",
    )


def exists(store: Store, wrong: str = "it already holds a run") -> RunExistsError:
    """Make the error for a directory that already holds a run, or files that a run would replace."""
    return RunExistsError(
        f"recording into {store}",
        wrong,
        got="a manifest" if wrong.endswith("run") else "a file of somebody else",
        expected="an empty directory",
        source="manifest.json" if wrong.endswith("run") else "the directory",
        fix="Choose another directory, continue with Recorder.resume, or replace the run: Recorder(…, overwrite=True)"
        if wrong.endswith("run")
        else "Choose another directory",
    )


def not_found(store: Store) -> RunNotFoundError:
    """Make the error for a missing run."""
    return RunNotFoundError(
        f"reading the run in {store}",
        "there is no run",
        got="no manifest.json",
        expected="a recorded run",
        source="the path given",
        fix="Give the directory that was passed to pkexplain.Recorder",
    )
