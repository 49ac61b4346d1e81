"""The errors of a run on disk that come from the operating system."""

from __future__ import annotations

from pkexplain.errors import RunError
from pkexplain.store.base import Store


def unreadable(store: Store, name: str, error: Exception) -> RunError:
    """Make the error for a file that is there and cannot be read."""
    return RunError(
        f"reading {name} of the run in {store}",
        "the file cannot be read",
        got=str(error),
        expected="a file that this user may read, on a disk that works",
        source="the operating system",
        fix="Look at its permissions and at the disk",
    )


def unwritable(store: Store, name: str, error: Exception) -> RunError:
    """Make the error for a file that cannot be written."""
    return RunError(
        f"writing {name} of the run in {store}",
        "the file could not be written; what was finished before is still there",
        got=str(error),
        expected="a directory with room that can be written to",
        source="the operating system",
        fix="Free some space or choose another directory",
    )


def undeletable(store: Store, name: str, error: Exception) -> RunError:
    """Make the error for a file that the run does not use any more and that cannot be deleted."""
    return RunError(
        f"deleting {name} of the run in {store}",
        "the file could not be deleted; the run does not use it any more, but what it holds is still there",
        got=str(error),
        expected="a directory that can be written to",
        source="the operating system",
        fix="Delete the file by hand, or run `pkexplain verify` as a user who may",
    )


def elsewhere(store: Store, name: str) -> RunError:
    """Make the error for a directory that is not the one that was locked."""
    return RunError(
        f"writing {name} of the run in {store}",
        "its directory was moved, deleted or replaced since it was locked",
        got="another lock file, or none",
        expected="the directory that was opened",
        source="the run's lock",
        fix="Leave a run where it is while it is written to",
    )
