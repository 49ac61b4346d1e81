"""An explanation as plain text: what `print(explanation)` shows.

The ledger comes first, because contributions only mean something next to their total; then how much cancelled; then the
examples; then the checks. Number formats are shared with the report.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from pkexplain.results.comparison import Comparison, Method
    from pkexplain.results.explanation import Contribution, Explanation

from pkexplain.results.numbers import WIDTH, clean, decimals, fixed, percent, significant, size, wall_time

__all__ = [
    "MOST_LINES",
    "checks_in_words",
    "one_line",
    "output_meaning",
    "plain_text",
    "render",
    "render_comparison",
    "render_list",
    "tabulate",
]

MOST_LINES = 100
"""The most explanations shown in one table."""
_NAME_LENGTH = 60
_MEANINGS = {
    "logit": "the score of class {} before the softmax",
    "log_probability": "the log of the probability of class {}, in nats",
    "margin": "the log-odds of class {0}: logit {0} minus the log-sum-exp of all other logits",
    "value": "number {} of the model's output",
}

_READINGS = {
    "path": "the contributions add up to the change of the output",
    "removal": "contributions predict what the output loses without an example; they do not add up",
}


def render(explanation: Explanation) -> str:
    """Render an explanation as plain text.

    Args:
        explanation: The explanation. Its rows are scanned once, for the gross contribution, unless a compressed index
            was used.

    Returns:
        Lines of at most ``WIDTH`` columns, without colour codes.
    """
    from rich.padding import Padding

    places = decimals([explanation.final - explanation.initial, explanation.initial, explanation.final])
    meaning = output_meaning(explanation.output)
    parts: list[RenderableType] = [
        f"{explanation.output}: {_moved(explanation, places)} ".ljust(WIDTH, "━"),  # so that one is seen to end here
        *([f"{explanation.output.partition('[')[0]}: {meaning}"] if meaning else []),
        *([f"prediction: {explanation.prediction}"] if explanation.prediction else []),
        f"{explanation.reading} reading: {_READINGS.get(explanation.reading, 'see the documentation')}",
        *(f"Note: {clean(note)}" for note in explanation.notes),
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


def one_line(explanation: Explanation) -> str:
    """Describe an explanation in one line, without reading rows: the output, the examples' total and the checks."""
    places = decimals([explanation.final - explanation.initial, explanation.initial, explanation.final])
    output = clean(explanation.output).replace("\n", " ")
    output = output if len(output) <= _NAME_LENGTH else output[: _NAME_LENGTH - 1] + "…"
    total = f"{explanation.num_examples:,} examples {fixed(explanation.total, places, sign=True)}"
    reading = "" if explanation.reading == "path" else f", {explanation.reading} reading"
    return f"{output}: {_moved(explanation, places)}; {total}{reading}; {checks_in_words(explanation)}"


def checks_in_words(explanation: Explanation) -> str:
    """Say whether the checks passed, and which did not."""
    failed, count = [check.name for check in explanation.checks if not check.passed], len(explanation.checks)
    if failed:
        return f"{len(failed)} of {count} checks failed: {', '.join(map(clean, failed))}"
    return f"all {count} checks passed" if count > 1 else f"{count} check passed" if count else "nothing was checked"


def output_meaning(name: str) -> str | None:
    """Say what an output is, by its name; None if it is not one of the package's own.

    Args:
        name: For example ``"margin[3]"``.

    Returns:
        For example ``"the log-odds of class 3: logit 3 minus the log-sum-exp of all other logits"``.
    """
    found = re.fullmatch(r"(logit|log_probability|margin|value)\[(\d+)\]", name)
    return None if found is None else _MEANINGS[found[1]].format(found[2])


def _moved(explanation: Explanation, places: int) -> str:
    after = "after" if explanation.run_segments is None else explanation.until
    return f"{fixed(explanation.initial, places)} before training, {fixed(explanation.final, places)} {after}"


def render_list(explanations: Sequence[Explanation]) -> str:
    """Render several explanations as one plain-text table.

    Args:
        explanations: The explanations; rows are not read.

    Returns:
        Lines of at most ``WIDTH`` columns, one for each explanation, at most ``MOST_LINES`` of them.
    """
    rows = []
    for position, each in enumerate(explanations[:MOST_LINES]):
        places = decimals([each.final - each.initial, each.initial, each.final])
        ends = [_strongest(side) for side in (each.proponents, each.opponents)]
        numbers = fixed(each.initial, places), fixed(each.final, places), fixed(each.total, places, sign=True)
        failed = sum(not check.passed for check in each.checks)
        rows.append((f"{position} {clean(each.output)}", *numbers, *ends, f"{failed} FAILED" if failed else "pass"))
    headings = ("query and output", "before", "after", "examples", "top proponent", "top opponent", "checks")
    notes = [f"Note: {clean(note)}" for note in dict.fromkeys(note for each in explanations for note in each.notes)]
    left = len(explanations) - len(rows)
    notes = [*([f"… and {left:,} more"] if left else []), *notes]
    return tabulate(f"{len(explanations):,} explanations", headings, rows, notes)


def _strongest(side: Sequence[Contribution]) -> str:
    values = [c.contribution for c in side[:1]]
    return f"{side[0].id}: {fixed(values[0], decimals(values, 3), sign=True)}" if side else "–"


def plain_text(*parts: RenderableType, extra: int = 0) -> str:
    """Render parts one below the other, without colour codes.

    Args:
        parts: Texts and rich's tables.
        extra: Further columns of text.

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
    gap = "gap" if explanation.reading == "path" else "difference (by design)"
    table.add_row("+", gap, fixed(explanation.gap, places, sign=True))
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
            f"by the norms of their rows, each of those contributes at most {bound.removeprefix('+')} either way.",
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
        table.add_column("what to check")
    for check in explanation.checks:
        verdict = "pass" if check.passed else "FAIL"
        row = [check.name, significant(check.value), f"{check.tolerance:.3g}", verdict]
        table.add_row(*row, *([check.meaning if check in wrong else ""] if wrong else []))
    return table


def _cost(explanation: Explanation) -> str:
    cost = explanation.cost
    spent = " (exhausted)" if cost.exhausted else ""
    return (
        f"Cost: {cost.backward_passes:,} gradients of a budget of {cost.budget:,}{spent}, and "
        f"{cost.forward_passes:,} forward passes besides."
    )


def render_comparison(comparison: Comparison) -> str:
    """Render a comparison as plain text.

    Args:
        comparison: The comparison.

    Returns:
        Lines of at most 100 columns; more with metrics.
    """
    from rich import box
    from rich.table import Table

    k, queries, examples = comparison.k, comparison.num_queries, comparison.num_examples
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("method", no_wrap=True)
    metrics = list(comparison.methods[0].metrics)
    for heading in ("gap", f"top {k}", "rank corr.", "a query", "once", "memory", *metrics):
        table.add_column(heading, justify="right", no_wrap=True)
    for method in comparison.methods:
        table.add_row(*_row(method), *(f"{value:.3f}" for value in method.metrics.values()))
    parts = [
        f"{len(comparison.methods)} methods on one run, asked how {examples:,} training examples changed minus the "
        f"loss of {queries:,} {'query' if queries == 1 else 'queries'}.",
        "",
        table,
        "",
        "gap: the part of the change of minus the loss that the scores' sum misses; the path reading closes by "
        "construction. "
        f"top {k}, rank corr.: agreement with the path reading; by chance {percent(min(k, examples) / examples)} and "
        "0. memory: peak over what was used before, coarse.",
    ]
    if comparison.left_out:
        parts += ["", "Left out:", *(f"  {each.name}: {each.reason}" for each in comparison.left_out)]
    return plain_text(*parts, extra=12 * len(metrics))


def _row(method: Method) -> tuple[str, ...]:
    correlation = "–" if math.isnan(method.rank_correlation) else f"{method.rank_correlation:.3f}"
    measures = percent(method.gap), percent(method.overlap), correlation
    times = wall_time(method.query_seconds), wall_time(method.setup_seconds)
    return method.name, *measures, *times, size(method.peak_bytes)


def tabulate(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """Format a plain-text table.

    Args:
        title: The line above it.
        headings: One for each column; the first column is left-aligned, the others right-aligned.
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
