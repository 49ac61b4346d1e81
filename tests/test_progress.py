"""The progress bar: nothing for short work, nothing where nobody looks, nothing left behind."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

import pkexplain as pk
from pkexplain import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def look(monkeypatch):
    """Put a terminal in place of the error stream; not in a fixture, after which pytest sets the stream again."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    return sys.stderr


@pytest.fixture
def long_work(monkeypatch):
    monkeypatch.setattr(progress, "_PATIENCE", 0.0)


def test_short_work_shows_nothing(monkeypatch):
    terminal = look(monkeypatch)
    monkeypatch.setattr(progress, "_PATIENCE", 3600.0)
    bar = pk.ProgressBar()
    for _ in range(5):
        for done in range(11):
            bar("index", done, 10)
    assert terminal.getvalue() == ""


def test_long_work_shows_its_name_and_its_end(monkeypatch, long_work):
    terminal = look(monkeypatch)
    bar = pk.ProgressBar()
    bar("index", 0, 10)
    assert "10/10" not in terminal.getvalue()
    bar("index", 4, 10)
    bar("index", 10, 10)
    assert "index: 100%" in terminal.getvalue()
    assert "10/10" in terminal.getvalue()


def test_two_kinds_of_work_have_a_bar_each(monkeypatch, long_work):
    terminal = look(monkeypatch)
    bar = pk.ProgressBar()
    bar("index", 0, 10), bar("covectors", 0, 4)
    bar("index", 10, 10)
    assert "4/4" not in terminal.getvalue()  # the other one goes on
    bar("covectors", 4, 4)
    assert "index: 100%" in terminal.getvalue()
    assert "covectors: 100%" in terminal.getvalue()


def test_a_total_that_grows_is_followed(monkeypatch, long_work):
    terminal = look(monkeypatch)
    bar = pk.ProgressBar()
    bar("covectors", 1, 4), bar("covectors", 2, 9), bar("covectors", 9, 9)
    assert "9/9" in terminal.getvalue()


def test_nothing_is_written_where_the_error_stream_is_no_terminal(capsys, long_work):
    bar = pk.ProgressBar()
    for done in (0, 1, 10):
        bar("index", done, 10)
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err == ""


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_PAUSE", 30.0)
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    bar = pk.ProgressBar()
    for done in range(101):
        now[0] = 1000.0 + 1.3 * done
        bar("covectors", done, 100)
    written = capsys.readouterr()
    assert written.out == ""
    lines = written.err.splitlines()
    assert lines == [
        "pkexplain: covectors: 24 of 100 (24%) after 0:00:31",
        "pkexplain: covectors: 48 of 100 (48%) after 0:01:02",
        "pkexplain: covectors: 72 of 100 (72%) after 0:01:33",
        "pkexplain: covectors: 96 of 100 (96%) after 0:02:04",
        "pkexplain: covectors: 100 of 100 (100%) after 0:02:10",
    ]


def test_a_log_of_short_work_gets_no_line_and_no_error_stream_is_no_error(capsys, monkeypatch):
    bar = pk.ProgressBar()
    for done in range(11):
        bar("index", done, 10)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "_PAUSE", 0.0)
    monkeypatch.setattr(sys, "stderr", None)
    bar("index", 0, 10), bar("index", 10, 10)


def test_a_notebook_sees_a_bar():
    manager = pytest.importorskip("jupyter_client.manager")
    code = "import pkexplain as pk\nfrom pkexplain import progress\nprogress._PATIENCE = 0.0\nbar = pk.ProgressBar()\n"
    shown: list[str] = []

    def keep(message):
        if message["msg_type"] == "stream":
            shown.append(message["content"]["text"])

    with manager.run_kernel(kernel_name="python3", cwd=str(Path(__file__).parents[1])) as client:
        reply = client.execute_interactive(
            code + "for i in range(4):\n    bar('index', i, 3)", timeout=120, output_hook=keep
        )
    assert reply["content"]["status"] == "ok"
    assert "index: 100%" in "".join(shown)
    assert "3/3" in "".join(shown)
