"""Files that survive a crash: checksums, and a write that happens whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["checksum_file", "checksum_json", "flush_and_rename"]


def checksum_file(file: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def checksum_json(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of plain data, in hexadecimal: of its JSON with sorted keys."""
    plain = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(plain.encode()).hexdigest()


def flush_and_rename(temporary: Path, target: Path) -> None:
    """Put a written file in its place, in one step that survives a crash of the machine."""
    for path, flags in ((temporary, os.O_RDWR), (None, os.O_RDONLY)):
        if path is None:
            os.replace(temporary, target)
            path = target.parent
        descriptor = os.open(path, flags)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
