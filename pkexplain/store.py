"""The run on disk, or in memory with the same interface.

A run is a manifest and tensors in safetensors files; nothing is ever unpickled. A file is written beside its place,
flushed to disk and renamed; the manifest, with the size and SHA-256 of every file and of itself, comes last. So a
killed run keeps every finished segment, and a file that is missing, truncated, altered or of another run is found
before a number is made of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pkexplain.errors import RunDamagedError, RunError, RunExistsError, RunNotFoundError, message
from pkexplain.trajectory import Trajectory

__all__ = ["DirectoryStore", "MemoryStore", "Store", "checksum_file", "open_store"]

FORMAT_VERSION = 2
_FILE_NAME = re.compile(r"(?:(?:checkpoints|segments)/\d{5,9}|projection)\.safetensors")


class Store(ABC):
    """Where a run's manifest and tensors are kept."""

    @abstractmethod
    def create(self, manifest: Mapping[str, Any]) -> None:
        """Start a run.

        Raises:
            RunExistsError: There is one already.
            RunError: The place cannot be written to.
        """

    @abstractmethod
    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors under a name; they count once `commit` has named them."""

    @abstractmethod
    def commit(self, manifest: Mapping[str, Any]) -> None:
        """Replace the manifest, in one step."""

    @abstractmethod
    def manifest(self) -> dict[str, Any]:
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
        """
        manifest = self.manifest()
        if not manifest["segments"]:
            raise RunNotFoundError(
                message(
                    f"reading the run in {self}",
                    "it holds no finished segment",
                    got="0 segments",
                    expected="at least 1",
                    source="the run's manifest",
                    fix="Let the training loop finish one segment (an epoch, by default)",
                )
            )
        return Trajectory.from_manifest(manifest, self.read)


class MemoryStore(Store):
    """A run that lives as long as this object."""

    def __init__(self) -> None:
        """Make an empty place for one run."""
        self._manifest: dict[str, Any] | None = None
        self._tensors: dict[str, dict[str, Tensor]] = {}

    def __str__(self) -> str:
        """Name the place."""
        return "memory"

    def create(self, manifest: Mapping[str, Any]) -> None:
        """Start a run."""
        if self._manifest is not None:
            raise _exists(self)
        self.commit(manifest)

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep copies of tensors under a name."""
        self._tensors[name] = {key: value.detach().cpu().clone() for key, value in tensors.items()}

    def commit(self, manifest: Mapping[str, Any]) -> None:
        """Replace the manifest."""
        files = {name: {"bytes": sum(t.nbytes for t in kept.values())} for name, kept in self._tensors.items()}
        self._manifest = json.loads(json.dumps({**manifest, "format_version": FORMAT_VERSION, "files": files}))

    def manifest(self) -> dict[str, Any]:
        """Read the manifest."""
        if self._manifest is None:
            raise _not_found(self)
        return self._manifest

    def read(self, name: str) -> Mapping[str, Tensor]:
        """Read the tensors under a name."""
        return self._tensors[name]


class DirectoryStore(Store):
    """A run in a directory.

    Args:
        path: The directory; it is made when a run starts.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Point at a directory, without touching it."""
        self.path = Path(path)
        self._files: dict[str, dict[str, Any]] = {}
        self._read: dict[str, Mapping[str, Tensor]] = {}
        self._known: dict[str, Any] | None = None

    def __str__(self) -> str:
        """Name the place."""
        return str(self.path)

    def create(self, manifest: Mapping[str, Any]) -> None:
        """Start a run."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "manifest.json").touch(exist_ok=False)  # of two that start at once, one wins
        except FileExistsError as error:
            raise _exists(self) from error
        except OSError as error:
            raise self._unwritable("manifest.json", error) from error
        self._files, self._read = {}, {}  # of a run that was here before
        self.commit(manifest)

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a file of tensors beside its place, flush it and rename it."""
        import safetensors.torch

        content = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        target = self.path / name
        try:
            target.parent.mkdir(exist_ok=True)
            temporary = target.with_suffix(".tmp")
            safetensors.torch.save_file(content, temporary)
            temporary.chmod((self.path / "manifest.json").stat().st_mode)  # safetensors makes files for the owner alone
            self._read.pop(name, None)
            self._files[name] = {"bytes": temporary.stat().st_size, "sha256": checksum_file(temporary)}
            _flush_and_rename(temporary, target)
        except (OSError, safetensors.SafetensorError) as error:
            raise self._unwritable(name, error) from error

    def commit(self, manifest: Mapping[str, Any]) -> None:
        """Replace the manifest, in one step."""
        content = {**manifest, "format_version": FORMAT_VERSION, "files": self._files}
        content["sha256"] = _checksum_json(content)
        temporary = self.path / "manifest.tmp"
        try:
            temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
            _flush_and_rename(temporary, self.path / "manifest.json")
            self._known = None
        except OSError as error:
            raise self._unwritable("manifest.json", error) from error

    def manifest(self) -> dict[str, Any]:
        """Read the manifest and check it against its own checksum."""
        file = self.path / "manifest.json"
        if not file.is_file():
            raise _not_found(self)
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            stated = content.pop("sha256")
            found = _checksum_json(content)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise self._damaged("manifest.json", "it cannot be read", f"{error}", "JSON with a checksum") from error
        if stated != found:
            raise self._damaged("manifest.json", "it was altered", f"sha256 {found}", f"sha256 {stated}")
        if content["format_version"] != FORMAT_VERSION:
            raise self._damaged(
                "manifest.json", "its format is not known here", content["format_version"], FORMAT_VERSION
            )
        for name in content["files"]:
            if not _FILE_NAME.fullmatch(name):
                raise self._damaged("manifest.json", "it names a file that no run has", name, "checkpoints/00000…")
        self._known = content
        return content

    def read(self, name: str) -> Mapping[str, Tensor]:
        """Read a file of tensors, mapped into memory, after one check of its size and checksum."""
        if name not in self._read:
            self.verify(name)
            import safetensors.torch

            try:
                self._read[name] = safetensors.torch.load_file(self.path / name)
            except (OSError, safetensors.SafetensorError) as error:
                raise self._damaged(name, "it cannot be read", f"{error}", "a safetensors file") from error
        return self._read[name]

    def verify(self, name: str) -> None:
        """Check one file's size and checksum against the manifest.

        Raises:
            RunDamagedError: The file is missing, truncated or altered.
        """
        stated = (self._known or self.manifest())["files"].get(name)
        if stated is None:
            raise self._damaged(name, "the manifest does not name it", "no entry", "an entry")
        file = self.path / name
        if not file.is_file():
            raise self._damaged(name, "it is missing", "no file", f"sha256 {stated['sha256']}")
        size, found = file.stat().st_size, checksum_file(file)
        if size != stated["bytes"]:
            wrong = "it was truncated" if size < stated["bytes"] else "it has grown"
            got = f"{size} bytes, sha256 {found}"
            raise self._damaged(name, wrong, got, f"{stated['bytes']} bytes, sha256 {stated['sha256']}")
        if found != stated["sha256"]:
            raise self._damaged(name, "it was altered", f"sha256 {found}", f"sha256 {stated['sha256']}")

    def _damaged(self, name: str, wrong: str, got: Any, expected: Any) -> RunDamagedError:
        return RunDamagedError(
            message(
                f"reading {name} of the run in {self}",
                wrong,
                got=got,
                expected=expected,
                source="the run's manifest",
                fix="Restore the file from a copy, or record the run again",
            )
        )

    def _unwritable(self, name: str, error: Exception) -> RunError:
        return RunError(
            message(
                f"writing {name} of the run in {self}",
                "the file could not be written; what was finished before is still there",
                got=str(error),
                expected="a directory with room that can be written to",
                source="the operating system",
                fix="Free some space or choose another directory",
            )
        )


def open_store(run: str | os.PathLike[str] | Store) -> Store:
    """Take a path or a store for a store."""
    return run if isinstance(run, Store) else DirectoryStore(run)


def _exists(store: Store) -> RunExistsError:
    return RunExistsError(
        message(
            f"recording into {store}",
            "it already holds a run",
            got="a manifest",
            expected="an empty place",
            source="manifest.json",
            fix="Choose another directory, or delete this run first",
        )
    )


def _not_found(store: Store) -> RunNotFoundError:
    return RunNotFoundError(
        message(
            f"reading the run in {store}",
            "there is no run",
            got="no manifest.json",
            expected="a recorded run",
            source="the path given",
            fix="Give the directory that was passed to pkexplain.Recorder",
        )
    )


def checksum_file(file: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _checksum_json(content: Mapping[str, Any]) -> str:
    plain = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(plain.encode()).hexdigest()


def _flush_and_rename(temporary: Path, target: Path) -> None:
    for path, flags in ((temporary, os.O_RDWR), (None, os.O_RDONLY)):
        if path is None:
            os.replace(temporary, target)
            path = target.parent
        descriptor = os.open(path, flags)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
