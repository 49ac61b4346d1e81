"""Queries: the user's inputs to explain, checked against the inputs seen while recording."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pkexplain.errors import QueryError
from pkexplain.ids import first_tensor
from pkexplain.store.manifest import InputEntry

__all__ = ["QueryBatch", "as_queries"]


class QueryBatch:
    """Queries for one model: positional or named tensors with the same number of rows.

    Args:
        args: Positional inputs, tensors with a batch dimension or mappings of such.
        kwargs: Named inputs, likewise.
        single: Whether the user passed one query without a batch dimension.
        path: Which of several tensors that the model returns is the prediction, as the training's loss used it.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, single: bool, path: str | None = None) -> None:
        """Keep the inputs."""
        self.args, self.kwargs, self.single, self._path = args, kwargs, single, path

    def __len__(self) -> int:
        """Return the number of queries."""
        return len(next(_tensors((*self.args, *self.kwargs.values()))))

    def select(self, positions: Tensor) -> QueryBatch:
        """Keep the queries at ``positions``."""
        args, kwargs = _map(lambda value: value[positions.to(value.device)], (self.args, self.kwargs))
        return QueryBatch(args, kwargs, single=self.single, path=self._path)

    def row(self, position: int) -> Any:
        """Return one query as the user would pass it."""
        args, kwargs = _map(lambda value: value[position], (self.args, self.kwargs))
        return kwargs or (args[0] if len(args) == 1 else args)

    def run(self, model: nn.Module) -> Tensor:
        """Run the model and return its prediction, ``(queries, …)``.

        Raises:
            QueryError: The model did not return a tensor with one row per query.
        """
        with _differentiable(model):
            output = first_tensor(model(*self.args, **self.kwargs), self._path)
        if output is None or output.ndim == 0 or len(output) != len(self):
            raise QueryError(
                "explaining a query",
                "the model's output does not have one row per query",
                got="no tensor" if output is None else f"shape {tuple(output.shape)}",
                expected=f"{len(self)} rows",
                source="the number of queries",
                fix="Make the model's forward pass keep the batch as the first dimension",
            )
        return output


def _differentiable(model: nn.Module) -> AbstractContextManager[None]:
    """Let a recurrent layer be differentiated in evaluation mode, which cuDNN refuses; torch's own kernels do it."""
    parts = model.modules() if torch.backends.cudnn.enabled and isinstance(model, nn.Module) else ()
    recurrent = any(isinstance(part, nn.RNNBase) for part in parts)
    return torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext()


def _map(change: Callable[[Tensor], Any], value: Any) -> Any:
    """Change the tensors of nested tuples and mappings."""
    if isinstance(value, Mapping):
        return {name: _map(change, part) for name, part in value.items()}
    return tuple(_map(change, part) for part in value) if isinstance(value, tuple) else change(value)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Iterate over the tensors of nested tuples and mappings."""
    if isinstance(value, (tuple, Mapping)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)
    else:
        yield value


def _flat(x: Any, shapes: Mapping[str, InputEntry]) -> dict[str, Any]:
    """Name the inputs as they were noted while recording: ``"0"``, ``"tokens"``, ``"0.tokens"``."""
    if not isinstance(x, Mapping):
        x = {str(place): value for place, value in enumerate(x if isinstance(x, tuple) else (x,))}
    elif shapes and all(name.startswith("0.") for name in shapes):  # the model takes one mapping
        x = {"0": x}
    found: dict[str, Any] = {}
    for name, value in x.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{inner}": part for inner, part in value.items()}
        else:
            found[str(name)] = value
    return found


def as_queries(x: Any, shapes: Mapping[str, InputEntry], device: torch.device, path: str | None = None) -> QueryBatch:
    """Turn the user's input, one query or a batch, into queries of the recorded shapes.

    Args:
        x: A tensor, a tuple of positional inputs, or a mapping of named inputs.
        shapes: The recorded inputs.
        device: Where the model is.
        path: Which of several tensors that the model returns is the prediction.

    Raises:
        QueryError: A shape or a dtype does not fit.
    """
    named = _flat(x, shapes)
    if not named:
        raise _bad_query(next(iter(shapes), "0"), "there is none", "nothing", shapes)
    singles = set()
    for name, value in list(named.items()):
        try:
            tensor = torch.as_tensor(value, device=getattr(value, "device", "cpu"))
        except (TypeError, ValueError, RuntimeError) as error:
            raise _bad_query(name, "it is not a tensor", type(value).__name__, shapes) from error
        tensor = tensor.detach().to(device)
        tensor = tensor.clone() if tensor.is_inference() else tensor  # autograd refuses those
        if name in shapes:
            wanted = shapes[name].shape
            kind = shapes[name].torch_dtype
            if tensor.is_floating_point() != kind.is_floating_point:
                raise _bad_query(name, "it has another dtype", tensor.dtype, shapes)
            single = _fits(tensor.shape, wanted)
            if (not single and not _fits(tensor.shape[1:], wanted)) or (
                tensor.ndim == len(wanted) + 1 and not len(tensor)
            ):
                raise _bad_query(name, "it has another shape", f"shape {tuple(tensor.shape)}", shapes)
            tensor = tensor.to(kind) if kind.is_floating_point else tensor
            singles.add(single)
        elif shapes:
            raise _bad_query(
                name, "no such input was seen while recording", f"{name!r} next to {', '.join(shapes)}", shapes
            )
        named[name] = tensor
    if len(singles) > 1:
        raise _bad_query(next(iter(named)), "some inputs have a batch dimension and some do not", "both", shapes)
    single = singles == {True}
    named = {name: tensor[None] if single else tensor for name, tensor in named.items()}
    if len({len(tensor) for tensor in named.values()}) != 1:
        lengths = [len(tensor) for tensor in named.values()]
        raise _bad_query(next(iter(named)), "the inputs hold different numbers of queries", lengths, shapes)
    nested: dict[str, Any] = {}
    for name, tensor in named.items():
        outer, _, inner = name.partition(".")
        if inner:
            nested.setdefault(outer, {})[inner] = tensor
        else:
            nested[outer] = tensor
    positional = all(name.isdigit() for name in nested)
    args, kwargs = (tuple(nested.values()), {}) if positional else ((), nested)
    return QueryBatch(args, kwargs, single=single, path=path)


def _fits(shape: Sequence[int], wanted: Sequence[int | None]) -> bool:
    return len(shape) == len(wanted) and all(w is None or s == w for s, w in zip(shape, wanted, strict=True))


def _bad_query(name: str, wrong: str, got: Any, shapes: Mapping[str, InputEntry]) -> QueryError:
    known = shapes.get(name)
    one = "a tensor" if known is None else f"one query of shape {known.shape}, or a batch of them"
    kind = "" if known is None else f", {known.dtype}"
    return QueryError(
        f"explaining query input {name!r}",
        wrong,
        got=got,
        expected=one + kind,
        source="the inputs seen while recording",
        fix="Prepare the query like the training examples",
    )
