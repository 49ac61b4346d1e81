"""The state of torch in which explanations are computed, whatever the caller's is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

_Method = TypeVar("_Method", bound=Callable[..., object])


@contextmanager
def own_torch_state() -> Iterator[None]:
    """Compute with gradients, outside inference mode and autocast; restore the caller's state afterwards."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    autocasts = [torch.autocast(device, enabled=False) for device in devices]
    with torch.inference_mode(False), torch.enable_grad():
        for autocast in autocasts:
            autocast.__enter__()
        try:
            yield
        finally:
            for autocast in reversed(autocasts):
                autocast.__exit__(None, None, None)


def in_own_torch_state(method: _Method) -> _Method:
    """Run a function in that state."""

    @functools.wraps(method)
    def run(*args: object, **kwargs: object) -> object:
        with own_torch_state():
            return method(*args, **kwargs)

    return run  # pyright: ignore[reportReturnType] - the same signature
