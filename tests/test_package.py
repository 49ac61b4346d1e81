"""The package as a whole: what it exports, and that importing it costs and changes little."""

from __future__ import annotations

import ast
import importlib
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pkexplain as pk

HEAVY = ["faiss", "captum", "jinja2", "matplotlib", "transformers", "datasets", "rich", "typer", "scipy", "sklearn"]
LOOK = """
import json, logging, random, sys
import numpy, torch
threads, state = torch.get_num_threads(), torch.get_rng_state()
numpy.random.seed(0); random.seed(0)
drawn = numpy.random.get_state()[1].tolist(), random.getstate()
handlers = list(logging.getLogger().handlers)
before = set(sys.modules)
import pkexplain
for name in pkexplain.__all__:
    if name not in ("ProgressBar", "write_report"):
        getattr(pkexplain, name)
print(json.dumps({
    "loaded": sorted({name.partition(".")[0] for name in set(sys.modules) - before}),
    "threads": threads == torch.get_num_threads(),
    "random": bool(torch.equal(state, torch.get_rng_state()))
    and drawn == (numpy.random.get_state()[1].tolist(), random.getstate()),
    "handlers": handlers == list(logging.getLogger().handlers),
}))
"""
MODULES = sorted(m.name for m in pkgutil.walk_packages(pk.__path__, "pkexplain."))


@pytest.fixture(scope="module")
def fresh():
    done = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) == 1, "importing prints something"
    return json.loads(lines[0])


def test_importing_loads_nothing_heavy(fresh):
    assert not set(HEAVY) & set(fresh["loaded"])
    assert "pkexplain" in fresh["loaded"]


def test_importing_changes_nothing(fresh):
    assert fresh["threads"]
    assert fresh["random"]
    assert fresh["handlers"]


def test_exports_are_sorted_and_complete():
    assert pk.__all__ == sorted(pk.__all__)
    public = {name for name, value in vars(pk).items() if not name.startswith("_") and not isinstance(value, type(sys))}
    public -= {"annotations", "TYPE_CHECKING", "Any"}
    later = {"ProgressBar", "evaluation", "write_report", "__version__"}
    assert public | later == set(pk.__all__)
    for name in pk.__all__:
        assert getattr(pk, name) is not None


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="module 'pkexplain' has no attribute 'Explain'"):
        _ = pk.Explain


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_is_for_and_public_ones_what_they_export(name):
    module = importlib.import_module(name)
    assert module.__doc__, "no docstring"
    defined = [value for value in vars(module).values() if getattr(value, "__module__", None) == name]
    public = not name.rpartition(".")[2].startswith("_") and defined
    exported = getattr(module, "__all__", [] if not public else None)
    assert exported is not None, "no __all__"
    assert len(set(exported)) == len(exported)
    for exported_name in exported:
        assert hasattr(module, exported_name)


def test_the_version_is_that_of_the_project():
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nversion = "{pk.__version__}"\n' in project


def test_a_file_with_an_underscore_is_used_inside_its_folder_only():
    package = Path(pk.__file__).parent
    private = [file for file in package.rglob("_*.py") if file.name != "__init__.py"]
    assert private
    for file in private:
        folder = ".".join(file.parent.relative_to(package.parent).parts)
        names = re.compile(
            rf"^\s*(?:from|import) {re.escape(folder)}(?:\.| import (?:\w+, )*){file.stem}\b", re.MULTILINE
        )
        for other in package.rglob("*.py"):
            if other.parent != file.parent:
                assert not names.search(other.read_text(encoding="utf-8")), f"{other} imports {file}"


def test_nothing_is_too_long_to_hold_in_mind():
    package = Path(pk.__file__).parent
    assert len([entry for entry in package.iterdir() if entry.name != "__pycache__"]) <= 20
    long = []
    for file in package.rglob("*.py"):
        text = file.read_text()
        if len(text.splitlines()) > 350:
            long.append(f"{file}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef):
                continue
            lines, arguments = node.end_lineno - node.lineno + 1, [*node.args.args, *node.args.kwonlyargs]
            parameters = len([argument for argument in arguments if argument.arg not in ("self", "cls")])
            most = {"recorder.py": 14, "explainer.py": 9}.get(file.name, 8)  # what users choose, by name
            if lines > 60 or (
                parameters > most and file.parent.name != "cli"
            ):  # a command's options are its parameters
                long.append(f"{file}: {node.name}, {lines} lines, {parameters} parameters")
    assert long == []


def test_the_docstring_lists_every_folder_and_file():
    package = Path(pk.__file__).parent
    for entry in package.iterdir():
        if not entry.name.startswith("_"):
            name = f"{entry.name}/" if entry.is_dir() else entry.stem
            assert re.search(rf"^    (.* )?{re.escape(name)}( |$)", pk.__doc__, re.MULTILINE), name


def test_every_module_path_in_the_documentation_exists():
    root = Path(__file__).parent.parent
    pages = [root / "README.md", *root.glob("docs/*.md"), *root.glob("tutorials/*.py")]
    paths = {path for page in pages for path in re.findall(r"\bpkexplain(?:\.[a-zA-Z_]\w*)+", page.read_text())}
    assert len(paths) > 20
    for path in sorted(paths):
        found = pk
        for at, name in enumerate(path.split(".")[1:], start=2):
            if not hasattr(found, name):
                importlib.import_module(".".join(path.split(".")[:at]))
            found = getattr(found, name)
