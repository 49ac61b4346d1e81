"""Results of an evaluation as plain text: what `print(result)` shows."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

from pkexplain.table import WIDTH

__all__ = ["tabulate"]


def tabulate(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """Lay out a table of plain text.

    Args:
        title: The line above it.
        headings: One for each column; the first column is to the left, all others to the right.
        rows: The cells of each row.
        notes: Lines below it.

    Returns:
        Lines of at most ``WIDTH`` columns, without colour codes.

    Example:
        >>> print(tabulate("Ages", ["name", "years"], [["Ada", "36"]]))
        Ages
        <BLANKLINE>
         name   years
         ──────────────
         Ada       36
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for position, heading in enumerate(headings):
        table.add_column(heading, justify="right" if position else "left", no_wrap=position > 0)
    for row in rows:
        table.add_row(*row)
    stream = io.StringIO()
    console = Console(file=stream, width=WIDTH, no_color=True, highlight=False, markup=False, emoji=False)
    console.print(title, "", table, *(("", *notes) if notes else ()), sep="\n")
    return "\n".join(line.rstrip() for line in stream.getvalue().rstrip("\n").split("\n"))
