"""Writing a run: segments, checkpoints and states of one or several processes, safe against a kill at any time.

Every process writes its own rows; the first one writes the rest, and the manifest last.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, TypeVar

from msgspec.structs import replace
from torch import Tensor

from pkexplain.distributed import ProcessGroup
from pkexplain.errors import RunError
from pkexplain.store.base import Store
from pkexplain.store.manifest import (
    FIRST_CHECKPOINT,
    Manifest,
    OptimizerEntry,
    SegmentEntry,
    SegmentFiles,
    SegmentSummary,
    StateEntry,
)
from pkexplain.store.trajectory import Checkpoint, Segment

__all__ = ["STATES_KEPT", "RunWriter"]

STATES_KEPT = 2
"""The last state, and the one before it, in case the user's own checkpoint for the last was never written."""

_T = TypeVar("_T")


class RunWriter:
    """Writes a run.

    Args:
        store: Where to write it.
        group: The processes that record.
        keeps: How many saved states are kept; None for all.
    """

    def __init__(self, store: Store, group: ProcessGroup, keeps: int | None = STATES_KEPT) -> None:
        """Write nothing yet."""
        self._keeps = keeps
        self._store, self._group, self._first = store, group, group.rank == 0
        self._held = ExitStack()
        self._now: Manifest | None = None

    def __len__(self) -> int:
        """Return the number of finished segments."""
        return len(self._manifest.segments)

    def lock(self) -> None:
        """Keep every other writer out until `close`.

        Raises:
            RunBusyError: There is another writer.
        """
        self._together(lambda: self._held.enter_context(self._store.lock()) if self._first else None)

    def start(self, manifest: Manifest, checkpoint: Checkpoint, overwrite: bool = False) -> None:
        """Start a run with its first checkpoint.

        Args:
            manifest: Of a run without segments; it is given the run's id.
            checkpoint: θ_0.
            overwrite: Whether to delete a run that is there.

        Raises:
            RunExistsError: There is one already.
            RunError: The run cannot be written.
        """
        self._now = replace(manifest, run_id=self._group.all_gather(uuid.uuid4().hex)[0])

        def write() -> None:
            if self._first:
                self._store.create(self._manifest, overwrite)
                self._store.put(FIRST_CHECKPOINT, checkpoint.tensors())
                self._store.commit(self._manifest)

        self._together(write)

    def resume(self, manifest: Manifest, ended: str, segments: int) -> None:
        """Continue a run after its first segments; what follows them is dropped.

        Args:
            manifest: The run's manifest.
            ended: How it ended, in words, from now on.
            segments: The number of segments that stay.
        """
        states = tuple(state for state in manifest.states if state.segments <= segments)
        drops = segments < len(manifest.segments) or len(states) < len(manifest.states)
        self._now = replace(
            manifest,
            segments=manifest.segments[:segments],
            states=states,
            revision=manifest.revision + drops,  # new files get other names than those that are dropped
            ended=ended,
        )

        def write() -> None:
            if self._first:
                self._store.reopen()
                self._store.commit(self._manifest)

        self._together(write)

    def segment(
        self,
        segment: Segment,
        summary: SegmentSummary,
        checkpoint: Checkpoint,
        manifest: Manifest,
    ) -> None:
        """Write a finished segment; after an error it can be written again.

        Args:
            segment: The segment, with the rows of this process.
            summary: Its numbers.
            checkpoint: θ at its end.
            manifest: The run's description now; this writer adds its own entries.
        """
        counts = self._group.all_gather(len(segment.shards[0]))
        files = SegmentFiles.named(len(self), counts, self._manifest.revision)
        self._put_each(files.rows[self._group.rank], segment.shards[0].tensors())
        entries = (*self._manifest.segments, SegmentEntry(summary=summary, files=files))

        def write() -> Manifest:
            after = self._counted(manifest, segments=entries)
            if self._first:
                self._store.put(files.vectors, segment.tensors())
                self._store.put(files.checkpoint, checkpoint.tensors())
                self._store.commit(after)
            return after

        self._now = self._together(write)

    def state(self, tensors: Mapping[str, Tensor], optimizer: str, settings: OptimizerEntry) -> None:
        """Write the state after the last segment, each process its own, unless it is there already.

        Args:
            tensors: This process's state.
            optimizer: Checksum of the optimizer's state.
            settings: The optimizer's class and options.
        """
        after, revision, optimizer = len(self), self._manifest.revision, self._group.all_gather(optimizer)[0]
        here = [state for state in self._manifest.states if state.segments == after]
        if any(state.optimizer == optimizer for state in here):
            same = tuple(replace(s, settings=settings) if s.segments == after else s for s in self._manifest.states)
            if same != self._manifest.states:
                now = replace(self._manifest, states=same)
                self._together(lambda: self._store.commit(now) if self._first else None)
                self._now = now
            return
        if here:
            revision += 1  # a reader may be reading the files of that name
        end = f"-{revision}" if revision else ""
        names = tuple(f"states/{after:05d}.{rank:03d}{end}.safetensors" for rank in range(self._group.world_size))
        self._put_each(names[self._group.rank], tensors)
        before = self._manifest.states
        others = [state for state in before if state.segments != after]
        kept = others if self._keeps is None else others[1 - self._keeps :] if self._keeps > 1 else []
        new = StateEntry(segments=after, files=names, optimizer=optimizer, settings=settings)
        then = replace(self._manifest, states=(*kept, new), revision=revision)
        self._together(lambda: self._store.commit(then) if self._first else None)
        self._now = then

    def close(self, manifest: Manifest) -> None:
        """Write the last manifest and release the lock; new examples count once a segment holds their rows."""
        now = self._manifest
        last = self._counted(manifest, num_examples=now.num_examples if now.segments else manifest.num_examples)
        try:
            self._together(lambda: self._store.commit(last) if self._first else None)
        finally:
            self.release()

    def release(self) -> None:
        """Release the lock."""
        self._held.close()

    def _put_each(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a file in every process, and tell the first process about all of them."""
        description = self._together(lambda: self._store.put(name, tensors))
        for other, described in self._group.all_gather((name, description)):
            if self._first and other != name:
                self._store.note(other, described)

    def _together(self, write: Callable[[], _T]) -> _T:
        """Write; an error in one process is raised in all of them, so that none waits for another.

        Raises:
            RunError: A process could not write.
        """
        found, mine = None, None
        try:
            found = write()
        except RunError as error:
            mine = error
        except Exception as error:  # no memory left, say: the others must not wait for this process
            if self._group.world_size == 1:
                raise
            mine = RunError("writing the run", str(error), type(error).__name__, "files", "a process", "Read its error")
        wrong = [error for error in self._group.all_gather(mine) if error is not None]
        if wrong:
            raise mine or wrong[0]
        return found  # pyright: ignore[reportReturnType] - write() has returned it

    @property
    def _manifest(self) -> Manifest:
        assert self._now is not None, "start or resume comes first"
        return self._now

    def _counted(self, manifest: Manifest, **changes: Any) -> Manifest:
        """Add this writer's own entries to a manifest."""
        ours = {
            name: getattr(self._manifest, name) for name in ("run_id", "revision", "withdrawn", "segments", "states")
        }
        return replace(manifest, **{**ours, **changes})
