"""Outputs of a language model: the log-probability of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pkexplain.explain.outputs import Index, Output, for_each, integers, no_output

__all__ = ["TokenLogProbability"]


@dataclass(frozen=True)
class TokenLogProbability(Output):
    """log p of a token, a span of tokens or a whole completion under a language model, in nats.

    For a causal model with one row of scores for each position, ``(queries, positions, vocabulary)``: the sum over j of
    log p(tokens[j] | everything before it), where the scores at position start − 1 + j of the input are for the token
    at position start + j. The input contains the span itself, as in training; only its last token may be omitted.

    Args:
        tokens: The token or tokens of the span, ``(span,)`` for all queries or ``(queries, span)``.
        start: Position in the input of the first token of the span, one for all queries or one for each; None if the
            span is the end of the input. Padding counts: left padding shifts every position.
        normalized: Whether to divide by the number of tokens.
        of: Which tensor of the model's output, see `Output`.
    """

    tokens: int | Sequence[int] | Sequence[Sequence[int]] | Tensor
    start: Index = None
    normalized: bool = False
    of: str | None = field(default=None, kw_only=True)
    per_query = ("tokens", "start")

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
        """Resolve the span's position, and check it and its tokens against the prediction."""
        name = f"output={type(self).__name__}(…)"
        if prediction.ndim != 3:
            expected = "shape (queries, positions, vocabulary)"
            raise no_output(name, "it needs scores for each position of a sequence", prediction, expected)
        queries, positions, vocabulary = prediction.shape
        try:
            tokens, starts = self._tokens(queries), self._starts(queries, positions)
        except (TypeError, ValueError, RuntimeError) as error:
            expected = f"integers, (span,) or ({queries}, span), and one start, or {queries} of them"
            raise no_output(name, f"the span does not fit the queries ({error})", prediction, expected) from error
        if ((tokens < 0) | (tokens >= vocabulary)).any():
            raise no_output(name, "there is no such token", prediction, f"tokens from 0 to {vocabulary - 1}")
        last = positions + 1 - tokens.shape[1]  # the scores at the last position are for a token after the input
        if ((starts < 1) | (starts > last)).any():
            wrong = (
                f"{tokens.shape[1]} token(s) from position {starts.tolist()[:5]} on are not predicted from the input"
            )
            expected = f"a start from 1 to {last}" if last > 0 else f"at most {positions} tokens"
            raise no_output(name, wrong, prediction, expected, "Count positions of the input from 0, padding included")
        return replace(self, tokens=tokens.to(prediction.device), start=starts.to(prediction.device))

    def _each(self, name: str) -> bool:
        tokens: Any = self.tokens
        return name != "tokens" or any(hasattr(span, "__len__") and getattr(span, "ndim", 1) for span in tokens)

    def _tokens(self, queries: int) -> Tensor:
        tokens = integers(self.tokens, "a token")
        tokens = tokens[None] if tokens.ndim == 0 else tokens
        if tokens.ndim > 2 or not tokens.shape[-1]:
            raise ValueError(f"tokens of shape {tuple(tokens.shape)}")
        return tokens.expand(queries, -1) if tokens.ndim == 1 else tokens.reshape(queries, tokens.shape[1])

    def _starts(self, queries: int, positions: int) -> Tensor:
        if self.start is None:
            return torch.full((queries,), positions - self._tokens(queries).shape[1], dtype=torch.int64, device="cpu")
        return for_each(integers(self.start, "a start"), queries)
