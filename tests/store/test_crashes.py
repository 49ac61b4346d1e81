"""What a crash, a damaged file, a full disk or a second process can do to a run: nothing that is not noticed.

The full forms, marked `stress`, count and print what they did (`make stress`).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch

import pkexplain as pk
from pkexplain.errors import RunDamagedError, RunError, RunNotFoundError
from pkexplain.store import scratch
from tests.crashes import WORKS, crash
from tests.endurance import endure, look
from tests.faults import PHASES, content_of, outcome, reseal, say
from tests.record.test_resume import assert_same_run
from tests.trainings import EPOCHS, Training

ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
NOBODY = 65534


# ------------------------------------------------------------------------------------------------------------- crashes


@pytest.mark.parametrize("work", WORKS[::3], ids=str)
def test_a_killed_process_loses_no_finished_segment_and_comes_to_the_same_end(tmp_path, work):
    crash(work, tmp_path, kills=3, seed=1)


@pytest.mark.stress
def test_killed_two_hundred_times_in_every_phase(tmp_path):
    total: Counter[str] = Counter()
    for place, work in enumerate(WORKS):
        (tmp_path / str(place)).mkdir()
        seen = crash(work, tmp_path / str(place), kills=200 // len(WORKS), seed=place)
        say(f"{work}: {sum(seen.values())} kills, {dict(seen)}")
        total += seen
    say(f"all: {sum(total.values())} kills, {dict(total)}; no segment lost, no run unreadable, all ends the same")
    assert set(total) == set(PHASES), "some phase was never hit"


# -------------------------------------------------------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two finished trainings of one model, from other seeds."""
    path = tmp_path_factory.mktemp("faults")
    trainings = []
    for name in ("run", "other"):
        (path / name).mkdir()
        training = Training(path / name, "adamw", projection=pk.Kronecker(64, warm_up_examples=20, seed=len(trainings)))
        if trainings:
            torch.manual_seed(1)
            for parameter in training.model.parameters():
                torch.nn.init.normal_(parameter, std=0.1)
        training.go(epochs=2)
        trainings.append(training)
    return trainings


def damaged_copy(runs, tmp_path):
    shutil.copytree(runs[0].run.parent, tmp_path / "damaged", dirs_exist_ok=True)
    return tmp_path / "damaged" / "run"


def use(training, run):
    """Explain with a run, then go on with it: everything that reads it."""
    explanation = pk.Explainer(run, training.model).explain(training.queries[0])
    go_on(training, run)
    return explanation


def go_on(training, run):
    optimizer = type(training.optimizer)(training.model.parameters())
    optimizer.load_state_dict(training.optimizer.state_dict())
    with pk.Recorder.resume(run, training.model, optimizer):
        pass


def assert_noticed(training, run, name):
    before = content_of(run)
    with pytest.raises(RunDamagedError) as caught:
        use(training, run)
    assert str(caught.value).startswith(f"reading {name} of the run in {run}: "), str(caught.value)
    after = content_of(run)
    assert {file: after.get(file) for file in before if file != "lock"} == {
        file: content for file, content in before.items() if file != "lock"
    }


def cuts(content, count, chance):
    return [content[:length] for length in sorted({0, len(content) - 1, *chance.sample(range(len(content)), count)})]


def flips(content, count, chance):
    for _ in range(count):
        flipped = bytearray(content)
        flipped[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        yield bytes(flipped)


def sweep(runs, tmp_path, truncations, flipped):
    """Damage every file in many ways; count how often that was noticed, and how often it changed nothing."""
    training, chance, seen = runs[0], random.Random(0), Counter()
    run = damaged_copy(runs, tmp_path)
    names = sorted(name for name in content_of(run) if name != "lock")
    kinds = {name.partition("/")[0] for name in names}
    assert kinds == {"manifest.json", "checkpoints", "segments", "rows", "states"}
    last = max(name for name in names if name.startswith("states/"))
    for name in names:
        whole = (run / name).read_bytes()
        if name.startswith("states/") and name != last:
            continue  # nobody goes on from there: it is swept out one day
        variants = [("truncated", cut) for cut in cuts(whole, truncations, chance)]
        variants += [("flipped", flip) for flip in flips(whole, flipped, chance)]
        for kind, content in variants:
            (run / name).write_bytes(content)
            if name == "manifest.json" and same_json(content, whole):
                seen["the same JSON"] += 1  # 1e-05 and 1E-05
                continue
            assert_noticed(training, run, name)
            seen[kind] += 1
        (run / name).write_bytes(whole)
    (run / "lock").write_bytes(b"\xff" * 3)
    assert use(training, run).passed is not None
    return seen


def same_json(one, other):
    try:
        return json.loads(one) == json.loads(other)
    except ValueError:
        return False


def test_a_cut_or_a_flipped_bit_anywhere_is_noticed_by_name(runs, tmp_path):
    sweep(runs, tmp_path, truncations=1, flipped=2)


@pytest.mark.stress
def test_every_file_cut_at_20_places_and_flipped_at_100(runs, tmp_path):
    seen = sweep(runs, tmp_path, truncations=20, flipped=100)
    say(f"damage: {dict(seen)}; every one noticed before a number was shown, by the file's name")


def test_files_that_changed_places_are_noticed_by_name(runs, tmp_path):
    training, other = runs
    run = damaged_copy(runs, tmp_path)
    names = [name for name in content_of(run) if name.endswith(".safetensors")]
    swapped = 0
    for name in names:
        whole = (run / name).read_bytes()
        folder, _, _ = name.partition("/")
        within = [mate for mate in names if mate.startswith(f"{folder}/") and mate != name][:2]
        if folder == "states" and name != max(names, key=lambda n: (n.startswith("states/"), n)):
            continue
        for source in (other.run / name, *(runs[0].run / mate for mate in within)):
            shutil.copy(source, run / name)
            assert_noticed(training, run, name)
            swapped += 1
        (run / name).write_bytes(whole)
    assert swapped > 20
    shutil.copy(other.run / "manifest.json", run / "manifest.json")
    with pytest.raises(RunDamagedError, match=r"^reading \S+\.safetensors of the run in "):
        use(training, run)


# ------------------------------------------------------------------------------------------- a disk without room


def fill_up(training, room):
    """Train; after two epochs there is no more room."""
    recorder, _ = training.resumed()
    with recorder:
        for epoch in range(EPOCHS):
            if epoch == 2:
                room()
            training.epoch(recorder, epoch)
            training.save(recorder, epoch)


def limit_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))


def assert_goes_on(training, unbroken, told):
    kind, text, _ = told
    assert kind == "RunError", told
    assert re.match(r"writing \S+ of the run in .*: the file could not be written; what was finished before", text)
    trajectory = pk.DirectoryStore(training.run).trajectory()
    assert len(trajectory) >= 4
    for t in range(len(trajectory)):
        trajectory.segment(t)
    assert_same_run(unbroken, training.run)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    path = tmp_path_factory.mktemp("unbroken")
    Training(path).go()
    return path / "run"


def test_files_that_may_not_grow_cost_no_finished_segment(tmp_path, unbroken):
    told = outcome(lambda: fill_up(Training(tmp_path), limit_files))
    assert "File too large" in told[1]
    Training(tmp_path).go()
    assert_goes_on(Training(tmp_path), unbroken, told)


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)]
    if not ROOT or shutil.which("mount") is None or subprocess.run(mounted, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)  # files of it are still mapped into memory


@pytest.mark.parametrize("left", [0, 20_000, 60_000, 90_000, 130_000])
def test_a_disk_that_is_full_costs_no_finished_segment(tmp_path, small_disk, unbroken, left):
    def room():
        with (small_disk / "ballast").open("wb") as file:
            free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize
            file.write(b"\1" * max(0, free - left))

    told = outcome(lambda: fill_up(Training(small_disk), room))
    assert "No space left" in told[1], told
    (small_disk / "ballast").unlink()
    Training(small_disk).go()
    assert_goes_on(Training(small_disk), unbroken, told)


def test_large_arrays_have_their_room_before_they_are_written_to(small_disk, monkeypatch):
    monkeypatch.setattr(scratch, "MEMORY_BYTES", 1000)
    fits, too_large = ((count,) for count in (200_000, 2_500_000))
    zeros = scratch.zeros_on_disk(*fits, like=torch.zeros(1, dtype=torch.float64), directory=small_disk)
    assert not zeros.any()
    kind, text, _ = outcome(lambda: scratch.empty_on_disk(too_large, torch.float64, small_disk).fill_(1.0).sum())
    assert kind == "RunError", text  # without its room the process would be ended by the system
    assert text.startswith(f"reserving 20000000 bytes of rows in {small_disk}: there is no space; ")
    assert "No space left" in text
    assert not list(small_disk.iterdir())


@pytest.mark.skipif(not ROOT, reason="who is not root cannot become somebody else")
def test_a_place_that_belongs_to_somebody_else(tmp_path, runs):
    for directory in (tmp_path, *tmp_path.parents, runs[0].run.parent.parent):
        if directory == tmp_path or directory.name.startswith(("pytest-", "popen-", "faults")):
            directory.chmod(0o755)  # pytest's own are for their owner alone
    (tmp_path / "locked").mkdir(mode=0o755)
    training = Training(tmp_path / "locked")  # reads its data from the environment, where nobody else may be let in
    kind, text, _ = outcome(training.go, prepare=lambda: os.setuid(NOBODY))
    assert kind == "RunError", text
    assert "writing lock of the run in" in text
    assert "Permission denied" in text
    assert not list((tmp_path / "locked").iterdir())
    training = runs[0]
    mine = pk.Explainer(training.run, training.model).contributions(training.queries[:1])
    kind, text, _ = outcome(
        lambda: pk.Explainer(training.run, training.model).contributions(training.queries[:1]).sum(),
        prepare=lambda: os.setuid(NOBODY),
    )
    assert kind == "", text
    assert float(text) == pytest.approx(mine.sum())


# -------------------------------------------------------------------------------------------- several processes


def race(directory, gate, results):
    torch.set_num_threads(1)
    training = Training(directory)
    gate.wait()
    try:
        training.go(epochs=1)
        results.put("")
    except RunError as error:
        results.put(type(error).__name__)


def test_of_two_recorders_that_start_at_once_one_wins(tmp_path):
    system = multiprocessing.get_context("fork")
    losers = Counter()
    for turn in range(4):
        (tmp_path / str(turn)).mkdir()
        gate, results = system.Barrier(2), system.SimpleQueue()
        both = [system.Process(target=race, args=(tmp_path / str(turn), gate, results)) for _ in range(2)]
        for process in both:
            process.start()
        told = sorted(results.get() for _ in both)
        for process in both:
            process.join()
        assert told[0] == "", told
        assert told[1] in ("RunBusyError", "RunExistsError"), told
        losers[told[1]] += 1
        assert len(pk.DirectoryStore(tmp_path / str(turn) / "run").trajectory()) == 2
    say(f"two recorders: {dict(losers)}")


def read_while_recording(tmp_path, openings, epochs):
    """Explain again and again while another process records; compare with copies that end where each reading did."""
    training = Training(tmp_path)
    child = os.fork()
    if child == 0:
        try:
            Training(tmp_path).go(epochs)
        finally:
            os._exit(0)
    found = {}
    refused = count = 0
    growing = True
    while growing or count < openings:
        growing = growing and os.waitpid(child, os.WNOHANG) == (0, 0)
        try:
            trajectory = pk.DirectoryStore(training.run).trajectory()
            explainer = pk.Explainer(training.run, training.model)
            values = explainer.contributions(training.queries[:1], output=pk.Logit(3))
            found.setdefault(len(explainer.trajectory), []).append(values)
            assert len(explainer.trajectory) >= len(trajectory)
            count += 1
        except RunNotFoundError:
            refused += 1
            time.sleep(0.01)
    for segments, values in found.items():
        copy = tmp_path / f"copy{segments}"
        shutil.copytree(training.run, copy)
        reseal(copy, lambda manifest, n=segments: manifest.update(segments=manifest["segments"][:n], states=[]))
        (expected,) = pk.Explainer(copy, training.model).contributions(training.queries[:1], output=pk.Logit(3))
        for value in values:
            assert np.array_equal(value[0], expected)
    return count, len(found), refused


def test_a_reader_of_a_growing_run_sees_whole_segments(tmp_path):
    count, lengths, _ = read_while_recording(tmp_path, openings=3, epochs=EPOCHS)
    assert count >= 3
    assert lengths >= 2


@pytest.mark.stress
def test_a_run_is_read_a_hundred_times_while_it_grows(tmp_path):
    count, lengths, refused = read_while_recording(tmp_path, openings=100, epochs=60)
    say(f"reading while recording: {count} openings, at {lengths} lengths, all as from a copy; {refused} too early")


# ------------------------------------------------------------------------------------------------------- endurance


def test_a_long_run_is_readable_while_it_grows(tmp_path):
    for reading in endure(tmp_path / "run", 400, segment=20, every=100):
        assert look(tmp_path / "run") == reading.steps // 20


@pytest.mark.stress
def test_a_million_steps(tmp_path):
    """Takes a quarter of an hour; ``STRESS_STEPS`` sets another number."""
    steps = int(os.environ.get("STRESS_STEPS", "1000000"))
    watcher = subprocess.Popen([sys.executable, "-m", "tests.endurance", str(tmp_path / "run")], stdout=subprocess.PIPE)
    readings = list(endure(tmp_path / "run", steps, segment=1000, every=10_000))
    (tmp_path / "run" / "done").touch()
    told = watcher.communicate()[0].decode().strip()
    first, last = readings[0], readings[-1]
    say(
        f"endurance: {last.steps} steps in {last.seconds:.0f} s; memory {first.resident / 2**20:.1f} MiB after "
        f"{first.steps} steps, {last.resident / 2**20:.1f} MiB at the end; manifest {last.manifest / 2**20:.2f} MiB, "
        f"longest commit {max(r.commit for r in readings[-10:]) * 1e3:.0f} ms; {told}"
    )
    assert watcher.returncode == 0, told
    assert last.resident - first.resident < 64 << 20
