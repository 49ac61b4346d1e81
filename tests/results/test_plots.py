"""The figures: what is drawn where, and nothing of pyplot."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from pkexplain.errors import ConfigurationError
from pkexplain.results import plots
from tests.explanations import HOSTILE, make_explanation


def draw(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=40)
    return buffer.getvalue()


def bars(axes: Any) -> list[Any]:
    return list(axes.patches)


def tick_names(axes: Any) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def test_ledger_bars_are_the_steps() -> None:
    explanation = make_explanation()
    axes = plots.plot_ledger(explanation)
    widths = [bar.get_width() for bar in bars(axes)]
    assert explanation.initial + sum(widths) == pytest.approx(explanation.final)
    assert tick_names(axes)[0].startswith("Before training")
    assert tick_names(axes)[-1].startswith("After training")
    assert len(draw(axes.figure)) > 1000


def test_contributions_are_bars_in_order() -> None:
    explanation = make_explanation(k=3)
    axes = plots.plot_contributions(explanation)
    shown = [*explanation.proponents, *reversed(explanation.opponents)]
    assert [bar.get_width() for bar in bars(axes)] == [c.contribution for c in shown]
    assert tick_names(axes) == [f"example {c.id}" for c in shown]
    colours = [bar.get_facecolor() for bar in bars(axes)]
    assert len(set(colours[:3])) == len(set(colours[3:])) == 1
    assert colours[0] != colours[-1]


def test_timeline_holds_outputs_and_segment_sums() -> None:
    explanation = make_explanation()
    axes = plots.plot_timeline(explanation)
    np.testing.assert_array_equal(axes.lines[0].get_xdata(), explanation.boundaries)
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), explanation.checkpoint_outputs)
    assert [bar.get_height() for bar in bars(axes)] == list(explanation.segment_sums)
    assert [bar.get_x() for bar in bars(axes)] == list(explanation.boundaries[:-1])


@pytest.mark.filterwarnings("ignore:.*Hebrew")
def test_groups_are_named_and_add_up() -> None:
    explanation = make_explanation()
    axes = plots.plot_groups(explanation, np.arange(200) % 2, label_names=["pays $5 and $6", HOSTILE])
    assert sum(bar.get_width() for bar in bars(axes)) == pytest.approx(explanation.total)
    assert tick_names(axes)[0].startswith(r"pays \$5 and \$6  (gross ")
    assert len(draw(axes.figure)) > 1000


def test_axes_given_are_used() -> None:
    axes = Figure().add_subplot()
    explanation = make_explanation()
    for plot in (plots.plot_ledger, plots.plot_contributions, plots.plot_timeline):
        assert plot(explanation, ax=axes) is axes
    assert plots.plot_groups(explanation, [0] * 200, ax=axes) is axes


def test_examples_show_pictures_with_signed_captions() -> None:
    explanation = make_explanation(k=3)
    data = [(np.full((8, 8), 0.1) + np.eye(8) * i, i % 2) for i in range(200)]
    figure = plots.plot_examples(explanation, data, label_names=["$ham$", "spam"])
    images = [axes.images[0] for axes in figure.axes if axes.images]
    assert len(images) == 7
    titles = [axes.get_title() for axes in figure.axes]
    for c in (*explanation.proponents, *explanation.opponents):
        name = ["\\$ham\\$", "spam"][c.id % 2]
        assert f"{c.contribution:+.3f}\n{c.id}, {name}" in titles
    assert len(draw(figure)) > 1000


@pytest.mark.filterwarnings("ignore:.*Hebrew")
def test_examples_show_texts() -> None:
    figure = plots.plot_examples(make_explanation(query="why $ $"), [f"{i} {HOSTILE}" for i in range(200)])
    assert sum(len(axes.texts) for axes in figure.axes) == 9
    assert len(draw(figure)) > 1000


def test_examples_refuse_another_dataset() -> None:
    with pytest.raises(ConfigurationError, match="Got 3 examples; expected 200"):
        plots.plot_examples(make_explanation(), ["a", "b", "c"])


def test_pyplot_stays_out() -> None:
    code = (
        "import io, sys\n"
        "from pkexplain.results import plots\n"
        "from tests.explanations import make_explanation\n"
        "assert 'matplotlib' not in sys.modules\n"
        "plots.plot_ledger(make_explanation()).figure.savefig(io.BytesIO())\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr
