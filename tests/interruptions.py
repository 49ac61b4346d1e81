"""Every system call that writes to a run, made to fail once, or to be interrupted once: before it is done, or after."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import safetensors.torch

CALLS = ("open", "fsync", "replace", "unlink", "mkdir", "chmod")
"""The functions of `os` through which everything is written, but for the content of files."""


class Interrupted:
    """Counts the calls that touch a directory, and lets one of them fail.

    Attributes:
        calls: What was called so far.

    Args:
        directory: Where.
        at: Which call fails; None for none of them.
        error: What it raises.
        done: Whether it is done before that.
    """

    def __init__(self, directory: Path, at: int | None = None, error: str = "OSError", done: bool = False) -> None:
        self._directory, self._at, self._error, self._done = str(directory), at, error, done
        self.calls: list[str] = []

    @contextmanager
    def around(self) -> Iterator[None]:
        """Watch until the context exits."""
        with mock.patch.multiple(os, **{name: self._watched(name, getattr(os, name)) for name in CALLS}):
            real = safetensors.torch.save_file
            with mock.patch.object(safetensors.torch, "save_file", self._watched("write", real, place=1)):
                yield

    def _watched(self, name: str, real: Callable[..., Any], place: int = 0) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            where = args[place]
            where = os.readlink(f"/proc/self/fd/{where}") if isinstance(where, int) else os.fspath(where)
            inside = str(where).startswith(self._directory) and not str(where).endswith("/lock")
            if not inside:
                return real(*args, **kwargs)
            self.calls.append(f"{name} {str(where).removeprefix(self._directory)}")
            fails = len(self.calls) - 1 == self._at
            if fails and not self._done:
                if name == "write":
                    Path(where).write_bytes(b"half a fi")
                self._fail()
            found = real(*args, **kwargs)
            if fails:
                if name == "open":
                    os.close(found)
                self._fail()
            return found

        return call

    def _fail(self) -> None:
        if self._error == "OSError":
            raise OSError(errno.EIO, "Input/output error, made to happen")
        raise KeyboardInterrupt
