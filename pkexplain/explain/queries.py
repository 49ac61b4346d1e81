"""Queries: the user's inputs to explain, checked against the inputs seen while recording."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pkexplain.errors import PkexplainError, QueryError
from pkexplain.explain._query_forms import QueryForm, forward_names, is_list_of_queries, rebuilt
from pkexplain.explain.outputs import as_output
from pkexplain.ids import PredictionRule, parts_of
from pkexplain.store.manifest import InputEntry
from pkexplain.store.trajectory import Trajectory

__all__ = ["Queries", "QueryBatch", "as_queries", "read_queries"]

Found = TypeVar("Found")


class QueryBatch:
    """Queries for one model: positional or named tensors with the same number of rows.

    Args:
        args: Positional inputs, tensors with a batch dimension, or mappings or dataclasses of such.
        kwargs: Named inputs, likewise.
        single: Whether the user passed one query without a batch dimension.
        path: Which of several tensors that the model returns is the prediction, as the training's loss used it.
        rule: The same, with its reason; it is shared by all parts of the queries.
        wanted: The recorded inputs, in words.
    """

    def __init__(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        single: bool,
        path: str | None = None,
        rule: PredictionRule | None = None,
        wanted: str = "inputs that the model takes",
    ) -> None:
        """Keep the inputs."""
        self.args, self.kwargs, self.single, self._wanted = args, kwargs, single, wanted
        self.rule = rule or PredictionRule(path)

    def __len__(self) -> int:
        """Return the number of queries."""
        return len(next(self.named())[1])

    def select(self, positions: Tensor) -> QueryBatch:
        """Keep the queries at ``positions``."""
        return self._changed(lambda value: value[positions.to(value.device)])

    def to(self, device: torch.device) -> QueryBatch:
        """Move the queries to a device."""
        return self._changed(lambda value: value.to(device))

    def _changed(self, change: Callable[[Tensor], Tensor]) -> QueryBatch:
        args, kwargs = _map(change, self.args), _map(change, self.kwargs)
        return QueryBatch(args, kwargs, single=self.single, rule=self.rule, wanted=self._wanted)

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over the tensors with their paths: ``"0"``, ``"tokens"``, ``"0.tokens"``."""
        return _named({**{str(place): value for place, value in enumerate(self.args)}, **self.kwargs})

    def row(self, position: int) -> Any:
        """Return one query as the user would pass it."""
        args, kwargs = (_map(lambda value: value[position], value) for value in (self.args, self.kwargs))
        if kwargs:
            return {**{str(place): value for place, value in enumerate(args)}, **kwargs}
        return args[0] if len(args) == 1 else args

    def run(self, model: nn.Module) -> Tensor:
        """Run the model and return its prediction, ``(queries, …)``.

        Raises:
            QueryError: The model fails on the queries, did not return a tensor with one row per query, or returned
                several and it is not known which is meant.
        """
        with _differentiable(model):
            try:
                output = model(*self.args, **self.kwargs)
            except (PkexplainError, torch.OutOfMemoryError):
                raise
            except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
                got = [f"{name!r} of shape {tuple(value.shape[1:])}" for name, value in self.named()]
                said = next(iter(str(error).strip().splitlines()), "")
                raise QueryError(
                    "explaining a query",
                    f"the model's forward pass fails on it ({type(error).__name__}: {said})",
                    got=", ".join(got) + (f" in a batch of {len(self)}" if len(self) > 1 else ""),
                    expected=self._wanted,
                    source="the inputs seen while recording",
                    fix="Prepare the query like the training examples",
                ) from error
        return self.rule.choose(output, len(self))


@dataclass(frozen=True)
class Queries:
    """All queries that were asked at once, in groups of the same shapes: padding would change numbers.

    Attributes:
        groups: The queries of each shape, with their places in the order they were asked in.
        single: Whether the user passed one query without a batch dimension.
    """

    groups: tuple[tuple[Tensor, QueryBatch], ...]
    single: bool

    def __len__(self) -> int:
        """Return the number of queries."""
        return sum(len(places) for places, _ in self.groups)

    @property
    def places(self) -> Tensor:
        """Where each query was asked, group by group, ``(queries,)``."""
        return torch.cat([places for places, _ in self.groups])

    def with_output(self, output: Any) -> Iterator[tuple[QueryBatch, Any]]:
        """Iterate over the groups, with what is to be explained of each."""
        for places, batch in self.groups:
            if output is None or len(self.groups) == 1:
                yield batch, output
            else:
                yield batch, as_output(output).given_for(places, len(self))

    def in_order(self, found: Sequence[Found]) -> list[Found]:
        """Put what was found group by group in the order in which it was asked."""
        return [found[int(at)] for at in self.places.argsort()]

    def asked_of(self, path: str | None) -> Queries:
        """Choose which tensor of the model's output is the prediction, by its path; None for the rule's own choice."""
        for _, batch in self.groups:
            batch.rule.asked = path
        return self


def read_queries(x: Any, trajectory: Trajectory, model: nn.Module) -> Queries:
    """Read the user's queries, in any form, for the model of a run.

    Args:
        x: As for `pkexplain.Explainer.explain`.
        trajectory: The run.
        model: Its model.

    Raises:
        QueryError: They do not fit the model.
    """
    device = next(model.parameters()).device
    return _read(x, trajectory.inputs, device, trajectory.manifest.output, forward_names(model))


def as_queries(x: Any, shapes: Mapping[str, InputEntry], device: torch.device, path: str | None = None) -> QueryBatch:
    """Turn the user's input, one query or a batch, into queries of the recorded shapes.

    Args:
        x: A tensor, a tuple of positional inputs, a mapping of named inputs, or a list of such.
        shapes: The recorded inputs.
        device: Where the model is.
        path: Which of several tensors that the model returns is the prediction.

    Raises:
        QueryError: A shape or a dtype does not fit; or the queries differ in their lengths.
    """
    return one_batch(_read(x, shapes, device, path, {}))


def one_batch(queries: Queries) -> QueryBatch:
    """Return queries of one shape as a batch.

    Raises:
        QueryError: Their shapes differ.
    """
    if len(queries.groups) == 1:
        return queries.groups[0][1]
    raise QueryError(
        "a batch of queries",
        "they differ in their shapes",
        got=f"{len(queries.groups)} different shapes",
        expected="one",
        source="this function, which runs them in one batch",
        fix="Ask for queries of each length separately, or pad them",
    )


def _read(
    x: Any, shapes: Mapping[str, InputEntry], device: torch.device, path: str | None, names: Mapping[str, str]
) -> Queries:
    form = QueryForm(shapes, names)
    if is_list_of_queries(x):
        rows = [_row(form, each, place) for place, each in enumerate(x)]
        return _grouped(form, rows, device, path, single=False)
    named, containers = form.named(x)
    values = {name: form.numbers(name, value) for name, value in named.items()}
    singles = {name: form.is_single(name, value) for name, value in values.items()}
    if len(set(singles.values())) > 1:
        raise form.refusal(next(iter(named)), "some inputs have a batch dimension and some do not", "both")
    single = all(singles.values())
    lengths = [1 if single else len(value) for value in values.values()]
    if len(set(lengths)) > 1:
        raise form.refusal(next(iter(named)), "the inputs hold different numbers of queries", lengths)
    if any(isinstance(value, list) for value in values.values()):
        rows = [({name: value[q] for name, value in values.items()}, containers) for q in range(lengths[0])]
        return _grouped(form, rows, device, path, single=False)
    whole = {name: value[None] if single else value for name, value in values.items()}  # pyright: ignore[reportCallIssue, reportArgumentType]
    batch = _batch(form, whole, containers, device, path, single=single)  # pyright: ignore[reportArgumentType]
    return Queries(((torch.arange(len(batch), device="cpu"), batch),), single)


_Row = tuple[dict[str, Tensor], dict[str, Any]]
"""One query's tensors without a batch dimension, and the mappings and dataclasses that they came in."""


def _row(form: QueryForm, x: Any, place: int) -> _Row:
    """Read one query of a list."""
    named, containers = form.named(x)
    values = {name: form.numbers(name, value) for name, value in named.items()}
    if form.shapes:
        for name, value in values.items():
            if not form.is_single(name, value):
                wrong, fix = (
                    "it is in a list of queries, and has a batch dimension",
                    ("Pass a list of single queries, or one batch; of a batch [inputs, targets], the inputs alone"),
                )
                raise form.refusal(name, wrong, f"a batch of {len(value)} as number {place} of the list", fix)
    return values, containers  # pyright: ignore[reportReturnType] - what is single is no list


def _grouped(form: QueryForm, rows: Sequence[_Row], device: torch.device, path: str | None, *, single: bool) -> Queries:
    """Put queries of the same shapes together."""
    places: dict[Any, list[int]] = {}
    for place, (values, _) in enumerate(rows):
        places.setdefault(tuple((name, value.shape) for name, value in values.items()), []).append(place)
    groups, rule = [], None
    for members in places.values():
        first, containers = rows[members[0]]
        stacked = {name: torch.stack([rows[q][0][name].to(device) for q in members]) for name in first}
        batch = _batch(form, stacked, containers, device, path, single=single, rule=rule)
        rule = batch.rule
        groups.append((torch.tensor(members, device="cpu"), batch))
    return Queries(tuple(groups), single)


def _batch(
    form: QueryForm,
    values: dict[str, Tensor],
    containers: dict[str, Any],
    device: torch.device,
    path: str | None,
    *,
    single: bool,
    rule: PredictionRule | None = None,
) -> QueryBatch:
    """Make the arguments of the model's forward pass, as it was called while recording."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *outer, last = name.split(".")
        node = tree
        for part in outer:
            node = node.setdefault(part, {})
        node[last] = value.to(device)
    given = {name: _assembled(containers.get(name), value) for name, value in tree.items()}
    args: list[Any] = []
    while str(len(args)) in given:
        args.append(given.pop(str(len(args))))
    kwargs = {form.parameter(name): value for name, value in given.items()}
    unsure = any(name not in values for name in form.shapes)
    rule = rule or PredictionRule(path, unsure=unsure)
    rule = rule if rule.unsure == unsure else replace(rule, unsure=unsure)
    return QueryBatch(tuple(args), kwargs, single=single, rule=rule, wanted=form.wanted)


def _assembled(container: Any, value: Any) -> Any:
    """Put tensors back into mappings and dataclasses like those they came in."""
    if not isinstance(value, dict):
        return value
    inside = (parts_of(container) if container is not None else None) or {}
    parts = {name: _assembled(inside.get(name), part) for name, part in value.items()}
    return parts if container is None else rebuilt(container, parts)


def _differentiable(model: nn.Module) -> AbstractContextManager[None]:
    """Let a recurrent layer be differentiated in evaluation mode, which cuDNN refuses; torch's own kernels do it."""
    parts = model.modules() if torch.backends.cudnn.enabled and isinstance(model, nn.Module) else ()
    recurrent = any(isinstance(part, nn.RNNBase) for part in parts)
    return torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext()


def _map(change: Callable[[Tensor], Any], value: Any) -> Any:
    """Change the tensors of nested tuples, mappings and dataclasses."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_map(change, part) for part in value)
    parts = parts_of(value)
    return value if parts is None else rebuilt(value, {name: _map(change, part) for name, part in parts.items()})


def _named(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Iterate over the tensors of nested tuples, mappings and dataclasses, with their paths."""
    if isinstance(value, Tensor):
        yield name, value
    parts = dict(enumerate(value)) if isinstance(value, tuple) else parts_of(value)
    for inner, part in (parts or {}).items():
        yield from _named(part, f"{name}.{inner}" if name else str(inner))
