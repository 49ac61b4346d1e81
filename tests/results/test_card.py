"""The cards that notebooks show: their content, and that nothing of them reaches the page around them."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

import pkexplain as pk
from pkexplain.results.report import _html as html
from tests.explanations import HOSTILE, make_explanation
from tests.results.test_report import Page

NOTE = "The run was interrupted by KeyboardInterrupt; the model is explained as it was after step 60."


def styles(source: str) -> str:
    return "".join(re.findall(r"<style>(.*?)</style>", source, re.DOTALL))


def test_a_card_holds_the_output_the_ledger_and_the_strongest() -> None:
    explanation = dataclasses.replace(make_explanation(output="margin[3]", k=8), notes=(NOTE,))
    text = Page(explanation._repr_html_()).text()
    for value in (explanation.initial, explanation.final):
        assert html.typeset(f"{value:.3f}") in text
    assert html.typeset(f"{explanation.total:+.3f}") in text
    for name in ("examples (200)", "weight_decay", "optimizer", "gap", "after training", "all 2 checks passed", NOTE):
        assert name in text
    assert "the log-odds of class 3: logit 3 minus the log-sum-exp of all other logits" in text
    for side in (explanation.proponents, explanation.opponents):
        for c in side[:6]:
            assert re.search(rf"\b{c.id} ?{re.escape(html.typeset(f'{c.contribution:+.3f}'))}", text)
    assert text.count("and 2 more in") == 2


def test_a_card_names_failed_checks_and_readings() -> None:
    assert "1 of 2 checks failed: quadrature gap" in Page(make_explanation(failing=True)._repr_html_()).text()
    text = Page(make_explanation(reading="removal")._repr_html_()).text()
    assert "removal reading: does not add up" in text
    assert "difference (by design)" in text
    assert not re.search(r"\bgap\b", text)


def test_bars_are_as_long_as_contributions() -> None:
    explanation = make_explanation(k=4)
    widths = [float(w) for w in re.findall(r"width: ([\d.]+)%\"", explanation._repr_html_())]
    shown = [abs(c.contribution) for c in (*explanation.proponents, *explanation.opponents)]
    assert widths == pytest.approx([100 * c / max(shown) for c in shown], abs=0.051)


def test_styles_reach_nothing_outside() -> None:
    for source in (make_explanation()._repr_html_(), pk.Explanations([make_explanation()])._repr_html_()):
        page = Page(source)
        rules = re.findall(r"([^{}]+)\{[^{}]*\}", styles(source))
        assert len(rules) > 20
        selectors = [each.strip() for rule in rules for each in rule.split(",")]
        assert [each for each in selectors if ".pkx" not in each] == []
        assert [a for _, a in page.elements if "id" in a] == []
        assert page.all("script") == []
        for _, attributes in page.elements:
            assert all(word.startswith("pkx") for word in attributes.get("class", "").split())
            assert attributes.get("src", "data:").startswith("data:")


def test_hostile_text_stays_text() -> None:
    explanation = make_explanation(output=HOSTILE, query=HOSTILE)
    ledger = dataclasses.replace(explanation.ledger, remainders={HOSTILE: 0.1})
    check = dataclasses.replace(explanation.checks[0], name=HOSTILE, value=9.0)
    hostile = dataclasses.replace(explanation, ledger=ledger, checks=(check,), notes=(HOSTILE,))
    for shown in (hostile, pk.Explanations([hostile, hostile])):
        source = shown._repr_html_()
        assert "<script" not in source
        assert "\u202e" not in source
        page = Page(source)
        assert page.all("img") == []
        assert len(page.all("style")) == 1
        assert "<script>alert('x')</script>" in page.text()
        assert "\n" not in repr(shown)


def test_a_list_is_a_table_with_a_line_for_each_query() -> None:
    explanations = pk.Explanations(make_explanation(seed=s, output=f"logit[{s}]") for s in range(120))
    page = Page(explanations._repr_html_())
    assert len(page.all("tr")) == 1 + 100
    assert "and 20 more" in page.text()
    assert len(page.all("img")) == 100
    first = explanations[0].proponents[0]
    assert f"{first.id} {first.contribution:+.3f}" in page.text()


def test_a_card_of_a_compressed_index_reads_no_rows() -> None:
    class Untouched:
        def __array__(self, dtype=None, copy=None):
            raise AssertionError("the rows were read")

    quick = dataclasses.replace(make_explanation(exact=False), all_contributions=Untouched())
    assert "checks passed" in quick._repr_html_()
    assert "checks passed" in repr(quick)
    everyone = pk.Explanations([quick, dataclasses.replace(make_explanation(), all_contributions=Untouched())])
    assert "checks passed" in everyone._repr_html_()
    assert "pass" in str(everyone)


def test_odd_explanations_have_cards() -> None:
    base = make_explanation()
    odd = dataclasses.replace(base, proponents=(), opponents=(), checks=(), query=None, all_contributions=np.zeros(200))
    page = Page(odd._repr_html_())
    assert "nothing was checked" in page.text()
    assert page.text().count("none") == 2
    assert "0 explanations" in Page(pk.Explanations()._repr_html_()).text()
    zero = dataclasses.replace(base.proponents[0], contribution=0.0)
    assert "width: 0.0%" in dataclasses.replace(base, proponents=(zero,), opponents=())._repr_html_()
