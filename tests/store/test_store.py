"""The same run in memory and on disk, and every way in which its files can go wrong."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
from msgspec.structs import replace

import pkexplain as pk
from pkexplain.errors import RunDamagedError, RunError, RunExistsError, RunNotFoundError
from pkexplain.files import checksum_file
from pkexplain.gradients.layers import Block
from pkexplain.store.directory import DirectoryStore, open_store
from pkexplain.store.fingerprint import ModelFingerprint
from pkexplain.store.manifest import (
    FORMAT_VERSION,
    InputEntry,
    Manifest,
    OptimizerEntry,
    RecordingEntry,
    SegmentEntry,
    SegmentFiles,
    SegmentSummary,
)
from pkexplain.store.memory import MemoryStore
from tests.conftest import digits, mlp, user_run
from tests.faults import reseal

MANIFEST = Manifest(
    run_id="run",
    pkexplain="1.0",
    torch="2.0",
    ended="finished",
    num_examples=4,
    dtype="float64",
    recording=RecordingEntry(segments="epoch"),
    optimizer=OptimizerEntry(kind="SGD", groups=({"lr": 0.1, "nesterov": False, "name": "all", "maximize": 1},)),
    projection={"kind": "Identity"},
    columns=None,
    model=ModelFingerprint((Block("", ("weight",), ((2, 3),), 0, 0, (2, 3)),), {}, {}, {"weight": "x"}, {"": "Linear"}),
    inputs={"0": InputEntry(shape=(3, None), dtype="float32")},
    digests={"3": {"0": "0123456789abcdef"}},
    output="",
    segments=(),
    states=(),
    revision=0,
    withdrawn=(),
    files={},
    format_version=FORMAT_VERSION,
)
WITH_A_SEGMENT = replace(
    MANIFEST,
    columns=6,
    segments=(
        SegmentEntry(
            summary=SegmentSummary(
                last_step=3,
                visits=4,
                learning_rate_sum=(0.3,),
                displacement_gap=0.0,
                optimizer_share=0.0,
                capture_gap=0.0,
                rescaled=(1.0, 1.0),
                bent=0.0,
                skipped_steps=0,
            ),
            files=SegmentFiles.named(0, [4]),
        ),
    ),
)
TENSORS = {
    "half": torch.randn(3, 4).half(),
    "single": torch.tensor([0.1, float("nan"), float("inf"), -0.0]),
    "double": torch.randn(2, 2, dtype=torch.float64).T,  # not contiguous
    "whole": torch.arange(5),
    "none": torch.zeros(0, 3),
    "one": torch.tensor(2.5),
}


@pytest.fixture(params=["memory", "directory"])
def store(request, tmp_path):
    return MemoryStore() if request.param == "memory" else DirectoryStore(tmp_path / "deep" / "run")


def bits(tensor):
    return tensor.contiguous().flatten().view(torch.uint8).tolist()


def reopened(store):
    return store if isinstance(store, MemoryStore) else DirectoryStore(store.path)


# -------------------------------------------------------------------------------------------- the common interface


def test_tensors_come_back_bit_for_bit(store):
    store.create(MANIFEST)
    store.put("checkpoints/00000.safetensors", TENSORS)
    store.commit(MANIFEST)
    store = reopened(store)
    store.manifest()
    found = store.read("checkpoints/00000.safetensors")
    assert set(found) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert bits(found[name]) == bits(tensor), name


def test_what_is_stored_does_not_follow_the_tensor(store):
    store.create(MANIFEST)
    changing = torch.ones(3)
    store.put("checkpoints/00000.safetensors", {"a": changing})
    store.commit(MANIFEST)
    changing.zero_()
    assert store.read("checkpoints/00000.safetensors")["a"].tolist() == [1, 1, 1]


def test_a_manifest_comes_back(store):
    store.create(MANIFEST)
    store.put("checkpoints/00000.safetensors", {"a": torch.ones(3)})
    changed = replace(MANIFEST, ended="interrupted", withdrawn=(3, 1))
    store.commit(changed)
    found = reopened(store).manifest()
    assert set(found.files) == {"checkpoints/00000.safetensors"}
    assert found.format_version == FORMAT_VERSION
    assert replace(found, files={}) == changed


def test_a_place_that_holds_a_run_is_refused(store):
    store.create(MANIFEST)
    store.commit(WITH_A_SEGMENT)
    with pytest.raises(
        RunExistsError, match=r"^recording into .*: it already holds a run\. .* Choose another directory"
    ):
        reopened(store).create(replace(MANIFEST, run_id="other"))
    assert reopened(store).manifest().run_id == "run"


def test_a_run_that_ended_before_its_first_segment_is_replaced(store):
    store.create(MANIFEST)
    store.put("checkpoints/00000.safetensors", TENSORS)
    store.commit(MANIFEST)
    again = reopened(store)
    again.create(replace(MANIFEST, run_id="other"))
    assert again.manifest().run_id == "other"
    assert again.manifest().files == {}


def test_no_run(store):
    with pytest.raises(RunNotFoundError, match=r"^reading the run in .*: there is no run\. Got no manifest\.json; "):
        store.manifest()
    with pytest.raises(RunNotFoundError, match="there is no run"):
        pk.Explainer(store, mlp())


def test_a_run_without_a_finished_segment(store):
    model = mlp()
    with pk.Recorder(store, model, torch.optim.SGD(model.parameters(), lr=0.1), num_examples=4):
        pass
    with pytest.raises(RunNotFoundError, match=r"it holds no finished segment\. Got 0 segments; expected at least 1"):
        pk.Explainer(store, model)


def test_a_recorder_refuses_a_place_that_holds_a_run_and_leaves_it_as_it_was(tmp_path):
    run = user_run(tmp_path / "run", epochs=1, examples=48)
    before = snapshot(tmp_path)
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1)
    with (
        pytest.raises(RunExistsError, match=rf"recording into {re.escape(str(tmp_path / 'run'))}: it already"),
        pk.Recorder(tmp_path / "run", run.model, optimizer, num_examples=48),
    ):
        pytest.fail("the loop must not run")
    assert snapshot(tmp_path) == before
    assert not optimizer._optimizer_step_pre_hooks


def test_explanations_of_a_run_in_memory_and_on_disk_are_the_same(tmp_path):
    runs = [user_run(store, epochs=1, examples=48) for store in (pk.MemoryStore(), tmp_path / "run")]
    found = [pk.Explainer(run.store, run.model).contributions(run.queries[:3]) for run in runs]
    assert np.array_equal(*found)


def go(recorder, model, optimizer, inputs, targets, size, at_step=lambda step: None):
    for number, ids in enumerate(torch.arange(len(inputs)).split(size)):
        with recorder.step(ids):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs[ids]), targets[ids]).backward()
            at_step(number)
            optimizer.step()


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupted_recorder_keeps_what_was_finished(store, interruption):
    inputs, targets = digits(40, torch.float32)
    model = mlp(dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    recorder = pk.Recorder(store, model, optimizer, num_examples=40, segments=2)

    def interrupt(step):
        if step == 3:
            raise interruption

    with pytest.raises(interruption), recorder:
        go(recorder, model, optimizer, inputs, targets, 8, interrupt)
    trajectory = reopened(store).trajectory()
    assert trajectory.boundaries == (0, 2, 3)  # the steps that were done, the last segment shorter
    explanation = pk.Explainer(reopened(store), model).explain(inputs[30], output=pk.Logit(1))
    assert explanation.passed, explanation.checks
    assert not explanation.contributions[24:].any()


def test_a_killed_recorder_leaves_every_finished_segment(tmp_path):
    inputs, targets = digits(40, torch.float32)
    model = mlp(dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    recorder = pk.Recorder(tmp_path / "run", model, optimizer, num_examples=40, segments=2)
    recorder.__enter__()
    go(recorder, model, optimizer, inputs, targets, 8)  # five steps; the recorder is never closed
    trajectory = DirectoryStore(tmp_path / "run").trajectory()
    assert trajectory.boundaries == (0, 2, 4)
    assert not list((tmp_path / "run").rglob("*.tmp"))
    assert pk.Explainer(tmp_path / "run", model).explain(inputs[0], output=pk.Logit(1)).passed


def test_a_path_is_a_directory_store(tmp_path):
    assert isinstance(open_store(tmp_path), DirectoryStore)
    assert isinstance(open_store(str(tmp_path)), DirectoryStore)
    memory = MemoryStore()
    assert open_store(memory) is memory


# --------------------------------------------------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Two runs of the same shapes and other numbers."""
    path = tmp_path_factory.mktemp("runs")
    run = user_run(path / "run", epochs=2, examples=48)
    model = mlp(seed=1, dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    with pk.Recorder(path / "other", model, optimizer, num_examples=48) as recorder:
        for ids in (*torch.arange(48).split(32), *torch.arange(48).split(32)):
            with recorder.step(ids):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(run.inputs[ids]), run.targets[ids]).backward()
                optimizer.step()
    return path, run


@pytest.fixture
def damaged(original, tmp_path):
    path, run = original
    shutil.copytree(path, tmp_path / "runs")
    return tmp_path / "runs" / "run", run


FILES = [
    "checkpoints/00000.safetensors",
    "checkpoints/00001.safetensors",
    "checkpoints/00002.safetensors",
    "segments/00000.safetensors",
    "segments/00001.safetensors",
    "rows/00000.000.safetensors",
    "rows/00001.000.safetensors",
]


def snapshot(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def explain(path, run):
    return pk.Explainer(path, run.model).explain(run.queries[0])


def stated(path, name):
    return json.loads((path / "manifest.json").read_text())["files"][name]["sha256"]


def refused(path, run, name, wrong, *details):
    with pytest.raises(RunDamagedError) as caught:
        explain(path, run)
    text = str(caught.value)
    assert text.startswith(f"reading {name} of the run in {path}: {wrong}. Got "), text
    assert "Restore the file from a copy, or " in text
    for detail in details:
        assert detail in text


def test_the_files_are_all_there_is(damaged):
    path, run = damaged
    assert set(json.loads((path / "manifest.json").read_text())["files"]) == set(FILES)
    assert set(snapshot(path)) == {*FILES, "manifest.json", "lock"}
    assert explain(path, run).passed


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(damaged, name):
    path, run = damaged
    (path / name).unlink()
    refused(path, run, name, "it is missing", "Got no file; ", f"expected sha256 {stated(path, name)} ")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0, 7, 200, -1])
def test_a_truncated_file_is_named_with_both_checksums(damaged, name, keep):
    path, run = damaged
    content = (path / name).read_bytes()[:keep]
    (path / name).write_bytes(content)
    found = hashlib.sha256(content).hexdigest()
    refused(path, run, name, "it was truncated", f"Got {len(content)} bytes, sha256 {found}; ", stated(path, name))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0, 40, 0.5, -1])
def test_a_flipped_bit_is_named_with_both_checksums(damaged, name, place):
    path, run = damaged
    content = bytearray((path / name).read_bytes())
    content[int(place * len(content)) if isinstance(place, float) else place] ^= 1
    (path / name).write_bytes(content)
    found = hashlib.sha256(content).hexdigest()
    refused(path, run, name, "it was altered", f"Got sha256 {found}; ", f"expected sha256 {stated(path, name)} ")


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_run_is_named_with_both_checksums(damaged, name):
    path, run = damaged
    size = (path / name).stat().st_size
    shutil.copy(path.parent / "other" / name, path / name)
    grown = (path / name).stat().st_size - size
    wrong = "it was altered" if grown == 0 else "it has grown" if grown > 0 else "it was truncated"
    refused(path, run, name, wrong, f"sha256 {checksum_file(path / name)}", f"sha256 {stated(path, name)}")


def test_a_file_that_has_grown_is_named(damaged):
    path, run = damaged
    with (path / FILES[3]).open("ab") as file:
        file.write(b"\0")
    refused(path, run, FILES[3], "it has grown", stated(path, FILES[3]))


LOADED = []


class Trap:
    """A pickle that tells when it is loaded."""

    def __reduce__(self):
        return spring, ()


def spring():
    LOADED.append(True)


@pytest.mark.parametrize("name", FILES)
def test_a_pickle_is_never_loaded_even_where_the_manifest_vouches_for_it(damaged, name):
    path, run = damaged
    content = pickle.dumps(Trap())
    (path / name).write_bytes(content)
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    reseal(path, lambda manifest: manifest["files"].update({name: entry}))
    refused(path, run, name, "it cannot be read", "expected a safetensors file")
    assert not LOADED
    pickle.loads(content)
    assert LOADED.pop()  # the trap works


def test_an_altered_manifest_is_refused_with_both_checksums(damaged):
    path, run = damaged
    content = json.loads((path / "manifest.json").read_text())
    content["num_examples"] = 47
    (path / "manifest.json").write_text(json.dumps(content))
    refused(path, run, "manifest.json", "it was altered", f"expected sha256 {content['sha256']} ")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"null", b"\xff\xfe", b"\x80\x04N."])
def test_a_manifest_that_is_none_is_refused(damaged, content):
    path, run = damaged
    (path / "manifest.json").write_bytes(content)
    refused(path, run, "manifest.json", "it cannot be read", "expected JSON with a checksum")


def test_a_missing_manifest_is_no_run(damaged):
    path, run = damaged
    (path / "manifest.json").unlink()
    with pytest.raises(RunNotFoundError, match="there is no run"):
        explain(path, run)


def test_a_manifest_of_another_format_is_refused(damaged):
    path, run = damaged
    reseal(path, lambda manifest: manifest.update(format_version=1))
    refused(
        path,
        run,
        "manifest.json",
        "this version of pkexplain does not know its format",
        f"Got 1; expected {FORMAT_VERSION} ",
    )


@pytest.mark.parametrize(
    "name",
    ["../other/segments/00000.safetensors", "/etc/passwd", "segments/../../other/segments/00000.safetensors", "a.pt",
     "segments/00000.safetensors\n", "segments/0.safetensors"],
)  # fmt: skip
def test_a_manifest_that_points_elsewhere_is_refused(damaged, name):
    path, run = damaged
    reseal(path, lambda manifest: manifest["files"].update({name: {"bytes": 1, "sha256": ""}}))
    refused(path, run, "manifest.json", "it is not a run's manifest", f"it names a file that no run has: {name!r}")


def test_a_file_that_the_manifest_does_not_name_is_refused(damaged):
    path, run = damaged
    reseal(path, lambda manifest: manifest["files"].pop(FILES[4]))
    refused(path, run, FILES[4], "the manifest does not list it")


def test_nothing_is_lost_by_a_refusal(damaged):
    path, run = damaged
    (path / FILES[0]).unlink()
    before = snapshot(path)
    with pytest.raises(RunDamagedError):
        explain(path, run)
    after = snapshot(path)
    assert {name: after[name] for name in before} == before
    assert all(name.startswith("index/") for name in set(after) - set(before))


# ------------------------------------------------------------------------------------------------ places without room


def test_a_place_that_cannot_be_a_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("something")
    model = mlp()
    with (
        pytest.raises(RunError, match=r"^writing lock of the run in .*: the file could not be written; what"),
        pk.Recorder(tmp_path / "file" / "run", model, torch.optim.SGD(model.parameters(), lr=0.1), num_examples=3),
    ):
        pytest.fail("the loop must not run")
    assert (tmp_path / "file").read_text() == "something"


def test_a_disk_that_fills_up_loses_no_finished_segment(tmp_path, monkeypatch):
    import safetensors.torch

    inputs, targets = digits(32, torch.float32)
    model = mlp(dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    save, written = safetensors.torch.save_file, []

    def full(content, file, metadata):
        written.append(file)
        if len(written) > 5:  # a checkpoint, the projection, a segment, a checkpoint, then half of a segment
            file.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(content, file, metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    recorder = pk.Recorder(tmp_path / "run", model, optimizer, num_examples=32, segments=2)
    with (
        pytest.raises(RunError, match=r"could not be written; .* No space left on device; .* Free some space"),
        recorder,
    ):
        go(recorder, model, optimizer, inputs, targets, 4)
    assert not optimizer._optimizer_step_pre_hooks
    trajectory = DirectoryStore(tmp_path / "run").trajectory()
    assert trajectory.boundaries == (0, 2)
    assert pk.Explainer(tmp_path / "run", model).explain(inputs[0], output=pk.Logit(0)).passed


def test_a_store_names_its_place(tmp_path):
    assert str(MemoryStore()) == "memory"
    assert str(DirectoryStore(tmp_path)) == str(tmp_path)


def test_a_store_that_is_recorded_into_reads_what_it_wrote_last(tmp_path):
    store = DirectoryStore(tmp_path / "run")
    store.create(MANIFEST)
    for value in (1.0, 2.0):
        store.put("checkpoints/00000.safetensors", {"a": torch.full((2,), value)})
        store.commit(MANIFEST)
        assert store.read("checkpoints/00000.safetensors")["a"].tolist() == [value, value]


def test_a_store_whose_run_was_deleted_remembers_nothing_of_it(tmp_path):
    store = DirectoryStore(tmp_path / "run")
    store.create(MANIFEST)
    store.put("checkpoints/00000.safetensors", {"a": torch.zeros(2)})
    store.commit(MANIFEST)
    store.read("checkpoints/00000.safetensors")
    shutil.rmtree(tmp_path / "run")
    store.create(MANIFEST)
    assert store.manifest().files == {}
    with pytest.raises(RunDamagedError, match="the manifest does not list it"):
        store.read("checkpoints/00000.safetensors")
