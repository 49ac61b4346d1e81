"""The report: its data, its HTML parsed, and how the file is written."""

from __future__ import annotations

import base64
import dataclasses
import io
import itertools
import math
import os
import re
import subprocess
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

import pkexplain as pk
from pkexplain.errors import ConfigurationError
from pkexplain.results.explanation import Explanation
from pkexplain.results.numbers import clean
from pkexplain.results.report import _html as html
from pkexplain.results.report import write_report
from pkexplain.results.report.data import build_section
from pkexplain.results.report.items import TrainingSet, name_label, read_item
from tests.conftest import digits
from tests.explanations import HOSTILE, make_explanation

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """A page's elements with their attributes and text; refuses tags that do not nest."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert self._open == [], f"unclosed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {k: v or "" for k, v in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self._open[-1] if self._open else "", data))

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for each, attributes in self.elements if each == tag]

    def text(self) -> str:
        words = "".join(data for tag, data in self.texts if tag != "style")
        return re.sub(r"\s+", " ", words)


def write(tmp_path: Path, explanation: Explanation | list[Explanation], **options: object) -> tuple[str, Page]:
    source = write_report(explanation, tmp_path / "why.html", **options).read_text("utf-8")  # pyright: ignore[reportArgumentType]
    return source, Page(source)


def pictures(n: int = 200) -> list[tuple[torch.Tensor, int]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(1, 8, 8, generator=generator), i % 3) for i in range(n)]


# Data.


def test_steps_lead_from_initial_to_final_without_a_jump() -> None:
    explanation = make_explanation()
    steps = build_section(explanation).steps
    assert (steps[0].value, steps[-1].value) == (explanation.initial, explanation.final)
    for before, after in itertools.pairwise(steps):
        assert after.start == pytest.approx(before.end, abs=1e-12)
    by_name = {s.name: s.value for s in steps}
    rest = by_name["All other examples (192)"]
    shown = sum(c.contribution for c in (*explanation.proponents, *explanation.opponents))
    assert shown + rest == pytest.approx(explanation.total)
    assert by_name["Weight decay"] == pytest.approx(explanation.ledger.remainders["weight_decay"])
    assert by_name["Completeness gap"] == pytest.approx(1e-6, abs=1e-9)


def test_steps_leave_out_sides_that_are_empty() -> None:
    section = build_section(make_explanation(strength=np.full(200, 9.0), num_examples=200))
    assert [s.name for s in section.steps if "opponents" in s.name] == []
    assert section.balance.ratio == pytest.approx(1.0)


def test_balance_counts_by_plain_loops() -> None:
    explanation = make_explanation(seed=5)
    values = [float(v) for v in explanation.contributions]
    balance = build_section(explanation).balance
    assert balance.positive == pytest.approx(sum(v for v in values if v > 0))
    assert balance.negative == pytest.approx(sum(v for v in values if v < 0))
    assert balance.gross == pytest.approx(sum(abs(v) for v in values))
    held, needed = 0.0, 0
    for size in sorted(map(abs, values), reverse=True):
        held, needed = held + size, needed + 1
        if held >= 0.5 * balance.gross:
            break
    assert balance.half == needed
    top = sum(abs(c.contribution) for c in (*explanation.proponents, *explanation.opponents))
    assert balance.shown_share == pytest.approx(top / balance.gross)


def test_groups_carry_names_and_add_up() -> None:
    explanation = make_explanation()
    training_set = TrainingSet(pictures(), ["cat", "dog", "owl"])
    section = build_section(explanation, training_set, name=training_set.name)
    assert [g.group for g in section.groups] == ["cat", "dog", "owl"]
    assert [g.count for g in section.groups] == [67, 67, 66]
    assert sum(g.net for g in section.groups) == pytest.approx(explanation.total)
    first = section.proponents[0]
    assert first.label == ["cat", "dog", "owl"][first.entry.id % 3]


@pytest.mark.parametrize(
    ("output", "final", "wanted"),
    [
        ("logit[3]", 12.41, "Why did the model give “owl” a score of 12.4?"),
        ("logit[3]", -2.5, "Why did the model give “owl” a score of −2.50?"),
        ("margin[3]", 1.0, "Why did the model say “owl”?"),
        ("margin[3]", -1.0, "Why did the model not say “owl”?"),
        ("log_probability[3]", -0.1, "Why did the model say “owl”?"),
        ("log_probability[3]", -3.0, "Why did the model not say “owl”?"),
        ("loss", 0.5, "Why is the loss here 0.500?"),
        ("energy", 0.5, "Why did the model answer energy = 0.500?"),
    ],
)
def test_question_claims_no_more_than_the_output(output: str, final: float, wanted: str) -> None:
    explanation = make_explanation(output=output)
    explanation = dataclasses.replace(explanation, ledger=dataclasses.replace(explanation.ledger, final=final))
    assert build_section(explanation, name=lambda label: {3: "owl"}[label]).question == wanted  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ((8, 9), (8, 9)),
        ((1, 8, 9), (8, 9)),
        ((8, 9, 1), (8, 9)),
        ((3, 8, 9), (8, 9, 3)),
        ((8, 9, 3), (8, 9, 3)),
        ((1, 3, 8, 9), (8, 9, 3)),
        ((2, 8, 9), None),
        ((64,), None),
        ((1, 64), None),
    ],
)
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_pictures_of_every_layout(shape: tuple[int, ...], wanted: tuple[int, ...] | None, kind: str) -> None:
    array = np.random.default_rng(0).normal(size=shape)
    item = read_item(array if kind == "numpy" else torch.tensor(array, dtype=torch.bfloat16))
    assert (None if item.picture is None else item.picture.shape) == wanted
    assert (item.text is None) == (wanted is not None)


def test_picture_values() -> None:
    ramp = np.arange(16, dtype=np.uint8).reshape(4, 4)
    bright = read_item(ramp).picture
    scaled = read_item(ramp.astype(np.float32) * 0.01 - 3.0).picture
    assert bright is not None
    assert scaled is not None
    np.testing.assert_array_equal(bright, ramp)
    np.testing.assert_array_equal(scaled, np.rint(np.arange(16) * 17).reshape(4, 4))
    flat = read_item(np.full((4, 4), 0.5)).picture
    assert flat is not None
    assert set(flat.ravel()) == {128}
    broken = read_item(np.array([[np.nan, 0.0], [np.inf, 1.0]])).picture
    assert broken is not None
    np.testing.assert_array_equal(broken, [[0, 0], [0, 255]])
    large = read_item(np.zeros((1000, 600), np.uint8)).picture
    assert large is not None
    assert max(large.shape) <= 256


def test_rows_of_every_kind() -> None:
    from PIL import Image

    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    for row in (
        (image, 4),
        (torch.tensor(5), image, torch.tensor(4)),
        [np.asarray(image), 4.0],
        {"img": image, "label": 4},
    ):
        item = read_item(row, 5)
        assert item.label == 4
        assert item.picture is not None
        np.testing.assert_array_equal(item.picture, np.arange(64).reshape(8, 8))
    assert read_item("a text") == read_item(("a text",))
    assert read_item({"premise": "a", "hypothesis": "b", "idx": 3, "label": 1}).text == "premise: a\nhypothesis: b"
    assert read_item({"input_ids": torch.tensor([5, 6, 7])}).text == "input_ids: 3 numbers: 5, 6, 7"
    assert read_item([0.5, 1.5]).label is None
    assert read_item((np.zeros(3), 2.5)).label == 2.5


def test_leading_integer_is_an_id_only_at_its_own_position() -> None:
    assert read_item((5, "text", 1), 5).text == "text"
    assert read_item((6, "text", 1), 5).text == "6"
    assert read_item((5.0, "text", 1), 5).text == "5.0"


def test_labels_from_every_kind_of_dataset() -> None:
    import datasets

    x, y = torch.zeros(6, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    names = datasets.ClassLabel(names=["a", "b", "c"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    hugging = datasets.Dataset.from_dict({"text": list("uvwxyz"), "label": y.tolist()}, features=features)
    for dataset in (torch.utils.data.TensorDataset(x, y), hugging, [(v, t) for v, t in zip(x, y, strict=True)]):
        assert TrainingSet(dataset).labels == (0, 1, 2, 0, 1, 2)
    assert TrainingSet(hugging).name(2) == "c"
    assert TrainingSet(hugging).item(4).text == "y"
    assert TrainingSet(hugging, {2: "see"}).name(2) == "see"
    assert TrainingSet(["a", "b"]).labels == ()
    assert TrainingSet([("a", 0.5), ("b", 1)]).labels == ()


def test_label_names() -> None:
    assert name_label(["a", "b"], 1) == "b"
    assert name_label(["a", "b"], 2) == "2"
    assert name_label(["a", "b"], -1) == "-1"
    assert name_label({"x": "y"}, "x") == "y"
    assert name_label(None, 3) == "3"


def test_clean_shows_what_a_page_cannot_hold() -> None:
    assert clean("a\u202eb\x00\ud800 שלום\n\t") == "a⟨U+202E⟩b⟨U+0000⟩⟨U+D800⟩ שלום\n\t"
    assert len(clean("x" * 30_000)) < 21_000


def test_wrong_datasets_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"Got 5 examples; expected 200 \(from num_examples of the run\)"):
        build_section(make_explanation(), TrainingSet(pictures(5)))
    with pytest.raises(ConfigurationError, match=r"readable by row number. Got generator"):
        TrainingSet(x for x in "ab")
    with pytest.raises(ConfigurationError, match="nothing to report"):
        write_report([], "never.html")


# Drawing helpers.


def test_axis_places_values_bars_and_ticks() -> None:
    axis = html.Axis.over([-2.0, 6.0, math.nan], 0.0, 100.0)
    assert [axis.at(v) for v in (-2.0, 0.0, 6.0, math.nan)] == [0.0, 25.0, 100.0, 25.0]
    assert axis.bar(6.0, 2.0) == (50.0, 50.0)
    assert axis.ticks() == [0.0, 5.0]
    assert html.Axis.over([1.5, 1.5]).at(1.5) == 50.0
    assert html.Axis.over([3.0, 4.0], zero=True).low == 0.0


def test_png_decodes_to_the_same_pixels() -> None:
    from PIL import Image

    for shape in ((5, 7), (5, 7, 3), (5, 7, 4)):
        picture = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        body = base64.b64decode(html.png_uri(picture).removeprefix("data:image/png;base64,"), validate=True)
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(body))), picture)


def test_numbers_are_typeset() -> None:
    assert html.typeset("-4.0e-15") == "−4.0\u202f×\u202f10⁻¹⁵"
    assert html.typeset("2.0e+09") == "2.0\u202f×\u202f10⁹"


# HTML.


def test_page_holds_every_part(tmp_path: Path) -> None:
    explanation = make_explanation(failing=True)
    _, page = write(tmp_path, explanation, dataset=pictures(), label_names=["cat", "dog", "owl", "elk"])
    text = page.text()
    for wanted in (
        "Why did the model give “elk” a score of",
        "How it adds up",
        "Proponents",
        "Opponents",
        "Gross against net",
        "By training label",
        "Over the course of training",
        "What was checked",
        "FAIL",
        "1 of 2 checks failed",
        "24 gradients of this query, of a budget of 96",
        "30 forward passes besides",
        'reading="removal"',
    ):
        assert wanted in text, wanted
    for c in (*explanation.proponents, *explanation.opponents):
        assert f"example {c.id}" in text
        assert html.typeset(f"{c.contribution:+.3f}") in text
        assert html.typeset(f"{c.weight:#.3g}") in text
        assert html.typeset(f"{c.kernel:#.3g}") in text
    for value in explanation.checkpoint_outputs:
        assert html.typeset(f"{value:.3f}") in text


def test_page_shows_each_picture_as_it_is(tmp_path: Path) -> None:
    from PIL import Image

    explanation, dataset = make_explanation(), pictures()
    _, page = write(tmp_path, explanation, dataset=dataset)
    shown = {attributes["alt"]: attributes["src"] for attributes in page.all("img")}
    assert len(shown) == 9
    for c in (*explanation.proponents, *explanation.opponents):
        source = shown[f"Training example {c.id}, label {c.id % 3}"]
        body = base64.b64decode(source.removeprefix("data:image/png;base64,"))
        values = dataset[c.id][0][0].numpy().astype(np.float64)
        wanted = np.rint(255 * (values - values.min()) / (values.max() - values.min()))
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(body))), wanted)


def test_page_asks_for_nothing_and_runs_nothing(tmp_path: Path) -> None:
    source, page = write(tmp_path, make_explanation(), dataset=pictures())
    assert page.all("script") == []
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "srcset", "action", "xlink:href", "data"):
            assert attributes.get(name, "#").startswith(("data:", "#")), (tag, name)
    code = re.sub(r'"data:image/png;base64,[\w+/=]*"', "", source)
    assert not re.search(r"https?:|//\w|@import|url\(", code)
    policy = [a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    texts = [(f"{i} {HOSTILE}" + " long" * (i % 2) * 200, HOSTILE) for i in range(200)]
    explanation = make_explanation(output=HOSTILE, query=HOSTILE)
    ledger = dataclasses.replace(explanation.ledger, remainders={HOSTILE: 0.1})
    check = dataclasses.replace(explanation.checks[0], name=HOSTILE, meaning=HOSTILE)
    hostile = dataclasses.replace(explanation, ledger=ledger, checks=(check,))
    for explanations in (hostile, [hostile, hostile]):
        source, page = write(tmp_path, explanations, dataset=texts, title=HOSTILE)
        assert "<script" not in source
        assert page.all("img") == []
        assert len(page.all("style")) == 1
        assert not [a for _, a in page.elements if any(name.startswith("on") for name in a)]
        assert "\u202e" not in source
        visible = page.text()
        assert visible.count("<script>alert('x')</script>\"><img src=x onerror=alert(1)>") > 20
        assert "שלום & {{ 7*7 }}" in visible


def test_hostile_label_names_stay_text(tmp_path: Path) -> None:
    source, page = write(tmp_path, make_explanation(), dataset=pictures(), label_names=[HOSTILE] * 4)
    assert "<script" not in source
    assert all("data:" in a["src"] for a in page.all("img"))
    assert any("<script>alert('x')</script>" in a["alt"] for a in page.all("img"))


def test_drawings_tables_and_headings_are_labelled(tmp_path: Path) -> None:
    _, page = write(tmp_path, [make_explanation(), make_explanation(seed=1)], dataset=pictures())
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for drawing in page.all("svg"):
        if drawing.get("aria-hidden") != "true":
            assert drawing["role"] == "img"
            assert set(drawing["aria-labelledby"].split()) <= set(ids)
    for tag, attributes in page.elements:
        if tag == "a":
            assert attributes["href"].removeprefix("#") in ids
        if tag == "th":
            assert attributes["scope"] in ("col", "row")
        if tag == "img":
            assert "alt" in attributes
        if tag in ("section", "article", "aside"):
            assert attributes["aria-labelledby"] in ids
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert page.all("html") == [{"lang": "en"}]


def test_long_texts_fold_and_keep_every_word(tmp_path: Path) -> None:
    words = " ".join(f"w{i}" for i in range(400))
    _, page = write(tmp_path, make_explanation(query="short"), dataset=[words] * 200)
    assert "Full text, 1,889 characters" in page.text()
    assert page.text().count("w399") == 8
    assert len([1 for tag, _ in page.elements if tag == "details"]) == 8 + 2


def test_labels_decide_whether_there_are_sums(tmp_path: Path) -> None:
    _, without = write(tmp_path, make_explanation(), dataset=["text"] * 200)
    assert "By training label" not in without.text()
    many = [("text", i % 50) for i in range(200)]
    _, page = write(tmp_path, make_explanation(), dataset=many)
    assert "The 20 labels with the largest gross, of 50" in page.text()


def test_removal_reading_does_not_claim_to_add_up(tmp_path: Path) -> None:
    _, page = write(tmp_path, make_explanation(reading="removal"))
    assert "How it adds up" not in page.text()
    assert "not meant to add up" in page.text()


def test_notes_and_the_output_in_words_stand_in_the_page(tmp_path: Path) -> None:
    notes = ("The run was interrupted by KeyboardInterrupt; the model is explained as it was after step 60.", HOSTILE)
    check = dataclasses.replace(make_explanation().checks[0], tolerance=0.00950124)
    explanation = dataclasses.replace(make_explanation(output="margin[3]"), notes=notes, checks=(check,))
    source, page = write(tmp_path, explanation)
    text = page.text()
    assert notes[0] in text
    assert "<script" not in source
    assert "margin[3]: the log-odds of class 3: logit 3 minus the log-sum-exp of all other logits" in text
    assert "0.0095" in text
    assert "0.00950124" not in text
    without, _ = write(tmp_path, make_explanation(output="energy"))
    assert '<ul class="notes"' not in without


def test_the_difference_of_the_removal_reading_is_no_gap(tmp_path: Path) -> None:
    _, page = write(tmp_path, make_explanation(reading="removal"))
    assert "Difference, by design" in page.text()
    assert "Completeness gap" not in page.text()


def test_several_explanations_have_a_navigation(tmp_path: Path) -> None:
    _, page = write(tmp_path, [make_explanation(output=f"logit[{i}]") for i in range(3)], title="Three")
    targets = [a["href"] for a in page.all("a") if re.fullmatch(r"#e\d", a["href"])]
    assert targets == ["#e1", "#e2", "#e3"]
    assert [a["id"] for a in page.all("article")] == ["e1", "e2", "e3"]
    assert [t for tag, t in page.texts if tag == "h1"] == ["Three"]


def test_odd_explanations_render(tmp_path: Path) -> None:
    base = make_explanation(k=2)
    nan = dataclasses.replace(base.proponents[0], weight=math.nan, kernel=math.nan, segments=(0.0,) * 6)
    odd = dataclasses.replace(base, proponents=(nan,), opponents=(), checks=(), query=None)
    _, page = write(tmp_path, odd)
    assert "Nothing was checked." in page.text()
    assert "nan" not in page.text()
    long = make_explanation(segments=300)
    source, page = write(tmp_path, long)
    assert len(source) < 600_000
    flat = dataclasses.replace(base, checkpoint_outputs=(1.0,) * 7, segment_sums=(0.0,) * 6)
    write(tmp_path, flat)


# Writing.


def test_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    first = write_report(make_explanation(), tmp_path / "a" / "one.html", dataset=pictures())
    second = write_report(make_explanation(), str(tmp_path / "two.html"), dataset=pictures())
    assert first == tmp_path / "a" / "one.html"
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes().startswith(b"<!doctype html>")


@pytest.mark.parametrize(("owner", "step"), [(os, "fsync"), (os, "replace")])
def test_a_failed_write_leaves_the_old_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: object, step: str
) -> None:
    path = write_report(make_explanation(), tmp_path / "why.html")
    before = path.read_bytes()

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(owner, step, fail)
    with pytest.raises(OSError, match="No space left"):
        write_report(make_explanation(seed=1), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_importing_the_report_is_light() -> None:
    code = (
        "import sys, pkexplain.results.report, pkexplain.results.plots, pkexplain.results.text\n"
        "heavy = {'jinja2', 'matplotlib', 'rich', 'PIL', 'datasets', 'playwright'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr


# The order of the data set.


def recorded(rows, prepare=lambda x: x, **options):
    """An explanation of a run of some rows ``(x, y)``, of which the loop passes on ``prepare(x)``."""
    x = torch.stack([torch.as_tensor(np.asarray(row[0])) for row in rows])
    width = prepare(x[:2]).flatten(1).shape[1]
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(width, 2))
    optimizer, store = torch.optim.SGD(model.parameters(), lr=1e-3), pk.MemoryStore()
    with pk.Recorder(store, model, optimizer, num_examples=len(rows), **options) as recorder:
        for ids in [*torch.randperm(len(rows)).split(32)] * 2:
            with recorder.step(ids):
                optimizer.zero_grad()
                model(prepare(x[ids])).square().mean().backward()
                optimizer.step()
    return pk.Explainer(store, model, tolerance=9.9).explain(prepare(x[:1])[0], output=pk.Value(0), k=3)


def digit_rows(count=240):
    x, y = digits(count, torch.float32, image=True)
    return list(zip(x, y.tolist(), strict=True))


def byte_rows(count=240):
    return [((row[0][0] * 6 + 5).round().byte().numpy() * 15, row[1]) for row in digit_rows(count)]


ORDERS = {
    "shifted": lambda rows: [*rows[1:], rows[0]],
    "reversed": lambda rows: rows[::-1],
    "shuffled": lambda rows: [
        rows[int(i)] for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(3))
    ],
    "sorted by label": lambda rows: sorted(rows, key=lambda row: row[1]),
}
LOOPS = {
    "as they are": (digit_rows, lambda x: x),
    "flattened": (digit_rows, lambda x: x.flatten(1)),
    "bytes, divided": (byte_rows, lambda x: x[:, None].float() / 255),
}


def caught_while(function):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [each for each in caught if "write_report" in str(each.message)]


@pytest.mark.parametrize("loop", LOOPS)
def test_a_report_says_so_if_the_data_set_is_in_another_order(loop, tmp_path):
    make, prepare = LOOPS[loop]
    rows = make()
    explanation = recorded(rows, prepare)
    write_report(explanation, tmp_path / "right.html", dataset=rows)  # warnings are errors
    for name, order in ORDERS.items():
        path = tmp_path / f"{name}.html"
        caught = caught_while(lambda order=order, path=path: write_report([explanation] * 2, path, dataset=order(rows)))
        assert len(caught) == 1, name
        assert caught[0].filename == __file__
        found = re.search(r"another order .*: its row (\d+) is example (\d+)\.", str(caught[0].message))
        assert found, str(caught[0].message)
        moved, example = int(found[1]), int(found[2])
        assert np.array_equal(order(rows)[moved][0], rows[example][0])
        assert Page(path.read_text("utf-8")).text().count("is in another order than the one that was recorded") == 2


def test_a_report_says_so_if_some_rows_were_replaced(tmp_path):
    rows = digit_rows()
    explanation = recorded(rows)
    other = [*rows[:120], *digit_rows(400)[260:380]]
    caught = caught_while(lambda: write_report(explanation, tmp_path / "why.html", dataset=other))
    assert len(caught) == 1
    found = re.search(r"(\d+) of (\d+) rows that were compared are others, .* row 120\.", str(caught[0].message))
    assert found
    wrong, compared = map(int, found.groups())
    assert compared - wrong == 40
    assert 36 <= wrong <= 40  # of similar digits it cannot be told for sure


def test_a_data_set_that_cannot_be_recognised_is_not_complained_about(tmp_path):
    rows = digit_rows()
    explanation = recorded(rows, lambda x: (x - 0.1) / 0.7)
    unknown = [
        rows,
        ORDERS["shuffled"](rows),
        [f"digit {label}" for _, label in rows],
        [(x + torch.randn(1, 8, 8), y) for x, y in rows],
        byte_rows(),
    ]
    for dataset in unknown:
        write_report(explanation, tmp_path / "why.html", dataset=dataset)
    augmented = recorded(rows, augmented=True)
    assert not augmented.input_digests
    write_report(augmented, tmp_path / "why.html", dataset=ORDERS["shuffled"](rows))


def test_with_the_data_set_at_recording_the_order_of_transformed_rows_is_known_too(tmp_path):
    rows = digit_rows()
    explanation = recorded(rows, lambda x: (x - 0.1) / 0.7, dataset=rows)
    write_report(explanation, tmp_path / "why.html", dataset=rows)
    assert (
        len(caught_while(lambda: write_report(explanation, tmp_path / "x.html", dataset=ORDERS["shuffled"](rows)))) == 1
    )


def test_digests_are_saved_once_with_several_explanations(tmp_path):
    rows = digit_rows(96)
    explanation = recorded(rows)
    assert len(explanation.input_digests) == 96
    other = dataclasses.replace(explanation, input_digests={})
    one, several = tmp_path / "one", tmp_path / "several"
    pk.Explanations([explanation]).save(one)
    pk.Explanations([explanation, explanation, other, explanation]).save(several)
    loaded = pk.Explanations.load(several)
    assert [each.input_digests for each in loaded] == [
        each.input_digests for each in (explanation, explanation, other, explanation)
    ]
    assert several.stat().st_size < 4 * one.stat().st_size
    assert len(caught_while(lambda: write_report(loaded, tmp_path / "x.html", dataset=ORDERS["shifted"](rows)))) == 1
