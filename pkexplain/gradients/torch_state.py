"""The state of torch in which this package computes, whatever the caller's is.

Default dtype and device are not part of it: a user's model may make tensors by them in its forward pass. Instead, every
tensor that this package makes names its own (`tests/test_package.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

__all__ = ["own_torch_state", "without_autocast"]

_DEVICES = ("cpu", "cuda", "mps", "xpu")


@contextmanager
def without_autocast() -> Iterator[None]:
    """Compute in the dtype of the tensors; restore the caller's autocast afterwards."""
    with ExitStack() as stack:
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def own_torch_state() -> Iterator[None]:
    """Compute with gradients, outside inference mode and autocast; restore the caller's state afterwards."""
    with torch.inference_mode(False), torch.enable_grad(), without_autocast():
        yield
