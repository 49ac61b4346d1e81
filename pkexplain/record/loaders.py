"""Which examples a data loader draws: read from its sampler, so that data set, collator and model stay as they are."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from pkexplain.errors import ConfigurationError, RecordingError

__all__ = ["DrawnIds", "Draws", "indexed"]


class DrawnIds:
    """The row numbers that a data loader draws, batch by batch, in the order in which it returns the batches.

    The object that the loader asks for batches of row numbers (its batch sampler) is replaced by one that asks it, and
    keeps a list. The loader draws the same random numbers as before.

    Attributes:
        num_examples: How many rows the data set has.

    Args:
        loader: A `torch.utils.data.DataLoader` of a data set with row numbers, also one that Accelerate has prepared.
        num_examples: How many rows its data set must have; None for any number. If the data set is a
            `torch.utils.data.Subset` of one that has so many, ids are that one's row numbers.

    Raises:
        ConfigurationError: The loader's row numbers are not to be had.
    """

    def __init__(self, loader: Any, num_examples: int | None = None) -> None:
        """Listen to the loader's sampler."""
        _refuse_other_loaders(loader)
        base = getattr(loader, "base_dataloader", loader)  # Accelerate's loaders hold another
        self._loaders = list({id(each): each for each in (loader, base)}.values())
        # a loader that does not collate by itself asks its sampler
        self._name = "sampler" if base.batch_sampler is None else "batch_sampler"
        self._rows, self.num_examples = _rows_of(base.dataset, num_examples)
        self._sampler = _ListeningSampler(getattr(base, self._name))
        for each in self._loaders:
            _put(each, self._name, self._sampler)

    def follow(self) -> Draws:
        """Follow the iteration that was begun last, once its first batch is there."""
        return Draws(self._sampler.latest, self._rows)

    def remove(self) -> None:
        """Give the loader its own sampler back."""
        for each in self._loaders:
            if getattr(each, self._name, None) is self._sampler:
                _put(each, self._name, self._sampler.inner)


class Draws:
    """The ids of one iteration over a data loader.

    Args:
        queue: The batches that were drawn and not taken yet; the sampler adds to it.
        rows: The row number of what was drawn, where that is a place in a part of the training set.
    """

    def __init__(self, queue: deque[list[int]], rows: Sequence[int] | None = None) -> None:
        """Take nothing yet."""
        self._queue, self._rows = queue, rows

    def __len__(self) -> int:
        """The number of batches that were drawn and not taken."""
        return len(self._queue)

    def take(self) -> list[int]:
        """Return the ids of the next batch.

        Raises:
            RecordingError: The loader has returned more batches than it drew.
        """
        if not self._queue:
            raise RecordingError(
                "the ids of a batch",
                "the data loader returned a batch that it did not draw from its sampler",
                got="a batch without row numbers",
                expected="one draw for each batch, after the recorder began to listen",
                source="the data loader's batch sampler",
                fix="Begin to iterate after the recorder was entered; or return row numbers with the data "
                "(pkexplain.indexed) and pass them to recorder.step(ids)",
            )
        drawn = self._queue.popleft()
        return drawn if self._rows is None else [int(self._rows[i]) for i in drawn]

    def skip(self, batches: int) -> None:
        """Drop the ids of batches that were drawn and left out."""
        for _ in range(batches):
            self.take()


class _ListeningSampler:
    """A sampler that keeps what another one draws; everything else is the other's."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.latest: deque[list[int]] = deque()

    def __iter__(self) -> Iterator[Any]:
        self.latest = queue = deque()  # the loader may be iterated a second time before the first is over
        return self._listen(queue)

    def _listen(self, queue: deque[list[int]]) -> Iterator[Any]:
        for drawn in self.inner:
            drawn = list(drawn) if isinstance(drawn, Iterator) else drawn
            queue.append(torch.as_tensor(drawn, device="cpu").flatten().tolist())
            yield drawn

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        if name in ("inner", "latest"):  # not there yet
            raise AttributeError(name)
        return getattr(self.inner, name)


def _put(loader: Any, name: str, sampler: Any) -> None:
    object.__setattr__(loader, name, sampler)  # DataLoader.__setattr__ refuses it
    going = getattr(loader, "_iterator", None)  # persistent workers keep their iterator, and it the sampler
    if going is not None:
        going._index_sampler = sampler


def _rows_of(dataset: Any, num_examples: int | None) -> tuple[Sequence[int] | None, int]:
    """Find the row numbers of what is drawn, None if it is drawn by them, and the number of examples.

    Raises:
        ConfigurationError: The data set is neither the training set nor a subset of it.
    """
    rows: Sequence[int] | None = None
    inside: Any = dataset
    while num_examples is not None and len(inside) != num_examples and isinstance(inside, Subset):
        rows = inside.indices if rows is None else [inside.indices[i] for i in rows]
        inside = inside.dataset
    if num_examples is None or len(inside) == num_examples:
        return rows, len(inside)
    raise _no_ids(
        "its data set is not the one that the recorder was made for",
        f"{len(dataset)} rows",
        "Pass num_examples=len(loader.dataset); for a part of the training set, take torch.utils.data.Subset, or "
        "return its own row numbers and pass them to recorder.step(ids)",
        f"{num_examples} rows",
    )


def _refuse_other_loaders(loader: Any) -> None:
    """Refuse what has no row numbers.

    Raises:
        ConfigurationError: The message says why, and what to do instead.
    """
    base = getattr(loader, "base_dataloader", loader)
    aside = "Return row numbers with the data (pkexplain.indexed) and pass them to recorder.step(ids)"
    if not isinstance(base, DataLoader):
        raise _no_ids("it is not a torch.utils.data.DataLoader", type(loader).__name__, aside)
    if isinstance(base.dataset, IterableDataset):
        fix = "Pass a number with each example, the same in every epoch, and give it to recorder.step(ids)"
        raise _no_ids("an iterable data set has no row numbers", type(base.dataset).__name__, fix)
    if not getattr(base, "in_order", True):
        raise _no_ids("its workers return batches in another order than they were drawn", "in_order=False", aside)
    if type(loader).__name__ == "DataLoaderDispatcher":
        fix = "Prepare it with dispatch_batches=False (in transformers: accelerator_config={'dispatch_batches': False})"
        raise _no_ids("the first process draws the batches of all", "Accelerate's dispatch_batches=True", fix)
    if not isinstance(base.dataset, Sized):
        raise _no_ids("its data set does not say how many rows it has", type(base.dataset).__name__, aside)


def _no_ids(wrong: str, got: str, fix: str, expected: str = "a DataLoader of rows with numbers") -> ConfigurationError:
    return ConfigurationError(
        "recorder.batches(loader)", wrong, got=got, expected=expected, source="the data loader", fix=fix
    )


class _Indexed(Dataset[Any]):
    """A data set whose rows begin with their number."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return _with_id(index, self.dataset[index])

    def __getitems__(self, indices: list[int]) -> list[Any]:
        together: Any = getattr(self.dataset, "__getitems__", None)
        rows = [self.dataset[i] for i in indices] if together is None else together(indices)
        return [_with_id(i, row) for i, row in zip(indices, rows, strict=True)]


def _with_id(index: int, row: Any) -> Any:
    if isinstance(row, Mapping):
        return {"id": index, **row}
    return (index, *row) if isinstance(row, (tuple, list)) else (index, row)


def indexed(dataset: Any) -> Dataset[Any]:
    """Let a data set return each row's number with the row, for a loop that calls `Recorder.step` itself.

    Args:
        dataset: Anything with ``len`` and row numbers from 0.

    Returns:
        A data set with rows ``(i, *row)`` where they were tuples, ``{"id": i, **row}`` where they were mappings, and
        ``(i, row)`` for others.

    Example:
        >>> import pkexplain as pk
        >>> pk.indexed([("a", 0), ("b", 1)])[1]
        (1, 'b', 1)
    """
    return _Indexed(dataset)
