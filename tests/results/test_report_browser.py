"""The report in a real browser: it asks for nothing, fits every screen, goes dark, and works by keyboard."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pkexplain as pk
from pkexplain.results.report import write_report
from tests.explanations import HOSTILE, make_comparison, make_explanation

CHROMIUM = "/usr/bin/chromium"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not os.access(CHROMIUM, os.X_OK), reason=f"{CHROMIUM} is not there"),
]

CONTRAST = """() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (c) => {
    const [r, g, b] = c.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const c = rgba(getComputedStyle(e).backgroundColor);
      if (c[3] === 255) return c;
    }
  };
  const low = [];
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || ['TITLE', 'DESC', 'STYLE'].includes(e.tagName.toUpperCase())) continue;
    const style = getComputedStyle(e);
    const a = light(rgba(e.ownerSVGElement ? style.fill : style.color)), b = light(ground(e));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) low.push([e.tagName, e.textContent.slice(0, 30), ratio]);
  }
  return low;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module", params=["pictures", "texts"])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "why.html"
    rng = np.random.default_rng(0)
    if request.param == "pictures":
        pictures = [(rng.normal(size=(1, 8, 8)), i % 5) for i in range(12_000)]
        explanations = [
            make_explanation(k=6, seed=s, segments=20, failing=s == 1, num_examples=12_000) for s in range(2)
        ]
        names = ["one", "two", "x" * 90, HOSTILE, "5"]
        return write_report(explanations, path, dataset=pictures, label_names=names, comparison=make_comparison())
    texts = [(f"{HOSTILE} {'long' * 100} {i} " + "שלום עולם " * i, i % 2) for i in range(200)]
    explanation = make_explanation(query=HOSTILE * 20, output="o" * 120)
    ledger = dataclasses.replace(explanation.ledger, remainders={HOSTILE: 0.1})
    hostile = make_comparison(name=HOSTILE)
    return write_report(dataclasses.replace(explanation, ledger=ledger), path, dataset=texts, comparison=hostile)


def open_page(browser: Any, report: Path, width: int = 1280, scheme: str = "light", **options: Any) -> Any:
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, **options)
    page = context.new_page()
    page.goto(report.as_uri())
    return page


def test_page_asks_for_nothing_and_complains_of_nothing(browser: Any, report: Path) -> None:
    page = browser.new_context().new_page()
    requests: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda line: complaints.append(line.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
    page.goto(report.as_uri())
    page.wait_for_load_state("networkidle")
    assert report.as_uri() in requests
    assert [url for url in requests if not url.startswith(("file://", "data:"))] == []
    assert complaints == []
    broken = "() => [...document.images].filter(i => !i.complete || i.naturalWidth === 0).length"
    assert page.evaluate(broken) == 0
    assert page.evaluate("document.images.length") == (28 if page.locator("nav").count() else 0)
    page.context.close()


@pytest.mark.parametrize("width", [320, 375, 768, 1280])
@pytest.mark.parametrize("unfolded", [False, True])
def test_page_never_scrolls_sideways(browser: Any, report: Path, width: int, unfolded: bool) -> None:
    page = open_page(browser, report, width)
    if unfolded:
        page.evaluate("() => document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    # a wide table scrolls in a region of its own, which does not spill
    spill = f"""() => [...document.querySelectorAll('main *, aside *')].filter(e => !e.ownerSVGElement &&
        !e.closest('.scroll table') &&
        e.getBoundingClientRect().right > {width} + 0.5).map(e => e.tagName + '.' + e.className)"""
    assert page.evaluate(spill) == []
    page.context.close()


def test_wide_tables_scroll_on_a_phone_with_their_names_in_sight(browser: Any, report: Path) -> None:
    page = open_page(browser, report, 400)
    regions = page.locator(".scroll")
    assert regions.count() == 2
    assert page.locator(".swipe").first.is_visible()
    for at in range(2):
        hidden = regions.nth(at).evaluate(
            "e => { e.scrollLeft = 1e6; return e.scrollWidth - e.clientWidth - e.scrollLeft }"
        )
        assert hidden < 1.0
        assert regions.nth(at).evaluate("e => e.scrollLeft") > 100
        box = regions.nth(at).locator("tbody th").first.bounding_box()
        assert box is not None
        assert 0 <= box["x"] < 20
        assert box["width"] < 200
        last = regions.nth(at).locator("tbody tr").first.locator("td").last.bounding_box()
        assert last is not None
        assert last["x"] + last["width"] <= 400.5
    page.context.close()
    wide = open_page(browser, report)
    assert not wide.locator(".swipe").first.is_visible()
    wide.context.close()


@pytest.mark.parametrize("width", [400, 1100])
@pytest.mark.parametrize("dark", [False, True])
def test_cards_change_nothing_around_them_and_can_be_read(browser: Any, tmp_path: Path, width: int, dark: bool) -> None:
    around = "<h2>A title</h2><p class='name'>text</p><table><tr><th>a</th><td>b</td></tr></table><ul><li>x</li></ul>"
    explanations = pk.Explanations(
        [make_explanation(k=8), make_explanation(query=HOSTILE, output="o" * 90, failing=True)]
    )
    noted = dataclasses.replace(explanations[1], notes=(HOSTILE,))
    cards = explanations[0]._repr_html_() + noted._repr_html_() + explanations._repr_html_()
    looks = """() => [...document.querySelectorAll('#around, #around *')].map(e => {
        const s = getComputedStyle(e), b = e.getBoundingClientRect();
        return [...s].map(n => s[n]).concat(b.width, b.height).join(';') })"""
    found = []
    for inside in ("", cards):
        path = tmp_path / f"{len(inside)}.html"
        colours = "background: #111; color: #eee" if dark else "background: #fff; color: #111"
        theme = f'data-jp-theme-light="{str(not dark).lower()}" style="{colours}; margin: 0"'
        path.write_text(f'<!doctype html><meta charset="utf-8"><body {theme}><div id="around">{around}</div>{inside}')
        page = open_page(browser, path, width)
        found.append(page.evaluate(looks))
        if inside:
            assert page.evaluate("document.documentElement.scrollWidth") == width
            assert page.evaluate(CONTRAST) == []
            assert page.locator(".pkx").count() == 3
            assert page.locator("img").count() == 2
        page.context.close()
    assert found[0] == found[1]


def test_names_and_numbers_in_drawings_do_not_collide_on_a_phone(browser: Any, report: Path) -> None:
    page = open_page(browser, report, 320)
    hits = """() => { const out = [];
      for (const svg of document.querySelectorAll('svg.chart')) {
        const boxes = [...svg.querySelectorAll('text.name, text.number')].map(t => [t, t.getBoundingClientRect()]);
        for (const [a, p] of boxes) for (const [b, q] of boxes)
          if (a !== b && p.left < q.right && q.left < p.right && p.top < q.bottom - 4 && q.top < p.bottom - 4)
            out.push(a.textContent + ' | ' + b.textContent);
      } return out; }"""
    assert page.evaluate(hits) == []
    page.context.close()


def test_dark_mode_is_dark_and_light_is_light(browser: Any, report: Path) -> None:
    brightness = """() => getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)"""
    for scheme, fits in (("dark", lambda c: max(c) < 40), ("light", lambda c: min(c) > 240)):
        page = open_page(browser, report, scheme=scheme)
        colour = page.evaluate(brightness)
        assert fits(colour), (scheme, colour)
        page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_the_contrast_of_wcag_aa(browser: Any, report: Path, scheme: str) -> None:
    page = open_page(browser, report, scheme=scheme)
    page.evaluate("() => document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate(CONTRAST) == []
    page.context.close()


def test_keyboard_reaches_every_link_and_summary(browser: Any, report: Path) -> None:
    page = open_page(browser, report)
    total = page.evaluate("document.querySelectorAll('a[href], summary').length")
    mark = """() => { const e = document.activeElement; e.dataset.seen = 1;
        return [e.tagName, e.matches(':focus-visible')]; }"""
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    box = page.locator(".skip").bounding_box()
    assert box is not None
    assert box["y"] >= 0
    for _ in range(total):
        tag, visible = page.evaluate(mark)
        assert tag in ("A", "SUMMARY")
        assert visible
        page.keyboard.press("Tab")
    assert page.evaluate("document.querySelectorAll('[data-seen]').length") == total
    page.locator("summary").first.focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.querySelector('details').open")
    page.context.close()


def test_page_works_without_javascript_and_on_paper(browser: Any, report: Path) -> None:
    page = open_page(browser, report, java_script_enabled=False)
    assert page.locator("h1").is_visible()
    assert page.locator("svg.chart").first.is_visible()
    page.emulate_media(media="print", color_scheme="dark")
    assert not page.locator(".skip").is_visible()
    assert page.locator("details table").first.is_visible()
    page.context.close()
