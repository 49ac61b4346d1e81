"""The folder of a run in which compressed indices are kept: which of them are of the run as it is.

An index holds the rows, so one that was built before examples were withdrawn must not stay. The name of every file
there says of which rows it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from pkexplain.files import TEMPORARY_END, checksum
from pkexplain.store.manifest import Manifest

__all__ = ["INDEX_FOLDER", "find_obsolete", "rows_name"]

INDEX_FOLDER = "index"
_NAME = re.compile(r"(?:([0-9a-f]{16})-)?[0-9a-f]{16}\.(?:faiss|json)")
"""The names of indices and of their descriptions; older versions did not say of which rows they are."""


def rows_name(manifest: Manifest) -> str:
    """Name the rows of a run: it changes with every segment, withdrawal and merge."""
    files = " ".join(name for segment in manifest.segments for name in segment.files.rows)
    return checksum(f"{manifest.run_id} {files}")[:16]


def find_obsolete(run: Path, manifest: Manifest, *, unfinished: bool) -> Iterator[Path]:
    """Find what is kept in a run's index folder and is not of its rows; other files there are somebody else's.

    Args:
        run: The directory of the run.
        manifest: The run's manifest, or that of a run without rows.
        unfinished: Whether temporary files count, too; another process may be writing them unless the run is locked.
    """
    current, folder = rows_name(manifest), run / INDEX_FOLDER
    for place in (folder, *sorted(folder.glob("part-*-of-*"))):
        if not place.is_dir() or run.resolve() not in place.resolve().parents:
            continue  # a link that leads out of the run
        for file in sorted(place.iterdir()):
            name, temporary = file.name, TEMPORARY_END.search(file.name)
            if temporary and temporary.end() == len(name):
                obsolete = unfinished and _NAME.fullmatch(name[: temporary.start()]) is not None
            else:
                kept = _NAME.fullmatch(name)
                obsolete = kept is not None and kept[1] != current and (kept[1] is not None or _is_described(file))
            if obsolete and not file.is_dir():
                yield file


def _is_described(file: Path) -> bool:
    """Whether an index whose name does not say of which rows it is was written by an older version of this package."""
    try:
        described = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
        return {"state", "factory", "hmac"} <= described.keys()
    except (OSError, ValueError, AttributeError):
        return False
