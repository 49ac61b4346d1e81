"""Ctrl-C, at any line of a training: what is recorded is whole, or is not there."""

from __future__ import annotations

import os
import signal
import sys
import threading

import pytest
import torch

import pkexplain as pk
from pkexplain.errors import RecordingError
from pkexplain.gradients.interrupts import deferred_interrupts
from pkexplain.store.upkeep import find_damage
from tests.trainings import Training


class LineInterrupt:
    """Sends this process a Ctrl-C at a line of this package's code, counted from the start."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.lines = at, 0

    def __enter__(self) -> LineInterrupt:
        sys.settrace(self._enter)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _enter(self, frame, event, argument):
        inside = "/pkexplain/" in frame.f_code.co_filename and "interrupts.py" not in frame.f_code.co_filename
        return self._line if inside else None

    def _line(self, frame, event, argument):
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                os.kill(os.getpid(), signal.SIGINT)  # its handler runs before the next line
        return self._line


def interrupted(tmp_path, at, kind="sgd"):
    """Train, with a Ctrl-C at some line; return the training and how many lines there were."""
    training, watch = Training(tmp_path, kind), LineInterrupt(at)
    try:
        with watch:
            training.go(epochs=1)
    except KeyboardInterrupt:
        pass
    return training, watch.lines


def assert_closes(training):
    """The run is whole, and every segment in it accounts for the whole of its displacement."""
    manifest, damaged = find_damage(training.run)
    assert not damaged
    for segment in manifest.segments:
        assert segment.summary.displacement_gap < 1e-6
    if manifest.segments:
        trajectory = pk.DirectoryStore(training.run).trajectory()
        for t in range(len(trajectory)):
            assert float((trajectory.checkpoint(t + 1).parameters - trajectory.checkpoint(t).parameters).norm()) > 0
        explanation = pk.Explainer(training.run, training.model).explain(training.queries[0], output=pk.Logit(3))
        assert abs(explanation.gap) < 1e-6 * abs(explanation.final - explanation.initial)
    return len(manifest.segments)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_ctrl_c_at_any_line_leaves_a_run_that_closes(tmp_path, kind):
    (tmp_path / "whole").mkdir()
    _, lines = interrupted(tmp_path / "whole", None, kind)
    assert lines > 5000
    for turn, at in enumerate(range(lines // 3, lines, lines // 12)):
        (tmp_path / str(turn)).mkdir()
        training, seen = interrupted(tmp_path / str(turn), at, kind)
        assert seen < lines + 400
        if (training.run / "manifest.json").exists():
            assert_closes(training)


@pytest.mark.stress
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_ctrl_c_at_three_hundred_lines_leaves_a_run_that_closes(tmp_path, kind):
    import shutil

    (tmp_path / "whole").mkdir()
    _, lines = interrupted(tmp_path / "whole", None, kind)
    for at in range(1, lines, lines // 300):
        (tmp_path / "run").mkdir()
        training, _ = interrupted(tmp_path / "run", at, kind)
        if (training.run / "manifest.json").exists():
            assert_closes(training)
        shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize("epochs", [0, 1])
def test_an_error_inside_the_accounts_drops_the_unfinished_segment(tmp_path, monkeypatch, epochs):
    training = Training(tmp_path, "sgd")
    recorder, _ = training.resumed()
    recorder.__enter__()
    for epoch in range(epochs):
        training.epoch(recorder, epoch)  # 5 steps: a segment of 3, and 2 more
    real, calls = torch.Tensor.index_add_, []

    def full(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:  # in the middle of a step's rows
            raise MemoryError
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "index_add_", full)
    with pytest.raises(MemoryError):
        training.epoch(recorder, epochs)
    monkeypatch.undo()
    with pytest.raises(RecordingError, match="an earlier step was not recorded as a whole"):
        training.epoch(recorder, epochs + 1)
    with pytest.raises(RecordingError, match="an earlier step was not recorded as a whole"):
        recorder.save()
    with pytest.warns(UserWarning, match="an error came in the middle of recording a step"):
        recorder.__exit__(MemoryError, MemoryError(), None)
    assert assert_closes(training) == epochs


def interrupt_twice(seen):
    with deferred_interrupts():
        os.kill(os.getpid(), signal.SIGINT)
        seen.append("went on")
        os.kill(os.getpid(), signal.SIGINT)
        seen.append("cannot be stopped")


def interrupt_once(seen):
    with deferred_interrupts():
        os.kill(os.getpid(), signal.SIGINT)
        seen.append("went on")


@pytest.mark.parametrize("interrupt", [interrupt_once, interrupt_twice])
def test_an_interrupt_waits_for_the_end_and_a_second_one_does_not(interrupt):
    seen = []
    with pytest.raises(KeyboardInterrupt):
        interrupt(seen)
    assert seen == ["went on"]


def test_a_programs_own_handlers_come_back_and_are_called():
    called = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGTERM, lambda *_: called.append("term"))
    mine = signal.getsignal(signal.SIGTERM)
    try:
        with deferred_interrupts():
            os.kill(os.getpid(), signal.SIGTERM)
            assert called == []
        assert called == ["term"]
        assert signal.getsignal(signal.SIGTERM) is mine
        assert signal.getsignal(signal.SIGINT) is before[signal.SIGINT]
    finally:
        signal.signal(signal.SIGTERM, before[signal.SIGTERM])


def test_other_threads_record_without_touching_handlers(tmp_path):
    training, before, found = Training(tmp_path, "sgd"), signal.getsignal(signal.SIGINT), []
    thread = threading.Thread(target=lambda: found.append(training.go(epochs=1)))
    thread.start()
    thread.join()
    assert found == [None]
    assert signal.getsignal(signal.SIGINT) is before
    assert assert_closes(training) == 2
