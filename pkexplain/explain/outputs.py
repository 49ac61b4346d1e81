"""What is explained: one number f(x) of the model's output, for each query.

An output is called with the model's prediction ``(queries, …)`` and returns ``(queries,)``. Classes and targets can be
one value for all queries, or one for each.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from pkexplain.errors import PkexplainError, QueryError

__all__ = [
    "Custom",
    "LogProbability",
    "Logit",
    "Margin",
    "Output",
    "Value",
    "as_output",
    "check_each",
    "for_each",
    "integers",
    "no_output",
    "settle_output",
]

Index = int | Sequence[int] | Tensor | None


class Output(ABC):
    """One number of the model's output for each query.

    A subclass is a frozen dataclass that defines what to compute and how to name it. Fields that may differ between
    queries are listed in ``per_query``; once resolved they are tensors whose first dimension is the queries.

    Attributes:
        of: Which tensor of the model's output is the prediction, by its path: ``"logits"``, ``"1"``, ``"heads.0"``. By
            default, and stated in the explanation: the one from which the training's loss was computed; where that is
            not known, the only floating-point tensor with one row per query, or of several the one named ``logits``.
    """

    of: str | None = None
    per_query: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def __call__(self, prediction: Tensor) -> Tensor:
        """Compute f, ``(queries,)``, from the prediction ``(queries, …)``."""

    @abstractmethod
    def names(self, queries: int) -> list[str]:
        """Name the output of each query, for example ``logit[3]``."""

    def settle(self, prediction: Tensor) -> Output:
        """Resolve what depends on the final prediction (the predicted class), and check the rest against its shape.

        Raises:
            QueryError: The output does not exist in this prediction.
        """
        return self

    def select(self, positions: Tensor) -> Output:
        """Keep the queries at ``positions``."""
        output: Any = self
        given = {name: getattr(output, name) for name in self.per_query}
        values = {n: torch.as_tensor(value, device=getattr(value, "device", "cpu")) for n, value in given.items()}
        return replace(output, **{name: value[positions.to(value.device)] for name, value in values.items()})

    def given_for(self, places: Tensor, queries: int) -> Output:
        """Keep what the user gave for the queries at ``places``, before `settle`; one value for all stays as it is.

        Raises:
            QueryError: There is neither one value nor one for each query.
        """
        output: Any = self
        given = {name: getattr(output, name) for name in self.per_query}
        each = {n: v for n, v in given.items() if hasattr(v, "__len__") and getattr(v, "ndim", 1) and self._each(n)}
        for name, values in each.items():
            if len(values) != queries:
                wrong, fix = f"there must be one of {name} for each query", "Pass one for each query, or one for all"
                got, source = f"{len(values)} for {queries} queries", "the number of queries"
                raise QueryError(f"output={type(self).__name__}(…)", wrong, got, queries, source, fix)
        return replace(output, **{name: [values[int(at)] for at in places] for name, values in each.items()})

    def _each(self, name: str) -> bool:
        """Whether a sequence in a field that may differ between queries holds one value for each of them."""
        return True


@dataclass(frozen=True)
class _OfClass(Output):
    """An output of one class of ``(queries, classes)``.

    Args:
        index: The class, one for all queries or one for each; None for the class predicted by the final model.
        of: Which tensor of the model's output, see `Output`.
    """

    index: Index = None
    of: str | None = field(default=None, kw_only=True)
    per_query = ("index",)

    @property
    def _label(self) -> str:
        return {"LogProbability": "log_probability"}.get(type(self).__name__, type(self).__name__.lower())

    def names(self, queries: int) -> list[str]:
        """Name the output of each query."""
        return [f"{self._label}[{int(i)}]" for i in self._tensor(queries)]

    def settle(self, prediction: Tensor) -> Output:
        """Use the predicted class if none was given; check the class against the prediction."""
        name = f"output={type(self).__name__}({'' if self.index is None else self.index})"
        if prediction.ndim != 2:
            wrong, expected = "it needs one row of classes for each query", "shape (queries, classes)"
            fix = _FOR_SEQUENCES if prediction.ndim == 3 else _FOR_OTHERS
            raise no_output(name, wrong, prediction, expected, fix)
        if self.index is None:
            return replace(self, index=prediction.argmax(1))
        try:
            index = self._tensor(len(prediction))
            if index.ndim > 1:
                raise ValueError("a class is one number")
        except (TypeError, ValueError, RuntimeError) as error:
            expected = f"one class, or {len(prediction)} of them"
            raise no_output(name, "the classes do not fit the queries", prediction, expected) from error
        if ((index < 0) | (index >= prediction.shape[1])).any():
            raise no_output(name, "there is no such class", prediction, f"a class from 0 to {prediction.shape[1] - 1}")
        return replace(self, index=index.to(prediction.device))

    def _tensor(self, queries: int) -> Tensor:
        return for_each(integers(self.index, "a class"), queries)

    def _of(self, prediction: Tensor) -> Tensor:
        return prediction.gather(1, self._tensor(len(prediction)).to(prediction.device)[:, None])[:, 0]


class Logit(_OfClass):
    """y_c, the class score before the softmax."""

    def __call__(self, prediction: Tensor) -> Tensor:
        """Compute y_c, ``(queries,)``."""
        return self._of(prediction)


class LogProbability(_OfClass):
    """log p_c, with p the softmax of the scores, in nats."""

    def __call__(self, prediction: Tensor) -> Tensor:
        """Compute log p_c, ``(queries,)``."""
        return self._of(prediction.log_softmax(1))


class Margin(_OfClass):
    """log p_c − log(1 − p_c): the log-odds of a class against all others (Park et al. 2023, TRAK), in nats."""

    def settle(self, prediction: Tensor) -> Output:
        """Use the predicted class if none was given; check that there are others."""
        if prediction.ndim == 2 and prediction.shape[1] == 1:
            wrong, fix = "a margin needs a second class", "For a model with one number, pass output=pkexplain.Value()"
            raise no_output(f"output=Margin({self.index})", wrong, prediction, "two classes or more", fix)
        return super().settle(prediction)

    def __call__(self, prediction: Tensor) -> Tensor:
        """Compute y_c − logsumexp of the other scores, ``(queries,)``."""
        index = self._tensor(len(prediction)).to(prediction.device)
        others = prediction.scatter(1, index[:, None], float("-inf"))
        return self._of(prediction) - others.logsumexp(1)


@dataclass(frozen=True)
class Value(Output):
    """y_j, one number of the prediction, for regression.

    Args:
        index: The position in a query's flattened prediction.
        of: Which tensor of the model's output, see `Output`.
    """

    index: int = 0
    of: str | None = field(default=None, kw_only=True)

    def __call__(self, prediction: Tensor) -> Tensor:
        """Return the value, ``(queries,)``."""
        return prediction.reshape(len(prediction), -1)[:, self.index]

    def names(self, queries: int) -> list[str]:
        """Name the output of each query."""
        return [f"value[{self.index}]"] * queries

    def settle(self, prediction: Tensor) -> Output:
        """Check that there is such a value."""
        name, size = f"output=Value({self.index})", prediction[0].numel()
        try:
            index = operator.index(self.index)
        except TypeError as error:
            fix = "Pass one position for all queries; for one in each, a function of the prediction"
            raise no_output(name, "the position is not an integer", prediction, f"0 to {size - 1}", fix) from error
        if not 0 <= index < size:
            raise no_output(name, "there is no such value", prediction, f"0 to {size - 1}")
        return self


@dataclass(frozen=True)
class Custom(Output):
    """Any function of the prediction.

    Args:
        function: Called with the prediction ``(queries, …)``; returns one number for each query, ``(queries,)``, which
            must not depend on the other queries.
        of: Which tensor of the model's output, see `Output`.
    """

    function: Callable[[Tensor], Tensor]
    of: str | None = field(default=None, kw_only=True)

    def __call__(self, prediction: Tensor) -> Tensor:
        """Compute the numbers, ``(queries,)``."""
        return self.function(prediction)

    def names(self, queries: int) -> list[str]:
        """Name the output of each query."""
        return [getattr(self.function, "__name__", type(self.function).__name__)] * queries

    def settle(self, prediction: Tensor) -> Output:
        """Check that the function returns one number for each query."""
        check_each(self, prediction, f"output={self.names(1)[0]}")
        return self


def settle_output(output: Output | Callable[[Tensor], Tensor] | None, prediction: Tensor) -> Output:
    """Check the output to be explained against the final prediction.

    Args:
        output: An output or any function of the prediction; None for the logit of the predicted class, or for the
            prediction itself if it is a single number.
        prediction: The model's final prediction, ``(queries, …)``.

    Raises:
        QueryError: It is not an output, or does not fit this prediction.
    """
    if output is None:
        output = Value() if prediction[0].numel() == 1 else Logit()
    settled = as_output(output).settle(prediction)
    found = check_each(settled, prediction, f"output={type(settled).__name__}")
    if not found.isfinite().all():
        bad = int((~found.isfinite()).nonzero()[0])
        wrong, fix = f"it is {found[bad]:g} for query {bad}", "Choose an output that is finite there"
        raise no_output(f"output={settled.names(len(prediction))[bad]}", wrong, prediction, "finite numbers", fix)
    return settled


def check_each(output: Output, prediction: Tensor, name: str) -> Tensor:
    """Compute a settled output, and check that it is one real number of each query alone.

    Raises:
        QueryError: It is something else.
    """
    each = f"a floating-point tensor of shape ({len(prediction)},)"
    fix = "Return one number for each row of the prediction, which comes as (queries, …)"
    places = sorted({0, len(prediction) - 1})
    try:
        found: Any = output(prediction)
        real = isinstance(found, Tensor) and found.is_floating_point()
        if not real or found.shape != prediction.shape[:1]:
            got = f"{type(found).__name__} of shape {tuple(getattr(found, 'shape', ()))}"
            got += f", {found.dtype}" if isinstance(found, Tensor) else ""
            raise no_output(name, f"it does not return one number for each query but a {got}", prediction, each, fix)
        parts = [torch.tensor([place], device="cpu") for place in places]
        alone = torch.stack([output.select(part)(prediction[part.to(prediction.device)])[0] for part in parts])
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        if isinstance(error, (PkexplainError, torch.OutOfMemoryError)):
            raise
        wrong = f"it fails ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        raise no_output(name, wrong, prediction, each, fix) from error
    there = found[places].detach()
    if not torch.allclose(alone.detach(), there, rtol=1e-3, atol=1e-5 * float(there.abs().max()), equal_nan=True):
        wrong = "its number for a query depends on the other queries of the batch"
        raise no_output(name, wrong, prediction, "the same number for a query alone", fix)
    return found


def as_output(output: Output | Callable[[Tensor], Tensor]) -> Output:
    """Turn a function of the prediction into an output; an output is returned unchanged.

    Raises:
        QueryError: It is neither.
    """
    if isinstance(output, Output):
        return output
    if callable(output) and not isinstance(output, type):
        return Custom(output)
    raise QueryError(
        "output=…",
        "this is not an output",
        got=repr(output),
        expected="Logit(c), LogProbability(c), Margin(c), TokenLogProbability(tokens), Loss(target), Value(j), or "
        "a function of the prediction",
        source="pkexplain.explain.outputs",
        fix="For a class score, pass output=pkexplain.Logit(c)",
    )


def integers(numbers: Any, what: str) -> Tensor:
    """Turn classes, tokens or positions into a tensor of integers.

    Raises:
        TypeError: They are not integers.
    """
    tensor = torch.as_tensor(numbers, device=getattr(numbers, "device", "cpu"))
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{what} is an integer")
    return tensor.long()


def for_each(values: Tensor, queries: int) -> Tensor:
    """Repeat a single value for every query, or check that there is one for each."""
    return values.expand(queries) if values.ndim == 0 else values.reshape(queries, *values.shape[1:])


_FOR_OTHERS = "Choose an output that this prediction has"
_FOR_SEQUENCES = (
    "For the tokens of a language model, pass output=pkexplain.TokenLogProbability(tokens); for anything else, a "
    "function of the prediction"
)


def no_output(asked: str, wrong: str, prediction: Tensor, expected: str, fix: str = _FOR_OTHERS) -> QueryError:
    """Make the error for an output that does not fit the prediction."""
    got = f"a prediction of shape {tuple(prediction.shape)}"
    return QueryError(asked, wrong, got=got, expected=expected, source="the model's prediction", fix=fix)
