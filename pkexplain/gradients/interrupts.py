"""Interrupts that arrive while something must be done as a whole: they wait for its end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["deferred_interrupts"]

_DEFERRED = (signal.SIGINT, signal.SIGTERM)
_MAIN = threading.main_thread().ident
_WAITING: set[Any] = set()
"""The handlers that are in place of a program's own."""


@contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Let Ctrl-C, and a SIGTERM that the program handles in Python, wait until this context exits.

    A handler that raises an exception, as that of Ctrl-C does, would otherwise leave half of something done. A second
    one does not wait: something may hang. Only the main thread runs handlers; in others nothing is changed.
    """
    if threading.get_ident() != _MAIN or signal.getsignal(signal.SIGINT) in _WAITING:
        yield  # in the last case, the context around this one makes them wait
        return

    def wait(number: int, frame: FrameType | None) -> None:
        arrived.append((number, frame))
        if len(arrived) > 1:
            handlers[number](number, frame)

    _WAITING.add(wait)
    arrived: list[tuple[int, FrameType | None]] = []
    handlers: dict[int, Any] = {number: signal.getsignal(number) for number in _DEFERRED}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    try:
        for number in handlers:
            signal.signal(number, wait)
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        _WAITING.discard(wait)
        for number, frame in arrived[:1]:
            handlers[number](number, frame)
