"""Whether a data set is the one that was recorded, in the same order: told by the digests of some inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from pkexplain.ids.digests import differ, digest, read_row, without_padding
from pkexplain.ids.likeness import layouts, varies

__all__ = ["note_on_order"]

_COMPARED = 64
"""Rows that are compared with what was recorded under their ids."""
_SEARCHED = 512
"""Rows among which these are looked for if none of them is where it should be."""
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def note_on_order(dataset: Any, digests: Mapping[str, Mapping[str, str]]) -> str | None:
    """Say so if rows of a data set are not at the ids under which they were recorded.

    That is told for sure only: if what was recorded under some ids is found in other rows; or if some rows are what was
    recorded, and others, of the same shape, are not. Where no row is recognised, because the loop transformed it or the
    data set draws random numbers, nothing is said.

    Args:
        dataset: The data set, with a length and rows by number.
        digests: What was recorded: digests by id and by the input's name.

    Returns:
        A sentence; None if nothing speaks against the data set.
    """
    found = _Found(dataset, digests)
    watched = sorted(int(name) for name in digests if name.isdecimal() and int(name) < len(dataset))
    watched = watched[:: max(1, len(watched) // _COMPARED)]
    for row in watched:
        found.compare(row)
    if not found.own and watched:
        step = max(1, len(dataset) // _SEARCHED)
        near = chain.from_iterable((row + 1, row - 1) for row in watched)
        for row in chain(near, range(step // 2, len(dataset), step)):
            if len(found.moved) > 1:
                break
            if 0 <= row < len(dataset):
                found.compare(row)
    return found.note()


@dataclass
class _Found:
    """What was found in the rows that were read.

    Attributes:
        dataset: The data set.
        digests: What was recorded.
        own: Rows that are what was recorded under their ids.
        moved: Rows that are what was recorded under another id, and that id.
        changed: Rows that are not what was recorded under their ids, and might be by their shape.
    """

    dataset: Any
    digests: Mapping[str, Mapping[str, str]]
    own: list[int] = field(default_factory=list)
    moved: dict[int, int] = field(default_factory=dict)
    changed: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Note which hashes belong to one example only."""
        self._ids: dict[str, int | None] = {}
        for name, recorded in self.digests.items():
            for code in {each.partition(" ")[0] for each in recorded.values()}:
                self._ids[code] = None if code in self._ids or not name.isdecimal() else int(name)

    def compare(self, row: int) -> None:
        """Read a row, and compare it."""
        mine = list(_digests_of(read_row(self.dataset, row).values()))
        found = {self._ids.get(each.partition(" ")[0]) for each in mine} - {None}
        recorded = self.digests.get(str(row), {})
        codes = {each.partition(" ")[0] for each in recorded.values()}
        if any(each.partition(" ")[0] in codes for each in mine):
            if row in found:
                self.own.append(row)
        elif found:
            self.moved[row] = min(example for example in found if example is not None)
        elif any(differ(each, other) for each in mine for other in recorded.values()):
            self.changed.append(row)

    def note(self) -> str | None:
        """Put it into words."""
        if len(self.moved) > max(1, len(self.own)):
            row, example = next(iter(self.moved.items()))
            return (
                "The data set that was passed is in another order than the one that was recorded: its row "
                f"{row:,} is example {example:,}. The examples shown here are not those that the numbers belong to."
            )
        wrong = sorted({*self.moved, *self.changed})
        if self.own and wrong:
            compared = f"{len(wrong):,} of {len(self.own) + len(wrong):,} rows that were compared"
            return (
                f"The data set that was passed is not the one that was recorded: {compared} are others, the first of "
                f"them row {wrong[0]:,}."
            )
        return None


def _digests_of(parts: Iterable[Tensor]) -> Iterator[str]:
    """Digests of the parts of a row, in the forms in which a loop may have passed them on."""
    for part in filter(varies, parts):
        for each in layouts(part):
            forms = [each, each.flatten()] if each.ndim > 1 else [each]
            if each.is_floating_point():
                forms += [form.to(dtype) for form in forms for dtype in _DTYPES if dtype != each.dtype]
            elif each.dtype == torch.uint8 and each.ndim > 1:
                forms += [form.to(torch.float32) / 255 for form in forms]
            yield from (digest(without_padding(form)) for form in forms)
