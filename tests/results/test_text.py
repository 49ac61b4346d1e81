"""The plain-text view."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np
import pytest

import pkexplain as pk
from pkexplain.results import text as table
from pkexplain.results.explanation import Check, Contribution, Explanation
from tests.explanations import make_explanation


def numbers(text: str, line: str) -> list[float]:
    """Read the numbers at the end of the one line that starts with a word."""
    found = [each for each in text.splitlines() if re.match(rf"\W*{line}\b", each)]
    assert len(found) == 1, f"{line!r} starts {len(found)} lines"
    return [float(n.replace(",", "")) for n in re.findall(r"[+-]?\d[\d,]*\.\d+(?:e[+-]\d+)?", found[0])]


def test_ledger_lines_as_printed_add_up() -> None:
    text = str(make_explanation(num_examples=1234))
    assert "examples (1,234)" in text
    parts = [numbers(text, name)[-1] for name in ("initial", "examples", "weight_decay", "optimizer", "gap")]
    assert sum(parts) == pytest.approx(numbers(text, "final")[-1], abs=3e-3)
    assert numbers(text, "gap") == [pytest.approx(1e-6, rel=0.06)]


def test_gross_stands_beside_net_with_the_share_shown() -> None:
    explanation = make_explanation(seed=3)
    text = table.render(explanation)
    net, gross, ratio = numbers(text, "Net")
    contributions = np.asarray(explanation.contributions)
    assert net == pytest.approx(contributions.sum(), rel=1e-3)
    assert gross == pytest.approx(np.abs(contributions).sum(), rel=1e-3)
    assert ratio == pytest.approx(gross / abs(net), rel=0.01)
    assert f"The 8 examples below hold {table.percent(explanation.shown_share)} of the gross." in text


def test_examples_show_id_contribution_weight_and_kernel() -> None:
    explanation = make_explanation(k=3)
    text = table.render(explanation)
    assert text.index("Proponents") < text.index("Checks")
    for c in (*explanation.proponents, *explanation.opponents):
        sign = "+" if c.contribution > 0 else "-"
        wanted = rf"\b{c.id}\s+\{sign}{abs(c.contribution):.3f}\s+{c.weight:#.3g}\s+{c.kernel:#.3g}"
        assert re.search(wanted, text), wanted


def test_checks_say_pass_or_fail() -> None:
    good, bad = table.render(make_explanation()), table.render(make_explanation(failing=True))
    assert "Checks: all passed" in good
    assert "FAIL" not in good
    assert "Checks: NOT all passed" in bad
    assert re.search(r"quadrature gap\s+0\.420\s+0\.01\s+FAIL\s+Error of the averaged gradient", bad)
    assert re.search(r"displacement gap\s+3\.10e-07\s+0\.0001\s+pass", bad)


def test_text_is_narrow_and_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    explanation = make_explanation(k=10, output="my[bold]output[/bold] :smile:")
    text = table.render(explanation)
    assert max(map(len, text.splitlines())) <= table.WIDTH
    assert max(map(len, text.splitlines())) > 80
    assert "\x1b" not in text
    assert "my[bold]output[/bold] :smile:" in text


def test_one_printed_after_another_is_seen_to_begin() -> None:
    lines = "\n".join(map(str, (make_explanation(), make_explanation(output="o" * 200)))).splitlines()
    heads = [line for line in lines if line.endswith("━━━━")]
    assert len(heads) == 1
    assert heads[0].startswith("logit[3]: -0.200 before training, -1.433 after ━━━")
    assert len(heads[0]) == table.WIDTH


def test_outputs_of_the_package_are_explained() -> None:
    meanings = {
        name: table.output_meaning(name) for name in ("logit[3]", "log_probability[12]", "margin[0]", "value[2]")
    }
    assert meanings["margin[0]"] == "the log-odds of class 0: logit 0 minus the log-sum-exp of all other logits"
    assert all(meanings.values())
    for name, meaning in meanings.items():
        assert f"\n{name.partition('[')[0]}: {meaning}\n" in table.render(make_explanation(output=name))
    for name in ("margin", "margin[x]", "loss[3]", "my_margin[3]", "log_probability[token 42 at 5]"):
        assert table.output_meaning(name) is None


def test_tolerances_have_few_digits_and_notes_are_shown() -> None:
    check = dataclasses.replace(make_explanation().checks[0], tolerance=0.00950124)
    explanation = dataclasses.replace(make_explanation(), checks=(check,), notes=("One thing.", "And \u202e another."))
    text = table.render(explanation)
    assert re.search(r"0\.0095 +pass", text)
    assert "0.00950124" not in text
    assert "Note: One thing.\nNote: And ⟨U+202E⟩ another.\n" in text


def test_the_removal_reading_has_a_difference_not_a_gap() -> None:
    text = table.render(make_explanation(reading="removal"))
    assert re.search(r"\+  difference \(by design\) +\+1\.0e-06", text)
    assert not re.search(r"\+  gap", text)


def test_several_explanations_are_a_table() -> None:
    explanations = pk.Explanations(make_explanation(seed=s, failing=s == 1) for s in range(120))
    lines = str(explanations).splitlines()
    assert lines[0] == "120 explanations"
    assert max(map(len, lines)) <= table.WIDTH
    rows = [line for line in lines if "logit[3]" in line]
    assert len(rows) == 100
    assert "… and 20 more" in lines
    for explanation, row in zip(explanations[:100], rows, strict=True):
        first = explanation.proponents[0]
        places = table.decimals([first.contribution], 3)
        assert f" {first.id}: {first.contribution:+.{places}f} " in row
        assert row.endswith("pass" if explanation.passed else "1 FAILED")


def test_readings_are_told_apart() -> None:
    assert "path reading: the contributions add up" in table.render(make_explanation())
    assert "do not add up" in table.render(make_explanation(reading="removal"))


def test_explanation_without_examples_or_numbers_still_renders() -> None:
    base = make_explanation()
    odd = Contribution(7, math.inf, math.nan, math.nan, ())
    empty: Explanation = dataclasses.replace(
        base, proponents=(odd,), opponents=(), checks=(Check("c", math.nan, 1.0, "m"),), all_contributions=np.zeros(200)
    )
    text = table.render(empty)
    assert re.search(r"7\s+not finite\s+–\s+–", text)
    assert "none" in text
    assert re.search(r"c\s+–\s+1\s+FAIL", text)


@pytest.mark.parametrize(
    ("value", "places", "sign", "wanted"),
    [
        (1234.5678, 2, True, "+1,234.57"),
        (-0.5, 1, True, "-0.5"),
        (0.0, 2, True, "0.00"),
        (0.004, 2, False, "4.0e-03"),
        (-0.004, 2, True, "-4.0e-03"),
        (0.005, 2, False, "0.01"),
        (2e9, 0, False, "2.0e+09"),
        (math.nan, 2, False, "not finite"),
    ],
)
def test_fixed(value: float, places: int, sign: bool, wanted: str) -> None:
    assert table.fixed(value, places, sign=sign) == wanted


@pytest.mark.parametrize(
    ("values", "wanted"),
    [([12.5, 0.25], 2), ([0.00123], 6), ([123456.0], 0), ([0.0], 3), ([], 3), ([math.nan, 1.0], 3)],
)
def test_decimals_follow_the_largest_value(values: list[float], wanted: int) -> None:
    assert table.decimals(values) == wanted


@pytest.mark.parametrize(
    ("share", "wanted"), [(0.081, "8.1%"), (1.0, "100%"), (0.00042, "0.042%"), (0.0, "0.0%"), (math.nan, "–")]
)
def test_percent(share: float, wanted: str) -> None:
    assert table.percent(share) == wanted
