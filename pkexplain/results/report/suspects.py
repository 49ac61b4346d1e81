"""A page of likely wrong labels: picture or text, the given label, what the model says, and the nearest rows."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pkexplain.files import local_path, write_atomically
from pkexplain.results.numbers import clean
from pkexplain.results.report._html import environment
from pkexplain.results.report.items import Item, TrainingSet

if TYPE_CHECKING:
    from pkexplain.results.suspects import Suspects

__all__ = ["write_page"]

_NEIGHBOURS = 4


@dataclass(frozen=True)
class Neighbour:
    """An example with a row like the suspect's: its number, the cosine, what it looks like, and its label."""

    id: int
    cosine: float
    item: Item
    label: str | None


@dataclass(frozen=True)
class Entry:
    """One suspect on the page: its number, score, looks, given label, what the model says, and its neighbours."""

    id: int
    score: float
    item: Item
    label: str | None
    says: str | None
    neighbours: tuple[Neighbour, ...]


def write_page(
    suspects: Suspects,
    path: str | os.PathLike[str],
    *,
    dataset: Any,
    label_names: Sequence[str] | Mapping[Any, str] | None,
    title: str | None,
) -> Path:
    """Write the page; see `Suspects.write_report`."""
    training_set = TrainingSet(dataset, label_names)
    training_set.check_length(len(suspects.scores), "Suspects.write_report(dataset)")

    def look(i: int) -> tuple[Item, str | None]:
        item = training_set.item(i)
        return item, None if item.label is None else clean(training_set.name(item.label))

    entries = []
    for each in suspects:
        near = tuple(Neighbour(i, cosine, *look(i)) for i, cosine in each.neighbours[:_NEIGHBOURS])
        item, label = look(each.id)
        says = each.prediction
        shown = None if says is None else clean(training_set.name(says)) if isinstance(says, int) else f"{says:.4g}"
        entries.append(Entry(each.id, each.score, item, label, shown, near))
    heading = clean(title or "Likely wrong labels")
    template = environment().get_template("suspects.html.j2")
    page = template.render(entries=entries, heading=heading, total=len(suspects.scores), centred=suspects.centred)
    target = local_path(path, "Suspects.write_report(path)")
    target.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(target, suspects.mode) as temporary:
        temporary.write_text(page.lstrip(), encoding="utf-8", newline="\n")
    return target
