"""The part of ``pkexplain inspect`` about how gradients were split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pkexplain.store.manifest import SplitSummary


def show_split(splits: Sequence[SplitSummary], console: Any) -> None:
    """Show the layers that were split worst, and the parameters that were not split."""
    from rich.table import Table

    worst: dict[str, float] = {}
    unsplit: dict[str, float] = {}
    for split in splits:
        worst.update({name: max(gap, worst.get(name, 0.0)) for name, gap in split.worst.items()})
        unsplit.update({name: max(share, unsplit.get(name, 0.0)) for name, share in split.unsplit.items()})
    if worst:
        shown = sorted(worst.items(), key=lambda pair: -pair[1])[:5]
        console.print(
            "largest split gaps, by layer: " + ", ".join(f"{name!r} {gap:.1e}" for name, gap in shown), markup=False
        )
    if any(split.interacting for split in splits):
        console.print("examples act on one another in this model; a row is the example's at whose place it is")
    if unsplit:
        table = Table(title="Not split among examples", title_justify="left")
        for column in ("parameter", "share of a step's gradient", "why"):
            table.add_column(column)
        for name, share in sorted(unsplit.items(), key=lambda pair: -pair[1]):
            why = next(split.reasons[name] for split in splits if name in split.reasons)
            table.add_row(name, f"{share:.2%}", why)
        console.print(table)
