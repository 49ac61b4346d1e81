"""An explanation as plain text: what `print(explanation)` shows.

The ledger comes first, because a contribution is read against what it adds up to; then how much cancelled; then the
examples; then what was checked. The number formats are shared with the report.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from pkexplain.explanation import Contribution, Explanation

__all__ = ["WIDTH", "decimals", "fixed", "percent", "plain_text", "render", "significant"]

WIDTH = 100
"""Columns of the rendered text."""

_READINGS = {
    "path": "the contributions add up to the change of the output",
    "removal": "contributions predict what leaving an example out takes away; they do not add up",
}


def decimals(values: Iterable[float], digits: int = 4) -> int:
    """Choose how many decimals show the largest of some values with a number of significant digits.

    Args:
        values: Numbers that will be shown under each other; those that are not finite are ignored.
        digits: Significant digits of the largest one.

    Returns:
        Decimals, 0 to 8.

    Example:
        >>> decimals([0.25, 12.5])
        2
    """
    scale = max((abs(v) for v in values if math.isfinite(v)), default=0.0)
    if scale == 0.0:
        return digits - 1
    return min(8, max(0, digits - 1 - math.floor(math.log10(scale))))


def fixed(value: float, places: int, *, sign: bool = False) -> str:
    """Write a number with a fixed number of decimals, and never a small number as zero.

    Args:
        value: The number.
        places: Decimals.
        sign: Whether a positive number gets its plus.

    Returns:
        The number; in scientific notation where the decimals would round it to zero or it is too long to read.

    Example:
        >>> fixed(1234.5, 2, sign=True), fixed(4e-15, 3)
        ('+1,234.50', '4.0e-15')
    """
    if not math.isfinite(value):
        return "not finite"
    plus = "+" if sign else ""
    too_small = value != 0.0 and abs(value) < 0.5 * 10.0**-places
    if too_small or abs(value) >= 1e9:
        return f"{value:{plus}.1e}"
    return f"{value:{plus},.{places}f}" if value else f"{0.0:.{places}f}"


def significant(value: float, digits: int = 3) -> str:
    """Write a number with a number of significant digits; a dash where there is none.

    Args:
        value: The number, or nan.
        digits: Significant digits.

    Returns:
        The number, for example ``"0.0123"``, ``"1,210"`` or ``"1.20e-05"``, or ``"–"`` for nan.
    """
    if math.isnan(value):
        return "–"
    rounded = float(f"{value:.{digits}g}")
    if 10**digits <= abs(rounded) < 10**6:
        return f"{rounded:,.0f}"
    return f"{value:#.{digits}g}".removesuffix(".")


def percent(share: float) -> str:
    """Write a share as a percentage with two significant digits, and never a small share as zero.

    Args:
        share: The share, 1 for all.

    Returns:
        For example ``"8.1%"``, ``"0.042%"`` or ``"100%"``.
    """
    if not math.isfinite(share):
        return "–"
    value = 100.0 * share
    if abs(value) >= 9.95:
        return f"{value:,.0f}%"
    return f"{value:#.2g}%" if value and abs(value) < 0.995 else f"{value:.1f}%"


def render(explanation: Explanation) -> str:
    """Render an explanation as plain text.

    Args:
        explanation: What to show. Its rows are scanned once, for the gross contribution, unless an index that does not
            search all of them was asked for.

    Returns:
        Lines of at most ``WIDTH`` columns, without colour codes.
    """
    from rich.padding import Padding

    places = decimals([explanation.final - explanation.initial, explanation.initial, explanation.final])
    parts: list[RenderableType] = [
        f"{explanation.output}: {fixed(explanation.initial, places)} before training, "
        f"{fixed(explanation.final, places)} after",
        f"{explanation.reading} reading: {_READINGS.get(explanation.reading, 'see the documentation')}",
        "",
        Padding(_ledger(explanation, places), (0, 0, 0, 2)),
        "",
        *_balance(explanation, places),
        "",
        _examples(explanation),
        "",
        _checks(explanation),
        _cost(explanation),
    ]
    return plain_text(*parts)


def plain_text(*parts: RenderableType, extra: int = 0) -> str:
    """Render parts under each other, without colour codes.

    Args:
        parts: Texts and rich's tables.
        extra: Columns beside the usual ones.

    Returns:
        Lines of at most ``WIDTH + extra`` columns.
    """
    from rich.console import Console, Group

    buffer = io.StringIO()
    console = Console(
        file=buffer,
        width=WIDTH + extra,
        color_system=None,
        force_terminal=False,
        force_jupyter=False,
        markup=False,
        emoji=False,
        highlight=False,
        _environ={},
    )
    console.print(Group(*parts))
    return "\n".join(line.rstrip() for line in buffer.getvalue().rstrip().splitlines())


def _ledger(explanation: Explanation, places: int) -> Table:
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(max_width=40)
    table.add_column(justify="right", no_wrap=True)
    table.add_row("", "initial", fixed(explanation.initial, places))
    count = f"{explanation.num_examples:,}"
    table.add_row("+", f"examples ({count})", fixed(explanation.total, places, sign=True))
    for name, value in explanation.ledger.remainders.items():
        table.add_row("+", name, fixed(value, places, sign=True))
    final = fixed(explanation.final, places)
    table.add_row("+", "gap", fixed(explanation.gap, places, sign=True))
    table.add_row("", "", "─" * max(len(final), 8))
    table.add_row("=", "final", final)
    return table


def _balance(explanation: Explanation, places: int) -> list[str]:
    net, rest = explanation.total, explanation.remainder
    shown = len({c.id for c in (*explanation.proponents, *explanation.opponents)})
    held, others, bound = (fixed(value, places, sign=True) for value in (rest.shown, rest.rest, rest.bound))
    parts = f"The {shown:,} examples below hold {held} of it, the other {rest.num_rest:,} {others}"
    if not rest.exact:
        return [
            f"Net {fixed(net, places, sign=True)}. An index proposed the examples; their own rows ranked them.",
            f"{parts};",
            f"by the norms of their rows, none of those contributes more than {bound.removeprefix('+')} either way.",
        ]
    gross = explanation.gross
    ratio = f", {gross / abs(net):,.1f} times as much" if net and math.isfinite(gross / net) else ""
    return [
        f"Net {fixed(net, places, sign=True)}; gross {fixed(gross, places)}{ratio}: the difference cancelled.",
        f"The {shown:,} examples below hold {percent(explanation.shown_share)} of the gross.",
    ]


def _examples(explanation: Explanation) -> Table:
    from rich.table import Table

    shown = (*explanation.proponents, *explanation.opponents)
    places = decimals((c.contribution for c in shown), 3)
    grid = Table.grid(expand=True)
    grid.add_column(ratio=1)
    grid.add_column(ratio=1)
    grid.add_row(_side("Proponents", explanation.proponents, places), _side("Opponents", explanation.opponents, places))
    return grid


def _side(title: str, contributions: Sequence[Contribution], places: int) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, title_style="none")
    for heading in ("id", "contribution", "a_i", "K"):
        table.add_column(heading, justify="right", no_wrap=True)
    for c in contributions:
        table.add_row(str(c.id), fixed(c.contribution, places, sign=True), significant(c.weight), significant(c.kernel))
    if not contributions:
        table.add_row("none", "", "", "")
    return table


def _checks(explanation: Explanation) -> Table:
    from rich import box
    from rich.table import Table

    title = "Checks: all passed" if explanation.passed else "Checks: NOT all passed"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, title_style="none")
    table.add_column("check", max_width=24)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("tolerance", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    wrong = [check for check in explanation.checks if not check.passed]
    if wrong:
        table.add_column("what to look at")
    for check in explanation.checks:
        verdict = "pass" if check.passed else "FAIL"
        row = [check.name, significant(check.value), f"{check.tolerance:g}", verdict]
        table.add_row(*row, *([check.meaning if check in wrong else ""] if wrong else []))
    return table


def _cost(explanation: Explanation) -> str:
    cost = explanation.cost
    spent = ", which ran out" if cost.exhausted else ""
    return (
        f"Cost: {cost.forward_passes:,} forward and {cost.backward_passes:,} backward passes; "
        f"budget {cost.budget:,}{spent}."
    )
