"""Whether an id comes back with the data it came with before: wrong ids pass every other check."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pkexplain.errors import warn
from pkexplain.gradients.graph import random_state_kept
from pkexplain.record._observers import calls_of, named_inputs

__all__ = ["InputIdentity", "digest"]

_WATCHED = 64
"""Examples whose inputs are looked at, evenly spaced in the training set."""
_PADDING = (0, -100)
"""What collators pad with, where no attention mask says what is padding."""


class InputIdentity:
    """Digests of the inputs of some examples, compared whenever these come back.

    Of each step, the first forward pass is looked at. What was padded is left out, as padding may differ from batch to
    batch.

    Attributes:
        digests: A digest of each input, by the example's id and the input's name or position.

    Args:
        model: The model.
        num_examples: How many examples there are.
        augmented: Whether inputs may differ from visit to visit, so that nothing is compared.
        dataset: The training set, to compare with from the first visit on; or None.
    """

    def __init__(self, model: nn.Module, num_examples: int, augmented: bool = False, dataset: Any = None) -> None:
        """Choose the examples."""
        self._model, self._dataset = model, dataset
        self._watched = torch.zeros(0 if augmented else num_examples, dtype=torch.bool, device="cpu")
        step = max(1, num_examples // _WATCHED)
        self._watched[::step] = True
        self._warned = False
        self.digests: dict[str, dict[str, str]] = {}

    @contextmanager
    def noting(self, ids: Tensor) -> Iterator[None]:
        """Look at the first forward pass of a batch with these ids, ``(batch,)``."""
        places = self._watched[ids].nonzero()[:, 0].tolist() if len(self._watched) else []
        if not places or self._warned:
            yield
            return
        done: list[bool] = []

        def given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not done and torch.is_grad_enabled():
                done.append(True)
                self._compare(ids, places, named_inputs(args, kwargs))

        with calls_of(self._model, before=given):
            yield

    def _compare(self, ids: Tensor, places: Sequence[int], named: Mapping[str, Any]) -> None:
        rows = {
            name: value.detach()
            for name, value in named.items()
            if isinstance(value, Tensor) and value.ndim and len(value) == len(ids) and not value.is_complex()
        }
        mask = rows.get("attention_mask")
        for place in places:
            example = int(ids[place])
            mine = {n: value[place].cpu() for n, value in rows.items()}
            found = {n: digest(row, None if mask is None else mask[place].cpu()) for n, row in mine.items()}
            before = self.digests.setdefault(str(example), found)
            changed = [name for name, value in found.items() if before.get(name, value) != value]
            if changed:
                self._warn(
                    f"example {example} came back with another input {changed[0]!r} than it had before",
                    "the ids do not belong to the data of their batch (a counter beside a shuffling loader does that)",
                )
            elif self._dataset is not None and not _is_row(_read(self._dataset, example), mine):
                self._warn(
                    f"the inputs of example {example} are not those of dataset[{example}]",
                    "the ids do not belong to the data of their batch",
                )
            if self._warned:
                return

    def _warn(self, found: str, because: str) -> None:
        self._warned = True
        warn(
            f"pkexplain: {found}. Either {because}, and every explanation names the wrong examples: iterate with "
            "recorder.batches(loader), or return row numbers with the data (pkexplain.indexed). Or the inputs are "
            "changed at random or on their way to the model: then say so, Recorder(augmented=True)."
        )


def digest(row: Tensor, mask: Tensor | None = None) -> str:
    """Return a digest of one example's input, ``(*shape)``, without its padding.

    Args:
        row: The input, on the CPU.
        mask: Nonzero where ``row``, or its first dimension, is no padding.
    """
    if mask is not None and mask.ndim == 1 and row.ndim and len(mask) == len(row):
        values = row[mask != 0].flatten()
    else:
        flat = row.flatten()
        kept = torch.stack([flat != pad for pad in _PADDING]).all(0).nonzero()[:, 0]
        values = flat[int(kept[0]) : int(kept[-1]) + 1] if len(kept) else flat[:0]
    return hashlib.blake2b(values.double().contiguous().numpy().tobytes(), digest_size=8).hexdigest()


def _read(dataset: Any, example: int) -> Any:
    """Read a row without drawing the training's random numbers, which a transform of the data set may do."""
    python, arrays = random.getstate(), np.random.get_state()
    try:
        with random_state_kept():
            return dataset[example]
    finally:
        random.setstate(python)
        np.random.set_state(arrays)


def _is_row(row: Any, inputs: Mapping[str, Tensor]) -> bool:
    """Whether some input of an example is in a row of the data set; a single number says too little to tell."""
    telling = [value for value in inputs.values() if value.numel() > 1]
    known = [part for part in _parts(row) if part.numel() > 1]
    if not telling or not known:
        return True
    return any(digest(part.to(value.dtype)) == digest(value) for value in telling for part in known)


def _parts(row: Any) -> Iterator[Tensor]:
    """The tensors, arrays and lists of numbers in a row of a data set."""
    if isinstance(row, Mapping):
        row = list(row.values())
    if isinstance(row, Tensor):
        yield row.detach().cpu()
    elif hasattr(row, "__array__"):
        yield torch.as_tensor(row, device="cpu")
    elif isinstance(row, (list, tuple)):
        if row and all(isinstance(part, (int, float)) for part in row):
            yield torch.tensor(row, device="cpu")
        else:
            for part in row:
                yield from _parts(part)
