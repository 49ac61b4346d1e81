"""Several runs of one training, averaged: the account of each closes, so that of their mean does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pkexplain.errors import ConfigurationError
from pkexplain.explain._ranking import Ranked
from pkexplain.explain._single_run import Account, RunExplainer
from pkexplain.results.explanation import Check, Contribution, Cost, Ledger, Remainder

__all__ = ["check_alike", "mean_checks", "mean_contributions", "mean_cost", "mean_ledger", "rank_mean"]


def check_alike(runs: Sequence[RunExplainer]) -> None:
    """Refuse to average runs of different data or lengths; that the model fits each was checked before.

    Raises:
        ConfigurationError: The runs differ.
    """
    first = runs[0].trajectory
    for place, run in enumerate(runs[1:], start=1):
        other = run.trajectory
        for what, mine, theirs in (
            ("their data differ in size", first.num_examples, other.num_examples),
            ("they were withdrawn different examples", *(t.details.get("withdrawn", []) for t in (first, other))),
            ("their models take different inputs", dict(first.inputs), dict(other.inputs)),
            ("they have different numbers of segments", len(first), len(other)),
            ("they are the same run", "one run twice" if first.run_id == other.run_id else "", ""),
        ):
            if mine != theirs:
                raise ConfigurationError(
                    "Explainer([…])",
                    f"runs 0 and {place} cannot be averaged: {what}",
                    got=theirs or mine,
                    expected=mine if theirs else "different runs",
                    source="the first run",
                    fix="Record the same model on the same data with the same segments, and different seeds",
                )


def mean_contributions(runs: Sequence[RunExplainer], accounts: Sequence[Account]) -> np.ndarray:
    """Average the contributions of all rows, ``(queries, num_examples)``, in output units."""
    found = [run.whole.scan(account.projected) for run, account in zip(runs, accounts, strict=True)]
    return np.mean(found, axis=0)


def rank_mean(
    runs: Sequence[RunExplainer], accounts: Sequence[Account], mean: np.ndarray, query: int, k: int
) -> Ranked:
    """Find the strongest mean contributions to one query.

    a_i is the mean contribution over the mean kernel.

    Args:
        runs: The runs.
        accounts: What each says of the batch of queries.
        mean: The mean contributions to this query, ``(num_examples,)``.
        query: Which query.
        k: How many proponents and how many opponents.
    """
    order = np.argsort(-mean, kind="stable")
    ids = torch.from_numpy(np.unique(np.concatenate([order[:k], order[-k:]])))
    parts = [
        {c.id: c for c in run.whole.contributions_of(ids, account.projected[query])}
        for run, account in zip(runs, accounts, strict=True)
    ]
    found = sorted((_mean([part[i] for part in parts]) for i in ids.tolist()), key=lambda c: -c.contribution)
    proponents = tuple([c for c in found if c.contribution > 0][:k])
    opponents = tuple([c for c in reversed(found) if c.contribution < 0][:k])
    shown = np.array([c.id for c in {c.id: c for c in (*proponents, *opponents)}.values()], dtype=np.int64)
    others = np.delete(mean, shown)
    gone = len(runs[0].trajectory.details.get("withdrawn", ()))
    remainder = Remainder(
        shown=float(mean[shown].sum()),
        rest=float(others.sum()),
        num_rest=len(others) - gone,
        bound=float(np.abs(others).max(initial=0.0)),
        exact=True,
    )
    return Ranked(proponents, opponents, remainder)


def _mean(found: Sequence[Contribution]) -> Contribution:
    contribution = float(np.mean([c.contribution for c in found]))
    kernel = float(np.mean([c.kernel for c in found]))
    segments = np.mean([c.segments for c in found], axis=0)
    weight = contribution / kernel if kernel else float("nan")
    return Contribution(found[0].id, contribution, weight, kernel, tuple(segments.tolist()))


def mean_ledger(ledgers: Sequence[Ledger]) -> Ledger:
    """Average every line."""
    names = [name for ledger in ledgers for name in ledger.remainders]
    return Ledger(
        initial=float(np.mean([ledger.initial for ledger in ledgers])),
        final=float(np.mean([ledger.final for ledger in ledgers])),
        examples=float(np.mean([ledger.examples for ledger in ledgers])),
        remainders={n: float(np.mean([ledger.remainders.get(n, 0.0) for ledger in ledgers])) for n in names},
    )


def mean_checks(checks: Sequence[Sequence[Check]]) -> tuple[Check, ...]:
    """Take the worst of each check: one run that fails makes the mean fail."""
    return tuple(
        max(same, key=lambda check: (np.isnan(check.value), check.value)) for same in zip(*checks, strict=True)
    )


def mean_cost(costs: Sequence[Cost]) -> Cost:
    """Add the passes up: all of them were made."""
    return Cost(
        sum(cost.forward_passes for cost in costs),
        sum(cost.backward_passes for cost in costs),
        sum(cost.budget for cost in costs),
        exhausted=any(cost.exhausted for cost in costs),
    )
