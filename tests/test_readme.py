"""What the README says must run."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pkexplain as pk
from tests.conftest import cnn, digits

README = Path(__file__).parents[1] / "README.md"


BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def block(beginning: str) -> str:
    """The one block of code that holds some words."""
    (found,) = [block for block in BLOCKS if beginning in block]
    return found


def run(code: str, names: dict) -> None:
    exec(compile(code, "README.md", "exec"), names)


@pytest.fixture
def names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images, labels = digits(104, torch.float32, image=True)
    model = cnn(dtype=torch.float32)
    train = TensorDataset(images[:96], labels[:96])
    return {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        "train": train,
        "loader": DataLoader(train, batch_size=32, shuffle=True),
        "epochs": 2,
        "torch": torch,
        "pk": pk,
        "loss_fn": nn.CrossEntropyLoss(),
        "query": images[100],
        "images": images[:20],
        "ids": range(20),
        "labels": labels[:20],
    }


def test_the_loop_and_what_was_left_out_run_as_they_stand(names, tmp_path, capsys):
    assert len(BLOCKS) == 7
    run(block("recorder.batches(loader):  #"), names)
    shown = capsys.readouterr().out
    assert "margin[3]" in shown
    assert "quadrature gap" in shown
    assert (tmp_path / "why.html").read_text(encoding="utf-8").count("<img") > 10
    assert (tmp_path / "runs" / "mnist" / "manifest.json").is_file()
    for seed in ("seed0", "seed1"):
        names["model"] = cnn(dtype=torch.float32)
        names["optimizer"] = torch.optim.SGD(names["model"].parameters(), lr=0.05, momentum=0.9)
        recording = block("recorder.batches(loader):  #").replace("runs/mnist", f"runs/{seed}").split("explainer =")[0]
        run(recording, names)
    for statement in ast.parse(block('reading="removal"')).body:
        assert isinstance(statement, ast.Expr)
        found = eval(compile(ast.Expression(statement.value), "README.md", "eval"), names)
        assert getattr(found, "reading", "removal") == "removal"
    run(block("pk.suspects"), names)
    assert "Likely wrong labels" in capsys.readouterr().out
    assert "Likely wrong labels" in (tmp_path / "suspects.html").read_text(encoding="utf-8")


def test_two_lines_record_a_loop():
    """Every other line of it stands in the loop without a recorder."""
    ours = [line for line in block("recorder.batches(loader):  #").split("explainer =")[0].splitlines() if "pk" in line]
    ours += [line for line in block("recorder.batches(loader):  #").splitlines() if "recorder.batches" in line]
    assert len(ours) == 3  # one of them is the import
    for beginning in ("runs/bert", "runs/lightning", "runs/skorch"):
        assert len([line for line in block(beginning).splitlines() if "RecordingCallback(" in line]) == 1
    assert len([line for line in block("accelerator").splitlines() if "recorder" in line]) == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_one_line_records_a_training_by_transformers(names, tmp_path):
    from tests.integrations import test_transformers as trainings

    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    arguments = transformers.TrainingArguments(
        str(tmp_path / "out"), use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, num_train_epochs=1
    )

    class Trainer(transformers.Trainer):  # the collator is the model's business, not the recorder's
        def __init__(self, *args, **kwargs):
            super().__init__(*args, data_collator=trainings.collator(), **kwargs)

    names |= {"model": trainings.bert(), "arguments": arguments, "train": trainings.rows(), "Trainer": Trainer}
    run(block("runs/bert"), names)
    names["trainer"].train()
    explanation = pk.Explainer("runs/bert", trainings.bert()).explain(trainings.rows()[0], output=pk.Logit(1))
    assert abs(explanation.ledger.gap) < 1e-4


@pytest.mark.filterwarnings("ignore")
def test_one_line_records_a_training_by_lightning(names):
    pytest.importorskip("lightning")
    from tests.integrations import test_lightning as trainings

    names["L"] = trainings.lightning
    run(block("runs/lightning"), names)
    names["trainer"].fit(trainings.Module(), trainings.loader())
    assert (
        pk.Explainer("runs/lightning", trainings.Module()).explain(trainings.INPUTS[0], output=pk.Logit(1)).proponents
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_one_line_records_a_training_by_skorch(names):
    skorch = pytest.importorskip("skorch")
    names |= {"module": names["model"], "NeuralNetClassifier": skorch.NeuralNetClassifier}
    run(block("runs/skorch"), names)
    names["net"].set_params(criterion=nn.CrossEntropyLoss, verbose=0, max_epochs=2)
    names["net"].fit(*(value.numpy() for value in names["train"].tensors))
    assert pk.Explainer("runs/skorch", names["model"]).explain(names["query"], output=pk.Logit(1)).proponents


def test_two_lines_record_a_loop_with_accelerate(names):
    accelerate = pytest.importorskip("accelerate")
    names["accelerator"] = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    run(block("accelerator"), names)
    assert pk.Explainer("runs/accelerate", names["model"]).explain(names["query"], output=pk.Logit(1)).proponents


def test_every_file_it_points_to_is_there():
    text = README.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", text)
    paths = [path for path in (a or b for a, b in targets) if not path.startswith("https://")]
    assert len(paths) > 5
    assert [path for path in paths if not (README.parent / path).exists()] == []
