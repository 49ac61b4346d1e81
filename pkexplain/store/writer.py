"""Writing a run: segments, checkpoints and states of several processes, in an order that a kill cannot break.

Every process writes the rows that it keeps; the first one writes the rest, and the manifest last.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import Tensor

from pkexplain.distributed import ProcessGroup
from pkexplain.errors import RunError
from pkexplain.projection.maps import Projector
from pkexplain.store.base import Store
from pkexplain.store.trajectory import FIRST_CHECKPOINT, Checkpoint, Segment, SegmentFiles, SegmentSummary

__all__ = ["RunWriter", "describe_optimizer"]

_STATES_KEPT = 2
"""The last state, and the one before it, in case the user's own checkpoint beside the last was not written any more."""

_T = TypeVar("_T")


class RunWriter:
    """Writes a run.

    Args:
        store: Where it goes.
        group: The processes that record.
    """

    def __init__(self, store: Store, group: ProcessGroup) -> None:
        """Take note; nothing is written yet."""
        self._store, self._group, self._first = store, group, group.rank == 0
        self._held = ExitStack()
        self._about: dict[str, Any] = {}
        self._segments: list[dict[str, Any]] = []
        self._states: list[dict[str, Any]] = []
        self.revision = 0

    def __len__(self) -> int:
        """Return the number of finished segments."""
        return len(self._segments)

    def lock(self) -> None:
        """Keep every other writer out until `close`.

        Raises:
            RunBusyError: There is one already.
        """
        self._together(lambda: self._held.enter_context(self._store.lock()) if self._first else None)

    def start(self, about: Mapping[str, Any], checkpoint: Checkpoint) -> None:
        """Start a run with its first checkpoint.

        Raises:
            RunExistsError: There is one already.
            RunError: The place cannot be written to.
        """
        self._about = {"run_id": self._group.all_gather(uuid.uuid4().hex)[0], **about}

        def write() -> None:
            if self._first:
                self._store.create(self._manifest())
                self._store.put(FIRST_CHECKPOINT, checkpoint.tensors())
                self._store.commit(self._manifest())

        self._together(write)

    def resume(self, manifest: Mapping[str, Any], about: Mapping[str, Any], segments: int) -> None:
        """Go on with a run after its first segments; what comes behind them is dropped.

        Args:
            manifest: The run's manifest.
            about: What is different in it from now on.
            segments: How many segments stay.
        """
        known = ("segments", "states", "files", "revision", "format_version")
        self._about = {name: value for name, value in manifest.items() if name not in known} | dict(about)
        self._segments, gone = list(manifest["segments"][:segments]), manifest["segments"][segments:]
        self._states = [state for state in manifest["states"] if state["segments"] <= segments]
        lost = [state for state in manifest["states"] if state["segments"] > segments]
        self.revision = manifest["revision"] + 1

        def write() -> None:
            if self._first:
                self._store.reopen()
                for entry in gone:
                    self._store.drop(SegmentFiles.from_description(entry["files"]).names)
                self._store.drop(name for state in lost for name in state["files"])
                self._store.commit(self._manifest())

        self._together(write)

    def segment(
        self,
        segment: Segment,
        summary: SegmentSummary,
        checkpoint: Checkpoint,
        projector: Projector | None,
        about: Mapping[str, Any],
    ) -> None:
        """Write a finished segment.

        Args:
            segment: The segment, with the rows of this process.
            summary: Its numbers.
            checkpoint: θ at its end.
            projector: The projection.
            about: What is new in the manifest.
        """
        self._about |= about
        counts = self._group.all_gather(len(segment.shards[0]))
        files = SegmentFiles.named(len(self._segments), counts, self.revision)
        own = files.rows[self._group.rank]
        self._put_each(own, segment.shards[0].tensors())

        def write() -> None:
            if self._first:
                if not self._segments and projector is not None:
                    self._store.put("projection.safetensors", projector.tensors())
                self._store.put(files.vectors, segment.tensors())
                self._store.put(files.checkpoint, checkpoint.tensors())
                self._segments.append({"summary": vars(summary), "files": vars(files)})
                self._store.commit(self._manifest())
            else:
                self._segments.append({"summary": vars(summary), "files": vars(files)})

        self._together(write)

    def state(self, tensors: Mapping[str, Tensor], optimizer: str) -> None:
        """Write what is in flight after the last segment, each process its own.

        Args:
            tensors: What is in flight here.
            optimizer: Checksum of the optimizer's state.
        """
        after = len(self._segments)
        end = f"-{self.revision}" if self.revision else ""
        names = [f"states/{after:05d}.{rank:03d}{end}.safetensors" for rank in range(self._group.world_size)]
        self._put_each(names[self._group.rank], tensors)
        earlier = [state for state in self._states if state["segments"] != after]
        gone = earlier[: max(0, len(earlier) + 1 - _STATES_KEPT)]
        kept = earlier[len(gone) :]
        gone = [state for state in self._states if state not in kept and state["files"] != names]
        self._states = [*kept, {"segments": after, "files": names, "optimizer": optimizer}]

        def write() -> None:
            if self._first:
                self._store.drop(name for state in gone for name in state["files"])
                self._store.commit(self._manifest())

        self._together(write)

    def close(self, about: Mapping[str, Any]) -> None:
        """Write the last manifest and let others write; examples count once a segment holds rows of them."""
        self._about |= {n: value for n, value in about.items() if n != "num_examples" or not self._segments}
        try:
            self._together(lambda: self._store.commit(self._manifest()) if self._first else None)
        finally:
            self.release()

    def release(self) -> None:
        """Let others write."""
        self._held.close()

    def _put_each(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a file of every process, and let the first know of all of them."""
        description = self._together(lambda: self._store.put(name, tensors))
        for other, described in self._group.all_gather((name, description)):
            if self._first and other != name:
                self._store.note(other, described)

    def _together(self, write: Callable[[], _T]) -> _T:
        """Write; an error of one process is one of all of them, so that none waits for another.

        Raises:
            RunError: One of them could not write.
        """
        found, mine = None, None
        try:
            found = write()
        except RunError as error:
            mine = error
        wrong = [error for error in self._group.all_gather(mine) if error is not None]
        if wrong:
            raise mine or wrong[0]
        return found  # pyright: ignore[reportReturnType] - write() has returned it

    def _manifest(self) -> dict[str, Any]:
        dynamic = {"segments": self._segments, "states": self._states, "revision": self.revision}
        return {**self._about, **dynamic}


def describe_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Describe an optimizer's kind and parameter groups in plain data."""
    plain = [
        {
            name: v if isinstance(v, (bool, int, str, float)) else repr(v)
            for name, v in group.items()
            if name != "params"
        }
        for group in optimizer.param_groups
    ]
    return {"kind": type(optimizer).__name__, "groups": plain}
