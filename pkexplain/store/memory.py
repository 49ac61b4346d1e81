"""A run kept in memory, until the process ends."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from pkexplain.errors import RunError
from pkexplain.store.base import FORMAT_VERSION, Store, busy, exists, not_found

__all__ = ["MemoryStore"]


class MemoryStore(Store):
    """A run that lives as long as this object."""

    def __init__(self) -> None:
        """Make an empty place for one run."""
        self._manifest: dict[str, Any] | None = None
        self._lock = threading.Lock()
        self._tensors: dict[str, dict[str, Tensor]] = {}

    def __str__(self) -> str:
        """Name the place."""
        return "memory"

    def create(self, manifest: Mapping[str, Any]) -> None:
        """Start a run."""
        if self._manifest is not None:
            raise exists(self)
        self.commit(manifest)

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Keep copies of tensors under a name."""
        kept = self._tensors[name] = {key: value.detach().cpu().clone() for key, value in tensors.items()}
        return {"bytes": sum(t.nbytes for t in kept.values())}

    def note(self, name: str, description: dict[str, Any]) -> None:
        """Refuse: another process has other memory."""
        fix = "Record into a directory that all processes see"
        raise RunError(
            f"recording {name} into memory",
            "another process made it",
            got=name,
            expected="one process",
            source="MemoryStore",
            fix=fix,
        )

    def drop(self, names: Iterable[str]) -> None:
        """Forget tensors."""
        for name in names:
            self._tensors.pop(name, None)

    def reopen(self) -> dict[str, Any]:
        """Take up the run that is there."""
        return self.manifest()

    @contextmanager
    def lock(self) -> Iterator[object]:
        """Keep every other writer out until the context is left."""
        if not self._lock.acquire(blocking=False):
            raise busy(self)
        try:
            yield
        finally:
            self._lock.release()

    def commit(self, manifest: Mapping[str, Any]) -> None:
        """Replace the manifest."""
        files = {name: {"bytes": sum(t.nbytes for t in kept.values())} for name, kept in self._tensors.items()}
        self._manifest = json.loads(json.dumps({**manifest, "format_version": FORMAT_VERSION, "files": files}))

    def manifest(self) -> dict[str, Any]:
        """Read the manifest."""
        if self._manifest is None:
            raise not_found(self)
        return self._manifest

    def read(self, name: str) -> Mapping[str, Tensor]:
        """Read the tensors under a name."""
        return self._tensors[name]
