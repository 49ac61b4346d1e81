"""The progress bar: nothing before a second has passed, nothing where nobody looks, nothing left behind."""

from __future__ import annotations

import io

import pytest
import rich.console

import pkexplain as pk
from pkexplain import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    stream, console = Terminal(), rich.console.Console
    monkeypatch.setattr(
        rich.console, "Console", lambda **options: console(file=stream, force_terminal=stream.isatty(), width=100)
    )
    return stream


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_short_work_shows_nothing(terminal, clock):
    bar = pk.ProgressBar()
    for done in range(11):
        bar("index", done, 10)
    assert terminal.getvalue() == ""
    assert bar._bars is None


def test_long_work_shows_its_name_and_its_end(terminal, clock):
    bar = pk.ProgressBar()
    bar("index", 0, 10)
    clock[0] += 2
    bar("index", 4, 10)
    assert bar._bars is not None
    bar("index", 10, 10)
    assert bar._bars is None
    assert "index" in terminal.getvalue()
    assert "10/10" in terminal.getvalue()


def test_two_kinds_of_work_have_a_bar_each(terminal, clock):
    bar = pk.ProgressBar()
    bar("index", 0, 10), bar("covectors", 0, 4)
    clock[0] += 2
    bar("index", 1, 10), bar("covectors", 1, 4)
    bar("index", 10, 10)
    assert bar._bars is not None  # the other one goes on
    bar("covectors", 4, 4)
    assert bar._bars is None


def test_each_piece_of_work_starts_its_second_anew(terminal, clock):
    bar = pk.ProgressBar()
    for _ in range(5):
        bar("index", 0, 2)
        clock[0] += 0.6
        bar("index", 1, 2)
        bar("index", 2, 2)
    assert terminal.getvalue() == ""


def test_nothing_is_written_where_the_error_stream_is_no_terminal(capsys, clock):
    bar = pk.ProgressBar()
    bar("index", 0, 10)
    clock[0] += 2
    bar("index", 1, 10)
    bar("index", 10, 10)
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err == ""
