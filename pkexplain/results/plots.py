"""The report's data as matplotlib figures, without pyplot or its global state.

Every function draws into the axes passed to it, or into a new figure, available as ``axes.figure``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from pkexplain.results.comparison import Comparison
from pkexplain.results.drawing import INK, OTHER, POSITIVE, colour_of, finish, literal, name_rows, new_axes, new_figure
from pkexplain.results.explanation import Explanation
from pkexplain.results.numbers import decimals, fixed
from pkexplain.results.report.data import Example, build_section
from pkexplain.results.report.items import TrainingSet, name_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_comparison", "plot_contributions", "plot_examples", "plot_groups", "plot_ledger", "plot_timeline"]


def plot_ledger(explanation: Explanation, *, ax: Axes | None = None) -> Axes:
    """Draw the ledger as a waterfall from the initial to the final output.

    Args:
        explanation: The explanation.
        ax: Where to draw; None for a new figure.

    Returns:
        The axes.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    section = build_section(explanation)
    steps = section.steps
    axes = new_axes(ax, height=0.45 * len(steps) + 1.0)
    for row, step in enumerate(steps):
        if step.kind == "level":
            axes.plot([step.end, step.end], [row - 0.3, row + 0.3], color=INK, linewidth=3)
        else:
            colour = colour_of(step.value) if step.kind == "examples" else OTHER
            axes.barh(row, step.value, left=step.start, height=0.5, color=colour)
        if row + 1 < len(steps):
            axes.plot([step.end, step.end], [row, row + 1], color=OTHER, linewidth=0.8, linestyle=":", zorder=0)
    axes.use_sticky_edges = False
    axes.margins(x=0.03)
    values = [fixed(s.value, section.places, sign=s.kind != "level") for s in steps]
    name_rows(axes, [f"{step.name}  {value}" for step, value in zip(steps, values, strict=True)])
    return finish(axes, xlabel=f"{explanation.output} (output units)", title="The ledger")


def plot_contributions(explanation: Explanation, *, ax: Axes | None = None) -> Axes:
    """Draw the contributions of the proponents and opponents, largest first.

    Args:
        explanation: The explanation.
        ax: Where to draw; None for a new figure.

    Returns:
        The axes.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    shown = (*explanation.proponents, *reversed(explanation.opponents))
    axes = new_axes(ax, height=0.3 * len(shown) + 1.2)
    values = [c.contribution for c in shown]
    axes.barh(range(len(shown)), values, height=0.7, color=list(map(colour_of, values)))
    axes.axvline(0.0, color=OTHER, linewidth=0.8)
    name_rows(axes, [f"example {c.id}" for c in shown])
    return finish(axes, xlabel="contribution (output units)", title=f"What moved {explanation.output} most")


def plot_timeline(explanation: Explanation, *, ax: Axes | None = None) -> Axes:
    """Draw the output at every checkpoint over the examples' summed contribution in every segment.

    Args:
        explanation: The explanation.
        ax: Where to draw; None for a new figure.

    Returns:
        The axes. Bars and line share its scale, output units.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    axes = new_axes(ax, height=3.6)
    steps = np.asarray(explanation.boundaries)
    widths, sums = np.diff(steps), list(explanation.segment_sums)
    colours = list(map(colour_of, sums))
    axes.bar(steps[:-1], sums, 0.9 * widths, align="edge", color=colours, label="examples, each segment")
    axes.plot(steps, explanation.checkpoint_outputs, color=INK, marker="o", markersize=3, label="output")
    axes.axhline(0.0, color=OTHER, linewidth=0.8)
    axes.set_ylabel(f"{literal(explanation.output)} (output units)")
    axes.legend(frameon=False)
    return finish(axes, xlabel="optimizer step", title="Over the course of training")


def plot_groups(
    explanation: Explanation,
    groups: Sequence[object] | np.ndarray,
    *,
    label_names: Sequence[str] | Mapping[Any, str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the contributions of all training examples summed by group.

    Args:
        explanation: The explanation.
        groups: One label per training example, ``(num_examples,)``.
        label_names: Name of each label, a sequence or a mapping.
        ax: Where to draw; None for a new figure.

    Returns:
        The axes: net as bars, and the share of the gross contribution next to each name.

    Raises:
        QueryError: The number of labels is not the number of training examples.
        MissingDependencyError: matplotlib is not installed.
    """
    sums = explanation.by_group(groups)
    axes = new_axes(ax, height=0.35 * len(sums) + 1.2)
    nets = [group.net for group in sums]
    axes.barh(range(len(sums)), nets, height=0.6, color=list(map(colour_of, nets)))
    axes.axvline(0.0, color=OTHER, linewidth=0.8)
    places = decimals(group.gross for group in sums)
    name_rows(axes, [f"{name_label(label_names, g.group)[:24]}  (gross {fixed(g.gross, places)})" for g in sums])
    return finish(axes, xlabel="net contribution (output units)", title=f"{explanation.output} by group")


def plot_examples(
    explanation: Explanation, dataset: Any, *, label_names: Sequence[str] | Mapping[Any, str] | None = None
) -> Figure:
    """Show the query, the proponents and the opponents as pictures or texts.

    Args:
        explanation: The explanation.
        dataset: The whole training set, as for `pkexplain.write_report`.
        label_names: Name of each label, a sequence or a mapping; by default the data set's own, if any.

    Returns:
        A figure: the query first, proponents in the upper row, opponents in the lower.

    Raises:
        ConfigurationError: The data set is not the one that was recorded.
        MissingDependencyError: matplotlib is not installed.
    """
    training_set = TrainingSet(dataset, label_names)
    section = build_section(explanation, training_set, name=training_set.name)
    columns = max(len(section.proponents), len(section.opponents), 1)
    figure = new_figure(1.5 * (columns + 1), 4.4)
    grid = figure.subplots(2, columns + 1, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    if section.query is not None:
        _show(grid[0, 0], section.query.picture, section.query.text, f"query\n{explanation.output}", INK)
    caption = partial(_caption, places=section.example_places)
    for row, examples in enumerate((section.proponents, section.opponents)):
        for axes, example in zip(grid[row, 1:], examples, strict=False):
            item = example.item
            if item is not None:
                _show(axes, item.picture, item.text, caption(example), colour_of(example.entry.contribution))
    return figure


def plot_comparison(comparison: Comparison) -> Figure:
    """Draw how well methods agree, and what they cost.

    Args:
        comparison: What `pkexplain.compare` returned.

    Returns:
        A figure: the rank correlations of all pairs as a map, then for each method the share of its top k examples
        that it has in common with the path reading, and the time of a query.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    methods = comparison.methods
    names = [literal(method.name) for method in methods]
    figure = new_figure(13.0, 0.42 * len(methods) + 2.2)
    grid = figure.subplots(1, 3, width_ratios=(1.3, 1.0, 1.0))
    drawn = grid[0].imshow(comparison.rank_correlations, cmap="RdBu", vmin=-1.0, vmax=1.0, aspect="auto")
    for row, values in enumerate(comparison.rank_correlations):
        for column, value in enumerate(values):
            text = "–" if np.isnan(value) else f"{value:.2f}"
            colour = "white" if abs(value) > 0.6 else INK
            grid[0].text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    grid[0].set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    grid[0].set_yticks(range(len(names)), names)
    grid[0].set_title("Rank correlation", loc="left")
    figure.colorbar(drawn, ax=grid[0], shrink=0.8)
    bars = [
        ([method.overlap for method in methods], f"First {comparison.k} shared with the path reading", "share"),
        ([1e3 * method.query_seconds for method in methods], "Time of a query", "milliseconds"),
    ]
    for axes, (values, title, unit) in zip(grid[1:], bars, strict=True):
        axes.barh(range(len(names)), values, height=0.6, color=POSITIVE)
        axes.set_yticks(range(len(names)), [""] * len(names))
        axes.set_ylim(len(names) - 0.5, -0.5)
        finish(axes, xlabel=unit, title=title)
    grid[1].set_xlim(0.0, 1.0)
    grid[2].set_xscale("log")
    return figure


def _caption(example: Example, places: int) -> str:
    label = "" if example.label is None else f", {example.label[:12]}"
    return f"{fixed(example.entry.contribution, places, sign=True)}\n{example.entry.id}{label}"


def _show(axes: Axes, picture: np.ndarray | None, text: str | None, title: str, colour: str) -> None:
    axes.set_title(literal(title), fontsize=9, color=colour)
    if picture is not None:
        axes.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    elif text is not None:
        short = text if len(text) <= 90 else text[:89] + "…"
        lines = [short[i : i + 18] for i in range(0, len(short), 18)]
        axes.text(0.5, 1.0, literal("\n".join(lines)), fontsize=7, ha="center", va="top", transform=axes.transAxes)
