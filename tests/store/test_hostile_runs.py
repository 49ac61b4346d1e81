"""Runs from somebody who knows the format, checksums and all: refused by the file's name, or harmless."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import shutil
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch

import pkexplain as pk
from pkexplain.errors import PkexplainError, RunDamagedError, RunError
from pkexplain.store import directory as store
from tests.faults import content_of, forge, forge_tensors, limit_memory, outcome, reseal
from tests.store.test_crashes import go_on, use
from tests.trainings import EXAMPLES, Training

SEGMENT, ROWS, CHECKPOINT = "segments/00001.safetensors", "rows/00001.000.safetensors", "checkpoints/00002.safetensors"
STATE = "states/the last"
MOST_MEMORY = 1 << 30
"""Address space that a refusal may take: room for threads and libraries that load late, not for what was forged."""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    path = tmp_path_factory.mktemp("hostile")
    trainings = {}
    for kind in ("sgd", "adamw"):
        (path / kind).mkdir()
        trainings[kind] = Training(path / kind, kind)
        trainings[kind].go(epochs=2)
    return trainings


@pytest.fixture(params=["sgd", "adamw"])
def training(recorded, request):
    return recorded[request.param]


@pytest.fixture
def run(training, tmp_path):
    shutil.copytree(training.run, tmp_path / "home" / "run")
    return tmp_path / "home" / "run"


def real(run, name):
    """Return the file's name; the last state's depends on the optimizer, which may have short first segments."""
    return f"states/{max(file.name for file in (run / 'states').iterdir())}" if name == STATE else name


def assert_refused(training, run, name, wrong=""):
    """Read a run in a process with little memory; it must be refused by the file's name, and left as it was."""
    name = real(run, name)
    before = content_of(run)
    kind, text, peak = outcome(lambda: use(training, run), prepare=lambda: limit_memory(MOST_MEMORY))
    assert kind == "RunDamagedError", (kind, text)
    assert text.startswith(f"reading {name} of the run in {run}: {wrong}"), text
    assert "Restore the file from a copy" in text
    assert peak < 300 << 20, f"{peak >> 20} MiB"
    assert content_of(run) == before


# ------------------------------------------------------------------------------------------------------- the manifest


def set_(*path, to):
    def change(manifest):
        *inner, last = path
        for key in inner:
            manifest = manifest[key]
        manifest[last] = to

    change.__name__ = f"{'.'.join(map(str, path))}={str(to)[:40]}"
    return change


ELSEWHERE = ["../other/rows/00000.000.safetensors", "/etc/passwd", "rows/../../x.safetensors", "manifest.json", "lock",
             "", "rows", 7, None, ["rows/00000.000.safetensors"], {"a": 1}]  # fmt: skip
NO_COUNTS = [10**15, -1, 0, 31, 33, 32.0, 31.5, "32", None, True, float("inf"), float("nan"), [32], 2**70]
CHANGES = [
    *(set_("segments", 0, "files", "vectors", to=name) for name in ELSEWHERE),
    *(set_("segments", 0, "files", "checkpoint", to=name) for name in ELSEWHERE),
    *(set_("segments", 0, "files", "rows", to=[name]) for name in ELSEWHERE),
    *(set_("states", 0, "files", to=[name]) for name in ELSEWHERE),
    set_("segments", 0, "files", "vectors", to=ROWS),
    set_("segments", 0, "files", "vectors", to=SEGMENT),
    set_("segments", 0, "files", "rows", to=[ROWS]),
    set_("segments", 0, "files", "rows", to=[]),
    *(set_("num_examples", to=count) for count in NO_COUNTS),
    *(set_("segments", 0, "files", "counts", to=[count]) for count in NO_COUNTS if count not in (0, 31, 1)),
    set_("segments", 0, "files", "counts", to=[16, 16]),
    set_("segments", 0, "files", "counts", to=32),
    *(set_("columns", to=k) for k in (10**15, 0, -3, 2.0, "64", None, True)),
    *(set_("projection", "k", to=k) for k in (-1, 0, 64.0, "64", None)),
    *(set_("projection", "seed", to=seed) for seed in (-1, 2**64, 0.5, "0", None, True)),
    set_("projection", "kind", to="Pickle"),
    set_("projection", "nonzeros", to=10**12),
    set_("projection", to={"kind": "SparseSign", "k": 10**15, "nonzeros": 10**12}),
    set_("projection", to={"kind": "Identity", "k": 3}),
    set_("projection", to=[1]),
    *(set_("dtype", to=dtype) for dtype in ("load", "float16", "save", 3, None, ["float64"])),
    *(set_("model", "blocks", 1, "start", to=start) for start in (0, -1, 10**15, 0.5)),
    set_("model", "blocks", 0, "shapes", 0, to=[10**9, 10**9]),
    set_("model", "blocks", 0, "shapes", 0, to=[-8, -64]),
    set_("model", "blocks", 0, "shapes", 0, to=[8.0, 64]),
    set_("model", "blocks", 0, "matrix", to=[1, 520]),
    set_("model", "blocks", 0, "matrix", to=[65, 8]),
    set_("model", "blocks", 0, "matrix", to=None),
    set_("model", "blocks", 0, "group", to="0"),
    set_("model", "blocks", 0, "name", to="else"),
    set_("model", "blocks", 0, "parameters", to=["0.weight", "0.weight"]),
    set_("model", "blocks", to=[]),
    set_("model", "blocks", to="blocks"),
    set_("segments", 0, "summary", "last_step", to=-1),
    set_("segments", 0, "summary", "last_step", to=10**6),
    set_("segments", 0, "summary", "last_step", to=3.0),
    set_("segments", 0, "summary", "displacement_gap", to="<script>"),
    set_("segments", 0, "summary", "learning_rate_sum", to=["0.1"]),
    set_("segments", 0, "summary", "learning_rate_sum", to=5),
    set_("segments", 0, "summary", "rescaled", to=[1]),
    set_("segments", 0, "summary", "more", to=1),
    set_("segments", 0, to=None),
    set_("segments", to={"a": 1}),
    set_("segments", to=3),
    set_("inputs", to={"0": {"shape": ["64"], "dtype": "float64"}}),
    set_("inputs", to={"0": {"shape": [64], "dtype": "load"}}),
    set_("inputs", to={"0": {"shape": [64], "dtype": "cuda.empty_cache"}}),
    set_("inputs", to=[3]),
    *(set_(name, to=[1]) for name in ("run_id", "ended", "pkexplain", "torch", "optimizer")),
    set_("optimizer", "groups", to=3),
    *(set_("withdrawn", to=gone) for gone in ([-1], [EXAMPLES], [1, 1], ["1"], 7, [1.0])),
    set_("recording", to=None),
    set_("recording", to={}),
    set_("revision", to=-1),
    set_("revision", to=1e3),
    set_("states", 0, "segments", to=99),
    set_("states", 0, to="state"),
    set_("states", to=7),
    set_("files", to=[]),
    set_("files", ROWS, to={"bytes": "7", "sha256": "x"}),
    set_("files", ROWS, to={"bytes": 7}),
    set_("files", ROWS, to={"other": 1}),
    set_("files", ROWS, to=7),
    set_("files", "../other/rows/00000.000.safetensors", to={"bytes": 7, "sha256": "x"}),
    set_("format_version", to="3"),
]


def test_manifests_that_say_what_cannot_be(recorded, tmp_path):
    training = recorded["sgd"]
    shutil.copytree(training.run, tmp_path / "run")
    run, whole = tmp_path / "run", (training.run / "manifest.json").read_bytes()
    refusals = []
    for change in CHANGES:
        (run / "manifest.json").write_bytes(whole)
        reseal(run, change)
        before = content_of(run)
        try:
            use(training, run)
            refusals.append((change.__name__, "was read"))
        except RunDamagedError as error:
            named = str(error).startswith((f"reading manifest.json of the run in {run}: ", f"reading {SEGMENT} of"))
            if not named or content_of(run) != before:
                refusals.append((change.__name__, str(error)))
        except Exception as error:
            refusals.append((change.__name__, repr(error)))
    assert not refusals, "\n".join(f"{name}: {what}" for name, what in refusals)


@pytest.mark.parametrize(
    ("change", "path"),
    [
        (set_("segments", 0, "summary", "last_step", to=3.0), "$.segments[0].summary.last_step"),
        (set_("segments", 1, "files", "rows", to=["/etc/passwd"]), "$.segments[1].files"),
        (set_("model", "blocks", 0, "shapes", 0, to=[8.0, 64]), "$.model.blocks[0].shapes[0][0]"),
        (set_("inputs", to={"0": {"shape": [64], "dtype": "load"}}), "$.inputs[...]"),
        (set_("withdrawn", to=[1, 1]), "$.withdrawn"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_refused_manifest_names_the_path(recorded, tmp_path, change, path):
    shutil.copytree(recorded["sgd"].run, tmp_path / "run")
    reseal(tmp_path / "run", change)
    with pytest.raises(RunDamagedError, match=re.escape(f"at `{path}`")):
        use(recorded["sgd"], tmp_path / "run")


PARTS = ("num_examples", "dtype", "projection", "model", "inputs", "segments", "states", "columns", "revision",
         "recording", "run_id", "files", "format_version")  # fmt: skip


@pytest.mark.parametrize("key", PARTS)
def test_a_manifest_that_lacks_something(recorded, tmp_path, key):
    shutil.copytree(recorded["sgd"].run, tmp_path / "run")
    reseal(tmp_path / "run", lambda manifest: manifest.pop(key))
    with pytest.raises(PkexplainError, match=r"manifest\.json|no finished segment"):
        use(recorded["sgd"], tmp_path / "run")


@pytest.mark.parametrize("deep", [b"[", b'{"a":'], ids=["lists", "mappings"])
def test_a_manifest_ten_million_levels_deep(recorded, tmp_path, deep):
    run = tmp_path / "run"
    shutil.copytree(recorded["sgd"].run, run)
    (run / "manifest.json").write_bytes(deep * 10_000_000)
    assert_refused(recorded["sgd"], run, "manifest.json", "it cannot be read")


def test_a_manifest_of_a_gigabyte(recorded, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(recorded["sgd"].run, run)
    with (run / "manifest.json").open("r+b") as file:
        file.truncate(1 << 30)
    with pytest.raises(
        RunDamagedError, match=r"^reading manifest\.json of .*: it is absurdly large\. Got 1073741824 b"
    ):
        use(recorded["sgd"], run)


@pytest.mark.stress
def test_a_manifest_that_swells_when_it_is_read(recorded, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(recorded["sgd"].run, run)
    (run / "manifest.json").write_bytes(b"[" + b"[]," * 8_000_000 + b"0]")
    kind, text, _ = outcome(lambda: use(recorded["sgd"], run), prepare=lambda: limit_memory(MOST_MEMORY // 4))
    assert kind == "RunDamagedError"
    assert text.startswith(f"reading manifest.json of the run in {run}: it cannot be read")


def test_a_manifest_that_no_reader_would_take_is_not_written(tmp_path, monkeypatch):
    training = Training(tmp_path)
    training.go(epochs=1)
    most = (training.run / "manifest.json").stat().st_size + 3000
    monkeypatch.setattr(store, "LARGEST_MANIFEST", most)
    with pytest.raises(RunError, match=r"^writing manifest\.json .*: record fewer, longer segments"):
        training.go(epochs=9)
    assert (training.run / "manifest.json").stat().st_size <= most
    assert len(pk.DirectoryStore(training.run).trajectory()) > 2


def test_huge_maps_are_not_made(recorded, tmp_path):
    """A model's sizes are taken from the manifest only where the checkpoint on the disk has them."""
    run = tmp_path / "run"
    shutil.copytree(recorded["sgd"].run, run)

    def change(manifest):
        manifest["projection"] = {"kind": "SparseSign", "k": 64, "nonzeros": 256, "seed": 0}
        manifest["model"]["blocks"] = [manifest["model"]["blocks"][0]]
        manifest["model"]["blocks"][0].update(parameters=["a"], shapes=[[1 << 40]], matrix=None)
        manifest["columns"] = 64

    reseal(run, change)
    told = outcome(
        lambda: pk.DirectoryStore(run).trajectory().projector(0, torch.device("cpu")), lambda: limit_memory(MOST_MEMORY)
    )
    assert told[0] == "RunDamagedError", told
    assert "checkpoints/00000" in told[1]


# ----------------------------------------------------------------------------------------------------------- tensors


def put(name, value):
    def change(tensors):
        tensors[name] = value(tensors[name]).contiguous()

    return change


def without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def poke(value):
    def change(tensor):
        tensor.view(-1)[0] = value
        return tensor

    return change


inf, nan = float("inf"), float("nan")
TENSORS = [
    *((ROWS, put("rows", f)) for f in (
        lambda r: r[:-1], lambda r: torch.cat([r, r]), lambda r: r[:, :-1], lambda r: r.float(), lambda r: r.T,
        lambda r: r.flatten(), lambda r: r.long(), lambda r: r[0, 0], lambda r: r[:0], poke(nan), poke(inf))),
    *((ROWS, put("scale", f)) for f in (poke(inf), poke(nan), poke(-inf), lambda s: s[:-1], lambda s: s.double(),
                                        lambda s: s[:, None], lambda s: s[0])),
    *((ROWS, put("loss_derivatives", f)) for f in (lambda d: d[:-1], lambda d: d.float(), lambda d: d[:, None])),
    *((ROWS, without(name)) for name in ("rows", "scale", "loss_derivatives", "norms", "ids")),
    *((ROWS, put("ids", f)) for f in (poke(-1), poke(EXAMPLES), lambda i: i[:-1], lambda i: i.int(),
                                      lambda i: i.flip(0))),
    *((ROWS, put("norms", f)) for f in (poke(nan), poke(inf), lambda n: n[:-1], lambda n: n.float())),
    (ROWS, lambda t: {**t, "self": t["scale"].clone()}),
    *((SEGMENT, put("row_sum", f)) for f in (lambda s: s[:-1], lambda s: s.float(), poke(nan), lambda s: s[0])),
    *((SEGMENT, put("withdrawn", f)) for f in (lambda s: s[:-1], poke(inf))),
    *((SEGMENT, put("weight_decay", f)) for f in (lambda d: d[:-1], lambda d: d[:1], lambda d: d.float(), poke(nan))),
    *((SEGMENT, put("optimizer", f)) for f in (lambda d: d[None], lambda d: d[:0], poke(-inf))),
    *((SEGMENT, put("audit_ids", f)) for f in (poke(-1), poke(EXAMPLES), poke(2**62), lambda a: a.double(),
                                               lambda a: a[:-1], lambda a: a[0], lambda a: torch.zeros_like(a))),
    *((SEGMENT, put("audit_rows", f)) for f in (lambda a: a[:-1], lambda a: a[:, 1:], poke(nan), lambda a: a.half())),
    *((SEGMENT, without(name)) for name in ("row_sum", "withdrawn", "weight_decay", "optimizer", "audit_ids",
                                            "audit_rows")),
    *((CHECKPOINT, put("parameters", f)) for f in (lambda p: p[:-1], lambda p: p.float(), lambda p: p[None], poke(nan),
                                                   poke(inf), lambda p: p[0])),
    (CHECKPOINT, without("parameters")),
    ("checkpoints/00000.safetensors", put("parameters", lambda p: p[:1])),
    *((SEGMENT, put("directions.0.left", f)) for f in (lambda m: m[:, :-1], lambda m: m.float(), poke(nan),
                                               lambda m: m.flatten(), lambda m: m[:0], lambda m: m[0, 0],
                                               lambda m: m.repeat(9, 1))),
    (SEGMENT, without("directions.0.left")),
    (SEGMENT, without("directions.1.right")),
    (SEGMENT, lambda t: {**t, "directions.9.left": t["directions.0.left"].clone()}),
    (SEGMENT, lambda t: {**t, "directions.-1.left": t["directions.0.left"].clone()}),
    (SEGMENT, lambda t: {**t, "operator": torch.ones(3, dtype=torch.float64)}),
    (SEGMENT, lambda t: {**t, "directions.code": torch.ones(3)}),
]  # fmt: skip


def test_tensors_that_are_not_what_the_manifest_says(recorded, tmp_path):
    training = recorded["sgd"]
    run = tmp_path / "run"
    shutil.copytree(training.run, run)
    whole, wrong = content_of(run), []
    for place, (name, change) in enumerate(TENSORS):
        forge_tensors(run, name, change)
        try:
            use(training, run)
            wrong.append((place, name, "was read"))
        except RunDamagedError as error:
            if not str(error).startswith(f"reading {name} of the run in {run}: "):
                wrong.append((place, name, str(error)))
        except Exception as error:
            wrong.append((place, name, repr(error)))
        for file in (name, "manifest.json"):
            (run / file).write_bytes(whole[file])
    assert not wrong, "\n".join(map(str, wrong))


def header(of, data=b""):
    text = of if isinstance(of, bytes) else json.dumps(of).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(kind, shape, start, stop):
    return {"dtype": kind, "shape": shape, "data_offsets": [start, stop]}


class Writes:
    """A pickle that would write a file."""

    def __init__(self, place: Path) -> None:
        self.place = str(place)

    def __reduce__(self):
        return open, (self.place, "w")


HEADERS = {
    "nothing": b"",
    "a length of 2**60": struct.pack("<Q", 1 << 60),
    "a length of 2**64 - 1": struct.pack("<Q", (1 << 64) - 1) + b"{}",
    "offsets beyond the file": header({"rows": entry("F64", [32, 60], 0, 10**12)}),
    "offsets backwards": header({"rows": entry("F64", [1], 8, 0)}, bytes(8)),
    "offsets below zero": header({"rows": entry("F64", [1], -8, 0)}, bytes(8)),
    "offsets of a fraction": header(b'{"rows":{"dtype":"F64","shape":[1],"data_offsets":[0.0,8.0]}}', bytes(8)),
    "overlapping tensors": header({"rows": entry("F64", [1], 0, 8), "scale": entry("F32", [1], 0, 4)}, bytes(8)),
    "a hole": header({"rows": entry("F64", [1], 8, 16)}, bytes(16)),
    "a shape beyond the data": header({"rows": entry("F64", [1 << 40], 0, 8)}, bytes(8)),
    "a shape that overflows": header({"rows": entry("F64", [1 << 62, 8, 8], 0, 8)}, bytes(8)),
    "another type": header({"rows": entry("OBJECT", [1], 0, 8)}, bytes(8)),
    "deep JSON": header(b"[" * 1_000_000),
    "no JSON": header(b"\x80\x04N."),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_forged_headers(recorded, tmp_path, kind):
    run = tmp_path / "run"
    shutil.copytree(recorded["sgd"].run, run)
    forge(run, ROWS, HEADERS[kind])
    assert_refused(recorded["sgd"], run, ROWS, "it cannot be read")


@pytest.mark.parametrize("name", [ROWS, SEGMENT, CHECKPOINT, STATE])
def test_a_pickle_is_not_executed(recorded, tmp_path, name):
    run, sign = tmp_path / "run", tmp_path / "sign"
    shutil.copytree(recorded["sgd"].run, run)
    name = real(run, name)
    forge(run, name, pickle.dumps(Writes(sign)))
    assert_refused(recorded["sgd"], run, name, "it cannot be read")
    assert not sign.exists()
    pickle.loads((run / name).read_bytes()).close()
    assert sign.exists()  # the pickle works


# ------------------------------------------------------------------------------------------------------------ states


def plan_of(run):
    tensors = safetensors.torch.load_file(run / real(run, STATE))
    return json.loads(bytes(tensors["plan"].tolist()))


def forge_plan(run, plan):
    text = plan if isinstance(plan, bytes) else json.dumps(plan).encode()
    forge_tensors(
        run, real(run, STATE), lambda tensors: {**tensors, "plan": torch.frombuffer(bytearray(text), dtype=torch.uint8)}
    )


def accounts(**inside):
    frozen = {
        "mapping": [
            ["attributed", False],
            ["age", 3],
            ["accounts", {"mapping": [list(pair) for pair in inside.items()]}],
        ]
    }
    return frozen


PLANS = {
    "no JSON": b"\x80\x04N.",
    "a number": 3,
    "another class": {"kind": "Trap", "fields": {}},
    "a class of Python's": {"kind": "Popen", "fields": {"args": "true"}},
    "a dotted class": {"kind": "os.system", "fields": {"command": "true"}},
    "a class with other fields": {"kind": "RowSum", "fields": {"rows": 1}},
    "a class that is no mapping": {"kind": "RowSum", "fields": [1]},
    "a class named by a list": {"kind": [], "fields": {}},
    "an abstract class": {"kind": "MatrixGradient", "fields": {}},
    "a container that is none": {"eval": ["1"]},
    "two containers": {"list": [], "tuple": []},
    "an unhashable set": {"set": [{"list": []}]},
    "an unhashable key": {"mapping": [[{"list": []}, 1]]},
    "a tensor that is not there": {"tensor": "99"},
    "a million levels": b'{"list":[' * 1_000_000,
    "a hundred thousand levels": b'{"list":[' * 100_000 + b"]}" * 100_000,
    "an empty mapping": {"mapping": []},
    "no accounts": {"mapping": [["attributed", True]]},
    "accounts that are a list": {"mapping": [["attributed", True], ["accounts", {"list": [1]}]]},
    "empty accounts": accounts(),
    "blocks that are none": accounts(
        weight_decay={"list": [{"tensor": "0"}, {"list": [77]}]}, elementwise=False, accumulator=None
    ),
    "a moment of one number": accounts(
        weight_decay={"list": [{"tensor": "plan"}, {"list": []}]}, elementwise=False, accumulator=None
    ),
    "a moment that is none": accounts(weight_decay={"list": [3, {"list": []}]}, elementwise=False, accumulator=None),
    "an accumulator of words": accounts(
        weight_decay={"list": [{"tensor": "0"}, {"list": []}]}, elementwise=False, accumulator="words"
    ),
    "an accumulator of nothing": accounts(
        weight_decay={"list": [{"tensor": "0"}, {"list": []}]}, elementwise=True, accumulator={"mapping": [["rows", 1]]}
    ),
}


@pytest.mark.parametrize("kind", PLANS)
def test_forged_plans_of_what_is_in_flight(training, run, kind):
    forge_plan(run, PLANS[kind])
    assert_refused(training, run, STATE, "it is not a state")


def test_tensors_of_a_state_in_other_shapes(training, run):
    """Every tensor of a state in turn, cut, longer, of one number that could be stretched, or empty; ids of nobody."""
    whole, wrong, tried = content_of(run), [], 0
    tensors = safetensors.torch.load_file(run / real(run, STATE))
    for name in sorted(tensors)[::3]:
        for change in (
            lambda t: t[:1],
            lambda t: torch.cat([t, t]),
            lambda t: t - 99 if t.dtype == torch.int64 else t[:0],
        ):
            tried += 1
            forge_tensors(run, real(run, STATE), put(name, change))
            try:
                go_on(training, run)
                wrong.append((name, tuple(tensors[name].shape), tensors[name].dtype, "was read"))
            except RunDamagedError as error:
                if not str(error).startswith(f"reading {real(run, STATE)} of the run in {run}: it is not a state"):
                    wrong.append((name, str(error)))
            except Exception as error:
                wrong.append((name, repr(error)))
            for file, content in whole.items():
                (run / file).write_bytes(content)
    assert tried > 6
    assert not wrong, "\n".join(map(str, wrong))


# ------------------------------------------------------------------------------------------------------------- links


@pytest.mark.parametrize("name", ["manifest.json", ROWS, SEGMENT, CHECKPOINT, STATE])
def test_a_link_that_leaves_the_run(training, run, name):
    name = real(run, name)
    shutil.move(run / name, run.parent / "outside")
    (run / name).symlink_to(run.parent / "outside")
    assert_refused(training, run, name, "it is a link that leaves the run")


def test_a_folder_that_is_a_link_is_neither_read_nor_swept(training, run):
    shutil.move(run / "states", run.parent / "states")
    (run.parent / "states" / "00099.000.safetensors").write_bytes(b"somebody else's")
    (run / "states").symlink_to(run.parent / "states")
    with pytest.raises(RunDamagedError, match="it is a link that leaves the run"):
        use(training, run)
    assert (run.parent / "states" / "00099.000.safetensors").read_bytes() == b"somebody else's"


def test_a_folder_that_is_a_link_is_not_written_into(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "rows").symlink_to(tmp_path / "outside")
    with pytest.raises(RunDamagedError, match="it is a link that leaves the run"):
        Training(tmp_path).go(epochs=1)
    assert not list((tmp_path / "outside").iterdir())


@pytest.mark.parametrize("name", ["lock", "manifest.tmp", "rows/00000.tmp"])
def test_what_a_link_points_to_is_not_written_over(tmp_path, name):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "run" / "rows").mkdir(parents=True)
    (tmp_path / "run" / name).symlink_to(tmp_path / "precious")
    with contextlib.suppress(RunDamagedError):
        Training(tmp_path).go(epochs=1)
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_run_that_is_reached_by_a_link_is_read(training, run):
    os.symlink(run, run.parent / "link")
    assert pk.Explainer(run.parent / "link", training.model).explain(training.queries[0]).ledger


def test_a_device_in_place_of_a_file(training, run):
    (run / ROWS).unlink()
    os.mkfifo(run / ROWS)  # reading it would wait for ever
    with pytest.raises(RunDamagedError, match=rf"^reading {ROWS} of .*: it is missing"):
        use(training, run)


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_the_command_line_refuses_in_one_line(recorded, tmp_path, command):
    from typer.testing import CliRunner

    from pkexplain.cli import app

    run = tmp_path / "run"
    shutil.copytree(recorded["sgd"].run, run)
    assert CliRunner().invoke(app, [command, str(run)]).exit_code == 0
    if command == "verify":
        forge_tensors(run, ROWS, put("scale", poke(nan)))
        told = CliRunner().invoke(app, [command, str(run)])
        assert told.exit_code == 1
        assert ROWS in " ".join(told.output.split())
    reseal(run, set_("num_examples", to=10**15))
    assert isinstance(CliRunner().invoke(app, [command, str(run)]).exception, RunDamagedError)
