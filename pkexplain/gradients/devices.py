"""What keeps an accelerator busy: copies that nobody waits for, results fetched together, and large pieces of work.

While a GPU computes, the CPU prepares what comes next. It waits for the GPU as soon as it looks at a result, and copies
one by one cost more than their bytes. Recording looks at a step's results once, before the optimizer steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["accelerated", "at_once", "fetch", "place", "room_for", "tensor_on"]

_ON_AN_ACCELERATOR = 64
"""How many times more is computed at a time than on a CPU, where it should stay in a core's cache."""
_SHARE_OF_FREE_MEMORY = 4
"""A table may take this part of an accelerator's free memory: there are two of them, and another when segments end."""


def accelerated(device: torch.device) -> bool:
    """Whether work there is only begun, so that looking at its result is waiting for it."""
    return device.type != "cpu"


def place(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device. Of a copy to an accelerator nothing waits; of one from there, all that follows."""
    return tensor.to(device, non_blocking=tensor.device.type == "cpu" and device.type != "cpu")


def tensor_on(values: Sequence[float], like: Tensor) -> Tensor:
    """Make a tensor of numbers with the dtype and device of another; on an accelerator nothing waits for it."""
    return place(torch.tensor(values, dtype=like.dtype, device="cpu"), like.device)


def fetch(tensors: Sequence[Tensor]) -> list[list[float]]:
    """Wait for some results and return the numbers of each, all in one copy for each device."""
    sizes: dict[torch.device, list[int]] = {}
    for at, tensor in enumerate(tensors):
        sizes.setdefault(tensor.device, []).append(at)
    found: list[list[float]] = [[] for _ in tensors]
    for places in sizes.values():
        together = torch.cat([tensors[at].detach().double().flatten() for at in places]).cpu()
        for at, numbers in zip(places, together.split([tensors[at].numel() for at in places]), strict=True):
            found[at] = numbers.tolist()
    return found


def at_once(numbers: int, device: torch.device) -> int:
    """How many numbers to compute at a time, given how many on a CPU."""
    return numbers * _ON_AN_ACCELERATOR if accelerated(device) else numbers


def room_for(device: torch.device, least: int) -> int:
    """How many bytes a table may have on an accelerator; ``least`` where its free memory is not known."""
    if device.type != "cuda":
        return least
    return max(least, torch.cuda.mem_get_info(device)[0] // _SHARE_OF_FREE_MEMORY)
