"""What is explained: one number f(x) of the model's output, for each query.

An output is called with the model's prediction ``(queries, …)`` and returns ``(queries,)``. Where a class or a target
may differ from query to query it can be given as one value for all, or as one for each query.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

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
    "TokenLogProbability",
    "Value",
    "as_output",
    "settle_output",
]

Index = int | Sequence[int] | Tensor | None


class Output(ABC):
    """A number of the model's output, one for each query."""

    @abstractmethod
    def __call__(self, prediction: Tensor) -> Tensor:
        """Compute f, ``(queries,)``, from the prediction ``(queries, …)``."""

    @abstractmethod
    def names(self, queries: int) -> list[str]:
        """Name the output of each query, for example ``logit[3]``."""

    def settle(self, prediction: Tensor) -> Output:
        """Fix what depends on the final prediction (the predicted class), and check the rest against its shape.

        Raises:
            QueryError: The output does not exist in this prediction.
        """
        return self

    def select(self, positions: Tensor) -> Output:
        """Keep the queries at ``positions``."""
        return self


@dataclass(frozen=True)
class _OfClass(Output):
    """An output of one class of ``(queries, classes)``.

    Args:
        index: The class, one for all queries or one for each; None for the class that the final model predicts.
    """

    index: Index = None

    @property
    def _label(self) -> str:
        return {"LogProbability": "log_probability"}.get(type(self).__name__, type(self).__name__.lower())

    def names(self, queries: int) -> list[str]:
        """Name the output of each query."""
        return [f"{self._label}[{int(i)}]" for i in self._tensor(queries)]

    def settle(self, prediction: Tensor) -> Output:
        """Take the predicted class where none was given; check the class against the prediction."""
        name = f"output={type(self).__name__}({'' if self.index is None else self.index})"
        if prediction.ndim != 2:
            wrong, expected = "it needs one row of classes for each query", "shape (queries, classes)"
            fix = _FOR_SEQUENCES if prediction.ndim == 3 else _FOR_OTHERS
            raise _no_output(name, wrong, prediction, expected, fix)
        if self.index is None:
            return replace(self, index=prediction.argmax(1))
        try:
            index = self._tensor(len(prediction))
        except (TypeError, ValueError, RuntimeError) as error:
            expected = f"one class, or {len(prediction)} of them"
            raise _no_output(name, "the classes do not fit the queries", prediction, expected) from error
        if ((index < 0) | (index >= prediction.shape[1])).any():
            raise _no_output(name, "there is no such class", prediction, f"a class from 0 to {prediction.shape[1] - 1}")
        return replace(self, index=index.to(prediction.device))

    def select(self, positions: Tensor) -> Output:
        """Keep the queries at ``positions``."""
        return replace(self, index=torch.as_tensor(self.index)[positions])

    def _tensor(self, queries: int) -> Tensor:
        index = _whole(self.index, "a class")
        return index.expand(queries) if index.ndim == 0 else index.reshape(queries)

    def _of(self, prediction: Tensor) -> Tensor:
        return prediction.gather(1, self._tensor(len(prediction)).to(prediction.device)[:, None])[:, 0]


class Logit(_OfClass):
    """y_c, the class score before the softmax."""

    def __call__(self, prediction: Tensor) -> Tensor:
        """Compute y_c, ``(queries,)``."""
        return self._of(prediction)


class LogProbability(_OfClass):
    """log p_c, of the softmax of the scores, in nats."""

    def __call__(self, prediction: Tensor) -> Tensor:
        """Compute log p_c, ``(queries,)``."""
        return self._of(prediction.log_softmax(1))


class Margin(_OfClass):
    """log p_c − log(1 − p_c): the score of a class against all others together (Park et al. 2023, TRAK), in nats."""

    def __call__(self, prediction: Tensor) -> Tensor:
        """Compute y_c − logsumexp of the other scores, ``(queries,)``."""
        index = self._tensor(len(prediction)).to(prediction.device)
        others = prediction.scatter(1, index[:, None], float("-inf"))
        return self._of(prediction) - others.logsumexp(1)


@dataclass(frozen=True)
class TokenLogProbability(Output):
    """log p of a token, a span of tokens or a whole completion under a language model, in nats.

    For a causal model with one row of scores for each position, ``(queries, positions, vocabulary)``: the sum over j of
    log p(tokens[j] | everything before it), where the scores at position start − 1 + j of the input are for the token
    at position start + j. The input holds the span itself, as in training; only its last token may be left out of it.

    Args:
        tokens: The token or tokens of the span, ``(span,)`` for all queries or ``(queries, span)``.
        start: Position in the input of the first token of the span, one for all queries or one for each; None where the
            span is the end of the input. Padding counts: with padding on the left every position is so much higher.
        normalized: Divide by the number of tokens.
    """

    tokens: int | Sequence[int] | Sequence[Sequence[int]] | Tensor
    start: Index = None
    normalized: bool = False

    def __call__(self, prediction: Tensor) -> Tensor:
        """Compute the log-probabilities, ``(queries,)``."""
        queries, positions = prediction.shape[:2]
        tokens = self._tokens(queries).to(prediction.device)
        before = self._starts(queries, positions).to(prediction.device)[:, None] - 1
        rows = torch.arange(queries, device=prediction.device)[:, None]
        scores = prediction[rows, before + torch.arange(tokens.shape[1], device=prediction.device)]
        found = scores.log_softmax(2).gather(2, tokens[:, :, None])[:, :, 0]
        return found.mean(1) if self.normalized else found.sum(1)

    def names(self, queries: int) -> list[str]:
        """Name the output of each query, for example ``log_probability[token 42 at 5]``."""
        kind = "mean_log_probability" if self.normalized else "log_probability"
        tokens = self._tokens(queries)
        span = tokens.shape[1]
        starts = [-span] * queries if self.start is None else self._starts(queries, 0).tolist()
        if span == 1:
            return [f"{kind}[token {int(t)} at {s}]" for t, s in zip(tokens, starts, strict=True)]
        return [f"{kind}[tokens {s}:{s + span or ''}]" for s in starts]

    def settle(self, prediction: Tensor) -> Output:
        """Fix where the span lies, and check it and its tokens against the prediction."""
        name = f"output={type(self).__name__}(…)"
        if prediction.ndim != 3:
            expected = "shape (queries, positions, vocabulary)"
            raise _no_output(name, "it needs scores for each position of a sequence", prediction, expected)
        queries, positions, vocabulary = prediction.shape
        try:
            tokens, starts = self._tokens(queries), self._starts(queries, positions)
        except (TypeError, ValueError, RuntimeError) as error:
            expected = f"whole numbers, (span,) or ({queries}, span), and one start, or {queries} of them"
            raise _no_output(name, f"the span does not fit the queries ({error})", prediction, expected) from error
        if ((tokens < 0) | (tokens >= vocabulary)).any():
            raise _no_output(name, "there is no such token", prediction, f"tokens from 0 to {vocabulary - 1}")
        last = positions + 1 - tokens.shape[1]  # the scores at the last position are for a token after the input
        if ((starts < 1) | (starts > last)).any():
            wrong = (
                f"{tokens.shape[1]} token(s) from position {starts.tolist()[:5]} on are not predicted from the input"
            )
            expected = f"a start from 1 to {last}" if last > 0 else f"at most {positions} tokens"
            raise _no_output(name, wrong, prediction, expected, "Count positions of the input from 0, padding included")
        return replace(self, tokens=tokens.to(prediction.device), start=starts.to(prediction.device))

    def select(self, positions: Tensor) -> Output:
        """Keep the queries at ``positions``."""
        tokens, start = torch.as_tensor(self.tokens), torch.as_tensor(self.start)
        return replace(self, tokens=tokens[positions.to(tokens.device)], start=start[positions.to(start.device)])

    def _tokens(self, queries: int) -> Tensor:
        tokens = _whole(self.tokens, "a token")
        tokens = tokens[None] if tokens.ndim == 0 else tokens
        if tokens.ndim > 2 or not tokens.shape[-1]:
            raise ValueError(f"tokens of shape {tuple(tokens.shape)}")
        return tokens.expand(queries, -1) if tokens.ndim == 1 else tokens.reshape(queries, tokens.shape[1])

    def _starts(self, queries: int, positions: int) -> Tensor:
        if self.start is None:
            return torch.full((queries,), positions - self._tokens(queries).shape[1])
        starts = _whole(self.start, "a start")
        return starts.expand(queries) if starts.ndim == 0 else starts.reshape(queries)


@dataclass(frozen=True)
class Loss(Output):
    """The query's own loss.

    Args:
        target: The query's target: a class, or one target for each query, ``(queries, …)``.
        function: Takes the prediction and the targets of a batch, returns the sum of the losses with
            ``reduction="sum"`` and one for each with ``reduction="none"``, as torch's own losses do.
    """

    target: Any
    function: Callable[..., Tensor] = F.cross_entropy

    def __call__(self, prediction: Tensor) -> Tensor:
        """Compute the losses, ``(queries,)``."""
        target = self._tensor(len(prediction)).to(prediction.device)
        losses = self.function(prediction, target, reduction="none")
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
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            raise _no_output(
                "output=Loss(…)", f"the loss failed ({error})", prediction, "a target it can use"
            ) from error
        return settled

    def select(self, positions: Tensor) -> Output:
        """Keep the queries at ``positions``."""
        return replace(self, target=self.target[positions.to(self.target.device)])

    def _tensor(self, queries: int) -> Tensor:
        target = torch.as_tensor(self.target)
        return target.expand(queries) if target.ndim == 0 else target.reshape(queries, *target.shape[1:])


@dataclass(frozen=True)
class Value(Output):
    """y_j, one number of the prediction, for regression.

    Args:
        index: Which of the numbers of a query's prediction, flattened.
    """

    index: int = 0

    def __call__(self, prediction: Tensor) -> Tensor:
        """Take the value, ``(queries,)``."""
        return prediction.reshape(len(prediction), -1)[:, self.index]

    def names(self, queries: int) -> list[str]:
        """Name the output of each query."""
        return [f"value[{self.index}]"] * queries

    def settle(self, prediction: Tensor) -> Output:
        """Check that the value is there."""
        size = prediction[0].numel()
        if not 0 <= self.index < size:
            raise _no_output(f"output=Value({self.index})", "there is no such value", prediction, f"0 to {size - 1}")
        return self


@dataclass(frozen=True)
class Custom(Output):
    """Any function of the prediction.

    Args:
        function: Takes the prediction ``(queries, …)`` and returns one number for each query, ``(queries,)``, treating
            every query alone.
    """

    function: Callable[[Tensor], Tensor]

    def __call__(self, prediction: Tensor) -> Tensor:
        """Compute the numbers, ``(queries,)``."""
        return self.function(prediction)

    def names(self, queries: int) -> list[str]:
        """Name the output of each query."""
        return [getattr(self.function, "__name__", type(self.function).__name__)] * queries

    def settle(self, prediction: Tensor) -> Output:
        """Check that the function gives one number for each query."""
        found = self.function(prediction)
        if not isinstance(found, Tensor) or found.shape != prediction.shape[:1]:
            got = f"{type(found).__name__} of shape {tuple(getattr(found, 'shape', ()))}"
            wrong = f"the function does not give one number for each query but a {got}"
            raise _no_output(f"output={self.names(1)[0]}", wrong, prediction, f"shape ({len(prediction)},)")
        return self


def settle_output(output: Output | Callable[[Tensor], Tensor] | None, prediction: Tensor) -> Output:
    """Settle what is to be explained on the final prediction.

    Args:
        output: An output or any function of the prediction; None for the logit of the predicted class, or for the one
            number where the prediction is no more.
        prediction: The model's final prediction, ``(queries, …)``.

    Raises:
        QueryError: It is no output, or not one of this prediction.
    """
    if output is None:
        output = Value() if prediction[0].numel() == 1 else Logit()
    return as_output(output).settle(prediction)


def as_output(output: Output | Callable[[Tensor], Tensor]) -> Output:
    """Take an output or any function of the prediction for an output.

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


def _whole(numbers: Any, what: str) -> Tensor:
    tensor = torch.as_tensor(numbers)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{what} is a whole number")
    return tensor.long()


_FOR_OTHERS = "Choose an output that this prediction has"
_FOR_SEQUENCES = (
    "For the tokens of a language model, pass output=pkexplain.TokenLogProbability(tokens); for anything else, a "
    "function of the prediction"
)


def _no_output(asked: str, wrong: str, prediction: Tensor, expected: str, fix: str = _FOR_OTHERS) -> QueryError:
    got = f"a prediction of shape {tuple(prediction.shape)}"
    return QueryError(asked, wrong, got=got, expected=expected, source="the model's prediction", fix=fix)
