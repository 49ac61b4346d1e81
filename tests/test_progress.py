"""The progress bar: nothing for short work, nothing where nobody looks, nothing left behind."""

from __future__ import annotations

import io
import sys

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
