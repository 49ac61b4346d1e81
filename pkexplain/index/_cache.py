"""A compressed index kept with its run, and only read again if this user built it.

faiss's reader trusts its file: a malicious file can run code. So a kept index is described in a JSON file, signed
(HMAC-SHA256) with a random key in the user's cache directory; an index without this signature is not read but rebuilt
from the rows. The key protects against files that came with a run, not against someone who writes to the directory
while it is being read.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pkexplain.files import cache_directory, checksum_file, write_atomically
from pkexplain.index.faiss_index import CompressedSearch
from pkexplain.store.base import Store
from pkexplain.store.index_files import rows_name
from pkexplain.store.manifest import Manifest

_KEY_BYTES = 32
_PATIENCE = 1.0
"""Seconds to wait for another writer of the run; if it takes longer, the index is kept in memory only."""


class KeptIndex:
    """The files of one index.

    Args:
        directory: Where they are.
        state: SHA-256 of the rows' identity and the factory string, in hexadecimal.
        run: The run whose rows these are, and its manifest when they were read; None for rows of no run.
    """

    def __init__(self, directory: Path, state: str, run: tuple[Store, Manifest] | None = None) -> None:
        """Name the files, without touching them."""
        self._run, self._state = run, state
        self._rows = rows_name(run[1]) + "-" if run else ""
        self._file = directory / f"{self._rows}{state[:16]}.faiss"

    @property
    def size(self) -> int:
        """Bytes of the index file; 0 if there is none."""
        return self._file.stat().st_size if self._file.is_file() else 0

    def load(self, search: CompressedSearch, num_examples: int) -> bool:
        """Read the index into ``search``; return whether it exists, is intact, is of these rows and by this user."""
        try:
            key = _read_key()
            described = json.loads(self._file.with_suffix(".json").read_text(encoding="utf-8"))
            signature = described.pop("hmac")
            if key is None or not hmac.compare_digest(signature, _sign(described, key)):
                return False
            if (described["state"], described["factory"]) != (self._state, search.factory):
                return False
            if (self._file.stat().st_size, checksum_file(self._file)) != (described["bytes"], described["sha256"]):
                return False
            before = search.dimension
            search.read(str(self._file), np.asarray(described["radii"], dtype=np.float32))
        except (OSError, ValueError, RuntimeError, KeyError, AttributeError, TypeError):
            return False
        return (search.dimension, search.num_rows) == (before, num_examples)

    def save(self, search: CompressedSearch) -> None:
        """Keep an index; if it cannot be written, it stays in memory only.

        So does one of rows that the run does not consist of any more: examples may have been withdrawn since they were
        read. While the run is locked, that cannot happen.
        """
        with contextlib.suppress(OSError, RuntimeError):
            if self._run is None:
                self._write(search, None)
                return
            store = self._run[0]
            with store.lock(wait=_PATIENCE):
                store.sweep()
                if rows_name(store.manifest()) + "-" == self._rows:
                    self._write(search, getattr(store, "mode", None))

    def _write(self, search: CompressedSearch, mode: int | None) -> None:
        """Write the index, and its description last: until that is there, nothing is read."""
        description = self._file.with_suffix(".json")
        self._file.parent.mkdir(parents=True, exist_ok=True)
        key = _read_key() or _make_key()
        try:
            with write_atomically(self._file, mode) as temporary:
                search.write(str(temporary))
                described: dict[str, Any] = {
                    "state": self._state,
                    "factory": search.factory,
                    "bytes": temporary.stat().st_size,
                    "sha256": checksum_file(temporary),
                    "radii": search.radii.tolist(),
                }
                description.unlink(missing_ok=True)
            with write_atomically(description, mode) as temporary:
                signed = {**described, "hmac": _sign(described, key)}
                temporary.write_text(json.dumps(signed), encoding="utf-8")
        except BaseException:
            with contextlib.suppress(OSError):
                self._file.unlink(missing_ok=True)  # nobody reads it without its description
            raise


def _sign(described: Mapping[str, Any], key: bytes) -> str:
    plain = json.dumps(described, sort_keys=True, separators=(",", ":"))
    return hmac.new(key, plain.encode(), "sha256").hexdigest()


def _read_key() -> bytes | None:
    """Read the key; None if there is none, or if others can read or write it."""
    try:
        with (cache_directory() / "index.key").open("rb") as file:
            about, key = os.fstat(file.fileno()), file.read(_KEY_BYTES + 1)
    except OSError:
        return None
    mine = os.name != "posix" or (about.st_uid == os.getuid() and not stat.S_IMODE(about.st_mode) & 0o077)
    return key if mine and len(key) == _KEY_BYTES else None


def _make_key() -> bytes:
    """Make a key that only this user can read."""
    directory = cache_directory()
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    with write_atomically(directory / "index.key", 0o600) as temporary:  # readable by its owner only
        temporary.write_bytes(secrets.token_bytes(_KEY_BYTES))
    key = _read_key()  # if two processes start at once, the last one's
    if key is None:
        raise OSError(f"the key in {directory} cannot be read again")
    return key
