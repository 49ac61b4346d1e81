"""A copy on its way to a URL: each file is written here, sent and deleted, the manifest last."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from pkexplain.errors import RunError
from pkexplain.files import cache_directory
from pkexplain.store.directory import DirectoryStore
from pkexplain.store.manifest import FileEntry, Manifest
from pkexplain.store.remote import RemoteStore, open_filesystem


class Upload(DirectoryStore):
    """Where `copy_run` writes what goes to a URL.

    Nothing keeps a second writer out there; whoever reads meanwhile finds no run until the manifest is there.

    Args:
        url: The URL of the copy.

    Raises:
        ConfigurationError: It is not a URL.
    """

    def __init__(self, url: str) -> None:
        """Name a URL, without opening it."""
        self._there, self._url = RemoteStore(url), url
        super().__init__(cache_directory() / "copies", 0o600)
        self._name = url

    @contextmanager
    def lock(self, wait: float = 0.0) -> Iterator[object]:
        """Make the folder that the files go through, and delete it afterwards."""
        cache_directory().mkdir(parents=True, exist_ok=True)  # /tmp may be too small, and in memory
        with tempfile.TemporaryDirectory(prefix="copy-", dir=cache_directory()) as folder:
            self.path = Path(folder)
            yield

    def manifest(self) -> Manifest:
        """Read the manifest at the URL."""
        return self._there.manifest()

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> FileEntry:
        """Write a file and send it."""
        entry = super().put(name, tensors)
        self._send(name)
        return entry

    def commit(self, manifest: Manifest) -> None:
        """Write the manifest and send it."""
        super().commit(manifest)
        self._send("manifest.json")

    def _send(self, name: str) -> None:
        filesystem, root = open_filesystem(self._url)
        file, target = self.path / name, f"{root}/{name}"
        try:
            # Object stores have no folders, and their drivers would create a bucket whose name is misspelt.
            if not filesystem.async_impl:
                filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
            filesystem.put_file(str(file), target)
            sent, size = filesystem.size(target), file.stat().st_size
            if sent != size:
                raise OSError(f"{sent} bytes of {size} arrived")
        except Exception as error:  # every driver has its own
            raise RunError(
                f"writing {name} of the run in {self}",
                "the file could not be sent; there is no run until the manifest, the last file, is there",
                got=f"{type(error).__name__}: {error}",
                expected="a URL that can be written to",
                source="fsspec",
                fix="Check the URL, the credentials and the connection, and copy again",
            ) from error
        file.unlink()
