"""A run at a URL, such as ``s3://bucket/run``: read through fsspec and copies of its files in the user's cache.

The manifest is fetched whenever it is asked for, so a run that grows is seen as it is now; a file of tensors when it is
first read, and again if the copy is not what the manifest states. Each is checked like a local one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

from torch import Tensor

from pkexplain.errors import ConfigurationError, MissingDependencyError, PkexplainError, RunDamagedError, RunError
from pkexplain.files import cache_directory, checksum, make_folder, write_atomically
from pkexplain.store.base import Store, damaged, not_found
from pkexplain.store.directory import FOLDERS, LARGEST_MANIFEST, DirectoryStore
from pkexplain.store.manifest import FileEntry, Manifest

__all__ = ["RemoteStore", "open_filesystem"]

_MODE = 0o600
"""Permissions of the copies: whoever may read the cache directory need not be allowed to read the run."""
_BLOCK = 1 << 24
_FOREVER = -1.0
_FIXES = {
    "recording into": "Record into a local directory, then copy it with `pkexplain copy DIRECTORY URL`",
    "salvaging": "Download its files with the tool of its storage, and salvage the local copy",
}


class RemoteStore(Store):
    """A run at a URL that fsspec can open; it can only be read.

    Copies of its files are kept in ``runs/`` of the user's cache directory (``PKEXPLAIN_CACHE``, or the platform's),
    which may be deleted at any time. fsspec takes credentials from its own configuration and from its drivers'.

    Args:
        url: Where the run's manifest lies, for example ``s3://bucket/run``.

    Raises:
        ConfigurationError: It is not a URL.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        """Name a URL, without opening it."""
        self._copies = _Copies(os.fspath(url))

    def __str__(self) -> str:
        """Return the URL."""
        return str(self._copies)

    def manifest(self) -> Manifest:
        """Fetch the manifest, and check it against its own checksum."""
        return self._copies.manifest()

    def read(self, name: str) -> Mapping[str, Tensor]:
        """Read a file of tensors, mapped into memory from its copy, after a check of its size and checksum."""
        return self._copies.read(name)

    def forget(self) -> None:
        """Fetch files again when they are next asked for."""
        self._copies.forget()

    def refusal(self, writing: str) -> RunError:
        """Make the error for what would write to the run, in words that end in a preposition or a verb."""
        return RunError(
            f"{writing} {self}",
            "a run at a URL can only be read",
            got=str(self),
            expected="a local directory",
            source="its scheme",
            fix=_FIXES.get(writing, "Copy it to a local directory with `pkexplain copy`, and change the copy"),
        )

    def lock(self, wait: float = 0.0) -> NoReturn:
        """Refuse: there is no lock at a URL."""
        raise self.refusal("writing to")

    def create(self, manifest: Manifest, overwrite: bool = False) -> NoReturn:
        """Refuse."""
        raise self.refusal("recording into")

    def reopen(self) -> NoReturn:
        """Refuse."""
        raise self.refusal("writing to")

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> NoReturn:
        """Refuse."""
        raise self.refusal("writing to")

    def note(self, name: str, entry: FileEntry) -> NoReturn:
        """Refuse."""
        raise self.refusal("writing to")

    def commit(self, manifest: Manifest) -> NoReturn:
        """Refuse."""
        raise self.refusal("writing to")


class _Copies(DirectoryStore):
    """The copies of a remote run's files, shared by all processes that read it; they fetch one after the other."""

    def __init__(self, url: str) -> None:
        if "://" not in url:
            raise ConfigurationError(
                f"opening {url}",
                "it looks like a URL that lost a slash in a pathlib.Path",
                got=url,
                expected="a URL with ://, or a local path",
                source="the path given",
                fix="Pass a URL as a string; write a local folder of that name as an absolute path",
            )
        super().__init__(cache_directory() / "runs" / checksum(url.rstrip("/"))[:32], _MODE)
        self._name = self._url = url

    def manifest(self) -> Manifest:
        try:
            self._fetch("manifest.json", LARGEST_MANIFEST)
        except FileNotFoundError as error:
            raise not_found(self) from error
        found = super().manifest()
        self._delete_all_but(found.files, wait=0)  # they may hold examples that were withdrawn
        return found

    def forget(self) -> None:
        super().forget()
        self._delete_all_but((), wait=_FOREVER)

    def _check(self, name: str) -> FileEntry:
        with self.lock(_FOREVER):
            try:
                return super()._check(name)
            except RunDamagedError:  # not fetched yet, or of a run that was here before
                stated = (self._known or self.manifest()).files.get(name)
                if stated is None:
                    raise
                try:
                    self._fetch(name, stated.bytes)
                except FileNotFoundError as error:
                    raise damaged(self, name, "it is missing", "no file", f"sha256 {stated.sha256}") from error
                return super()._check(name)

    def _fetch(self, name: str, size: int) -> None:
        """Copy a file; of one that is longer than it should be, one byte too many, which shows.

        Raises:
            FileNotFoundError: There is no such file.
            RunError: It cannot be read, or not be written here.
        """
        filesystem, root = open_filesystem(self._url)
        target, left = self.path / name, size + 1
        try:
            make_folder(self.path, _MODE)
            make_folder(target.parent, _MODE)
            with (
                filesystem.open(f"{root}/{name}", "rb") as remote,
                write_atomically(target, _MODE) as temporary,
                temporary.open("wb") as local,
            ):
                while left > 0 and (block := remote.read(min(left, _BLOCK))):
                    left -= local.write(block)
        except FileNotFoundError:
            raise
        except Exception as error:  # every driver has its own
            raise RunError(
                f"reading {name} of the run in {self}",
                "the file could not be fetched",
                got=f"{type(error).__name__}: {error}",
                expected="a file that can be read, and a cache directory with room",
                source="fsspec",
                fix=f"Check the URL, the credentials, the connection, and the room in {cache_directory()}",
            ) from error

    def _delete_all_but(self, names: Collection[str], wait: float) -> None:
        """Delete copies, and what a killed process left of one: while this holds the lock, nobody fetches."""
        files = [file for folder in FOLDERS if folder != "." for file in (self.path / folder).glob("*")]
        gone = [file for file in files if file.relative_to(self.path).as_posix() not in names]
        if gone:
            with contextlib.suppress(OSError), self.lock(wait):  # the next reader tries again
                for file in gone:
                    file.unlink(missing_ok=True)


def open_filesystem(url: str) -> tuple[Any, str]:
    """Open what fsspec makes of a URL, and return it with the URL's path in it.

    Raises:
        MissingDependencyError: The driver is not installed.
        ConfigurationError: fsspec does not know the scheme, or refuses the URL.
    """
    import fsspec
    from fsspec.registry import known_implementations

    try:
        for scheme in (part.partition("://")[0] for part in url.split("::")):
            try:
                fsspec.get_filesystem_class(scheme)
            except ImportError as error:
                package = known_implementations.get(scheme, {}).get("class", "fsspec").partition(".")[0]
                package = f'"fsspec[{scheme.replace("https", "http")}]"' if package == "fsspec" else package
                raise MissingDependencyError(
                    f"opening {url}",
                    f"the driver of {scheme}:// is not installed",
                    got=str(error),
                    expected=package,
                    source="fsspec",
                    fix=f"pip install {package}",
                ) from error
        # Listings would be remembered for as long as the process lives, and a run grows.
        filesystem, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except PkexplainError:
        raise
    except Exception as error:  # every driver has its own
        raise ConfigurationError(
            f"opening {url}",
            "fsspec cannot open this URL",
            got=f"{type(error).__name__}: {error}",
            expected="a URL such as s3://bucket/run",
            source="fsspec",
            fix="Check the URL and the credentials",
        ) from error
    return filesystem, root.rstrip("/")
