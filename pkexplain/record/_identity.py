"""Whether an id comes back with the data it came with before: wrong ids pass every other check.

An id is called wrong only if nothing else explains what was seen. Between two visits of an example, these may change:

- padding, on either end of any dimension, whatever it is padded with;
- rounding, where inputs are computed anew, as by a frozen network;
- scale and offset, where the loop divides by statistics of the batch;
- which of several forward passes comes first, and what it is given besides the example's own data.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pkexplain.errors import warn
from pkexplain.gradients.torch_state import without_autocast
from pkexplain.ids.digests import differ, digest, read_row, without_padding
from pkexplain.ids.likeness import FEW, InputRow, distance, layouts, standard, varies
from pkexplain.record._observers import calls_of, named_inputs

__all__ = ["InputIdentity"]

_WATCHED = 64
"""Examples whose inputs are looked at, evenly spaced in the training set."""
_PASSES = 4
"""Forward passes of a step that are looked at."""
_EQUAL = 5e-3
"""How far an input may be from the row that it is: bfloat16 makes half of it."""
_LIKELY, _LOOKED_AT = 0.05, 256
"""Rows that come as near in so many of their values are compared in full."""
_SURE = 16
"""Once so many rows have come under their own ids, no more are looked for."""
_DOUBTS, _MOST_DOUBTS = 4, 256
"""How many rows of a batch, and of an epoch, are compared in full."""
_AGAIN = " ="
"""Marks the digest of an input that came back with the same bits."""

_Passed = tuple[Tensor, Tensor | None]
"""An input of one example, and its attention mask."""


class InputIdentity:
    """The inputs of some examples, compared whenever these come back, and found where they come under another id.

    An example has changed if an input of it did, and no input that tells it from the other watched examples is as it
    was. Inputs are taken from forward passes with gradients, if they have one row for each example.

    With the training set, whether its rows are the inputs is not asked, as the loop may transform them in any way. It
    is looked whether a row comes, unchanged, cast, or scaled and shifted, under another id than its own, and the row of
    that id is not there: then the ids are wrong, whatever the loop does. Every row comes once in an epoch, so that the
    first one shows it. Where inputs cannot be recognised in the rows (texts that a collator tokenises, pictures that
    it resizes), nothing is said.

    Attributes:
        digests: A digest of each input, by the example's id and the input's name or position, and those of the rows of
            the data set, as ``dataset…``. One that came back with the same bits ends in ``=``.

    Args:
        model: The model.
        num_examples: How many examples there are.
        augmented: Whether inputs may differ from visit to visit, so that nothing is compared.
        dataset: The training set, to find wrong ids from the first visit on; or None.
    """

    def __init__(self, model: nn.Module, num_examples: int, augmented: bool = False, dataset: Any = None) -> None:
        """Choose the examples."""
        self._model = model
        self._watched = torch.zeros(0 if augmented else num_examples, dtype=torch.bool, device="cpu")
        self._watched[:: max(1, num_examples // _WATCHED)] = True
        self._rows = None if dataset is None or augmented else _DataSetRows(dataset, num_examples)
        self._warned = self._begun = False
        self._known: dict[str, dict[str, list[InputRow]]] = {}
        self.digests: dict[str, dict[str, str]] = {}

    @contextmanager
    def noting(self, ids: Tensor) -> Iterator[None]:
        """Look at the forward passes of a batch with these ids, ``(batch,)``."""
        if not self._begun:
            self._begin()
        places = self._watched[ids].nonzero()[:, 0] if len(self._watched) else torch.empty(0, device="cpu")
        looks = self._rows is not None and self._rows.left > 0
        if self._warned or not (len(places) or looks):
            yield
            return
        passes: list[dict[str, list[_Passed]]] = []
        whole: list[dict[str, Tensor]] = []

        def given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if len(passes) < _PASSES and torch.is_grad_enabled():
                inputs = _inputs(named_inputs(args, kwargs), len(ids))
                passes.append(_rows_at(inputs, places))
                if self._rows is not None and looks:
                    self._rows.read(self.digests)
                    whole.append(inputs)

        with calls_of(self._model, before=given):
            yield
        if self._rows is not None and whole and (found := self._rows.elsewhere(ids, whole)):
            self._warn(
                f"an input that came as example {found[0]} is dataset[{found[1]}], not dataset[{found[0]}]: "
                "the ids do not belong to the data of their batch",
            )
        for at, place in enumerate(places.tolist()):
            now = {name: [each[name][at] for each in passes if name in each] for each in passes for name in each}
            if not self._warned and now:
                self._compare(str(int(ids[place])), now)

    def _begin(self) -> None:
        """Also watch what was watched before the run was resumed."""
        self._begun = True
        if len(self._watched):
            before = [int(name) for name in self.digests if name.isdecimal() and int(name) < len(self._watched)]
            self._watched[before] = True

    def _compare(self, example: str, now: Mapping[str, list[_Passed]]) -> None:
        """Compare the inputs of an example, by their names, each as it was in some forward passes."""
        digests, known = self.digests.setdefault(example, {}), self._known.setdefault(example, {})
        changed: list[str] = []
        same: list[str] = []
        for name, passed in now.items():
            before = known.get(name)
            if before is not None and before[0].is_again(passed[0][0]):
                same.append(name)
                if digests[name] == before[0].digest:
                    digests[name] += _AGAIN
                continue
            rows = [InputRow.of(*each) for each in passed]
            if before is not None:
                agree = any(mine.same_as(other) for mine, other in itertools.product(rows, before))
                (same if agree else changed).append(name)
                continue
            known[name] = rows
            stored = digests.setdefault(name, rows[0].digest)
            if stored.split()[0] == rows[0].code:
                same.append(name)
            elif stored.endswith(_AGAIN) and differ(stored, rows[0].digest):
                changed.append(name)
        if changed and not any(self._tells(example, name) for name in same):
            self._warn(
                f"example {example} came back with another input {changed[0]!r} than it had before. "
                "Either the ids do not belong to the data of their batch (a counter beside a shuffling loader does "
                "that), or the inputs are changed at random: then say so, Recorder(augmented=True)",
            )

    def _tells(self, example: str, name: str) -> bool:
        """Whether an input tells an example from the others; a mask of ones does not."""
        mine = self.digests[example][name].partition(" ")[0]
        others = (digests for other, digests in self.digests.items() if other != example)
        return all(digests.get(name, "").partition(" ")[0] != mine for digests in others)

    def _warn(self, found: str) -> None:
        self._warned = True
        warn(
            f"pkexplain: {found}. With wrong ids every explanation names the wrong examples: iterate with "
            "recorder.batches(loader), or return row numbers with the data (pkexplain.indexed)."
        )


def _inputs(named: Mapping[str, Any], examples: int) -> dict[str, Tensor]:
    """The tensors with one row for each example, ``(batch, …)``; also those that have these in their second dimension.

    Where the first two dimensions have the size of the batch, either may be it, and the second is taken, too.
    """
    found: dict[str, Tensor] = {}
    for name, value in named.items():
        if not isinstance(value, Tensor) or not value.ndim or value.is_nested or value.is_quantized:
            continue
        if len(value) != examples or value.layout not in (torch.strided, torch.sparse_coo):
            continue
        value = value.detach()
        found[name] = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
        if value.ndim > 1 and value.shape[1] == examples and value.layout == torch.strided:
            found[f"{name} in columns"] = found[name].transpose(0, 1)
    return found


def _rows_at(inputs: Mapping[str, Tensor], places: Tensor) -> dict[str, list[_Passed]]:
    """The rows of some examples, by the input's name; with the attention mask that came beside an input."""
    if not len(places):
        return {}
    some = {name: value.index_select(0, places.to(value.device)) for name, value in inputs.items()}
    some = {name: (value.to_dense() if value.is_sparse else value).cpu() for name, value in some.items()}
    rows: dict[str, list[_Passed]] = {}
    for name, value in some.items():
        beside, _, own = name.rpartition(".")
        masks = some.get(f"{beside}.attention_mask".lstrip("."))
        if own == "labels" or own.startswith("decoder"):
            masks = None  # it is the mask of the encoder's tokens
        rows[name] = [(row, None if masks is None else masks[at]) for at, row in enumerate(value)]
    return rows


class _DataSetRows:
    """Rows of the data set at some ids, looked for in every batch of the first epoch.

    Args:
        dataset: The data set.
        num_examples: How many examples there are.

    Attributes:
        left: How many examples are still to come in the first epoch.
    """

    def __init__(self, dataset: Any, num_examples: int) -> None:
        """Read nothing yet."""
        self._dataset, self.left, self._doubts = dataset, num_examples, _MOST_DOUBTS
        self._ids = range(0, num_examples, max(1, num_examples // _WATCHED))
        self._kinds: list[_Kind] | None = None
        self._right: set[int] = set()
        self._wrong: set[int] = set()

    def read(self, digests: dict[str, dict[str, str]]) -> None:
        """Read the rows, once, and note their digests."""
        if self._kinds is not None:
            return
        found: dict[tuple[int, bool], list[tuple[int, Tensor]]] = {}
        for example in self._ids:
            for name, part in read_row(self._dataset, example).items():
                digests.setdefault(str(example), {})[f"dataset{name}"] = digest(without_padding(part))
                if varies(part):
                    for each in layouts(part):
                        found.setdefault((part.numel(), False), []).append((example, each))
                    if part.ndim == 1 and not part.is_floating_point():
                        found.setdefault((0, True), []).append((example, part))
        self._kinds = [_Kind.of(parts, tokens) for (_, tokens), parts in found.items()]

    def elsewhere(self, ids: Tensor, passes: Sequence[Mapping[str, Tensor]]) -> tuple[int, int] | None:
        """Find an id, and that of the row that came under it, once this was seen of two ids.

        It ends once enough rows have come under their own ids.

        Args:
            ids: The batch, ``(batch,)``.
            passes: The inputs of each forward pass.
        """
        self.left -= len(ids)
        values = [value for inputs in passes for value in inputs.values() if not value.is_sparse and value.numel()]
        with torch.no_grad(), without_autocast():
            likely = [found for value in values for kind in self._kinds or () for found in kind.likely(value)]
            self._right |= {row for far, place, row, _ in likely if int(ids[place]) == row and far < 1e-4}
            others = [found for found in likely if int(ids[found[1]]) != found[2]]
            for _, place, row, part in sorted(others, key=lambda each: each[0])[:_DOUBTS]:
                self._doubts -= 1
                if self._is_elsewhere(int(ids[place]), [value[place].cpu() for value in values], row, part):
                    self._wrong.add(int(ids[place]))
                if len(self._wrong) > 1:
                    return int(ids[place]), row
        if self._doubts <= 0 or (len(self._right) >= _SURE and not self._wrong):  # or rows that are all alike
            self.left = 0
        if self.left <= 0:
            self._kinds = []
        return None

    def _is_elsewhere(self, example: int, values: Sequence[Tensor], row: int, part: Tensor) -> bool:
        """Whether a part of another row is one of an example's inputs, and nothing of the example's own row is."""
        there = min(distance(value, part) for value in values)
        if there > _EQUAL:
            return False
        mine, others = read_row(self._dataset, example), read_row(self._dataset, row)
        own = [each for value in mine.values() for each in layouts(value)]
        if min((distance(each, part) for each in own), default=math.inf) < _EQUAL:
            return False  # the two rows are alike
        telling = (
            each
            for name, value in mine.items()
            if varies(value) and not (name in others and torch.equal(value, others[name]))
            for each in layouts(value)
        )
        here = min((distance(value, each) for each in telling for value in values), default=math.inf)
        return here > 10 * max(there, 1e-4)


@dataclass
class _Kind:
    """Parts of rows that are compared together: those of one size; or tokens, of any length.

    Attributes:
        parts: The id of each row, and the part.
        ids: The ids again.
        tokens: Whether they are tokens.
        places: Which of their values are compared first, ``(parts, values)``.
        values: These, ``(parts, values)``; of more than a few numbers, to be correlated.
        lengths: How long they are, ``(parts, 1)``.
    """

    parts: list[tuple[int, Tensor]]
    ids: Tensor
    tokens: bool
    places: Tensor
    values: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, parts: list[tuple[int, Tensor]], tokens: bool) -> _Kind:
        flat = [part.flatten() for _, part in parts]
        lengths = torch.tensor([[len(each)] for each in flat], device="cpu")
        count = FEW if tokens else min(_LOOKED_AT, len(flat[0]))
        shares = torch.linspace(0, 1, count, dtype=torch.float64, device="cpu")
        places = (shares * (lengths - 1)).long()
        values = torch.stack([each[at].to(torch.float32) for each, at in zip(flat, places, strict=True)])
        ids = torch.tensor([example for example, _ in parts], device="cpu")
        alone = tokens or len(flat[0]) < FEW
        return cls(parts, ids, tokens, places, values if alone else standard(values), lengths)

    def likely(self, value: Tensor) -> Iterator[tuple[float, int, int, Tensor]]:
        """Where an input's values may be those of a row: how far, the place in the batch, the row's id, the part.

        Args:
            value: The input, ``(batch, …)``.
        """
        flat = value.reshape(len(value), -1)
        if not self.tokens:
            if flat.shape[1] != int(self.lengths[0]):
                return
            looked = flat[:, self.places[0].to(flat.device)].to(torch.float32).cpu()
            if flat.shape[1] < FEW:
                known = self.values.nan_to_num()
                far = torch.cdist(looked.nan_to_num(), known) / known.norm(dim=1)
            else:
                far = 1 - standard(looked) @ self.values.T
        elif value.ndim == 2 and not value.is_floating_point():
            start = (self.places % flat.shape[1], (flat.shape[1] - self.lengths + self.places) % flat.shape[1])
            hits = [(flat[:, at.to(flat.device)].to(torch.float32).cpu() == self.values).all(-1) for at in start]
            far = 1.0 - ((hits[0] | hits[1]) & (self.lengths[:, 0] <= flat.shape[1])).float()
        else:
            return
        for place, which in (far < _LIKELY).nonzero().tolist():
            yield float(far[place, which]), place, *self.parts[which]
