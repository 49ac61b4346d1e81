"""What goes into a model and what comes out: example ids, input shapes, queries, the loss derivative."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pkexplain.errors import ExampleIdError, QueryError, message

__all__ = ["InputShapes", "LossDerivatives", "QueryBatch", "as_queries", "check_ids", "first_tensor"]


def check_ids(
    ids: Sequence[int] | Tensor, num_examples: int, asked: str = "recorder.step(ids)", gone: Sequence[int] = ()
) -> Tensor:
    """Take example ids as a tensor of row numbers, ``(batch,)``.

    Args:
        ids: What was given.
        num_examples: How many examples there are.
        asked: What they were given to.
        gone: Examples that were withdrawn.

    Raises:
        ExampleIdError: They are not whole numbers in one dimension, in range and without repeats.
    """

    def bad(wrong: str, got: Any, fix: str) -> ExampleIdError:
        expected = f"different whole numbers from 0 to {num_examples - 1}"
        return ExampleIdError(message(asked, wrong, got=got, expected=expected, source=f"{num_examples=}", fix=fix))

    try:
        tensor = torch.as_tensor(ids if isinstance(ids, Tensor) or hasattr(ids, "dtype") else list(ids))
    except (TypeError, ValueError, RuntimeError) as error:
        raise bad("the ids are not numbers", repr(ids)[:80], "Let the data loader return each row number") from error
    if tensor.ndim != 1 or len(tensor) == 0:
        got = f"shape {tuple(tensor.shape)}"
        raise bad("the ids must be a list with one id per example", got, "Give one id for each row of the batch")
    if tensor.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise bad("the ids are not whole numbers", tensor.dtype, "Convert them to integers")
    tensor = tensor.long()
    outside = tensor[(tensor < 0) | (tensor >= num_examples)]
    if len(outside):
        fix = "Count rows of the training set from 0, and give num_examples=len(train)"
        raise bad("ids are out of range", outside[:5].tolist(), fix)
    withdrawn = tensor[torch.isin(tensor, torch.tensor(gone, dtype=torch.long))] if len(gone) else ()
    if len(withdrawn):
        raise bad("these examples were withdrawn from the run", list(map(int, withdrawn[:5])), "Train without them")
    values, counts = tensor.unique(return_counts=True)
    if len(values) < len(tensor):
        fix = "Put an example into a batch once, or into two batches with accumulate=True"
        raise bad("ids are repeated in one batch", values[counts > 1][:5].tolist(), fix)
    return tensor


def first_tensor(output: Any) -> Tensor | None:
    """Find the tensor of a model's output that is the prediction: the output, its ``logits``, or the first tensor."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return next((part for part in parts if isinstance(part, Tensor) and part.is_floating_point()), None)


class LossDerivatives:
    """Watches ∂(loss)/∂y of the model's output, of the loss as it was back-propagated (a mean's 1/batch included).

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        """Remember the model; nothing is watched yet."""
        self._model = model

    @contextmanager
    def noting(self, batch: Any) -> Iterator[None]:
        """Set ``batch.derivatives``, ``(batch,)``: each example's loss derivative along its unit direction u_i.

        For an output of one number u_i is +1 and the derivative has a sign; for several, u_i is the direction in which
        the loss falls fastest and the derivative is −‖∂ℓ_i/∂y_i‖.
        """

        def arrive(gradient: Tensor) -> None:
            flat = gradient.detach().flatten(1) if gradient.ndim > 1 else gradient.detach()[:, None]
            single = flat.shape[1] == 1
            here = flat[:, 0] if single else -flat.norm(dim=1)
            before = batch.derivatives
            batch.derivatives = here if before is None else (before + here if single else -torch.hypot(before, here))

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensor = first_tensor(output)
            if tensor is not None and tensor.requires_grad and tensor.ndim and len(tensor) == len(batch.ids):
                tensor.register_hook(arrive)

        handle = self._model.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()


class InputShapes:
    """Notes the shapes and types of the model's tensor inputs, without the batch; a size that varies becomes None.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        """Remember the model; nothing is noted yet."""
        self._model = model
        self.seen: dict[str, dict[str, Any]] = {}

    @contextmanager
    def noting(self, examples: int) -> Iterator[None]:
        """Note the inputs of every forward pass with ``examples`` rows."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            named = {**{str(i): value for i, value in enumerate(args)}, **kwargs}
            for name, value in named.items():
                if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != examples:
                    continue
                shape = list(value.shape[1:])
                known = self.seen.get(name)
                if known is not None and len(known["shape"]) == len(shape):
                    shape = [a if a == b else None for a, b in zip(known["shape"], shape, strict=True)]
                self.seen[name] = {"shape": shape, "dtype": str(value.dtype).removeprefix("torch.")}

        handle = self._model.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


class QueryBatch:
    """Queries for one model: positional or named tensors that lead with the same number of rows.

    Args:
        args: Positional inputs, each with a batch dimension.
        kwargs: Named inputs, each with a batch dimension.
        single: Whether the user gave one query without a batch dimension.
    """

    def __init__(self, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], *, single: bool) -> None:
        """Keep the inputs."""
        self.args, self.kwargs, self.single = args, kwargs, single

    def __len__(self) -> int:
        """Return the number of queries."""
        return len(next(iter((*self.args, *self.kwargs.values()))))

    def select(self, positions: Tensor) -> QueryBatch:
        """Keep the queries at ``positions``."""
        args = tuple(value[positions.to(value.device)] for value in self.args)
        kwargs = {name: value[positions.to(value.device)] for name, value in self.kwargs.items()}
        return QueryBatch(args, kwargs, single=self.single)

    def row(self, position: int) -> Any:
        """Return one query as the user would give it."""
        if not self.kwargs:
            args = tuple(value[position] for value in self.args)
            return args[0] if len(args) == 1 else args
        return {name: value[position] for name, value in self.kwargs.items()}

    def run(self, model: nn.Module) -> Tensor:
        """Run the model and return its prediction, ``(queries, …)``.

        Raises:
            QueryError: The model gave no tensor with one row per query.
        """
        output = first_tensor(model(*self.args, **self.kwargs))
        if output is None or output.ndim == 0 or len(output) != len(self):
            raise QueryError(
                message(
                    "explaining a query",
                    "the model's output does not have one row per query",
                    got="no tensor" if output is None else f"shape {tuple(output.shape)}",
                    expected=f"{len(self)} rows",
                    source="the number of queries",
                    fix="Give the model a forward pass that keeps the batch as the first dimension",
                )
            )
        return output


def as_queries(x: Any, shapes: Mapping[str, Mapping[str, Any]], device: torch.device) -> QueryBatch:
    """Take what the user gave for queries, one or a batch, in the shapes that were recorded.

    Args:
        x: A tensor, a tuple of positional inputs, or a mapping of named inputs.
        shapes: What `InputShapes` noted.
        device: Where the model is.

    Raises:
        QueryError: A shape or a type does not fit.
    """
    if isinstance(x, Mapping):
        named = {str(name): value for name, value in x.items()}
    else:
        named = {str(i): value for i, value in enumerate(x if isinstance(x, tuple) else (x,))}
    if not named:
        raise _bad_query(next(iter(shapes), "0"), "there is none", "nothing", shapes)
    singles = set()
    for name, value in list(named.items()):
        try:
            tensor = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise _bad_query(name, "it is not a tensor", type(value).__name__, shapes) from error
        tensor = tensor.to(device)
        if name in shapes:
            wanted = shapes[name]["shape"]
            kind = getattr(torch, shapes[name]["dtype"])
            if tensor.is_floating_point() != kind.is_floating_point:
                raise _bad_query(name, "it is of another type", tensor.dtype, shapes)
            single = _fits(tensor.shape, wanted)
            if (not single and not _fits(tensor.shape[1:], wanted)) or (
                tensor.ndim == len(wanted) + 1 and not len(tensor)
            ):
                raise _bad_query(name, "it has another shape", f"shape {tuple(tensor.shape)}", shapes)
            tensor = tensor.to(kind) if kind.is_floating_point else tensor
            singles.add(single)
        elif shapes:
            raise _bad_query(
                name, "no such input was seen while recording", f"{name!r} beside {', '.join(shapes)}", shapes
            )
        named[name] = tensor
    if len(singles) > 1:
        raise _bad_query(next(iter(named)), "some inputs have a batch dimension and some have not", "both", shapes)
    single = singles == {True}
    named = {name: tensor[None] if single else tensor for name, tensor in named.items()}
    if len({len(tensor) for tensor in named.values()}) != 1:
        lengths = [len(tensor) for tensor in named.values()]
        raise _bad_query(next(iter(named)), "the inputs hold different numbers of queries", lengths, shapes)
    if isinstance(x, Mapping):
        return QueryBatch((), named, single=single)
    return QueryBatch(tuple(named.values()), {}, single=single)


def _fits(shape: Sequence[int], wanted: Sequence[int | None]) -> bool:
    return len(shape) == len(wanted) and all(w is None or s == w for s, w in zip(shape, wanted, strict=True))


def _bad_query(name: str, wrong: str, got: Any, shapes: Mapping[str, Mapping[str, Any]]) -> QueryError:
    known = shapes.get(name)
    one = "a tensor" if known is None else f"one query of shape {tuple(known['shape'])}, or a batch of them"
    kind = "" if known is None else f", {known['dtype']}"
    return QueryError(
        message(
            f"explaining query input {name!r}",
            wrong,
            got=got,
            expected=one + kind,
            source="the inputs seen while recording",
            fix="Prepare the query as the training examples were",
        )
    )
