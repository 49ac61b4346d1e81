"""What the README says must run."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.conftest import cnn, digits

README = Path(__file__).parents[1] / "README.md"


def test_the_example_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
    images, labels = digits(104, torch.float32, image=True)
    model = cnn(dtype=torch.float32)
    names = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        "train": TensorDataset(images[:96], labels[:96]),
        "epochs": 2,
        "torch": torch,
        "loss_fn": nn.CrossEntropyLoss(),
        "query": images[100],
    }
    exec(compile(blocks[1], "README.md", "exec"), names)
    names["loader"] = DataLoader(names["WithIds"](), batch_size=32, shuffle=True)
    exec(compile(blocks[0], "README.md", "exec"), names)
    shown = capsys.readouterr().out
    assert "margin[3]" in shown
    assert "quadrature gap" in shown
    assert (tmp_path / "why.html").read_text(encoding="utf-8").count("<img") > 10
    assert (tmp_path / "runs" / "mnist" / "manifest.json").is_file()
    for seed in ("seed0", "seed1"):
        names["model"] = cnn(dtype=torch.float32)
        names["optimizer"] = torch.optim.SGD(names["model"].parameters(), lr=0.05, momentum=0.9)
        recording = blocks[0].replace("runs/mnist", f"runs/{seed}").split("explainer =")[0]
        exec(compile(recording, "README.md", "exec"), names)
    names |= {"images": images[:20], "ids": range(20), "labels": labels[:20]}
    for statement in ast.parse(blocks[2]).body:
        assert isinstance(statement, ast.Expr)
        found = eval(compile(ast.Expression(statement.value), "README.md", "eval"), names)
        assert getattr(found, "reading", "removal") == "removal"


def test_every_file_it_points_to_is_there():
    text = README.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", text)
    paths = [path for path in (a or b for a, b in targets) if not path.startswith("https://")]
    assert len(paths) > 5
    assert [path for path in paths if not (README.parent / path).exists()] == []
