"""Explanations made of seeded numbers that add up, for tests of what shows them."""

from __future__ import annotations

import numpy as np

from pkexplain.results.comparison import Comparison, LeftOut, Method, rank_correlation, top_overlap
from pkexplain.results.explanation import Check, Contribution, Cost, Explanation, Ledger, Remainder

HOSTILE = "</style></title><script>alert('x')</script>\"><img src=x onerror=alert(1)> \u202eabc\u202c שלום & {{ 7*7 }}"
"""Text that must come out as text wherever it goes in."""


def make_explanation(
    *,
    num_examples: int = 200,
    segments: int = 6,
    k: int = 4,
    seed: int = 0,
    output: str = "logit[3]",
    reading: str = "path",
    query: object = None,
    strength: np.ndarray | None = None,
    failing: bool = False,
    exact: bool = True,
) -> Explanation:
    """Make an explanation whose contributions, remainders and checkpoint outputs agree with each other.

    Args:
        num_examples: Training examples.
        segments: Segments of the training.
        k: Proponents and opponents shown, each.
        seed: Seed of every number.
        output: Name of the output.
        reading: ``"path"`` or ``"removal"``.
        query: The query; an 8 x 8 picture where it is None.
        strength: Mean contribution of each example, ``(num_examples,)``; about zero where it is None.
        failing: Whether one check fails.
        exact: Whether all rows were searched.

    Returns:
        The explanation. Final minus initial is examples plus remainders plus a gap of 1e-6.
    """
    rng = np.random.default_rng(seed)
    fade = np.exp(-np.arange(segments) / 2.0)
    rows = rng.standard_t(4, (num_examples, segments)) * 0.1 * fade
    if strength is not None:
        rows = rows + strength[:, None] * fade / fade.sum()
    contributions = rows.sum(1)
    decay, remainder, gap = -0.02 * np.ones(segments), 0.003 * rng.standard_normal(segments), 1e-6
    outputs = -0.2 + np.concatenate([[0.0], np.cumsum(rows.sum(0) + decay + remainder)])
    outputs[-1] += gap
    loss_derivative = rng.uniform(0.05, 0.9, num_examples)
    order = np.argsort(contributions)

    def contribution(i: int) -> Contribution:
        c, a = float(contributions[i]), float(loss_derivative[i])
        return Contribution(int(i), c, a, c / a, tuple(map(float, rows[i])))

    checks = (
        Check("displacement gap", 3.1e-7, 1e-4, "Share of the parameters' movement that no line of the ledger holds."),
        Check("quadrature gap", 0.42 if failing else 0.0042, 0.01, "Error of the averaged gradient; raise the budget."),
    )
    proponents = tuple(contribution(i) for i in order[::-1][:k] if contributions[i] > 0)
    opponents = tuple(contribution(i) for i in order[:k] if contributions[i] < 0)
    shown = {c.id: c.contribution for c in (*proponents, *opponents)}
    others = np.delete(contributions, list(shown))
    return Explanation(
        output=output,
        reading=reading,
        ledger=Ledger(
            float(outputs[0]),
            float(outputs[-1]),
            float(contributions.sum()),
            {"weight_decay": float(decay.sum()), "optimizer": float(remainder.sum())},
        ),
        proponents=proponents,
        opponents=opponents,
        remainder=Remainder(
            shown=sum(shown.values()),
            rest=float(others.sum()),
            num_rest=len(others),
            bound=float(np.abs(others).max(initial=0.0)) * (1.0 if exact else 20.0),
            exact=exact,
        ),
        checks=checks,
        cost=Cost(forward_passes=5 * segments, backward_passes=4 * segments, budget=16 * segments),
        boundaries=tuple(range(0, 10 * segments + 1, 10)),
        segment_sums=tuple(map(float, rows.sum(0))),
        checkpoint_outputs=tuple(map(float, outputs)),
        query=rng.uniform(-1.0, 2.0, (1, 8, 8)) if query is None else query,
        all_contributions=contributions,
    )


def make_comparison(*, methods: int = 10, name: str = "method") -> Comparison:
    """Make a comparison of seeded scores, with one metric and one method left out.

    Args:
        methods: How many.
        name: What they are called, and why one was left out.

    Returns:
        The comparison, of 3 queries and 50 examples.
    """
    scores = np.random.default_rng(0).normal(size=(methods, 3, 50)).cumsum(axis=0)
    overlaps, correlations = top_overlap(list(scores), 5), rank_correlation(list(scores))
    found = tuple(
        Method(
            f"{name} {at}",
            each,
            gap=np.nan if at > 3 else 0.3 * at,
            overlap=float(overlaps[at, 0]),
            rank_correlation=float(correlations[at, 0]),
            setup_seconds=0.1,
            query_seconds=0.01,
            peak_bytes=2e7,
            metrics={name: 0.2},
        )
        for at, each in enumerate(scores)
    )
    return Comparison(found, (LeftOut(name, name),), np.ones(3), 5, overlaps, correlations)
