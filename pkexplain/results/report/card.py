"""An explanation as a card, and several as a table, for notebooks: HTML whose styles reach nothing outside of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pkexplain.results.explanation import Explanation
from pkexplain.results.ledger import Contribution
from pkexplain.results.numbers import decimals
from pkexplain.results.report._html import environment
from pkexplain.results.report.items import Item, read_item
from pkexplain.results.text import MOST_LINES, checks_in_words, output_meaning

__all__ = ["Card", "render_card", "render_list_card"]

_SHOWN = 6
"""The most proponents, and opponents, on a card."""


@dataclass(frozen=True)
class Card:
    """The content of a card.

    Attributes:
        explanation: The explanation.
        query: The query's picture or text; None if the explanation has no query.
        meaning: What the output is, in words; None of an output of the user's own.
        lines: The ledger's lines between the initial and the final output, by name, in output units.
        sides: The strongest proponents and opponents, strongest first.
        checks: Whether the checks passed, in words.
        places: Decimals that suit the ledger.
        example_places: Decimals that suit the contributions of the examples shown.
        strongest: The largest contribution in either direction, in output units; 1 without any.
        gross: Σ |c_i| in output units; None where rows would have to be read for it.
    """

    explanation: Explanation
    query: Item | None
    meaning: str | None
    lines: dict[str, float]
    sides: dict[str, tuple[Contribution, ...]]
    checks: str
    places: int
    example_places: int
    strongest: float
    gross: float | None

    @classmethod
    def of(cls, explanation: Explanation) -> Card:
        """Build the card of an explanation; its rows are scanned once, unless a compressed index was used."""
        ledger, shown = explanation.ledger, (*explanation.proponents, *explanation.opponents)
        gap = "gap" if explanation.reading == "path" else "difference (by design)"
        return cls(
            explanation=explanation,
            query=None if explanation.query is None else read_item(explanation.query),
            meaning=output_meaning(explanation.output),
            lines={f"examples ({explanation.num_examples:,})": ledger.examples, **ledger.remainders, gap: ledger.gap},
            sides={
                "Proponents": explanation.proponents[:_SHOWN],
                "Opponents": explanation.opponents[:_SHOWN],
            },
            checks=checks_in_words(explanation),
            places=decimals([ledger.final - ledger.initial, ledger.initial, ledger.final]),
            example_places=decimals((c.contribution for c in shown), 3),
            strongest=max((abs(c.contribution) for c in shown), default=0.0) or 1.0,
            gross=explanation.gross if explanation.remainder.exact else None,
        )


def render_card(explanation: Explanation) -> str:
    """Render an explanation as a card.

    Args:
        explanation: The explanation.

    Returns:
        HTML: an element with its own styles, without scripts, ids or requests.
    """
    return _macro("card", Card.of(explanation))


def render_list_card(explanations: Sequence[Explanation]) -> str:
    """Render several explanations as a table, one line each.

    Args:
        explanations: The explanations; rows are not read.

    Returns:
        HTML, as of `render_card`; of more than ``MOST_LINES`` explanations, the first ones.
    """
    rows = []
    for each in explanations[:MOST_LINES]:
        places = decimals([each.final - each.initial, each.initial, each.final])
        item = None if each.query is None else read_item(each.query)
        rows.append((each, item, places, checks_in_words(each)))
    notes = list(dict.fromkeys(note for each in explanations for note in each.notes))
    return _macro("several", rows, len(explanations), notes)


def _macro(name: str, *arguments: object) -> str:
    """Render a macro as a plain string: an escaping one would turn text that is added to it into HTML."""
    return str(getattr(environment().get_template("card.html.j2").module, name)(*arguments))
