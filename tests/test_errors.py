"""The exception tree and the one form of its messages."""

from __future__ import annotations

import builtins
import inspect
import pickle
import re

import pytest
import torch

import pkexplain as pk
from pkexplain import errors

CLASSES = {
    name: value
    for name, value in vars(errors).items()
    if inspect.isclass(value) and value.__module__ == errors.__name__
}
LINE = re.compile(r"^(?P<indent>[ │├└─]*)(?P<name>\w+Error)(?: \((?P<builtin>\w+)\))?")


def tree():
    """Read the tree of the docstring: for each class its parent in the tree and the builtin it names."""
    found, path = {}, []
    for line in errors.__doc__.splitlines():
        if matched := LINE.match(line):
            depth = (len(matched["indent"]) - 4) // 4
            path = [*path[:depth], matched["name"]]
            found[matched["name"]] = path[-2] if len(path) > 1 else None, matched["builtin"]
    return found


def test_the_tree_in_the_docstring_is_the_tree():
    drawn = tree()
    assert set(drawn) == set(CLASSES)
    for name, (parent, builtin) in drawn.items():
        bases = [base.__name__ for base in CLASSES[name].__bases__]
        expected = [parent or "Exception"] + ([builtin] if builtin else [])
        assert bases == expected, name


def test_every_error_is_one_of_ours_and_of_a_builtin_that_fits():
    for name, (_, builtin) in tree().items():
        kind = CLASSES[name]
        assert issubclass(kind, pk.PkexplainError)
        assert kind.__doc__
        if builtin:
            assert issubclass(kind, getattr(builtins, builtin))
        fitting = [base for base in kind.__mro__ if base.__module__ == "builtins"]
        assert len(fitting) > len(Exception.__mro__) or kind is pk.PkexplainError


def test_every_class_is_exported():
    assert set(errors.__all__) == {*CLASSES, "warn"}
    assert errors.__all__ == sorted(errors.__all__)


def test_a_message_has_one_form():
    text = errors.ExampleIdError(
        "ids", "out of range", got=[7], expected="0 to 4", source="num_examples=5", fix="Count from 0"
    )
    assert str(text) == "ids: out of range. Got [7]; expected 0 to 4 (from num_examples=5). Count from 0."


FORM = re.compile(r"^.+?: .+\. Got .*; expected .+ \(from .+\)\. [A-Z].+\.$", re.DOTALL)


@pytest.mark.parametrize(
    "provoke",
    [
        lambda: pk.Quadrature(nodes=0),
        lambda: pk.Kronecker(k=0),
        lambda: pk.Explainer(pk.MemoryStore(), None),
        lambda: pk.Explainer("/nowhere", None),
        lambda: pk.Logit(1).settle(torch.zeros(3)),
        lambda: pk.Recorder(pk.MemoryStore(), None, None, num_examples=0),
    ],
)
def test_messages_of_real_errors_have_that_form(provoke):
    with pytest.raises(pk.PkexplainError) as caught:
        provoke()
    assert FORM.match(str(caught.value)), str(caught.value)


def made(kind, got=3):
    return kind("ids", "are wrong", got=got, expected=range(2), source="the run", fix="Count from 0")


@pytest.mark.parametrize("kind", CLASSES.values(), ids=CLASSES)
def test_an_error_keeps_its_text_and_fields_and_travels_between_processes(kind):
    error = made(kind, got=lambda: None)  # which cannot be pickled
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == str(error)
    assert (error.asked, error.fix, error.expected) == ("ids", "Count from 0", range(2))
    assert (again.asked, again.wrong, again.source, again.fix) == ("ids", "are wrong", "the run", "Count from 0")


def test_run_errors_are_oserrors_that_keep_their_text():
    for kind in (errors.RunError, errors.RunExistsError, errors.RunNotFoundError, errors.RunDamagedError):
        assert str(made(kind)) == "ids: are wrong. Got 3; expected range(0, 2) (from the run). Count from 0."
        assert issubclass(kind, OSError)


def test_a_warning_points_at_the_line_of_the_user():
    inner = {"__name__": "pkexplain.record.deep", "warn": errors.warn}
    exec("def go(depth): warn('look here') if not depth else go(depth - 1)", inner)
    between = {"__name__": "torch.optim.optimizer", "go": inner["go"]}
    exec("def step(depth): go(depth)", between)
    for depth in (0, 3):
        with pytest.warns(UserWarning, match="look here") as seen:
            between["step"](depth)
        assert seen[0].filename == __file__
