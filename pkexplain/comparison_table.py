"""A comparison as plain text: what `print(comparison)` shows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pkexplain.table import percent, plain_text, significant

if TYPE_CHECKING:
    from pkexplain.comparison import Comparison, Method

__all__ = ["render_comparison", "size", "wall_time"]


def wall_time(seconds: float) -> str:
    """Write a duration with the unit that suits it.

    Args:
        seconds: The duration.

    Returns:
        For example ``"12.3 ms"`` or ``"4.50 s"``.
    """
    if not seconds < 1e-3:
        return f"{significant(seconds)} s" if not seconds < 1.0 else f"{significant(seconds * 1e3)} ms"
    return f"{significant(seconds * 1e6)} µs"


def size(count: float) -> str:
    """Write a number of bytes.

    Args:
        count: Bytes, or nan.

    Returns:
        For example ``"12 MiB"``; a dash for nan.
    """
    return "–" if math.isnan(count) else f"{count / 2**20:,.0f} MiB"


def render_comparison(comparison: Comparison) -> str:
    """Render a comparison as plain text.

    Args:
        comparison: What to show.

    Returns:
        Lines of at most 100 columns; more where there are yardsticks.
    """
    from rich import box
    from rich.table import Table

    k, queries, examples = comparison.k, comparison.num_queries, comparison.num_examples
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("method", no_wrap=True)
    yardsticks = list(comparison.methods[0].yardsticks)
    for heading in ("gap", f"top {k}", "rank corr.", "a query", "once", "memory", *yardsticks):
        table.add_column(heading, justify="right", no_wrap=True)
    for method in comparison.methods:
        table.add_row(*_row(method), *(f"{value:.3f}" for value in method.yardsticks.values()))
    parts = [
        f"{len(comparison.methods)} methods on one run, asked how {examples:,} training examples moved minus the loss "
        f"of {queries:,} {'query' if queries == 1 else 'queries'}.",
        "",
        table,
        "",
        "gap: what the sum of the scores leaves of the change of minus the loss; the path reading's is made to close. "
        f"top {k}, rank corr.: agreement with the path reading; by chance {percent(min(k, examples) / examples)} and "
        "0. memory: peak beside what was there, coarse.",
    ]
    if comparison.left_out:
        parts += ["", "Left out:", *(f"  {each.name}: {each.reason}" for each in comparison.left_out)]
    return plain_text(*parts, extra=12 * len(yardsticks))


def _row(method: Method) -> tuple[str, ...]:
    correlation = "–" if math.isnan(method.rank_correlation) else f"{method.rank_correlation:.3f}"
    measures = percent(method.gap), percent(method.overlap), correlation
    times = wall_time(method.query_seconds), wall_time(method.setup_seconds)
    return method.name, *measures, *times, size(method.peak_bytes)
