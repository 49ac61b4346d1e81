"""Looking after a run: finding damage, copying it while it grows, and saving what is whole of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass

from msgspec import structs
from torch import Tensor

from pkexplain.errors import RunDamagedError, RunNotFoundError
from pkexplain.files import is_remote
from pkexplain.progress import Progress, no_progress
from pkexplain.store._upload import Upload
from pkexplain.store.base import Store, exists
from pkexplain.store.directory import DirectoryStore, open_store
from pkexplain.store.manifest import FIRST_CHECKPOINT, FileEntry, Manifest

__all__ = ["Salvaged", "copy_run", "find_damage", "salvage"]


def find_damage(
    run: str | os.PathLike[str] | Store, *, progress: Progress = no_progress
) -> tuple[Manifest, dict[str, RunDamagedError]]:
    """Check every file of a run against its checksum and the manifest, also while the run is being written to.

    Args:
        run: The run.
        progress: Told how many files are done.

    Returns:
        The manifest, and an error for each damaged file, by its name.

    Raises:
        RunNotFoundError: There is no run.
        RunDamagedError: The manifest itself is damaged.
    """
    store = open_store(run)
    store.forget()  # what was read before says nothing about the disk now
    seen: dict[str, FileEntry] = {}
    found: dict[str, RunDamagedError] = {}
    while True:
        manifest = store.manifest()
        read = store.read
        if manifest.segments:
            trajectory = store.trajectory()
            manifest, read = trajectory.manifest, trajectory.read
        for done, (name, entry) in enumerate(manifest.files.items(), start=1):
            if seen.get(name) == entry:
                continue
            try:
                read(name)
            except RunDamagedError as error:
                if store.manifest().files.get(name) != entry:
                    continue  # it was replaced meanwhile: the next round reads what took its place
                found[name] = error
            seen[name] = entry
            progress("verifying", done, len(manifest.files))
        now = store.manifest()
        if all(seen.get(name) == entry for name, entry in now.files.items()):
            return now, {name: error for name, error in found.items() if name in now.files}


def copy_run(
    run: str | os.PathLike[str] | Store, to: str | os.PathLike[str] | Store, *, progress: Progress = no_progress
) -> Manifest:
    """Copy a run into another directory or to a URL, also while it is being written to.

    The copy is the run as one of its manifests described it: whole segments, with all files checked. Kept indices are
    not copied; they are built again on first use.

    Args:
        run: The run, or its URL.
        to: The directory of the copy, which must not hold a run; or a URL that fsspec can write to, such as
            ``s3://bucket/run``.
        progress: Told how many files are done.

    Returns:
        The manifest of the copy.

    Raises:
        RunNotFoundError: There is no run.
        RunExistsError: There is a run already where it should be copied to, or a file that the copy would replace.
        RunDamagedError: A file of the run is missing, truncated or altered.
        RunError: The copy cannot be written.
    """
    source = open_store(run)
    manifest = source.manifest()
    source.forget()
    if isinstance(to, Store):
        target = to
    else:
        target = Upload(os.fspath(to)) if is_remote(to) else DirectoryStore(to, mode=getattr(source, "mode", None))
    with target.lock():
        with contextlib.suppress(RunNotFoundError):
            target.manifest()
            raise exists(target)
        target.sweep()  # an earlier copy may have been interrupted
        copied: dict[str, FileEntry] = {}
        while True:
            for done, (name, entry) in enumerate(manifest.files.items(), start=1):
                if copied.get(name) != entry:
                    tensors = _read_if_there(source, name, entry)
                    if tensors is None:
                        break
                    target.put(name, tensors)
                    copied[name] = entry
                progress("copying", done, len(manifest.files))
            else:
                target.commit(manifest)
                return target.manifest()
            manifest = source.manifest()  # a file was replaced before it was copied: copy what took its place


def _read_if_there(store: Store, name: str, entry: FileEntry) -> Mapping[str, Tensor] | None:
    """Read a file; None if the run does not hold it any more, at least not as it was."""
    try:
        tensors = store.read(name)
    except RunDamagedError:
        if store.manifest().files.get(name) == entry:
            raise
        return None
    return tensors if store.manifest().files.get(name) == entry else None


@dataclass(frozen=True)
class Salvaged:
    """What was saved of a damaged run.

    Attributes:
        segments: How many of its segments are left.
        before: How many there were.
        last_step: The last optimizer step that is left.
        damaged: The names of the damaged files.
    """

    segments: int
    before: int
    last_step: int
    damaged: tuple[str, ...]


def salvage(run: str | os.PathLike[str] | Store, *, progress: Progress = no_progress) -> Salvaged:
    """Reduce a damaged run to the whole segments before the first damaged one.

    What is left is an account up to an earlier step, which closes: explanations are of the model as it was then, and
    training can be resumed from there. Later segments are deleted, also those that are whole: their displacements start
    from a checkpoint that is not there. `pkexplain.Explainer` reads the same segments of a run that is left as it is,
    with ``segments=``.

    Args:
        run: The run.
        progress: Told how many files are done.

    Returns:
        What is left, and what was damaged.

    Raises:
        RunNotFoundError: There is no run.
        RunDamagedError: Nothing can be saved: the manifest, the first checkpoint or the first segment is damaged.
        RunBusyError: The run is being written to.
    """
    store = open_store(run, "salvaging")
    store.manifest()  # before the lock makes a directory where there is no run
    with store.lock():
        before, damaged = find_damage(store, progress=progress)
        first_bad = next(
            (t for t, segment in enumerate(before.segments) if damaged.keys() & set(segment.files.names)),
            len(before.segments),
        )
        lost = damaged.get(FIRST_CHECKPOINT)
        if lost is not None or (damaged and not first_bad):
            raise lost or next(iter(damaged.values()))
        if damaged:
            after = before.first(first_bad)
            kept = tuple(state for state in after.states if not damaged.keys() & set(state.files))
            ended = f"salvaged: {first_bad} of {len(before.segments)} segments are left"
            store.reopen()
            store.commit(structs.replace(after, states=kept, revision=before.revision + 1, ended=ended))
    step = before.segments[first_bad - 1].summary.last_step if before.segments else 0
    return Salvaged(first_bad, len(before.segments), step, tuple(damaged))
