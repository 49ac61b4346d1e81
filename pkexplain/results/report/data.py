"""The content of a report as plain data, built from explanations and, if given, their training set.

`build_section` turns an explanation into the numbers, names and words of one section, without HTML.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from pkexplain.results.explanation import Contribution, Explanation, GroupSum
from pkexplain.results.numbers import clean, decimals, fixed
from pkexplain.results.report.items import Item, TrainingSet, read_item
from pkexplain.results.text import output_meaning

__all__ = ["Balance", "Example", "Section", "Step", "build_section"]

_LINE_NAMES = {
    "weight_decay": "Weight decay",
    "unsplit": "Not split among examples",
    "optimizer": "Optimizer remainder",
    "buffers": "Running statistics",
}


@dataclass(frozen=True)
class Example:
    """A training example and its contribution.

    Attributes:
        entry: Its contribution, in output units.
        share: |c_i| / Σ_j |c_j|, its share of the gross contribution.
        item: Its picture or text; None without a data set.
        label: The name of its label; None if it has none.
    """

    entry: Contribution
    share: float
    item: Item | None
    label: str | None


@dataclass(frozen=True)
class Step:
    """One line of the ledger as a step from one level of the output to the next.

    Attributes:
        name: Name of the line.
        kind: ``"level"`` (initial, final), ``"examples"``, ``"remainder"`` or ``"gap"``.
        start: The level before, in output units; equals ``end`` for a level.
        end: The level after, in output units.
    """

    name: str
    kind: str
    start: float
    end: float

    @property
    def value(self) -> float:
        """The value of a level, or the change of a step, in output units."""
        return self.end if self.kind == "level" else self.end - self.start


@dataclass(frozen=True)
class Balance:
    """Gross and net contribution, and how the gross is distributed over the examples.

    Attributes:
        positive: Σ of the positive contributions, in output units.
        negative: Σ of the negative contributions, in output units.
        num_positive: The number of positive contributions.
        num_negative: The number of negative contributions.
        num_examples: The number of training examples.
        shown: The number of examples that the section shows.
        shown_share: Their share of the gross contribution, 0 to 1.
        half: The fewest examples that hold half of the gross contribution.
    """

    positive: float
    negative: float
    num_positive: int
    num_negative: int
    num_examples: int
    shown: int
    shown_share: float
    half: int

    @property
    def net(self) -> float:
        """Σ c_i, in output units."""
        return self.positive + self.negative

    @property
    def gross(self) -> float:
        """Σ |c_i|, in output units."""
        return self.positive - self.negative

    @property
    def ratio(self) -> float:
        """Gross over |net|: 1 if nothing cancels, inf if everything does."""
        return self.gross / abs(self.net) if self.net else math.inf


@dataclass(frozen=True)
class Section:
    """The content of one explanation's section.

    Attributes:
        question: The question in words.
        meaning: What the output is, in words; None of an output of the user's own.
        explanation: The explanation, for its ledger, checks, cost and checkpoints.
        query: The query's picture or text; None if the explanation has no query.
        steps: The ledger from initial to final.
        proponents: Examples with positive contributions, largest first.
        opponents: Examples with negative contributions, most negative first.
        balance: Gross and net.
        groups: Sums by training label, with the label's name as group; empty without labels.
        places: Decimals that suit the ledger.
        example_places: Decimals that suit the contributions of the examples shown.
    """

    question: str
    meaning: str | None
    explanation: Explanation
    query: Item | None
    steps: tuple[Step, ...]
    proponents: tuple[Example, ...]
    opponents: tuple[Example, ...]
    balance: Balance
    groups: tuple[GroupSum, ...]
    places: int
    example_places: int


def build_section(
    explanation: Explanation, training_set: TrainingSet | None = None, *, name: Callable[[object], str] = str
) -> Section:
    """Build one explanation's section.

    Args:
        explanation: The explanation. Its rows are scanned once.
        training_set: The training examples; None to show numbers only.
        name: Names a label, for the class in the question and for the labels of examples.

    Returns:
        The section's data; every number in output units.

    Raises:
        ConfigurationError: The training set does not have one example per contribution.
    """
    contributions = np.asarray(explanation.contributions, np.float64)
    if training_set is not None:
        training_set.check_length(len(contributions), "write_report(dataset)")
    gross = float(np.abs(contributions).sum())
    shown = (*explanation.proponents, *explanation.opponents)
    ledger = explanation.ledger
    labels = training_set.labels if training_set is not None else ()
    sums = explanation.by_group(labels) if labels else ()
    return Section(
        question=_question(explanation, name),
        meaning=output_meaning(explanation.output),
        explanation=explanation,
        query=None if explanation.query is None else read_item(explanation.query),
        steps=tuple(_steps(explanation)),
        proponents=tuple(_example(c, gross, training_set, name) for c in explanation.proponents),
        opponents=tuple(_example(c, gross, training_set, name) for c in explanation.opponents),
        balance=_balance(contributions, explanation),
        groups=tuple(GroupSum(name(g.group), g.count, g.net, g.gross) for g in sums),
        places=decimals([ledger.final - ledger.initial, ledger.initial, ledger.final]),
        example_places=decimals((c.contribution for c in shown), 3),
    )


def _example(
    entry: Contribution, gross: float, training_set: TrainingSet | None, name: Callable[[object], str]
) -> Example:
    item = training_set.item(entry.id) if training_set is not None else None
    label = name(item.label) if item is not None and item.label is not None else None
    return Example(entry, abs(entry.contribution) / gross if gross else 0.0, item, label)


def _balance(contributions: np.ndarray, explanation: Explanation) -> Balance:
    sizes = np.sort(np.abs(contributions))[::-1].cumsum()
    shown = {c.id for c in (*explanation.proponents, *explanation.opponents)}
    return Balance(
        positive=float(contributions[contributions > 0].sum()),
        negative=float(contributions[contributions < 0].sum()),
        num_positive=int((contributions > 0).sum()),
        num_negative=int((contributions < 0).sum()),
        num_examples=len(contributions),
        shown=len(shown),
        shown_share=explanation.shown_share,
        half=int(np.searchsorted(sizes, 0.5 * sizes[-1])) + 1 if len(sizes) else 0,
    )


def _steps(explanation: Explanation) -> Iterator[Step]:
    ledger = explanation.ledger
    pro, con = (sum(c.contribution for c in side) for side in (explanation.proponents, explanation.opponents))
    num_pro, num_con = len(explanation.proponents), len(explanation.opponents)
    num_rest = explanation.num_examples - num_pro - num_con
    changes = [
        (f"Strongest proponents ({num_pro:,})", "examples", pro if num_pro else None),
        (f"Strongest opponents ({num_con:,})", "examples", con if num_con else None),
        (f"All other examples ({num_rest:,})", "examples", ledger.examples - pro - con if num_rest else None),
        *((clean(_LINE_NAMES.get(name, name)), "remainder", value) for name, value in ledger.remainders.items()),
        ("Completeness gap" if explanation.reading == "path" else "Difference, by design", "gap", ledger.gap),
    ]
    yield Step("Before training", "level", ledger.initial, ledger.initial)
    level = ledger.initial
    for name, kind, value in changes:
        if value is not None:
            yield Step(name, kind, level, level + value)
            level += value
    yield Step(
        f"A{explanation.until[1:]}", "level", ledger.final, ledger.final
    )  # after training, or a step before its end


def _question(explanation: Explanation, name: Callable[[object], str]) -> str:
    """Put the output into words, without claiming too much: a logit alone does not show which class won."""
    found = re.fullmatch(r"\W*([A-Za-z_ ]+?)\W*\[\s*(\d+)\s*\]", explanation.output)
    kind = re.sub("[^a-z]", "", (found[1] if found else explanation.output).lower())
    final = explanation.final
    value = fixed(final, decimals([final], 3)).replace("-", "−")
    if kind.startswith("loss"):
        return f"Why is the loss here {value}?"
    if found is None or kind not in ("logit", "logprobability", "margin"):
        return f"Why did the model answer {clean(explanation.output)} = {value}?"
    answer = f"“{name(int(found[2]))}”"
    if kind == "logit":
        return f"Why did the model give {answer} a score of {value}?"
    said = final > 0.0 if kind == "margin" else final > math.log(0.5)
    return f"Why did the model {'say' if said else 'not say'} {answer}?"
