"""Adaptive integrals over a segment.

The output's change over a segment is known exactly from two forward passes, so the error of a quadrature rule on any
interval of it is known too:

    error = f(θ(b)) − f(θ(a)) − Σ_n w_n ⟨∇f(θ(τ_n)), θ(b) − θ(a)⟩

It starts with one interval per segment (`BUFFER_PIECES` where buffers move, too); the intervals with the largest errors
are halved until the total error is within tolerance or the budget of gradients is spent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from pkexplain.errors import ConfigurationError

__all__ = ["BUFFER_PIECES", "Interval", "Quadrature"]

BUFFER_PIECES = 4
"""Pieces of a segment's line on which buffers that move stand still. More are closer to a straight line in parameters
and buffers together, and each takes a gradient at every node. For a trained ResNet the buffers' median share of the
change was 34% with 1 piece, 28% with 2, 23% with 4, and 19% along that straight line."""


@dataclass(frozen=True, order=True)
class Interval:
    """A dyadic interval of segment ``segment``: τ from ``index / 2^level`` to ``(index + 1) / 2^level``."""

    segment: int
    level: int
    index: int

    @property
    def start(self) -> float:
        """Its start, 0 to 1."""
        return self.index / 2**self.level

    @property
    def width(self) -> float:
        """Its share of the segment."""
        return 1 / 2**self.level

    @property
    def end(self) -> float:
        """Its end, 0 to 1."""
        return (self.index + 1) / 2**self.level

    @classmethod
    def equal(cls, segment: int, count: int) -> list[Interval]:
        """Divide a segment's line into a number of equal ones, a power of two."""
        return [cls(segment, count.bit_length() - 1, index) for index in range(count)]

    def middle(self, pieces: int) -> float:
        """The middle, 0 to 1, of that one of the segment's equal pieces, a power of two, in which it lies."""
        return ((self.index * pieces >> self.level) + 0.5) / pieces

    def halves(self) -> tuple[Interval, Interval]:
        """Halve it."""
        below = (Interval(self.segment, self.level + 1, 2 * self.index + half) for half in (0, 1))
        first, second = below
        return first, second


@dataclass(frozen=True)
class Quadrature:
    """How the covector φ_t = ∫₀¹ ∇f(θ_t + τ Δθ_t) dτ is computed.

    Args:
        nodes: Gauss–Legendre nodes on each interval: 2 for networks with kinks (ReLU), 4 or 8 for smooth ones.
        budget: The most gradients of a query's output per segment, on average over the segments.
    """

    nodes: int = 2
    budget: int = 32

    def __post_init__(self) -> None:
        """Refuse a rule without nodes, and a budget that the first pass would exceed."""
        if self.nodes < 1 or self.budget < self.nodes:
            raise ConfigurationError(
                "Quadrature(nodes=…, budget=…)",
                "the first pass over a segment already needs one gradient for each node",
                got=f"nodes={self.nodes}, budget={self.budget}",
                expected="1 ≤ nodes ≤ budget",
                source="pkexplain.explain.quadrature",
                fix="Raise the budget",
            )

    def rule(self) -> tuple[np.ndarray, np.ndarray]:
        """Return nodes and weights on [0, 1]."""
        nodes, weights = np.polynomial.legendre.leggauss(self.nodes)
        return (nodes + 1) / 2, weights / 2

    def pieces(self, buffers_move: bool) -> int:
        """In how many pieces a segment's line is followed, a power of two that the budget allows."""
        affordable = 1 << ((self.budget // self.nodes).bit_length() - 1)
        return min(BUFFER_PIECES, affordable) if buffers_move else 1

    def unsettled(self, errors: Iterable[float], allowed: float) -> bool:
        """Whether the total error is too large.

        Both the sum of the errors and the root of the sum of their squares must be within ``allowed``: the sum alone
        could be small by chance.
        """
        values = list(errors)
        return max(abs(math.fsum(values)), math.sqrt(math.fsum(e * e for e in values))) > allowed

    def worst(self, errors: dict[Interval, float], allowed: float, gradients_left: int) -> list[Interval]:
        """Choose the intervals to halve next: those above an even share of the allowed error, largest errors first.

        Args:
            errors: The known error of each interval, in output units.
            allowed: The allowed total error, in output units.
            gradients_left: Gradients left in the budget; halving an interval takes twice the nodes.

        Returns:
            Intervals; empty if the budget allows none.
        """
        order = sorted(errors, key=lambda interval: -abs(errors[interval]))
        even = allowed / math.sqrt(len(order))
        chosen = [interval for interval in order if abs(errors[interval]) > even] or order[:1]
        return chosen[: gradients_left // (2 * self.nodes)]
