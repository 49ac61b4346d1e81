"""Shared parts of all figures: colours, axes, and names that matplotlib does not parse as mathematics."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from pkexplain.results.numbers import clean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "INK",
    "NEGATIVE",
    "OTHER",
    "POSITIVE",
    "colour_of",
    "finish",
    "literal",
    "name_rows",
    "new_axes",
    "new_figure",
]

POSITIVE, NEGATIVE, OTHER, INK = "#2468a8", "#b4540a", "#7b7f86", "#1d2126"
_NAME_LENGTH = 48


def colour_of(value: float) -> str:
    """Choose a bar's colour by its sign."""
    return POSITIVE if value >= 0.0 else NEGATIVE


def literal(text: str) -> str:
    """Keep matplotlib from parsing dollar signs in data as mathematics."""
    return clean(text).replace("$", r"\$")


def name_rows(axes: Axes, names: Iterable[str]) -> None:
    """Label each row with a name, the first one at the top."""
    labels = [literal(name if len(name) <= _NAME_LENGTH else name[: _NAME_LENGTH - 1] + "…") for name in names]
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)


def finish(axes: Axes, *, xlabel: str, title: str) -> Axes:
    """Set the title and the horizontal axis's label."""
    axes.set_xlabel(literal(xlabel))
    axes.set_title(literal(title), loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def new_axes(ax: Axes | None, *, height: float) -> Axes:
    """Return the axes passed, or those of a new figure."""
    return new_figure(7.0, height).add_subplot() if ax is None else ax


def new_figure(width: float, height: float) -> Figure:
    """Make a figure, in inches, without pyplot."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
