"""Models that `torch.compile` has wrapped, as they were before: hooks do not reach what runs compiled."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["compiled_parts", "named_buffers", "named_modules", "named_parameters", "running_eagerly", "uncompiled"]

_INSIDE = "_orig_mod"
"""The name under which `torch.compile` keeps what it wraps."""


def uncompiled(model: nn.Module) -> nn.Module:
    """The model itself, if `torch.compile` has wrapped it; its parts are left as they are."""
    while isinstance(inside := getattr(model, _INSIDE, None), nn.Module):
        model = inside
    return model


def compiled_parts(model: nn.Module) -> list[str]:
    """The paths of what is compiled in a model, ``""`` for the model itself."""
    return [
        path
        for path, part in model.named_modules()
        if hasattr(part, _INSIDE) or getattr(part, "_compiled_call_impl", None) is not None
    ]


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A model's parts by the paths that they have without `torch.compile`."""
    return ((_plain(path), part) for path, part in model.named_modules() if not hasattr(part, _INSIDE))


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A model's parameters by the names that they have without `torch.compile`."""
    return ((_plain(name), parameter) for name, parameter in model.named_parameters())


def named_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A model's buffers by the names that they have without `torch.compile`."""
    return ((_plain(name), buffer) for name, buffer in model.named_buffers())


def _plain(path: str) -> str:
    return ".".join(part for part in path.split(".") if part != _INSIDE)


@contextmanager
def running_eagerly() -> Iterator[None]:
    """Run whatever was compiled as it was written: models, their parts, functions that call them."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled; importing it takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
