"""Files that survive a crash: checksums, and a write that happens whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["TEMPORARY_END", "checksum", "checksum_file", "checksum_json", "write_atomically"]

TEMPORARY_END = re.compile(r"\.[0-9a-f]{32}\.tmp")
"""How the names of temporary files end; a name that ends otherwise is somebody else's."""


def checksum(*parts: str | bytes | Tensor) -> str:
    """Return the SHA-256 of texts, bytes and tensors' numbers, one after the other, in hexadecimal."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        else:
            digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()


def checksum_file(file: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def checksum_json(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of plain data, in hexadecimal: of its JSON with sorted keys."""
    return checksum(json.dumps(content, sort_keys=True, separators=(",", ":")))


@contextmanager
def write_atomically(target: Path, mode: int | None = None) -> Iterator[Path]:
    """Give a temporary path to write to; afterwards it replaces ``target`` in one step that survives a crash.

    The temporary file's name is its own, so several processes may write the same target: the last one wins. After an
    error it is removed, and ``target`` is as it was; only if the error came after that step, while the folder was
    flushed, ``target`` may be the new one already.

    Args:
        target: The file to write.
        mode: Its permissions, from its first byte on; None for those that the user's umask leaves.
    """
    temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666 if mode is None else mode)
        wanted = stat.S_IMODE(os.fstat(descriptor).st_mode) if mode is None else mode
        os.close(descriptor)
        yield temporary
        os.chmod(temporary, wanted)  # not reduced by the umask, and whatever a library made of it
        _flush(temporary, os.O_RDWR)
        os.replace(temporary, target)
        _flush(target.parent, os.O_RDONLY)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _flush(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
