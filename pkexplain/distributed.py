"""The processes of a training run, and their collective operations.

With one process nothing is communicated. With several (`torch.distributed`, DistributedDataParallel), each processes
its share of every batch and keeps the rows of a range of examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["ProcessGroup", "TorchProcessGroup", "find_process_group"]

_T = TypeVar("_T")


class ProcessGroup:
    """A single process.

    Attributes:
        rank: This process, from 0.
        world_size: The number of processes.
    """

    rank: int = 0
    world_size: int = 1

    def shard(self, examples: int) -> slice:
        """Return the examples whose rows this process keeps."""
        return slice(self.rank * examples // self.world_size, (self.rank + 1) * examples // self.world_size)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place, and return it."""
        return tensor

    def all_reduce_int(self, number: int) -> int:
        """Sum an integer over all processes."""
        return number

    def all_reduce_max(self, number: float) -> float:
        """Return the maximum over all processes."""
        return number

    def open_channel(self) -> None:
        """Open a channel beside that of the training, whose collectives never meet those of the training."""

    def close_channel(self) -> None:
        """Close it; a process that waits in `meet` gets an error."""

    def meet(self, code: int, number: int) -> list[tuple[int, int]]:
        """Exchange two numbers on the channel; return those of all processes, in rank order.

        Raises:
            RuntimeError: A process has closed the channel, or died.
        """
        return [(code, number)]

    def all_gather(self, value: _T) -> list[_T]:
        """Return the values of all processes, in rank order."""
        return [value]

    def broadcast(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Send the first process's tensors to all processes."""
        return dict(tensors)

    def all_to_all(self, examples: int, ids: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        """Send each example's values to the process that keeps its row.

        Args:
            examples: The number of examples.
            ids: Row numbers, ``(batch,)``.
            values: Tensors with the batch as first dimension.

        Returns:
            The positions of the received examples among this process's rows, and their values.
        """
        return (ids, *values)


class TorchProcessGroup(ProcessGroup):
    """The processes of a `torch.distributed` group.

    Args:
        group: The group, or None for all processes.
    """

    def __init__(self, group: Any = None) -> None:
        """Ask the group for its size."""
        self._group = group
        self._channel: Any = None
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        gpu = dist.get_backend(group) == "nccl"
        self._device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")

    def open_channel(self) -> None:
        """Open a group of the same processes, on the CPU, if they are all there are.

        Of some of all processes, torch opens a second group under the name of the first; they meet in their own group.
        """
        if dist.is_gloo_available() and self.world_size == dist.get_world_size():
            self._channel = dist.new_group(backend="gloo")

    def close_channel(self) -> None:
        """Close it; a process that waits in `meet` gets an error."""
        channel, self._channel = self._channel, None
        if channel is not None and dist.is_initialized():
            dist.destroy_process_group(channel)

    def meet(self, code: int, number: int) -> list[tuple[int, int]]:
        """Exchange two numbers on the channel; return those of all processes, in rank order."""
        on = torch.device("cpu") if self._channel is not None else self._device
        mine = torch.tensor([code, number], device=on)
        found = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(found, mine, self._group if self._channel is None else self._channel)
        return [(int(c), int(n)) for c, n in found]

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place, and return it."""
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def all_reduce_int(self, number: int) -> int:
        """Sum an integer over all processes."""
        return int(self._reduce(torch.tensor([number], device="cpu"), dist.ReduceOp.SUM))

    def all_reduce_max(self, number: float) -> float:
        """Return the maximum over all processes."""
        return float(self._reduce(torch.tensor([number], dtype=torch.float64, device="cpu"), dist.ReduceOp.MAX))

    def _reduce(self, tensor: Tensor, how: Any) -> Tensor:
        here = tensor.to(self._device)
        dist.all_reduce(here, how, self._group)
        return tensor if here is tensor else tensor.copy_(here)

    def all_gather(self, value: _T) -> list[_T]:
        """Return the values of all processes, in rank order."""
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value, self._group)
        return found

    def broadcast(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Send the first process's tensors to all processes."""
        first = 0 if self._group is None else dist.get_global_rank(self._group, 0)
        found = {}
        for name, tensor in tensors.items():
            here = tensor.to(self._device).contiguous().clone()
            dist.broadcast(here, first, self._group)
            found[name] = here.to(tensor.device)
        return found

    def all_to_all(self, examples: int, ids: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        """Send each example's values to the process that keeps its row."""
        starts = torch.tensor([r * examples // self.world_size for r in range(self.world_size)], device=ids.device)
        owner = torch.searchsorted(starts, ids, right=True) - 1
        order = owner.argsort(stable=True)
        outgoing = owner.bincount(minlength=self.world_size).to(self._device)
        incoming = torch.empty_like(outgoing)
        dist.all_to_all_single(incoming, outgoing, group=self._group)
        sizes = incoming.tolist(), outgoing.tolist()
        mine, *found = (self._exchange(value[order], *sizes) for value in (ids, *values))
        return (mine - starts[self.rank], *found)

    def _exchange(self, value: Tensor, incoming: Sequence[int], outgoing: Sequence[int]) -> Tensor:
        here = value.to(self._device).contiguous()
        found = here.new_empty(sum(incoming), *value.shape[1:])
        dist.all_to_all_single(found, here, list(incoming), list(outgoing), group=self._group)
        return found.to(value.device)


def find_process_group(model: nn.Module, group: Any = None) -> tuple[nn.Module, ProcessGroup]:
    """Unwrap the model and find the processes that train it.

    Args:
        model: The model, or its DistributedDataParallel wrapper.
        group: The `torch.distributed` group that averages gradients, where the wrapper is not passed.

    Returns:
        The model without the wrapper, and the processes that the wrapper averages gradients over.
    """
    if group is not None:
        inside = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        return inside, TorchProcessGroup(group)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.module, TorchProcessGroup(model.process_group)
    return model, ProcessGroup()
