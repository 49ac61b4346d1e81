"""The command line, over a small recorded run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from torch.utils.data import TensorDataset
from typer.testing import CliRunner

import pkexplain as pk
import pkexplain.demo
from pkexplain.cli import app, parse_output
from pkexplain.errors import QueryError, RunDamagedError, RunNotFoundError
from tests.conftest import digits, mlp

SOURCE = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

number = 3


def build():
    import {name}_parts  # a module beside this one, imported while the function runs

    return nn.Sequential(nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))


def five():
    return 5


def load():
    return [(torch.zeros(8, 8), i % 10) for i in range(96)]
"""


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def source(tmp_path, monkeypatch):
    """The name of a module of the user's, in the working directory, and its functions."""
    monkeypatch.chdir(tmp_path)
    name = "mine_" + re.sub(r"\W", "_", tmp_path.name)
    (tmp_path / f"{name}.py").write_text(SOURCE.format(name=name))
    (tmp_path / f"{name}_parts.py").write_text("")
    return name


@pytest.fixture
def query(disk_run, tmp_path):
    file = tmp_path / "query.npy"
    np.save(file, disk_run.queries[0].numpy())
    return file


@pytest.fixture
def explain(disk_run, source, query):
    """Call ``pkexplain explain`` on the recorded run with what is usual, and some options changed."""

    def explain(**changed):
        options = {"model": f"{source}:build", "query": query, **changed}
        return call("explain", disk_run.store, *(w for name, value in options.items() for w in (f"--{name}", value)))

    return explain


def test_without_a_command_it_shows_what_there_is():
    shown = call("--help").output
    assert all(command in shown for command in ("demo", "inspect", "verify", "explain", "index", "merge", "withdraw"))


def test_demo_trains_explains_and_writes_a_report(tmp_path, monkeypatch):
    train, test = pkexplain.demo.load_digits()
    fewer = TensorDataset(*(tensor[:300] for tensor in train.tensors))
    monkeypatch.setattr(pkexplain.demo, "load_digits", lambda: (fewer, test))
    monkeypatch.setattr(pkexplain.demo.build_cnn, "__kwdefaults__", {"channels": (4, 8)})
    for _ in range(2):  # the second takes the place of the first
        result = call("demo", "--out", tmp_path / "d[e]mo", "--epochs", 1)
        assert result.exit_code == 0, result.output
    assert result.output.count("quadrature gap") == 2
    assert result.output.count("Why did the model call this") == 2
    assert str(tmp_path / "d[e]mo" / "run") in result.output
    assert "<html" in (tmp_path / "d[e]mo" / "why.html").read_text(encoding="utf-8")
    assert pk.DirectoryStore(tmp_path / "d[e]mo" / "run").manifest().num_examples == 300


def test_merge_and_withdraw_change_a_run(disk_run):
    result = call("merge", disk_run.store, "--shards", 3)
    assert (result.exit_code, result.output.strip()) == (0, "Each segment's rows are now in 3 file(s).")
    result = call("withdraw", disk_run.store, "--ids", "3, 17")
    assert result.exit_code == 0
    assert "2 example(s) withdrawn" in result.output
    trajectory = pk.DirectoryStore(disk_run.store).trajectory()
    assert [len(files.rows) for files in trajectory.files] == [3] * len(trajectory)
    assert trajectory.manifest.withdrawn == (3, 17)
    assert call("verify", disk_run.store).exit_code == 0
    assert ", 2 of them withdrawn" in call("inspect", disk_run.store).output


@pytest.mark.parametrize("ids", ["three", "1;2", "-1", "", "1,,2"])
def test_withdraw_refuses_what_are_no_row_numbers(disk_run, ids):
    result = call("withdraw", disk_run.store, "--ids", ids)
    assert isinstance(result.exception, QueryError)
    assert "these are not row numbers" in str(result.exception)


def test_inspect_shows_the_run_and_its_segments(disk_run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    result = call("inspect", disk_run.store)
    assert result.exit_code == 0
    manifest = pk.DirectoryStore(disk_run.store).manifest()
    for text in (str(disk_run.store), manifest.run_id, "finished", "SGD", "96", "910 recorded", "Kronecker"):
        assert text in result.output
    rows = [line for line in result.output.splitlines() if re.match(r"│\s+\d", line)]
    assert len(rows) == 2


def test_verify_passes_a_whole_run(disk_run):
    result = call("verify", disk_run.store)
    assert result.exit_code == 0
    assert "files whole, 2 segments" in result.output


def test_verify_names_every_damaged_file(disk_run):
    files = [disk_run.store / "segments/00001.safetensors", disk_run.store / "checkpoints/00000.safetensors"]
    content = bytearray(files[0].read_bytes())
    content[-1] ^= 1
    files[0].write_bytes(content)
    files[1].unlink()
    result = call("verify", disk_run.store)
    assert result.exit_code == 1
    assert "segments/00001.safetensors" in result.output
    assert "it was altered" in result.output
    assert "checkpoints/00000.safetensors" in result.output
    assert "it is missing" in result.output
    assert "2 problem(s)" in result.output


def test_verify_fails_where_a_gap_is_above_the_tolerance(disk_run):
    result = call("verify", disk_run.store, "--tolerance", 0)
    assert result.exit_code == 1
    assert re.search(r"segment 1: \S+ is above 0", result.output)


def test_a_table_in_a_pipe_is_not_cut(disk_run, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    lines = call("inspect", disk_run.store).output.splitlines()
    heading = next(line for line in lines if "displacement gap" in line)
    assert all(name in heading for name in ("segment", "Σ learning rate", "optimizer ‖share‖", "split gap"))
    assert max(map(len, lines)) > 80
    assert not any("…" in line for line in lines)


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_run_that_is_missing_or_unreadable_is_our_error(tmp_path, command):
    missing = call(command, tmp_path / "nowhere")
    assert missing.exit_code == 1
    assert isinstance(missing.exception, RunNotFoundError)
    (tmp_path / "manifest.json").write_text("{")
    broken = call(command, tmp_path)
    assert broken.exit_code == 1
    assert isinstance(broken.exception, RunDamagedError)


def test_explain_prints_what_python_prints_and_writes_a_report(explain, disk_run, source, tmp_path):
    path = list(sys.path)
    result = explain(output="logit:3", k=4, report="pages/why.html", dataset=f"{source}:load")
    assert result.exit_code == 0, result.output
    new = mlp(seed=7, activation=torch.nn.ReLU, dtype=torch.float32)  # as untrained as the one that is built
    expected = pk.Explainer(disk_run.store, new).explain(disk_run.queries[0], output=pk.Logit(3), k=4)
    assert str(expected) in result.output
    assert "Note: The model that was passed has other weights than the run's last ones" in result.output
    report = tmp_path / "pages" / "why.html"
    assert report.resolve().as_uri() in result.output
    assert report.read_text(encoding="utf-8").lstrip().lower().startswith("<!doctype html>")
    assert sys.path == path


def test_explain_reads_every_kind_of_query(explain, disk_run, tmp_path):
    two = disk_run.queries[:2]
    (tmp_path / "one.json").write_text(json.dumps(two[0].tolist()))
    np.save(tmp_path / "two.npy", two.numpy())
    safetensors.torch.save_file({"digits": two}, tmp_path / "two.safetensors")
    safetensors.torch.save_file({"0": two}, tmp_path / "named.safetensors")
    printed = {}
    for name in ("query.npy", "one.json", "two.npy", "two.safetensors"):
        result = explain(query=tmp_path / name)
        assert result.exit_code == 0, result.output
        printed[name] = result.output
    assert printed["one.json"] == printed["query.npy"]
    assert printed["two.npy"] == printed["two.safetensors"]
    assert printed["two.npy"].startswith(printed["query.npy"].splitlines()[0])


def test_explain_takes_an_input_by_its_name(source, tmp_path):
    class Named(torch.nn.Linear):
        def forward(self, pixels):
            return super().forward(pixels)

    inputs, targets = digits(20, torch.float32)
    model = Named(64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pk.Recorder(tmp_path / "named", model, optimizer, num_examples=20) as recorder, recorder.step(range(20)):
        torch.nn.functional.cross_entropy(model(pixels=inputs), targets).backward()
        optimizer.step()
    (tmp_path / f"{source}_parts.py").write_text(
        "import torch\n\n\nclass Named(torch.nn.Linear):\n"
        "    def forward(self, pixels):\n        return super().forward(pixels)\n"
    )
    (tmp_path / f"{source}.py").write_text(
        f"def build():\n    from {source}_parts import Named\n\n    return Named(64, 10)\n"
    )
    safetensors.torch.save_file({"pixels": inputs[0]}, tmp_path / "q.safetensors")
    result = call("explain", tmp_path / "named", "--model", f"{source}:build", "--query", tmp_path / "q.safetensors")
    assert result.exit_code == 0, result.exception
    assert result.output.startswith("logit[")

    row = {"pixels": inputs[0].tolist(), "label": 3}
    (tmp_path / "row.json").write_text(json.dumps(row))
    (tmp_path / "rows.json").write_text(json.dumps([row, row]))
    for name, count in (("row.json", 1), ("rows.json", 2)):
        again = call("explain", tmp_path / "named", "--model", f"{source}:build", "--query", tmp_path / name)
        assert again.exit_code == 0, again.exception
        assert again.output.count("logit[") >= count
        assert result.output.splitlines()[1] in again.output


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("logit:3", "logit[3]"),
        ("log-probability:3", "log_probability[3]"),
        ("margin:3", "margin[3]"),
        ("value:0", "value[0]"),
        ("tokens:17", "log_probability[token 17 at -1]"),
        ("tokens:17,42", "log_probability[tokens -2:]"),
    ],
)
def test_outputs_are_written_with_a_colon(text, name):
    assert parse_output(text).names(1) == [name]


def test_an_output_without_a_number_is_that_of_the_predicted_class(explain):
    for text in ("logit", "margin", "loss:3"):
        result = explain(output=text)
        assert result.exit_code == 0, result.output
        assert text.partition(":")[0] in result.output.splitlines()[0]


def test_a_model_of_one_number_is_explained_without_naming_an_output(source, tmp_path):
    inputs, _ = digits(20, torch.float32)
    model = torch.nn.Sequential(torch.nn.Linear(64, 1), torch.nn.Flatten(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with pk.Recorder(tmp_path / "one", model, optimizer, num_examples=20) as recorder, recorder.step(range(20)):
        torch.nn.functional.mse_loss(model(inputs), inputs.mean(1)).backward()
        optimizer.step()
    (tmp_path / f"{source}.py").write_text(
        "from torch import nn\n\n\ndef build():\n    return nn.Sequential(nn.Linear(64, 1), nn.Flatten(0))\n"
    )
    np.save(tmp_path / "q.npy", inputs[0].numpy())
    result = call("explain", tmp_path / "one", "--model", f"{source}:build", "--query", tmp_path / "q.npy")
    assert result.exit_code == 0, result.exception
    assert result.output.startswith("value[0]")


def test_an_output_that_the_model_does_not_have_is_refused(explain):
    result = explain(output="logit:77")
    assert result.exit_code == 1
    assert isinstance(result.exception, QueryError)
    assert "there is no such class" in str(result.exception)
    assert "a class from 0 to 9" in str(result.exception)


@pytest.mark.parametrize(
    "text", ["", "logits:3", "logit:x", "logit:-1", "logit:²", "loss", "logit:3:4", "tokens", "tokens:1,x"]
)
def test_an_output_that_is_none_is_refused(text):
    with pytest.raises(QueryError, match=r"there is no such output\. Got .*expected logit:NUMBER"):
        parse_output(text)


@pytest.mark.parametrize(
    ("function", "wrong"),
    [
        ("{}", "it cannot be imported"),
        ("{}:nothing", "it cannot be imported"),
        ("no_such_module:build", "it cannot be imported"),
        (".build", "it cannot be imported"),
        (":build", "it cannot be imported"),
        ("{}:number", "which is not callable"),
        ("{}:five", "not a torch.nn.Module"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused(explain, source, function, wrong):
    result = explain(model=function.format(source))
    assert result.exit_code == 1
    assert isinstance(result.exception, QueryError)
    assert wrong in str(result.exception)
    assert "--model" in str(result.exception)


@pytest.mark.parametrize(
    ("name", "content", "wrong"),
    [
        ("missing.npy", None, "it cannot be read"),
        ("empty.npy", b"", "it cannot be read"),
        ("words.json", b'["a"]', "it cannot be read"),
        ("half.json", b"[1.0, ", "it cannot be read"),
        ("junk.safetensors", b"junk", "it cannot be read"),
        ("query.pt", b"", "this file type is not supported"),
        ("short.json", b"[1.0, 2.0]", "the model's forward pass fails on it"),
        ("one.json", b"[1.0]", "it has another shape"),
    ],
)
def test_a_query_that_cannot_be_read_is_refused(explain, tmp_path, name, content, wrong):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    result = explain(query=tmp_path / name)
    assert result.exit_code == 1
    assert isinstance(result.exception, QueryError)
    assert wrong in str(result.exception)


def test_a_query_is_never_unpickled(explain, tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    result = explain(query=tmp_path / "objects.npy")
    assert isinstance(result.exception, QueryError)
    assert "it cannot be read" in str(result.exception)


def test_an_error_is_shown_as_its_message_with_exit_status_1(tmp_path):
    nowhere = tmp_path / "[bold]nowhere[/x]"  # brackets are shown, not obeyed
    done = subprocess.run(
        [sys.executable, "-c", "from pkexplain.cli import main; main()", "verify", str(nowhere)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: reading the run in {nowhere}: there is no run.")
    assert "Traceback" not in done.stderr


# -------------------------------------------------------------------------------------------- how gradients are split

BUILD = """
import torch
from torch import nn

class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        hidden = torch.tanh(self.inner(x))
        if hidden.requires_grad:
            hidden.register_hook(lambda g: g / g.norm())
        return self.out(hidden)

def parts(model):
    x, y = torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    return model, (x, y), lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])

def good():
    model = nn.Linear(6, 3)
    return *parts(model), torch.optim.SGD(model.parameters(), lr=0.1)

def unknown():
    model = nn.Linear(6, 3)
    return *parts(model), torch.optim.LBFGS(model.parameters())

def unsplit():
    return parts(Odd())
"""


@pytest.mark.parametrize(
    ("name", "status", "words"),
    [
        ("good", 0, ["rule", "the same, bit for bit", "passed"]),
        ("unsplit", 0, ["unsplit", "its split gap is", "not split: "]),
        ("unknown", 1, ["The optimizer cannot be recorded", "NOT PASSED"]),
    ],
)
def test_recording_can_be_tried_on_one_batch(tmp_path, monkeypatch, name, status, words):
    (tmp_path / "tried_on_one_batch.py").write_text(BUILD, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["verify-recording", f"tried_on_one_batch:{name}"])
    assert result.exit_code == status, result.output
    assert all(word in result.output for word in words)


def test_inspect_and_verify_show_the_split(tmp_path, monkeypatch):
    namespace = {}
    exec(BUILD, namespace)
    torch.manual_seed(0)
    model, batch, loss = namespace["unsplit"]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = pk.Recorder(tmp_path / "run", model, optimizer, num_examples=4)

    def record():
        with recorder, recorder.step(range(4)):
            loss(model, batch).backward()
            optimizer.step()

    with pytest.warns(UserWarning, match="cannot be split"):
        record()
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "run")]).output
    assert "largest split gaps, by layer: 'out' " in shown
    assert "Not split among examples" in shown
    assert "inner.weight" in shown
    assert CliRunner().invoke(app, ["verify", str(tmp_path / "run")]).exit_code == 0
