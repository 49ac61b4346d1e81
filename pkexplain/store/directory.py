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
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import msgspec
from filelock import FileLock, Timeout
from torch import Tensor

from pkexplain.errors import RunDamagedError, RunError
from pkexplain.files import checksum_file, checksum_json, is_remote, local_path, make_folder, write_atomically
from pkexplain.store._ownership import MARK, claims, is_temporary, was_written_by_us
from pkexplain.store._run_errors import elsewhere, undeletable, unreadable, unwritable
from pkexplain.store.base import Store, busy, damaged, exists, not_found
from pkexplain.store.index_files import find_obsolete
from pkexplain.store.manifest import FILE_NAME, FORMAT_VERSION, FileEntry, Manifest

__all__ = ["DirectoryStore", "open_store"]

LARGEST_MANIFEST = 1 << 26
"""Bytes, enough for some 80,000 segments; parsed JSON can take twenty times its size."""
FOLDERS = ("checkpoints", "segments", "rows", "states", ".")


class DirectoryStore(Store):
    """A run in a directory.

    Args:
        path: The directory; it is created when a run starts. It may hold other files; they are left alone.
        mode: Permissions of the run's files, for example ``0o600`` for their owner only (and its folders can be entered
            by the same users); None for those that the umask leaves, or that the run has already.

    Raises:
        ConfigurationError: The path is a URL.
    """

    def __init__(self, path: str | os.PathLike[str], mode: int | None = None) -> None:
        """Name a directory, without touching it."""
        local = local_path(path, "DirectoryStore(path)")
        self.path, self._name = local.absolute(), os.fspath(path)  # the program may change its directory
        self._given_mode = mode
        self._held: tuple[int, int] | None = None
        self._files: dict[str, FileEntry] = {}
        self._dropped: set[str] = set()
        self._read: dict[str, tuple[FileEntry, Mapping[str, Tensor]]] = {}
        self._known: Manifest | None = None
        self._seen: tuple[tuple[int, int, int], tuple[str, int, str]] | None = None

    def __str__(self) -> str:
        """Return the path, as it was given."""
        return str(self._name)

    @property
    def mode(self) -> int | None:
        """The permissions of the run's files; None before it is created, if they were not given."""
        if self._given_mode is not None:
            return self._given_mode
        try:
            return stat.S_IMODE((self.path / "manifest.json").stat().st_mode)
        except OSError:
            return None

    def create(self, manifest: Manifest, overwrite: bool = False) -> None:
        """Start a run; one that was interrupted before its first segment was finished is replaced."""
        try:
            make_folder(self.path, self._given_mode)
        except OSError as error:
            raise unwritable(self, "manifest.json", error) from error
        try:
            before = self.manifest() if (self.path / "manifest.json").exists() else None
        except RunDamagedError as error:
            raise exists(self) from error
        if before is not None and before.segments and not overwrite:
            raise exists(self)
        if before is not None and overwrite:
            self._delete("manifest.json")  # then its files are no run's, and are swept
        self._files, self._read, self._dropped = {}, {}, set()  # of a run that was here before
        self.sweep()
        for name in claims(self.path, FOLDERS):
            if before is None or name not in before.files:
                self._refuse_other(name)
        self.commit(manifest)

    def reopen(self) -> Manifest:
        """Open the existing run for writing, and remove what a killed writer left."""
        manifest = self.manifest()
        self._files, self._dropped = dict(manifest.files), set()
        self.forget()
        self.sweep()
        return manifest

    def forget(self) -> None:
        """Read files again, and check them, when they are next asked for."""
        self._read = {}

    def sweep(self) -> list[str]:
        """Delete what the run does not consist of: files of killed writers, and indices of other rows."""
        manifest = self.manifest() if (self.path / "manifest.json").exists() else None
        listed, found = manifest.files if manifest else {}, sorted(self._dropped)
        for folder in FOLDERS:
            self._keep_inside(folder)
            for file in sorted((self.path / folder).glob("*")):
                name = file.relative_to(self.path).as_posix()
                stray = FILE_NAME.fullmatch(name) and name not in listed and was_written_by_us(file)
                if name not in found and (stray or is_temporary(self.path, name)):
                    found.append(name)
        if manifest is not None:
            self._keep_inside("index")
            obsolete = find_obsolete(self.path, manifest, unfinished=True)
            found += [file.relative_to(self.path).as_posix() for file in obsolete]
        for name in found:
            self._delete(name)
        self._dropped = set()
        return found

    @contextmanager
    def lock(self, wait: float = 0.0) -> Iterator[object]:
        """Keep every other writer out, with a lock that the system releases if the process dies."""
        self._keep_inside("lock")
        try:
            make_folder(self.path, self._given_mode)
            mode = self.mode if self.mode is not None else 0o644
            lock = FileLock(self.path / "lock", timeout=wait, mode=mode, thread_local=False)
            lock.acquire()
        except Timeout as error:
            raise busy(self) from error
        except (OSError, NotImplementedError) as error:
            raise unwritable(self, "lock", error) from error
        try:
            self._held = self._lock_identity()
            yield
        finally:
            self._held = None
            lock.release()

    def _lock_identity(self) -> tuple[int, int]:
        about = (self.path / "lock").stat()
        return about.st_dev, about.st_ino

    def _refuse_to_write_elsewhere(self, name: str) -> None:
        """Refuse to write if the directory is not the one that was locked: there may be another writer in it.

        Raises:
            RunError: It was moved, deleted or replaced.
        """
        if self._held is None:  # another process holds the lock for this one
            return
        with contextlib.suppress(OSError):
            if self._lock_identity() == self._held:
                return
        raise elsewhere(self, name)

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> FileEntry:
        """Write a file of tensors, in one step."""
        import safetensors.torch

        content = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        target = self.path / name
        self._refuse_to_write_elsewhere(name)
        self._keep_inside(name)
        if name not in self._files:
            self._refuse_other(name)
        try:
            make_folder(target.parent, self._given_mode)
            with write_atomically(target, self.mode) as temporary:
                safetensors.torch.save_file(content, temporary, metadata=MARK)
                entry = FileEntry(bytes=temporary.stat().st_size, sha256=checksum_file(temporary))
        except (OSError, safetensors.SafetensorError) as error:
            raise unwritable(self, name, error) from error
        self.note(name, entry)  # now that it is there
        return entry

    def note(self, name: str, entry: FileEntry) -> None:
        """List a file that another process has written in the next manifest."""
        self._read.pop(name, None)
        self._dropped.discard(name)
        self._files[name] = entry

    def commit(self, manifest: Manifest) -> None:
        """Replace the manifest, in one step."""
        self._refuse_to_write_elsewhere("manifest.json")
        files = {name: entry for name, entry in self._files.items() if name in manifest.names}
        content = msgspec.to_builtins(msgspec.structs.replace(manifest, files=files))
        content["sha256"] = checksum_json(content)
        try:
            text = json.dumps(content)
            if len(text) > LARGEST_MANIFEST:
                raise OSError(f"{len(text)} bytes, more than a reader accepts: record fewer, longer segments")
            with write_atomically(self.path / "manifest.json", self.mode) as temporary:
                temporary.write_text(text, encoding="utf-8")
        except OSError as error:
            raise unwritable(self, "manifest.json", error) from error
        finally:
            self._known = None
        self._dropped |= self._files.keys() - files.keys()
        self._files = files
        for name in sorted(self._dropped):
            with contextlib.suppress(RunError):  # the next writer tries again
                self._delete(name)
                self._dropped.discard(name)

    def manifest(self) -> Manifest:
        """Read the manifest and check it against its own checksum."""
        file = self.path / "manifest.json"
        try:
            if not file.is_file():
                raise not_found(self)
            self._keep_inside("manifest.json")
            size = file.stat().st_size
        except RunError:
            raise
        except (OSError, ValueError) as error:
            raise unreadable(self, "manifest.json", error) from error
        if size > LARGEST_MANIFEST:
            raise damaged(self, "manifest.json", "it is absurdly large", f"{size} bytes", f"{LARGEST_MANIFEST} at most")
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            stated = content.pop("sha256")
            found = checksum_json(content)
        except OSError as error:
            raise unreadable(self, "manifest.json", error) from error
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
            known = self._known = msgspec.convert(content, Manifest)
        except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
            raise damaged(
                self, "manifest.json", "it is not a run's manifest", error, "a manifest that a recorder wrote"
            ) from error
        for name in [name for name, (entry, _) in list(self._read.items()) if known.files.get(name) != entry]:
            self._read.pop(name, None)  # withdrawn, perhaps: it must not stay in memory
        return known

    def identity(self) -> tuple[str, int, str]:
        """The run's id, revision and contents; the manifest is only read if it was replaced since the last time."""
        try:
            about = (self.path / "manifest.json").stat()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise not_found(self) from error
        except OSError as error:
            raise unreadable(self, "manifest.json", error) from error
        stamp, seen = (about.st_ino, about.st_mtime_ns, about.st_size), self._seen
        if seen is None or seen[0] != stamp:
            seen = self._seen = stamp, super().identity()
        return seen[1]

    def read(self, name: str) -> Mapping[str, Tensor]:
        """Read a file of tensors, mapped into memory, after one check of its size and checksum."""
        kept = self._read.get(name)
        if kept is not None:
            return kept[1]
        entry = self._check(name)
        import safetensors.torch

        try:
            tensors = safetensors.torch.load_file(self.path / name)
        except (OSError, RuntimeError, safetensors.SafetensorError) as error:  # it may have been deleted just now
            raise damaged(self, name, "it cannot be read", f"{error}", "a safetensors file") from error
        self._read[name] = entry, tensors
        return tensors

    def verify(self, name: str) -> None:
        """Check one file's size and checksum against the manifest.

        Raises:
            RunDamagedError: The file is missing, truncated or altered.
        """
        self._check(name)

    def _check(self, name: str) -> FileEntry:
        stated = (self._known or self.manifest()).files.get(name)
        if stated is None:
            raise damaged(self, name, "the manifest does not list it", "no entry", "an entry")
        file = self.path / name
        self._keep_inside(name)
        try:
            about = file.stat()
            if not stat.S_ISREG(about.st_mode):  # a device may have no end
                raise FileNotFoundError(name)
            size, found = about.st_size, checksum_file(file)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise damaged(self, name, "it is missing", "no file", f"sha256 {stated.sha256}") from error
        except OSError as error:
            raise unreadable(self, name, error) from error
        if size != stated.bytes:
            wrong = "it was truncated" if size < stated.bytes else "it has grown"
            got = f"{size} bytes, sha256 {found}"
            raise damaged(self, name, wrong, got, f"{stated.bytes} bytes, sha256 {stated.sha256}")
        if found != stated.sha256:
            raise damaged(self, name, "it was altered", f"sha256 {found}", f"sha256 {stated.sha256}")
        return stated

    def _delete(self, name: str) -> None:
        try:
            (self.path / name).unlink(missing_ok=True)
        except OSError as error:
            raise undeletable(self, name, error) from error

    def _refuse_other(self, name: str) -> None:
        """Refuse to replace or delete a file that this package did not write.

        Raises:
            RunExistsError: There is one of this name.
        """
        file = self.path / name
        if file.exists() and not was_written_by_us(file):
            raise exists(self, f"a file that pkexplain did not write has the name of one of a run's: {name}")

    def _keep_inside(self, name: str) -> None:
        """Refuse a link that leads out of the run: nothing outside it may be read, written or deleted."""
        try:
            target, home = (self.path / name).resolve(), self.path.resolve()
        except (OSError, RuntimeError) as error:
            raise damaged(self, name, "it is a link that leads nowhere", error, "a file inside the run") from error
        if target != home and home not in target.parents:
            raise damaged(self, name, "it is a link that leaves the run", target, "a file inside the run")


def open_store(run: str | os.PathLike[str] | Store, writing: str = "") -> Store:
    """Return the store of a path or a URL, or the store itself; ``writing`` (words) is refused where one only reads."""
    from pkexplain.store.remote import RemoteStore  # which imports this module

    store = run if isinstance(run, Store) else RemoteStore(run) if is_remote(run) else DirectoryStore(run)
    if writing and isinstance(store, RemoteStore):
        raise store.refusal(writing)
    return store
