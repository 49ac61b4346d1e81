"""Files that survive a crash, with checksums and writes that happen whole or not at all; and which paths are local."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch
from torch import Tensor

from pkexplain.errors import ConfigurationError

__all__ = [
    "TEMPORARY_END",
    "cache_directory",
    "checksum",
    "checksum_file",
    "checksum_json",
    "is_remote",
    "local_path",
    "make_folder",
    "write_atomically",
]

TEMPORARY_END = re.compile(r"\.[0-9a-f]{32}\.tmp")
"""How the names of temporary files end; a name that ends otherwise is somebody else's."""
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:[:/\\]")
"""How a URL or a chain of them begins, also if `pathlib` made ``s3:/`` of ``s3://``; a drive's name has one letter."""


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


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL of something other than a local file: ``s3://bucket/run``, but not ``file:///run``."""
    text = os.fspath(path)
    return _URL.match(text) is not None and not text.lower().startswith("file:")


def local_path(path: str | os.PathLike[str], asked: str) -> Path:
    """Return a local path, also that of a ``file://`` URL; `pathlib` would make a folder named ``s3:`` of another URL.

    Args:
        path: The path, as the user gave it.
        asked: What it was given for, for the message.

    Raises:
        ConfigurationError: It is a URL that does not name a file of this machine.
    """
    text = os.fspath(path)
    if not is_remote(path):
        if not text.lower().startswith("file:/"):
            return Path(path)
        parts = urlsplit(text)
        if parts.netloc in ("", "localhost"):
            return Path(url2pathname(parts.path))
    raise ConfigurationError(
        asked,
        "a URL is not a local path",
        got=text,
        expected="a path on this machine",
        source="its scheme",
        fix="Give a local path, and copy what was written afterwards",
    )


def cache_directory() -> Path:
    """Return this user's cache directory for the package: ``PKEXPLAIN_CACHE``, or the platform's."""
    if own := os.environ.get("PKEXPLAIN_CACHE"):
        return Path(own)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "pkexplain"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "pkexplain"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pkexplain"


def make_folder(folder: Path, mode: int | None) -> None:
    """Make a folder, with permissions that go with those given for files: who may read may enter.

    Args:
        folder: The folder; if it is there, it stays as it is.
        mode: Permissions of the files in it; None for a folder as the umask leaves it.
    """
    if folder.is_dir():
        return
    folder.mkdir(parents=True, exist_ok=True)
    if mode is not None:
        kept = folder.stat().st_mode & stat.S_ISGID  # new files stay with the folder's group
        folder.chmod(kept | mode | (mode & 0o444) >> 2 | 0o300)


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
