"""A run on disk.

A run is a manifest and tensors in safetensors files; nothing is ever unpickled. A file is written under a temporary
name, flushed to disk and renamed; the manifest, with the size and SHA-256 of every file and of itself, comes last. So
a killed run keeps every finished segment, and a file that is missing, truncated, altered or of another run is found
before a number is computed from it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec
from filelock import FileLock, Timeout
from torch import Tensor

from pkexplain.errors import RunError
from pkexplain.files import checksum_file, checksum_json, write_atomically
from pkexplain.store.base import Store, busy, damaged, exists, not_found
from pkexplain.store.manifest import FILE_NAME, FORMAT_VERSION, FileEntry, Manifest

__all__ = ["DirectoryStore", "open_store"]

_LARGEST_MANIFEST = 1 << 26
"""Bytes, enough for some 80,000 segments; parsed JSON can take twenty times its size."""


class DirectoryStore(Store):
    """A run in a directory.

    Args:
        path: The directory; it is created when a run starts.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Name a directory, without touching it."""
        self.path = Path(path)
        self._files: dict[str, FileEntry] = {}
        self._dropped: set[str] = set()
        self._read: dict[str, Mapping[str, Tensor]] = {}
        self._known: Manifest | None = None

    def __str__(self) -> str:
        """Return the path."""
        return str(self.path)

    def create(self, manifest: Manifest) -> None:
        """Start a run."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable("manifest.json", error) from error
        if (self.path / "manifest.json").exists():
            raise exists(self)
        self._files, self._read, self._dropped = {}, {}, set()  # of a run that was here before
        self._sweep()
        self.commit(manifest)

    def reopen(self) -> Manifest:
        """Open the existing run for writing, and remove what a killed writer left."""
        manifest = self.manifest()
        self._files, self._dropped = dict(manifest.files), set()
        self._sweep()
        return manifest

    def _sweep(self) -> None:
        """Remove files of a run that the manifest does not list: a killed writer left them."""
        for folder in ("checkpoints", "segments", "rows", "states", "."):
            self._keep_inside(folder)
            for file in (self.path / folder).glob("*"):
                name = file.relative_to(self.path).as_posix()
                ours = FILE_NAME.fullmatch(name) and name not in self._files
                if ours or (file.suffix == ".tmp" and not file.is_dir()):
                    file.unlink(missing_ok=True)

    @contextmanager
    def lock(self) -> Iterator[object]:
        """Keep every other writer out, with a lock that the system releases if the process dies."""
        self._keep_inside("lock")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / "lock", timeout=0, thread_local=False)
            lock.acquire()
        except Timeout as error:
            raise busy(self) from error
        except (OSError, NotImplementedError) as error:
            raise self._unwritable("lock", error) from error
        try:
            yield
        finally:
            lock.release()

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> FileEntry:
        """Write a file of tensors, in one step."""
        import safetensors.torch

        content = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        target = self.path / name
        self._keep_inside(name)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with write_atomically(target) as temporary:
                safetensors.torch.save_file(content, temporary)
                with contextlib.suppress(FileNotFoundError):  # on a machine other than the first process's
                    mode = (self.path / "manifest.json").stat().st_mode
                    temporary.chmod(mode)  # safetensors makes files that only the owner can read
                self._read.pop(name, None)
                self._dropped.discard(name)
                self._files[name] = FileEntry(bytes=temporary.stat().st_size, sha256=checksum_file(temporary))
        except (OSError, safetensors.SafetensorError) as error:
            raise self._unwritable(name, error) from error
        return self._files[name]

    def note(self, name: str, entry: FileEntry) -> None:
        """List a file that another process has written in the next manifest."""
        self._files[name] = entry

    def drop(self, names: Iterable[str]) -> None:
        """Leave files out of the next manifest; they are deleted once it is written."""
        for name in names:
            self._files.pop(name, None)
            self._read.pop(name, None)
            self._dropped.add(name)

    def commit(self, manifest: Manifest) -> None:
        """Replace the manifest, in one step."""
        content = msgspec.to_builtins(msgspec.structs.replace(manifest, files=self._files))
        content["sha256"] = checksum_json(content)
        try:
            text = json.dumps(content)
            if len(text) > _LARGEST_MANIFEST:
                raise OSError(f"{len(text)} bytes, more than a reader accepts: record fewer, longer segments")
            with write_atomically(self.path / "manifest.json") as temporary:
                temporary.write_text(text, encoding="utf-8")
            self._known = None
        except OSError as error:
            raise self._unwritable("manifest.json", error) from error
        for name in self._dropped:
            (self.path / name).unlink(missing_ok=True)
        self._dropped = set()

    def manifest(self) -> Manifest:
        """Read the manifest and check it against its own checksum."""
        file = self.path / "manifest.json"
        if not file.is_file():
            raise not_found(self)
        self._keep_inside("manifest.json")
        size = file.stat().st_size
        if size > _LARGEST_MANIFEST:
            raise damaged(
                self, "manifest.json", "it is absurdly large", f"{size} bytes", f"{_LARGEST_MANIFEST} at most"
            )
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            stated = content.pop("sha256")
            found = checksum_json(content)
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError, MemoryError) as error:
            raise damaged(self, "manifest.json", "it cannot be read", f"{error}", "JSON with a checksum") from error
        if stated != found:
            raise damaged(self, "manifest.json", "it was altered", f"sha256 {found}", f"sha256 {stated}")
        if content.get("format_version") != FORMAT_VERSION:
            version = content.get("format_version")
            raise damaged(
                self, "manifest.json", "this version of pkexplain does not know its format", version, FORMAT_VERSION
            )
        try:
            self._known = msgspec.convert(content, Manifest)
        except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
            raise damaged(
                self, "manifest.json", "it is not a run's manifest", error, "a manifest that a recorder wrote"
            ) from error
        return self._known

    def read(self, name: str) -> Mapping[str, Tensor]:
        """Read a file of tensors, mapped into memory, after one check of its size and checksum."""
        if name not in self._read:
            self.verify(name)
            import safetensors.torch

            try:
                self._read[name] = safetensors.torch.load_file(self.path / name)
            except (OSError, safetensors.SafetensorError) as error:
                raise damaged(self, name, "it cannot be read", f"{error}", "a safetensors file") from error
        return self._read[name]

    def verify(self, name: str) -> None:
        """Check one file's size and checksum against the manifest.

        Raises:
            RunDamagedError: The file is missing, truncated or altered.
        """
        stated = (self._known or self.manifest()).files.get(name)
        if stated is None:
            raise damaged(self, name, "the manifest does not list it", "no entry", "an entry")
        file = self.path / name
        self._keep_inside(name)
        if not file.is_file():
            raise damaged(self, name, "it is missing", "no file", f"sha256 {stated.sha256}")
        size, found = file.stat().st_size, checksum_file(file)
        if size != stated.bytes:
            wrong = "it was truncated" if size < stated.bytes else "it has grown"
            got = f"{size} bytes, sha256 {found}"
            raise damaged(self, name, wrong, got, f"{stated.bytes} bytes, sha256 {stated.sha256}")
        if found != stated.sha256:
            raise damaged(self, name, "it was altered", f"sha256 {found}", f"sha256 {stated.sha256}")

    def _keep_inside(self, name: str) -> None:
        """Refuse a link that leads out of the run: nothing outside it may be read, written or deleted."""
        target, home = (self.path / name).resolve(), self.path.resolve()
        if target != home and home not in target.parents:
            raise damaged(self, name, "it is a link that leaves the run", target, "a file inside the run")

    def _unwritable(self, name: str, error: Exception) -> RunError:
        return RunError(
            f"writing {name} of the run in {self}",
            "the file could not be written; what was finished before is still there",
            got=str(error),
            expected="a directory with room that can be written to",
            source="the operating system",
            fix="Free some space or choose another directory",
        )


def open_store(run: str | os.PathLike[str] | Store) -> Store:
    """Return the store of a path, or the store itself."""
    return run if isinstance(run, Store) else DirectoryStore(run)
