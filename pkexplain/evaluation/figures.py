"""Results of an evaluation as matplotlib figures, without pyplot or its global state.

Every function draws into the axes passed to it, or into a new figure, available as ``axes.figure``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pkexplain.evaluation._checking import as_finite
from pkexplain.evaluation.datamodelling import LinearDatamodellingScore
from pkexplain.evaluation.leave_one_out import LeaveOneOut
from pkexplain.evaluation.mislabels import MislabelDetection
from pkexplain.evaluation.subset_removal import SubsetRemoval
from pkexplain.results.drawing import INK, OTHER, POSITIVE, finish, literal, name_rows, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_detection", "plot_leave_one_out", "plot_removal", "plot_scores"]


def plot_scores(scores: Mapping[str, LinearDatamodellingScore], *, ax: Axes | None = None) -> Axes:
    """Draw linear datamodelling scores with their intervals, and the ceiling if it is known.

    Args:
        scores: The scores, by method.
        ax: Where to draw; None for a new figure.

    Returns:
        The axes.
    """
    axes = new_axes(ax, height=0.4 * len(scores) + 1.2)
    for row, score in enumerate(scores.values()):
        axes.plot([score.mean.low, score.mean.high], [row, row], color=POSITIVE, linewidth=2)
        axes.plot([score.mean.value], [row], color=POSITIVE, marker="o")
    axes.axvline(0.0, color=OTHER, linewidth=0.8)
    ceilings = {score.ceiling for score in scores.values() if score.ceiling is not None}
    for ceiling in sorted(ceilings):
        axes.axvline(ceiling, color=INK, linewidth=0.8, linestyle=":")
    name_rows(axes, [f"{name}  {score.mean.value:.3f}" for name, score in scores.items()])
    dotted = " (dotted: ceiling)" if ceilings else ""
    return finish(axes, xlabel=f"Spearman's correlation over subsets{dotted}", title="Linear datamodelling score")


def plot_detection(detections: Mapping[str, MislabelDetection], *, ax: Axes | None = None) -> Axes:
    """Draw the share of mislabelled examples found over the share of examples inspected.

    Args:
        detections: The detections, by the name of the score.
        ax: Where to draw; None for a new figure.

    Returns:
        The axes; the dotted line is chance.
    """
    axes = new_axes(ax, height=4.2)
    for name, detection in detections.items():
        label = literal(f"{name} (AUROC {detection.auroc.value:.3f})")
        axes.plot(detection.inspected, detection.found, label=label)
    axes.plot([0.0, 1.0], [0.0, 1.0], color=OTHER, linewidth=0.8, linestyle=":")
    axes.set_ylabel("share of the mislabelled found")
    axes.legend(frameon=False)
    return finish(axes, xlabel="share of examples inspected", title="Mislabelled examples")


def plot_removal(removal: SubsetRemoval, *, ax: Axes | None = None) -> Axes:
    """Draw the mean drop of the output over the number of examples left out, with intervals over queries.

    Args:
        removal: The drops.
        ax: Where to draw; None for a new figure.

    Returns:
        The axes.
    """
    axes = new_axes(ax, height=3.6)
    for method in removal.methods:
        means = removal.means[method]
        values = [mean.value for mean in means]
        below = [max(0.0, mean.value - mean.low) for mean in means]
        above = [max(0.0, mean.high - mean.value) for mean in means]
        axes.errorbar(removal.counts, values, yerr=[below, above], marker="o", capsize=3, label=literal(method))
    axes.axhline(0.0, color=OTHER, linewidth=0.8)
    axes.set_ylabel("drop (output units)")
    axes.legend(frameon=False)
    return finish(axes, xlabel="examples left out", title="Outputs without their strongest proponents")


def plot_leave_one_out(contributions: Any, left_out: LeaveOneOut, *, query: int = 0, ax: Axes | None = None) -> Axes:
    """Plot one query's output differences without single examples against their contributions.

    Args:
        contributions: Contribution of every example to every query's output, ``(queries, num_examples)``, in output
            units.
        left_out: The differences.
        query: Which query to draw.
        ax: Where to draw; None for a new figure.

    Returns:
        The axes; on the dotted line both are equal.

    Raises:
        EvaluationError: The contributions are not those of these queries and examples.
    """
    asked, shape = "plot_leave_one_out(contributions, …)", (len(left_out.differences), left_out.num_examples)
    finite = as_finite(contributions, shape, asked, "(queries, num_examples)", "what was left out")
    chosen, differences = finite[query, left_out.ids], left_out.differences[query]
    axes = new_axes(ax, height=4.2)
    axes.scatter(chosen, differences, s=12, color=POSITIVE)
    ends = [float(np.min([chosen, differences])), float(np.max([chosen, differences]))]
    axes.plot(ends, ends, color=OTHER, linewidth=0.8, linestyle=":")
    axes.set_ylabel("drop without it (output units)")
    return finish(axes, xlabel="contribution (output units)", title=f"Query {query}, examples left out one by one")
