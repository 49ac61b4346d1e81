"""Runs at URLs: read through fsspec and checked like local ones, never written to, and never a folder named s3:."""

from __future__ import annotations

import importlib.util
import os
import stat
import threading
from collections import Counter
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from typer.testing import CliRunner

import pkexplain as pk
from pkexplain.cli import app
from pkexplain.demo import run_demo
from pkexplain.errors import (
    ConfigurationError,
    MissingDependencyError,
    PkexplainError,
    RunDamagedError,
    RunError,
    RunExistsError,
    RunNotFoundError,
)
from pkexplain.store.remote import RemoteStore
from tests.trainings import EXAMPLES, Training

URL = "memory://bucket/runs/digits"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, an empty memory filesystem and an empty working directory."""
    monkeypatch.setenv("PKEXPLAIN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    yield tmp_path / "cache"
    MemoryFileSystem.store.clear()
    assert not list((tmp_path / "here").iterdir()), "a folder was made where the program runs"


@pytest.fixture
def training(tmp_path):
    made = Training(tmp_path, "sgd")
    made.go(epochs=2)
    return made


@pytest.fixture
def opened(monkeypatch, tmp_path):
    """How often each file of the run in ``up`` was opened through fsspec's local filesystem, to be read."""
    counts, original = Counter(), LocalFileSystem._open

    def counting(self, path, mode="rb", **options):
        if mode == "rb":
            counts[path.removeprefix(f"{tmp_path}/up/")] += 1
        return original(self, path, mode, **options)

    monkeypatch.setattr(LocalFileSystem, "_open", counting)
    return counts


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def sync(run, url=URL):
    """Make a URL hold what a directory holds, as a storage's own tool would."""
    filesystem, root = fsspec.core.url_to_fs(url)
    if filesystem.exists(root):
        filesystem.rm(root, recursive=True)
    for file in filter(Path.is_file, run.rglob("*")):
        target = f"{root}/{file.relative_to(run).as_posix()}"
        filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
        filesystem.pipe_file(target, file.read_bytes())


def contributions(training, run=None, **options):
    return pk.Explainer(run or training.run, training.model, **options).contributions(training.queries[:2])


def copies(cache):
    return {file.name for file in cache.rglob("*.safetensors")}


# ---------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("kind", ["memory://a/run", "memory://a/run/", "local://{}/up/run", "simplecache::memory://b"])
def test_a_copy_at_a_url_is_explained_like_the_run(training, tmp_path, kind):
    url = kind.format(tmp_path)
    if kind.startswith("simplecache"):
        sync(training.run, "memory://b")
    else:
        pk.copy_run(training.run, url)
    np.testing.assert_array_equal(contributions(training, url), contributions(training))
    ours, theirs = pk.DirectoryStore(training.run).manifest(), RemoteStore(url).manifest()
    assert (theirs.run_id, theirs.segments, theirs.files) == (ours.run_id, ours.segments, ours.files)


def test_the_command_line_inspects_verifies_explains_and_copies_a_url(training, tmp_path):
    np.save(tmp_path / "query.npy", training.queries[0].numpy())
    assert call("copy", training.run, URL).exit_code == 0
    shown, local = call("inspect", URL).output, call("inspect", training.run).output
    assert URL in shown
    assert shown.partition("\nid ")[2].split() == local.partition("\nid ")[2].split() != []
    assert "files whole" in call("verify", URL).output
    options = ("--model", "tests.trainings:small_model", "--query", tmp_path / "query.npy", "--index", "Flat")
    explained = call("explain", URL, *options)
    assert explained.exit_code == 0, explained.exception
    assert explained.output.splitlines()[0] == call("explain", training.run, *options).output.splitlines()[0]
    assert call("copy", URL, tmp_path / "back").exit_code == 0
    np.testing.assert_array_equal(contributions(training, tmp_path / "back"), contributions(training))


def test_a_file_url_is_the_local_path(tmp_path, training):
    url = training.run.as_uri()
    np.testing.assert_array_equal(contributions(training, url), contributions(training))
    store = pk.DirectoryStore((tmp_path / "a name").as_uri())
    assert store.path == tmp_path / "a name"
    pk.merge(url, shards=2)
    pk.withdraw(url, [1])
    assert pk.DirectoryStore(training.run).manifest().withdrawn == (1,)
    with pytest.raises(ConfigurationError, match="a URL is not a local path"):
        pk.DirectoryStore("file://elsewhere/run")


def test_a_run_in_memory_is_copied_to_a_url():
    model = torch.nn.Linear(3, 2)
    store, optimizer = pk.MemoryStore(), torch.optim.SGD(model.parameters(), lr=0.1)
    with pk.Recorder(store, model, optimizer, num_examples=8) as recorder, recorder.step(range(8)):
        model(torch.ones(8, 3)).square().sum().backward()
        optimizer.step()
    pk.copy_run(store, URL)
    x = torch.ones(1, 3)
    ours = pk.Explainer(store, model).contributions(x, output=pk.Logit(0))
    np.testing.assert_array_equal(pk.Explainer(URL, model).contributions(x, output=pk.Logit(0)), ours)


def test_an_index_of_a_url_is_kept_nowhere(training, cache):
    sync(training.run)
    explainer = pk.Explainer(URL, training.model, index="IVF2,SQ8")
    found = explainer.explain(training.queries[0], k=3)
    assert explainer.index.factory == "IVF2,SQ8"
    exact = pk.Explainer(training.run, training.model, index="Flat").explain(training.queries[0], k=3)
    assert {each.id for each in found.proponents} <= set(range(EXAMPLES))
    assert found.ledger == exact.ledger
    assert not [*cache.rglob("*.faiss"), *training.run.rglob("*.faiss")]
    assert not [name for name in MemoryFileSystem.store if "faiss" in name]


def test_files_are_fetched_once_and_only_when_they_are_needed(training, opened, tmp_path):
    url = f"local://{tmp_path}/up"
    sync(training.run, url)
    RemoteStore(url).trajectory()
    assert opened.keys() == {"manifest.json"}
    contributions(training, url)
    fetched = {name: count for name, count in opened.items() if name != "manifest.json"}
    assert {"rows", "checkpoints", "segments"} == {name.partition("/")[0] for name in fetched}
    assert set(fetched.values()) == {1}
    contributions(training, url)
    assert {name: count for name, count in opened.items() if name != "manifest.json"} == fetched


def test_threads_that_read_one_url_fetch_each_file_once(training, opened, tmp_path):
    url = f"local://{tmp_path}/up"
    sync(training.run, url)
    answers, expected = [], contributions(training)
    threads = [threading.Thread(target=lambda: answers.append(contributions(training, url))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 4
    assert all(np.array_equal(answer, expected) for answer in answers)
    assert {count for name, count in opened.items() if name != "manifest.json"} == {1}


def test_copies_are_for_their_owner_only(training, cache):
    sync(training.run)
    explainer = pk.Explainer(URL, training.model)
    explainer.contributions(training.queries[:1])
    for entry in (cache / "runs").rglob("*"):
        assert not stat.S_IMODE(entry.stat().st_mode) & 0o077, entry
    assert explainer.explain(training.queries[0]).mode is None  # a report's permissions are the umask's


# -------------------------------------------------------------------------------------------- a run that is written to


def test_a_run_that_grows_is_seen_as_it_is(training):
    sync(training.run)
    before = pk.Explainer(URL, training.model)
    known = before.contributions(training.queries[:2])
    training.go(epochs=3)
    sync(training.run)
    np.testing.assert_array_equal(before.contributions(training.queries[:2]), known)
    np.testing.assert_array_equal(contributions(training, URL), contributions(training))
    assert RemoteStore(URL).manifest() == pk.DirectoryStore(training.run).manifest()


def test_withdrawn_examples_are_gone_from_an_open_explainer_and_from_the_cache(training, cache):
    sync(training.run)
    explainer = pk.Explainer(URL, training.model)
    explainer.contributions(training.queries[:2])
    held = copies(cache)
    pk.withdraw(training.run, [0, 5])
    sync(training.run)
    np.testing.assert_array_equal(explainer.contributions(training.queries[:2]), contributions(training))
    now = copies(cache)
    old = held - {Path(name).name for name in pk.DirectoryStore(training.run).manifest().files}
    assert old
    assert not old & now


def test_another_run_at_the_same_url_is_not_taken_for_the_first(training, tmp_path):
    sync(training.run)
    explainer = pk.Explainer(URL, training.model)
    explainer.contributions(training.queries[:2])
    (tmp_path / "other").mkdir()
    other = Training(tmp_path / "other", "adamw")
    other.go(epochs=2)
    sync(other.run)
    with pytest.raises(RunNotFoundError, match="it was replaced by another run"):
        explainer.contributions(training.queries[:2])
    np.testing.assert_array_equal(contributions(other, URL), contributions(other))


# ------------------------------------------------------------------------------------------------------------ damage


def flip(content):
    return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (flip, "it was altered"),
        (lambda c: c[:-1], "truncated"),
        (lambda c: c + b"x" * 9, "has grown"),
        (None, "missing"),
    ],
)
@pytest.mark.parametrize("folder", ["checkpoints", "segments", "rows"])
@pytest.mark.parametrize("cached", [False, True])
def test_a_damaged_file_at_a_url_is_refused_like_a_local_one(training, change, wrong, folder, cached):
    sync(training.run)
    if cached:
        contributions(training, URL)  # what is in the cache is whole, and says nothing about the URL
        RemoteStore(URL).forget()
    name = next(name for name in sorted(RemoteStore(URL).manifest().files) if name.startswith(folder))
    key = next(key for key in MemoryFileSystem.store if key.endswith(name))
    file = MemoryFileSystem.store[key]
    whole = file.getvalue()
    if change is None:
        del MemoryFileSystem.store[key]
    else:
        fsspec.filesystem("memory").pipe_file(key, change(whole))
    with pytest.raises(RunDamagedError, match=wrong) as caught:
        contributions(training, URL)
    assert f"reading {name} of the run in {URL}" in str(caught.value)
    with pytest.raises(RunDamagedError, match=wrong):
        pk.copy_run(URL, training.run.with_name("copy"))
    fsspec.filesystem("memory").pipe_file(key, whole)
    np.testing.assert_array_equal(contributions(training, URL), contributions(training))


@pytest.mark.parametrize("change", [flip, lambda c: c[:-1], lambda c: b"[]"])
def test_a_damaged_manifest_at_a_url_is_refused(training, change):
    sync(training.run)
    contributions(training, URL)
    memory = fsspec.filesystem("memory")
    memory.pipe_file(f"{URL}/manifest.json", change(memory.cat_file(f"{URL}/manifest.json")))
    with pytest.raises(RunDamagedError, match=r"manifest\.json"):
        contributions(training, URL)


def test_verifying_reads_the_url_and_not_the_copies(training):
    sync(training.run)
    contributions(training, URL)
    key = next(key for key in sorted(MemoryFileSystem.store) if "/rows/" in key)
    memory = fsspec.filesystem("memory")
    memory.pipe_file(key, flip(memory.cat_file(key)))
    checked = call("verify", URL)
    assert checked.exit_code == 1
    assert "it was altered" in checked.output


def test_where_there_is_no_run_it_says_so(training):
    with pytest.raises(RunNotFoundError, match="memory://nothing"):
        pk.Explainer("memory://nothing", training.model)


def test_a_storage_that_fails_is_named(training, monkeypatch):
    sync(training.run)

    def fails(self, path, **options):
        raise TimeoutError("no answer")

    monkeypatch.setattr(MemoryFileSystem, "_open", fails)
    with pytest.raises(RunError, match=r"could not be fetched\. Got TimeoutError: no answer") as caught:
        pk.Explainer(URL, training.model)
    assert not isinstance(caught.value, RunDamagedError)


# --------------------------------------------------------------------------------------------------------- uploading


def test_a_copy_that_was_interrupted_is_no_run_until_it_is_repeated(training, monkeypatch, cache):
    original, sent = MemoryFileSystem.put_file, []

    def fails(self, source, target, **options):
        sent.append(target)
        if len(sent) == 5:
            raise ConnectionError("gone")
        return original(self, source, target, **options)

    monkeypatch.setattr(MemoryFileSystem, "put_file", fails)
    with pytest.raises(RunError, match=r"could not be sent.*ConnectionError: gone"):
        pk.copy_run(training.run, URL)
    with pytest.raises(RunNotFoundError):
        RemoteStore(URL).manifest()
    pk.copy_run(training.run, URL)
    assert sent[-1].endswith("manifest.json")
    np.testing.assert_array_equal(contributions(training, URL), contributions(training))
    assert not list(cache.glob("copy-*"))


def test_a_file_that_arrives_cut_off_is_noticed(training, monkeypatch):
    original = MemoryFileSystem.put_file

    def cuts(self, source, target, **options):
        original(self, source, target, **options)
        self.pipe_file(target, self.cat_file(target)[:-1])

    monkeypatch.setattr(MemoryFileSystem, "put_file", cuts)
    with pytest.raises(RunError, match=r"\d+ bytes of \d+ arrived"):
        pk.copy_run(training.run, URL)


def test_a_copy_to_a_url_replaces_no_run(training):
    pk.copy_run(training.run, URL)
    with pytest.raises(RunExistsError, match="it already holds a run"):
        pk.copy_run(training.run, URL)


# ---------------------------------------------------------------------------------------------------------- refusals


URLS = ["s3://bucket/run", "gs://bucket/run", "memory://run", "abfs://c/run", Path("s3://bucket/run"), "nosuch://x"]
WRITERS = {
    "Recorder": lambda run, t: pk.Recorder(run, t.model, t.optimizer, num_examples=EXAMPLES),
    "Recorder.resume": lambda run, t: pk.Recorder.resume(run, t.model, t.optimizer),
    "merge": lambda run, t: pk.merge(run),
    "withdraw": lambda run, t: pk.withdraw(run, [0]),
    "salvage": lambda run, t: pk.salvage(run),
    "DirectoryStore": lambda run, t: pk.DirectoryStore(run),
    "write_report": lambda run, t: pk.write_report(t.explained, run),
    "Retraining": lambda run, t: pk.evaluation.Retraining(
        lambda ids, seed: t.model, t.queries, output=pk.Logit(0), num_examples=EXAMPLES, kept=run
    ),
    "run_demo": lambda run, t: run_demo(run, epochs=1),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    made = Training(tmp_path_factory.mktemp("trained"), "sgd")
    made.go(epochs=1)
    made.explained = pk.Explainer(made.run, made.model).explain(made.queries[0])
    return made


@pytest.mark.parametrize("url", URLS, ids=str)
@pytest.mark.parametrize("writer", WRITERS)
def test_what_writes_refuses_a_url_by_name(trained, writer, url):
    with pytest.raises((ConfigurationError, RunError)) as caught:
        WRITERS[writer](url, trained)
    assert os.fspath(url) in str(caught.value)
    assert not isinstance(caught.value, MissingDependencyError), "installing a driver would not help"


@pytest.mark.parametrize("command", ["merge", "withdraw", "salvage", "index"])
def test_commands_that_write_refuse_a_url(training, command):
    sync(training.run)
    before = {name: file.getvalue() for name, file in MemoryFileSystem.store.items()}
    done = call(command, URL, *(["--ids", "1"] if command == "withdraw" else []))
    assert isinstance(done.exception, RunError)
    assert "a run at a URL can only be read" in str(done.exception)
    assert {name: file.getvalue() for name, file in MemoryFileSystem.store.items()} == before


def test_recording_at_a_url_says_what_to_do(trained):
    with pytest.raises(
        RunError, match="Record into a local directory, then copy it with `pkexplain copy DIRECTORY URL`"
    ):
        WRITERS["Recorder"]("s3://bucket/run", trained)
    with pytest.raises(ConfigurationError, match="Pass a URL as a string"):
        WRITERS["Recorder"](Path("s3://bucket/run"), trained)


@pytest.mark.parametrize(
    "write",
    [
        lambda store, manifest: store.create(manifest),
        lambda store, manifest: store.reopen(),
        lambda store, manifest: store.put("x", {}),
        lambda store, manifest: store.note("x", None),
        lambda store, manifest: store.commit(manifest),
        lambda store, manifest: store.lock(),
        lambda store, manifest: pk.copy_run(store, store),
    ],
)
def test_the_store_of_a_url_refuses_every_way_to_write(training, write):
    sync(training.run)
    store = RemoteStore(URL)
    with pytest.raises(RunError, match="a run at a URL can only be read"):
        write(store, store.manifest())


@pytest.mark.parametrize(
    ("url", "package"), [("s3://b/run", "s3fs"), ("gs://b/run", "gcsfs"), ("abfs://b/run", "adlfs")]
)
def test_a_missing_driver_is_named_as_pip_knows_it(trained, url, package):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    for read in (
        lambda: pk.Explainer(url, trained.model),
        lambda: pk.copy_run(trained.run, url),
        lambda: pk.copy_run(f"simplecache::{url}", "copy"),
    ):
        with pytest.raises(MissingDependencyError, match=f"pip install {package}"):
            read()
    shown = call("inspect", url)
    assert isinstance(shown.exception, PkexplainError)


def test_a_scheme_that_nobody_knows_is_refused(trained):
    with pytest.raises(ConfigurationError, match="Protocol not known: nosuch"):
        pk.Explainer("nosuch://run", trained.model)
