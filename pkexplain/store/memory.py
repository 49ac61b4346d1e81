"""A run kept in memory, until the process ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import msgspec
from torch import Tensor

from pkexplain.errors import RunError
from pkexplain.store.base import Store, busy, damaged, exists, not_found
from pkexplain.store.manifest import FileEntry, Manifest

__all__ = ["MemoryStore"]


class MemoryStore(Store):
    """A run that lives as long as this object."""

    def __init__(self) -> None:
        """Make an empty store for one run."""
        self._manifest: Manifest | None = None
        self._lock = threading.Lock()
        self._tensors: dict[str, dict[str, Tensor]] = {}

    def __str__(self) -> str:
        """Return its name."""
        return "memory"

    def __repr__(self) -> str:
        """Describe it in one line."""
        if self._manifest is None:
            return "<MemoryStore, empty>"
        examples, size = self._manifest.num_examples, sum(file.bytes for file in self._manifest.files.values())
        count = len(self._manifest.segments)
        segments = f"{count} segment{'s' if count != 1 else ''}"
        return f"<MemoryStore: {examples:,} examples, {segments}, {size / 2**20:,.1f} MiB>"

    def create(self, manifest: Manifest, overwrite: bool = False) -> None:
        """Start a run."""
        if self._manifest is not None and self._manifest.segments and not overwrite:
            raise exists(self)
        self._tensors = {}  # of a run that was interrupted before its first segment was finished
        self.commit(manifest)

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> FileEntry:
        """Keep copies of tensors under a name."""
        kept = self._tensors[name] = {key: value.detach().cpu().clone() for key, value in tensors.items()}
        return FileEntry(bytes=sum(t.nbytes for t in kept.values()), sha256="")

    def note(self, name: str, entry: FileEntry) -> None:
        """Refuse: another process has its own memory."""
        fix = "Record into a directory that all processes share"
        raise RunError(
            f"recording {name} into memory",
            "another process wrote it",
            got=name,
            expected="one process",
            source="MemoryStore",
            fix=fix,
        )

    def reopen(self) -> Manifest:
        """Open the existing run for writing."""
        return self.manifest()

    @contextmanager
    def lock(self, wait: float = 0.0) -> Iterator[object]:
        """Keep every other writer out until the context exits."""
        if not self._lock.acquire(blocking=wait > 0, timeout=wait if wait > 0 else -1):
            raise busy(self)
        try:
            yield
        finally:
            self._lock.release()

    def commit(self, manifest: Manifest) -> None:
        """Replace the manifest."""
        kept = {name: tensors for name, tensors in self._tensors.items() if name in manifest.names}
        files = {
            name: FileEntry(bytes=sum(t.nbytes for t in tensors.values()), sha256="") for name, tensors in kept.items()
        }
        content = msgspec.to_builtins(msgspec.structs.replace(manifest, files=files))
        self._manifest = msgspec.convert(content, Manifest)  # checked as one that is read from a disk
        self._tensors = kept

    def manifest(self) -> Manifest:
        """Read the manifest."""
        if self._manifest is None:
            raise not_found(self)
        return self._manifest

    def read(self, name: str) -> Mapping[str, Tensor]:
        """Read the tensors under a name."""
        try:
            return self._tensors[name]
        except KeyError as error:
            raise damaged(self, name, "the run does not hold it any more", "no tensors", "tensors") from error
