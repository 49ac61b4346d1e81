"""The mean of several runs of one training; each run's ledger closes, so their mean closes too."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pkexplain.errors import ConfigurationError
from pkexplain.explain._single_run import RunExplainer
from pkexplain.results.explanation import Check, Cost, Ledger


def check_alike(runs: Sequence[RunExplainer]) -> None:
    """Refuse to average runs with different data or lengths; the model was already checked against each.

    Raises:
        ConfigurationError: The runs differ.
    """
    first = runs[0].trajectory
    fix = "Record the same model on the same data with the same segments, and different seeds"
    withdraw = "Withdraw the same examples from all of them, with pkexplain.withdraw"
    for position, run in enumerate(runs[1:], start=1):
        other = run.trajectory
        gone = first.manifest.withdrawn, other.manifest.withdrawn
        for what, mine, theirs, do in (
            ("their data differ in size", first.num_examples, other.num_examples, fix),
            ("different examples were withdrawn from them", *gone, withdraw),
            ("their models take different inputs", dict(first.inputs), dict(other.inputs), fix),
            ("they have different numbers of segments", len(first), len(other), fix),
            ("they are the same run", "one run twice" if first.run_id == other.run_id else "", "", fix),
        ):
            if mine != theirs:
                raise ConfigurationError(
                    "Explainer([…])",
                    f"runs 0 and {position} cannot be averaged: {what}",
                    got=theirs or mine,
                    expected=mine if theirs else "different runs",
                    source="the first run",
                    fix=do,
                )


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
    """Add up the passes: all of them were made."""
    return Cost(
        sum(cost.forward_passes for cost in costs),
        sum(cost.backward_passes for cost in costs),
        sum(cost.budget for cost in costs),
        exhausted=any(cost.exhausted for cost in costs),
    )


def mean_rows(rows: Sequence[Tensor]) -> tuple[float, ...]:
    """Average rows of numbers."""
    return tuple(torch.stack(list(rows)).mean(0).tolist())
