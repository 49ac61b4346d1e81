"""What an explanation consists of, as frozen data: contributions, the ledger, the checks, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Check", "Contribution", "Cost", "GroupSum", "Ledger", "Remainder"]


@dataclass(frozen=True)
class Contribution:
    """One training example's contribution to one output.

    Attributes:
        id: The example's row number in the training set.
        contribution: c_i = Σ_t ⟨φ_t, D_i,t⟩, in output units; equals ``weight * kernel``.
        weight: a_i, minus the example's loss derivative, averaged along the path with the kernel as weight
            (Domingos 2020, Definition 2 and Theorem 1); nan if no loss derivative was recorded.
        kernel: K(x, x_i), the path kernel, in output units per unit of weight; nan if no loss derivative was recorded.
        segments: The contribution of each segment of training, in output units; they sum to ``contribution``.
    """

    id: int
    contribution: float
    weight: float
    kernel: float
    segments: tuple[float, ...]


@dataclass(frozen=True)
class Ledger:
    """The sum that makes up the final output: final = initial + examples + remainders + gap.

    Attributes:
        initial: f_0(x), the output before the first recorded step, in output units.
        final: f_T(x), the output after the last recorded step, in output units.
        examples: Σ_i c_i(x) over all training examples, in output units.
        remainders: Changes of the output that belong to no example, by name, in output units: ``"weight_decay"``,
            ``"optimizer"``, ``"unsplit"`` if some gradients were not split among the examples, and, if buffers moved,
            ``"buffers"`` (running statistics and others).
    """

    initial: float
    final: float
    examples: float
    remainders: Mapping[str, float]

    @property
    def gap(self) -> float:
        """The completeness gap, f_T − f_0 − Σ_i c_i − remainders, in output units."""
        return self.final - self.initial - self.examples - sum(self.remainders.values())


@dataclass(frozen=True)
class Check:
    """One thing that can go wrong, measured.

    Attributes:
        name: What is measured, for example ``"quadrature gap"``.
        value: The measured value, dimensionless unless ``meaning`` says otherwise.
        tolerance: The largest value that passes.
        meaning: What the value is, and what to do if it fails.
    """

    name: str
    value: float
    tolerance: float
    meaning: str

    @property
    def passed(self) -> bool:
        """Whether the value is a number within the tolerance."""
        return bool(abs(self.value) <= self.tolerance)


@dataclass(frozen=True)
class GroupSum:
    """Contributions of one group of training examples, summed.

    Attributes:
        group: The group's name or label.
        count: The number of training examples in it.
        net: Σ c_i over the group, in output units.
        gross: Σ |c_i| over the group, in output units.
    """

    group: object
    count: int
    net: float
    gross: float


@dataclass(frozen=True)
class Cost:
    """The cost of an explanation.

    Attributes:
        forward_passes: Evaluations of the model's output for this query, apart from those that gradients take.
        backward_passes: Gradients of the model's output for this query.
        budget: The largest number of gradients allowed.
        exhausted: Whether the budget was spent before the quadrature met its tolerance.
    """

    forward_passes: int
    backward_passes: int
    budget: int
    exhausted: bool = False


@dataclass(frozen=True)
class Remainder:
    """What is known about the examples that are not shown.

    Attributes:
        shown: Σ of the contributions shown, in output units.
        rest: Σ of all others, in output units: the total, which is known exactly, minus those shown.
        num_rest: The number of others.
        bound: None of them contributes more than this, in either direction, in output units.
        exact: Whether all rows were searched; then the bound is the next contribution. Otherwise it is certified by
            the norms of the rows, and much larger than is likely.
    """

    shown: float
    rest: float
    num_rest: int
    bound: float
    exact: bool
