"""The state of torch in which this package computes, whatever the caller's is.

Default dtype and device are not part of it: a user's model may make tensors by them in its forward pass. Instead, every
tensor that this package makes names its own (`tests/test_package.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

__all__ = ["defaults_of", "own_torch_state", "without_autocast"]

_DEVICES = ("cpu", "cuda", "mps", "xpu")


@contextmanager
def without_autocast() -> Iterator[None]:
    """Compute in the dtype of the tensors; restore the caller's autocast afterwards."""
    enabled = [device for device in _DEVICES if torch.is_autocast_enabled(device)]
    if not enabled:
        yield
        return
    with ExitStack() as stack:
        for device in enabled:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def defaults_of(like: torch.Tensor) -> Iterator[None]:
    """Let libraries that rely on torch's defaults use a tensor's dtype and device; random numbers are restored, too.

    The default dtype belongs to all threads, so this is not for what a service does.
    """
    devices = [like.device.index or 0] if like.device.type == "cuda" else []
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=devices), torch.device(like.device):
        torch.set_default_dtype(like.dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


@contextmanager
def own_torch_state() -> Iterator[None]:
    """Compute with gradients, outside inference mode and autocast; restore the caller's state afterwards."""
    with torch.inference_mode(False), torch.enable_grad(), without_autocast():
        yield
