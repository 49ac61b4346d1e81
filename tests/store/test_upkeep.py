"""Looking after runs: other people's files, copies and checks of a growing run, what is saved of a damaged one."""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

import pkexplain as pk
from pkexplain.cli import app
from pkexplain.errors import RunDamagedError, RunError, RunExistsError, RunNotFoundError
from pkexplain.store.upkeep import find_damage
from tests.conftest import user_run
from tests.faults import content_of, outcome, say
from tests.races import race
from tests.record.test_resume import assert_same_run
from tests.trainings import EXAMPLES, Training


@pytest.fixture
def training(tmp_path):
    made = Training(tmp_path, "sgd")
    made.go(epochs=2)
    return made


def call(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


def contributions(training, run=None, **options):
    return pk.Explainer(run or training.run, training.model, **options).contributions(training.queries[:1])


# ------------------------------------------------------------------------------------------------- other people's files


OTHERS = {
    "notes.tmp": b"a draft",
    "pkexplain-notes.tmp": b"another",
    ".tmpABCdef": b"a third",
    "index/0123456789abcdef.json": b"{}",
    "model.safetensors": b"weights",
    "checkpoints/last.pt": b"weights",
    "checkpoints/epoch.ckpt.tmp": b"half of the weights",
    "states/0.tmp": b"x",
    "index/embeddings.faiss": b"somebody's vectors",
    "index/0.tmp": b"x",
    "rows/table.csv": b"1,2",
}


def put_others(directory):
    for name, content in OTHERS.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)


def assert_others(directory):
    for name, content in OTHERS.items():
        assert (directory / name).read_bytes() == content, name


def test_other_files_in_the_directory_are_left_alone(tmp_path):
    training = Training(tmp_path, "sgd")
    put_others(training.run)
    training.go(epochs=1)
    assert_others(training.run)
    Training(tmp_path, "sgd").go(epochs=2)
    pk.merge(training.run, shards=2)
    pk.withdraw(training.run, [3, 4, 5])
    pk.Explainer(training.run, training.model, index="SQ8").prepare()
    assert call("verify", training.run).exit_code == 0
    assert_others(training.run)


@pytest.mark.parametrize(
    "name", ["checkpoints/00003.safetensors", "rows/00000.000.safetensors", "segments/00001.safetensors"]
)
def test_a_file_of_somebody_else_that_a_run_would_replace_is_refused(tmp_path, name):
    file = tmp_path / "run" / name
    file.parent.mkdir(parents=True)
    safetensors.torch.save_file({"weight": torch.ones(3)}, file)
    before = content_of(tmp_path / "run")
    with pytest.raises(RunExistsError, match=rf"a file that pkexplain did not write has the name .*{name}"):
        Training(tmp_path, "sgd").go(epochs=1)
    assert {n: c for n, c in content_of(tmp_path / "run").items() if n != "lock"} == before


def test_a_file_that_came_later_under_a_name_of_ours_is_neither_deleted_nor_replaced(training):
    file = training.run / "checkpoints" / "00077.safetensors"
    safetensors.torch.save_file({"weight": torch.ones(3)}, file)
    Training(training.run.parent, "sgd").go(epochs=3)
    assert file.exists()
    segments = len(pk.DirectoryStore(training.run).manifest().segments)
    file.rename(training.run / "checkpoints" / f"{segments + 1:05d}.safetensors")
    with pytest.raises(RunExistsError, match="a file that pkexplain did not write"):
        Training(training.run.parent, "sgd").go(epochs=4)


def test_what_a_killed_writer_left_is_deleted_by_the_next(training):
    left = training.run / "segments" / "00009.safetensors"
    shutil.copy(training.run / "segments" / "00000.safetensors", left)
    half = training.run / "rows" / f"00009.000.safetensors.{'a' * 32}.tmp"
    half.write_bytes(b"half")
    scratch = training.run / "pkexplain-rows-abc_1234.tmp"
    scratch.write_bytes(b"rows")
    shown = call("verify", training.run)
    assert "3 leftover file(s)" in shown.output
    assert not left.exists()
    assert not half.exists()
    assert not scratch.exists()
    assert "leftover" not in call("verify", training.run).output


def test_what_a_killed_withdrawal_of_an_older_version_left_is_deleted(training):
    """Older versions did not mark their files."""
    for folder in ("rows", "segments", "states"):
        file = next((training.run / folder).glob("*.safetensors"))
        left = file.with_name("00077" + file.name[5:])
        safetensors.torch.save_file(safetensors.torch.load_file(file), left)
    assert "3 leftover file(s)" in call("verify", training.run).output


def test_rows_that_cannot_be_deleted_are_named(training, monkeypatch):
    real, gone = os.unlink, pk.DirectoryStore(training.run).manifest().segments[0].files.rows[0]

    def refuse(path, *args, **kwargs):
        if os.fspath(path).endswith(gone):
            raise PermissionError(13, "Operation not permitted")
        real(path, *args, **kwargs)

    monkeypatch.setattr(os, "unlink", refuse)
    with pytest.raises(RunError, match=rf"deleting {gone} of the run in .* what it holds is still there"):
        pk.withdraw(training.run, [3, 17, 30])
    monkeypatch.undo()
    assert not np.asarray(contributions(training))[0, [3, 17, 30]].any()  # it counts
    pk.withdraw(training.run, [3, 17, 30])
    assert not (training.run / gone).exists()


def test_what_a_kill_inside_safetensors_left_is_deleted(training):
    """It writes under a name of its own, in the same folder."""
    file = next((training.run / "rows").glob("*.safetensors"))
    for name in (".tmpfIV9pH", ".tmp0aZ9zz"):
        shutil.copy(file, file.with_name(name))
    assert "2 leftover file(s)" in call("verify", training.run).output
    assert not list((training.run / "rows").glob(".tmp*"))


def test_a_program_that_changes_its_directory_writes_where_it_began(tmp_path, monkeypatch):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "there")
    other = Training(Path(), "adamw")
    other.go(epochs=1)
    before = content_of(tmp_path / "there" / "run")
    monkeypatch.chdir(tmp_path / "here")
    training = Training(Path(), "sgd")
    recorder, _ = training.resumed()
    with recorder:
        training.epoch(recorder, 0)
        monkeypatch.chdir(tmp_path / "there")
        training.epoch(recorder, 1)
    explainer = pk.Explainer(training.store, training.model)
    monkeypatch.chdir(tmp_path)
    assert len(explainer.explain(training.queries[0]).boundaries) > 2
    assert content_of(tmp_path / "there" / "run") == before
    assert not find_damage(tmp_path / "here" / "run")[1]


@pytest.mark.parametrize("what", ["moved", "deleted", "replaced"])
def test_a_directory_that_is_not_the_one_that_was_locked_is_not_written_to(tmp_path, what):
    training = Training(tmp_path, "sgd")
    recorder, _ = training.resumed()
    recorder.__enter__()
    training.epoch(recorder, 0)
    training.run.rename(tmp_path / "elsewhere")
    before = content_of(tmp_path / "elsewhere")
    if what == "deleted":
        shutil.rmtree(tmp_path / "elsewhere")
    if what == "replaced":
        Training(tmp_path, "adamw").go(epochs=1)
        (tmp_path / "checkpoint.pt").unlink()
    new = content_of(training.run) if training.run.exists() else {}
    with pytest.raises(RunError, match="its directory was moved, deleted or replaced since it was locked"):
        recorder.__exit__(None, None, None)
    assert (content_of(training.run) if training.run.exists() else {}) == new
    if what != "deleted":
        assert content_of(tmp_path / "elsewhere") == before


def test_damage_is_found_with_a_store_that_has_read_the_files_before(training):
    store = pk.DirectoryStore(training.run)
    pk.Explainer(store, training.model).explain(training.queries[0])
    name = store.manifest().segments[1].files.rows[0]
    content = bytearray((training.run / name).read_bytes())
    content[-1] ^= 1
    (training.run / name).unlink()  # another file, as a restored backup is
    (training.run / name).write_bytes(bytes(content))
    assert set(find_damage(store)[1]) == {name}
    for work in (lambda: pk.withdraw(store, [3]), lambda: pk.copy_run(store, training.run.with_name("copy"))):
        with pytest.raises(RunDamagedError, match=f"reading {name}"):
            work()
    assert pk.salvage(store).damaged == (name,)


def test_nothing_is_made_where_there_is_no_run(tmp_path):
    for work in (lambda: pk.salvage(tmp_path / "typo"), lambda: pk.copy_run(tmp_path / "typo", tmp_path / "to")):
        with pytest.raises(RunNotFoundError):
            work()
    assert not list(tmp_path.iterdir())


def test_a_copy_that_was_interrupted_leaves_nothing_of_a_row_that_is_withdrawn_then(training, tmp_path):
    def stop(what, done, total):
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pk.copy_run(training.run, tmp_path / "copy", progress=stop)
    left = {n for n in content_of(tmp_path / "copy") if n.startswith("rows/")}
    assert left
    pk.withdraw(training.run, list(range(0, 32, 3)))
    pk.copy_run(training.run, tmp_path / "copy")
    files = {n for n in content_of(tmp_path / "copy") if n.endswith(".safetensors")}
    assert files == set(pk.DirectoryStore(tmp_path / "copy").manifest().files)


@pytest.mark.parametrize("mode", [0o600, 0o640])
def test_a_copy_has_the_permissions_of_the_run(tmp_path, mode):
    training = Training(tmp_path, "sgd")
    training.store = pk.DirectoryStore(training.run, mode=mode)
    training.go(epochs=1)
    pk.copy_run(training.run, tmp_path / "copy")
    assert modes_of(tmp_path / "copy") == {mode}
    assert stat.S_IMODE((tmp_path / "copy" / "lock").stat().st_mode) == mode


@pytest.mark.skipif(os.geteuid() != 0, reason="who is not root cannot become somebody else")
@pytest.mark.parametrize("name", ["rows", "manifest.json"])
def test_a_file_that_may_not_be_read_is_named(training, name):
    for directory in (training.run, *training.run.parents):
        if directory.name.startswith(("pytest-", "popen-", "test_a_file")):
            directory.chmod(0o755)
    hidden = next((training.run / "rows").iterdir()) if name == "rows" else training.run / name
    hidden.chmod(0o600)
    kind, text, _ = outcome(lambda: pk.Explainer(training.run, training.model), prepare=lambda: os.setuid(65534))
    assert kind == "RunError", text
    assert text.startswith(f"reading {hidden.relative_to(training.run)} of the run in ")
    assert "the file cannot be read" in text


def test_a_run_whose_manifest_was_deleted_is_begun_anew(training):
    (training.run / "manifest.json").unlink()
    training.checkpoint.unlink()
    again = Training(training.run.parent, "sgd")
    again.go(epochs=1)
    assert not find_damage(again.run)[1]
    assert {n for n in content_of(again.run) if n.endswith(".safetensors")} == set(
        pk.DirectoryStore(again.run).manifest().files
    )


# -------------------------------------------------------------------------------------- copies and checks of a live run


def while_it_grows(tmp_path, epochs, look):
    """Do something again and again while another process records, and saves after every epoch."""
    training, child = Training(tmp_path, "sgd"), os.fork()
    if child == 0:
        try:
            Training(tmp_path, "sgd").go(epochs)
        finally:
            os._exit(0)
    seen = Counter()
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        try:
            seen[look(training)] += 1
        except RunNotFoundError:
            seen["too early"] += 1
            time.sleep(0.01)
    return seen


def test_a_run_that_is_recorded_and_saved_is_never_called_damaged(tmp_path):
    def look(training):
        shown = call("verify", training.run)
        assert shown.exit_code == (1 if "no run" in str(shown.exception) else 0), shown.output
        return "whole" if shown.exit_code == 0 else "too early"

    assert while_it_grows(tmp_path, 12, look)["whole"] > 3


def test_a_copy_of_a_run_that_is_recorded_is_a_whole_run(tmp_path):
    lengths = set()

    def look(training):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        manifest = pk.copy_run(training.run, tmp_path / "copy")
        copied, damaged = find_damage(tmp_path / "copy")
        assert copied == manifest
        assert not damaged
        lengths.add(len(manifest.segments))
        return "copied"

    assert while_it_grows(tmp_path, 12, look)["copied"] > 3
    assert len(lengths) > 1
    training = Training(tmp_path, "sgd")
    last = pk.DirectoryStore(tmp_path / "copy").manifest().segments
    assert pk.DirectoryStore(training.run).manifest().segments[: len(last)] == last


def test_a_copy_is_explained_and_goes_on_like_the_run(training, tmp_path):
    (tmp_path / "there").mkdir()
    shown = call("copy", training.run, tmp_path / "there" / "run")
    assert shown.exit_code == 0
    assert "segments, up to step 10." in shown.output
    assert np.array_equal(contributions(training), contributions(training, tmp_path / "there" / "run"))
    shutil.copy(training.checkpoint, tmp_path / "there" / "checkpoint.pt")
    for place in (tmp_path, tmp_path / "there"):
        Training(place, "sgd").go(epochs=3)
    assert_same_run(training.run, tmp_path / "there" / "run")


def test_a_copy_never_replaces_anything(training, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    Training(other, "adamw").go(epochs=1)
    before = content_of(other / "run")
    with pytest.raises(RunExistsError, match="it already holds a run"):
        pk.copy_run(training.run, other / "run")
    assert content_of(other / "run") == before
    with pytest.raises(RunExistsError, match="it already holds a run"):
        pk.copy_run(training.run, training.run)
    (tmp_path / "theirs" / "rows").mkdir(parents=True)
    (tmp_path / "theirs" / "rows" / "00000.000.safetensors").write_bytes(b"mine")
    with pytest.raises(RunExistsError, match="a file that pkexplain did not write"):
        pk.copy_run(training.run, tmp_path / "theirs")
    assert (tmp_path / "theirs" / "rows" / "00000.000.safetensors").read_bytes() == b"mine"


def test_a_damaged_file_is_not_copied(training, tmp_path):
    (training.run / "rows" / "00001.000.safetensors").write_bytes(b"half")
    with pytest.raises(RunDamagedError, match=r"reading rows/00001\.000\.safetensors"):
        pk.copy_run(training.run, tmp_path / "copy")
    with pytest.raises(RunNotFoundError):
        pk.DirectoryStore(tmp_path / "copy").manifest()


def test_a_run_in_memory_is_copied_to_a_directory(tmp_path):
    run = user_run(pk.MemoryStore())
    pk.copy_run(run.store, tmp_path / "run")
    one, other = (pk.Explainer(store, run.model).explain(run.inputs[0]) for store in (run.store, tmp_path / "run"))
    assert one.ledger == other.ledger
    assert np.array_equal(one.contributions, other.contributions)


# -------------------------------------------------------------------------------------------------------------- salvage


def test_what_is_whole_of_a_damaged_run_is_saved(training):
    expected = contributions(training, segments=2)
    manifest = pk.DirectoryStore(training.run).manifest()
    lost = manifest.segments[2].files.rows[0]
    (training.run / lost).unlink()
    shown = call("salvage", training.run)
    step = manifest.segments[1].summary.last_step
    assert f"2 of 4 segments are left, up to step {step}" in shown.output
    assert lost in shown.output
    assert np.array_equal(contributions(training), expected)
    assert not find_damage(training.run)[1]
    assert pk.DirectoryStore(training.run).manifest().ended == "salvaged: 2 of 4 segments are left"
    files = {n for n in content_of(training.run) if n.endswith(".safetensors")}
    assert files == set(pk.DirectoryStore(training.run).manifest().files)


def test_a_salvaged_run_goes_on_from_the_state_that_is_left(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        Training(tmp_path / name, "sgd").go(epochs=1)
    kept = (tmp_path / "one" / "checkpoint.pt").read_bytes()
    for name in ("one", "other"):
        Training(tmp_path / name, "sgd").go(epochs=2)
    run = tmp_path / "one" / "run"
    (run / pk.DirectoryStore(run).manifest().segments[-1].files.checkpoint).write_bytes(b"")
    assert pk.salvage(run).segments == 3
    (tmp_path / "one" / "checkpoint.pt").write_bytes(kept)
    Training(tmp_path / "one", "sgd").go(epochs=2)
    assert_same_run(tmp_path / "other" / "run", run)


def test_a_whole_run_is_not_changed_by_salvaging(training):
    before = content_of(training.run)
    assert "Nothing is damaged: 4 segments, up to step 10." in call("salvage", training.run).output
    assert content_of(training.run) == before


@pytest.mark.parametrize("name", ["checkpoints/00000", "segments/00000", "rows/00000.000"])
def test_a_run_of_which_nothing_is_whole_stays_as_it_is(training, name):
    (training.run / f"{name}.safetensors").write_bytes(b"")
    before = content_of(training.run)
    with pytest.raises(RunDamagedError, match=f"reading {name}.safetensors"):
        pk.salvage(training.run)
    assert content_of(training.run) == before


def test_a_damaged_state_costs_no_segment(training):
    last = pk.DirectoryStore(training.run).manifest().states[-1].files[0]
    (training.run / last).write_bytes(b"")
    found = pk.salvage(training.run)
    assert (found.segments, found.before, found.damaged) == (4, 4, (last,))
    assert not find_damage(training.run)[1]


# ---------------------------------------------------------------------------------------------------------- permissions


def modes_of(directory, suffix=""):
    return {stat.S_IMODE(f.stat().st_mode) for f in directory.rglob(f"*{suffix}") if f.is_file() and f.name != "lock"}


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_permissions_that_the_umask_leaves(tmp_path, umask, mask, mode):
    umask(mask)
    training = Training(tmp_path, "sgd")
    training.go(epochs=1)
    explainer = pk.Explainer(training.run, training.model, index="SQ8")
    explainer.prepare()
    assert modes_of(training.run) == {mode}
    umask(0)
    report = pk.write_report(explainer.explain(training.queries[0]), tmp_path / "report.html")
    assert stat.S_IMODE(report.stat().st_mode) == mode  # those of the run, whatever the umask is now


def test_a_run_for_its_owner_only(tmp_path, umask):
    training = Training(tmp_path, "sgd")
    training.store = pk.DirectoryStore(training.run, mode=0o600)
    training.go(epochs=1)
    Training(tmp_path, "sgd").go(epochs=2)  # continued by somebody who did not say so again
    pk.withdraw(training.run, [3, 4, 5])
    explainer = pk.Explainer(training.run, training.model, index="SQ8")
    explainer.prepare()
    assert modes_of(training.run) == {0o600}
    folders = [training.run, *(f for f in training.run.iterdir() if f.is_dir())]
    assert {stat.S_IMODE(f.stat().st_mode) & 0o077 for f in folders[:1]} == {0}
    explanation = explainer.explain(training.queries[0])
    assert stat.S_IMODE(pk.write_report(explanation, tmp_path / "a.html").stat().st_mode) == 0o600
    assert stat.S_IMODE(pk.write_report(explanation, tmp_path / "b.html", mode=0o640).stat().st_mode) == 0o640


def test_a_report_of_a_run_in_memory_has_the_permissions_that_the_umask_leaves(tmp_path, umask):
    run = user_run(pk.MemoryStore())
    umask(0o027)
    report = pk.write_report(pk.Explainer(run.store, run.model).explain(run.inputs[0]), tmp_path / "report.html")
    assert stat.S_IMODE(report.stat().st_mode) == 0o640


# ---------------------------------------------------------------------------------------------------------------- forks


def test_a_forked_child_writes_nothing(tmp_path):
    training = Training(tmp_path, "sgd")
    recorder, _ = training.resumed()
    with recorder:
        training.epoch(recorder, 0)
        before = content_of(training.run)

        def go_on():
            with recorder.step([1, 2]):
                pass

        for work in (go_on, recorder.save):
            kind, text, _ = outcome(work)
            assert kind == "RecordingError"
            assert "this process was forked from the one that records" in text
        child = os.fork()
        if child == 0:
            try:
                recorder.__exit__(SystemExit, SystemExit(), None)  # as a worker does that ends by itself
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert content_of(training.run) == before
        with pytest.raises(pk.errors.RunBusyError):  # the child did not release the parent's lock
            pk.merge(training.run)
        training.epoch(recorder, 1)
    assert pk.DirectoryStore(training.run).manifest().ended == "finished"


def test_a_run_whose_recorder_was_killed_is_free_while_its_workers_live(tmp_path):
    reader, writer = os.pipe()
    owner = os.fork()
    if owner == 0:
        try:
            training = Training(tmp_path, "sgd")
            recorder, _ = training.resumed()
            with recorder:
                training.epoch(recorder, 0)
                training.save(recorder, 0)
                worker = os.fork()  # as a DataLoader does
                if worker == 0:
                    os.write(writer, str(os.getpid()).encode())
                    time.sleep(60)
                time.sleep(60)
        finally:
            os._exit(0)
    worker = int(os.read(reader, 20))
    os.kill(owner, 9)
    os.waitpid(owner, 0)
    try:
        Training(tmp_path, "sgd").go(epochs=2)
    finally:
        os.kill(worker, 9)
    assert pk.DirectoryStore(tmp_path / "run").manifest().num_examples == EXAMPLES


# ------------------------------------------------------------------------------------------------------------- races


def raced(tmp_path, seconds):
    told = race(tmp_path, seconds)
    assert told["left"] == 0
    assert told["gone"] > 1
    for name, done in (("merge", "merged"), ("verify", "whole"), ("index", "indexed"), ("explain", "explained")):
        assert told[name][done] > 0
    return told


def test_five_processes_on_one_run(tmp_path):
    raced(tmp_path, seconds=6)


@pytest.mark.stress
def test_five_processes_on_one_run_for_five_minutes(tmp_path):
    say(f"races: {raced(tmp_path, float(os.environ.get('STRESS_SECONDS', '300')))}")
