"""What goes wrong with a run, made to happen: kills at chosen moments, forged files, processes without room."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

import pkexplain as pk
from pkexplain.errors import RunExistsError, RunNotFoundError
from tests.trainings import Training

PHASES = ("training", "writing a file", "between files", "writing the manifest", "in save()", "own checkpoint")


class Watch:
    """What a process is doing, in memory that is left when it is killed: its phase, and the segments it has finished.

    Args:
        kill_at: Let the process die by itself when it has entered this phase so many times.
        delay: And after so many seconds more.
    """

    def __init__(self, kill_at: tuple[str, int] | None = None, delay: float = 0.0) -> None:
        self._memory, self._kill_at, self._delay = mmap.mmap(-1, 12), kill_at, delay
        self._entered: Counter[str] = Counter()
        self.saving = False

    @property
    def phase(self) -> str:
        return PHASES[struct.unpack_from("i", self._memory, 0)[0]]

    @property
    def segments(self) -> set[int]:
        """How many segments the last manifest held, or that which was being written."""
        return set(struct.unpack_from("ii", self._memory, 4))

    def note_segments(self, before: int, after: int) -> None:
        struct.pack_into("ii", self._memory, 4, before, after)

    @contextmanager
    def during(self, phase: str, after: str) -> Iterator[None]:
        """Be in a phase, and afterwards in another."""
        self.enter(phase)
        yield
        self.enter("in save()" if self.saving else after)

    def enter(self, phase: str) -> None:
        struct.pack_into("i", self._memory, 0, PHASES.index(phase))
        self._entered[phase] += 1
        if (phase, self._entered[phase]) == self._kill_at:
            if self._delay == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the system ends the process, whatever it is doing
            signal.setitimer(signal.ITIMER_REAL, self._delay)


class WatchedStore(pk.DirectoryStore):
    """A directory that says what it is doing; it writes as any other."""

    watch = Watch()

    def put(self, name, tensors):
        with self.watch.during("writing a file", after="between files"):
            return super().put(name, tensors)

    def commit(self, manifest):
        before, after = self.watch.segments, len(manifest.segments)
        self.watch.note_segments(max(before), after)
        with self.watch.during("writing the manifest", after="training"):
            super().commit(manifest)
        self.watch.note_segments(after, after)


class WatchedTraining(Training):
    """A training that says what it is doing."""

    def __init__(self, directory: Path, *args: Any, watch: Watch | None = None, **kwargs: Any) -> None:
        super().__init__(directory, *args, **kwargs)
        self.watch = watch or Watch()
        self.store = WatchedStore(self.run)
        self.store.watch = self.watch

    def go_with_patience(self):
        """Go on, or start anew where nothing was saved: then the run is deleted, its manifest first."""
        try:
            self.go()
        except (RunExistsError, RunNotFoundError):
            self.watch.note_segments(max(self.watch.segments), 0)
            (self.run / "manifest.json").unlink()
            self.watch.note_segments(0, 0)
            shutil.rmtree(self.run)
            self.go()

    def save(self, recorder, epoch):
        real = recorder.save

        def watched() -> None:
            self.watch.saving = True
            with self.watch.during("in save()", after="own checkpoint"):
                real()
                self.watch.saving = False

        recorder.save = watched
        super().save(recorder, epoch)
        del recorder.save
        self.watch.enter("training")


def killed(work: Callable[[], None], longest: float | None, chance: random.Random) -> bool:
    """Run some work in a process that is killed after a random time, or kills itself; say whether it was killed."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    if longest is not None:
        time.sleep(chance.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL, -signal.SIGALRM), "the work failed by itself"
    return status != 0


def outcome(work: Callable[[], Any], prepare: Callable[[], None] = lambda: None) -> tuple[str, str, int]:
    """Run some work in a process of its own.

    Args:
        work: What to do.
        prepare: What to do before (give up rights, limit memory).

    Returns:
        The name of the error's class (``""`` for none), its message or the result, and how many bytes more than before
        the process held in memory at most.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        found: tuple[str, str, int] = "died", "", 0
        try:
            prepare()
            Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        except OSError:
            pass
        try:
            before = _peak()
            found = "", str(work()), _peak() - before
        except BaseException as error:
            found = type(error).__name__, str(error), _peak() - before
        finally:
            with os.fdopen(writer, "w") as stream:
                json.dump(found, stream)
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        told = stream.read()
    os.waitpid(child, 0)
    assert told, "the process died"
    return tuple(json.loads(told))


def _peak() -> int:
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.partition("VmHWM:")[2].split()[0])


def limit_memory(more: int) -> None:
    """Let this process take so many bytes of address space more."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + more, used + more))


# ---------------------------------------------------------------------------------------------------------- forgeries


def reseal(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest, with its own checksum, as somebody who knows the format could."""
    content = json.loads((run / "manifest.json").read_text())
    content.pop("sha256")
    change(content)
    plain = json.dumps(content, sort_keys=True, separators=(",", ":"))
    content["sha256"] = hashlib.sha256(plain.encode()).hexdigest()
    (run / "manifest.json").write_text(json.dumps(content))


def forge(run: Path, name: str, content: bytes) -> None:
    """Put other bytes in place of a file, and let the manifest vouch for them."""
    (run / name).write_bytes(content)
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    reseal(run, lambda manifest: manifest["files"].update({name: entry}))


def forge_tensors(run: Path, name: str, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor] | None]) -> None:
    """Change the tensors of a file, and let the manifest vouch for them."""
    tensors = {key: value.clone() for key, value in safetensors.torch.load_file(run / name).items()}
    changed = change(tensors)
    forge(run, name, safetensors.torch.save({**(tensors if changed is None else changed)}))


def content_of(run: Path) -> dict[str, bytes]:
    """Read all files of a run."""
    return {str(f.relative_to(run)): f.read_bytes() for f in sorted(run.rglob("*")) if f.is_file()}


def say(text: str) -> None:
    """Show a measured figure, where pytest does not capture what is printed (`make stress`)."""
    print(text, file=sys.stderr, flush=True)
