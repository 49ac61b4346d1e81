"""Which files of a directory this package has written: nothing else in it is deleted or replaced."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from pkexplain.files import TEMPORARY_END
from pkexplain.store.manifest import FILE_NAME
from pkexplain.store.scratch import SCRATCH

__all__ = ["MARK", "claims", "is_temporary", "was_written_by_us"]

MARK = {"written_by": "pkexplain"}
"""What the header of each of a run's files says."""
_HOLDS = {"rows": {"rows", "scale", "loss_derivatives"}, "segments": {"row_sum", "weight_decay"}, "states": {"plan"}}
"""What is in the files of a folder, also in those of older versions, which did not bear the mark."""
_LONGEST_HEADER = 1 << 22
_SCRATCH_NAME = re.compile(re.escape(SCRATCH) + r"[a-z0-9_]{8}\.tmp")
_SAFETENSORS_NAME = re.compile(r"(?:(?:checkpoints|segments|rows|states)/)?\.tmp[A-Za-z0-9]{6}")
"""The names under which safetensors writes, before it renames the file to the name that it was given."""


def is_temporary(run: Path, name: str) -> bool:
    """Whether a path within a run is that of a temporary file of this package."""
    if _SAFETENSORS_NAME.fullmatch(name):
        return was_written_by_us(run / name)
    end = TEMPORARY_END.search(name)
    if end is None or end.end() != len(name):
        return _SCRATCH_NAME.fullmatch(name) is not None
    whole = name[: end.start()]
    return whole == "manifest.json" or FILE_NAME.fullmatch(whole) is not None


def was_written_by_us(file: Path) -> bool:
    """Whether a file bears this package's mark, or holds what only its files hold."""
    try:
        if file.is_symlink() or not file.is_file():
            return False
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length)) if length <= _LONGEST_HEADER else {}
        holds = _HOLDS.get(file.parent.name)
        return MARK.items() <= header.get("__metadata__", {}).items() or (holds is not None and holds <= header.keys())
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def claims(directory: Path, folders: Sequence[str]) -> Iterator[str]:
    """The names of files in a directory that a run would have, too."""
    for folder in folders:
        for file in sorted((directory / folder).glob("*.safetensors")):
            name = file.relative_to(directory).as_posix()
            if FILE_NAME.fullmatch(name):
                yield name
