"""What is explained: one number f(x) of the model's output, for each query.

An output is called with the model's prediction ``(queries, …)`` and returns ``(queries,)``. Classes and targets can be
one value for all queries, or one for each.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from pkexplain.errors import QueryError

__all__ = [
    "Custom",
    "LogProbability",
    "Logit",
    "Loss",
    "Margin",
    "Output",
    "Value",
    "as_output",
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
    """

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


@dataclass(frozen=True)
class _OfClass(Output):
    """An output of one class of ``(queries, classes)``.

    Args:
        index: The class, one for all queries or one for each; None for the class predicted by the final model.
    """

    index: Index = None
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

    def __call__(self, prediction: Tensor) -> Tensor:
        """Compute y_c − logsumexp of the other scores, ``(queries,)``."""
        index = self._tensor(len(prediction)).to(prediction.device)
        others = prediction.scatter(1, index[:, None], float("-inf"))
        return self._of(prediction) - others.logsumexp(1)


@dataclass(frozen=True)
class Loss(Output):
    """The query's own loss.

    Args:
        target: The query's target: a class, or one target for each query, ``(queries, …)``.
        function: Called with the prediction and the targets of a batch; returns the sum of the losses with
            ``reduction="sum"`` and one for each query with ``reduction="none"``, like torch's own losses.
    """

    target: Any
    function: Callable[..., Tensor] = F.cross_entropy
    per_query = ("target",)

    def __call__(self, prediction: Tensor) -> Tensor:
        """Compute the losses, ``(queries,)``."""
        target = self._tensor(len(prediction)).to(prediction.device)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Using a target size")  # torch's own word for broadcasting
            losses = self.function(prediction, target, reduction="none")
        if len(losses) != len(prediction) or losses.numel() > max(prediction.numel(), target.numel()):
            raise ValueError(f"the prediction and the target were broadcast to losses of shape {tuple(losses.shape)}")
        return losses.reshape(len(prediction), -1).mean(1)

    def names(self, queries: int) -> list[str]:
        """Name the output of each query."""
        targets = self._tensor(queries)
        return [f"loss[{t.item():g}]" if t.numel() == 1 else "loss" for t in targets]

    def settle(self, prediction: Tensor) -> Output:
        """Check the targets against the prediction."""
        try:
            settled = replace(self, target=self._tensor(len(prediction)))
            settled(prediction)
        except (TypeError, ValueError, RuntimeError, IndexError, UserWarning) as error:
            raise no_output(
                "output=Loss(…)", f"the loss failed ({error})", prediction, "a target it can use"
            ) from error
        return settled

    def _tensor(self, queries: int) -> Tensor:
        return for_each(torch.as_tensor(self.target, device=getattr(self.target, "device", "cpu")), queries)


@dataclass(frozen=True)
class Value(Output):
    """y_j, one number of the prediction, for regression.

    Args:
        index: The position in a query's flattened prediction.
    """

    index: int = 0

    def __call__(self, prediction: Tensor) -> Tensor:
        """Return the value, ``(queries,)``."""
        return prediction.reshape(len(prediction), -1)[:, self.index]

    def names(self, queries: int) -> list[str]:
        """Name the output of each query."""
        return [f"value[{self.index}]"] * queries

    def settle(self, prediction: Tensor) -> Output:
        """Check that there is such a value."""
        size = prediction[0].numel()
        if not 0 <= self.index < size:
            raise no_output(f"output=Value({self.index})", "there is no such value", prediction, f"0 to {size - 1}")
        return self


@dataclass(frozen=True)
class Custom(Output):
    """Any function of the prediction.

    Args:
        function: Called with the prediction ``(queries, …)``; returns one number for each query, ``(queries,)``, which
            must not depend on the other queries.
    """

    function: Callable[[Tensor], Tensor]

    def __call__(self, prediction: Tensor) -> Tensor:
        """Compute the numbers, ``(queries,)``."""
        return self.function(prediction)

    def names(self, queries: int) -> list[str]:
        """Name the output of each query."""
        return [getattr(self.function, "__name__", type(self.function).__name__)] * queries

    def settle(self, prediction: Tensor) -> Output:
        """Check that the function returns one number for each query."""
        found = self.function(prediction)
        if not isinstance(found, Tensor) or found.shape != prediction.shape[:1]:
            got = f"{type(found).__name__} of shape {tuple(getattr(found, 'shape', ()))}"
            wrong = f"the function does not return one number for each query but a {got}"
            raise no_output(f"output={self.names(1)[0]}", wrong, prediction, f"shape ({len(prediction)},)")
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
    return as_output(output).settle(prediction)


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
