"""Displacements: how far each example, and weight decay, moved the parameters in a segment.

For the recursion of `pkexplain.update_rules`, a gradient g of step r moves the parameters, up to step e, by

    −(gradient_step_r + gain_r W_r) g,    W_r = moment_step_r + decay_{r+1} W_{r+1},   W_{e+1} = 0,

and leaves gain_r · decay_{r+1} ⋯ decay_e · g in the moment, which goes on moving them in the next segment. Only the
batch of a step is touched when it happens; the factors are applied when the segment closes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pkexplain.update_rules import LinearStep

__all__ = ["FullSpaceAccount", "RowAccumulator"]

Steps = Sequence[Mapping[int, LinearStep]]
"""For each optimizer step, the numbers of each parameter group."""


@dataclass
class _Factors:
    """What a gradient of each step has done by the end, ``(steps,)``, and what an earlier moment has done."""

    moved: list[float]
    kept: list[float]
    earlier_moved: float
    earlier_kept: float

    @classmethod
    def of(cls, steps: Sequence[LinearStep]) -> _Factors:
        moved, kept = [0.0] * len(steps), [0.0] * len(steps)
        reach, remains = 0.0, 1.0  # decay_{r+1} W_{r+1} and decay_{r+1} ⋯ decay_e
        for r in range(len(steps) - 1, -1, -1):
            step = steps[r]
            reach += step.moment_step
            moved[r] = step.gradient_step + step.gain * reach
            kept[r] = step.gain * remains
            reach, remains = reach * step.decay, remains * step.decay
        return cls(moved, kept, reach, remains)


@dataclass
class RowAccumulator:
    """Displacement rows of all examples, gathered over a segment.

    Args:
        examples: How many rows there are.
        group_columns: The columns that each parameter group of the optimizer moves.
        columns: Width of a row.
        dtype: Number format of the sums.
        device: Where they are kept.
    """

    examples: int
    group_columns: Mapping[int, slice]
    columns: int
    dtype: torch.dtype
    device: torch.device
    _visits: list[tuple[int, _Parts]] = field(default_factory=list, init=False)
    _waiting: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        """Start the first segment, with nothing in the moment."""
        self._moment: _Sum | None = None
        self._moved = self._new_sum()

    def _new_sum(self) -> _Sum:
        rows = torch.zeros(self.examples, self.columns, dtype=self.dtype, device=self.device)
        return _Sum(rows, torch.zeros_like(rows[:, 0]), torch.zeros_like(rows[:, 0]))

    def add(self, step: int, ids: Tensor, gradients: Tensor, derivatives: Tensor) -> None:
        """Note a batch.

        Args:
            step: The optimizer step since the last `fold` that the batch's gradients enter.
            ids: Row numbers, ``(batch,)``.
            gradients: Projected gradients of the loss, ``(batch, columns)``.
            derivatives: Loss derivatives, ``(batch,)``.
        """
        self._visits.append((step, _Parts.of(ids, gradients, derivatives, self.group_columns)))
        self._waiting += len(ids)

    @property
    def full(self) -> bool:
        """Whether as many gradients wait as there are rows, so that folding would free memory."""
        return self._waiting >= self.examples

    def fold(self, steps: Steps) -> None:
        """Turn the waiting gradients into displacements up to now, and moments.

        Args:
            steps: The optimizer steps since the last fold.
        """
        factors = {group: _Factors.of([step[group] for step in steps]) for group in self.group_columns}
        moment = None
        if any(f.earlier_kept or any(f.kept) for f in factors.values()):
            moment = self._new_sum()
        if self._moment is not None:
            every = torch.arange(self.examples, device=self.device)
            earlier = _Parts.of(every, self._moment.rows, self._moment.derivatives(), self.group_columns)
            self._moved.add(earlier, {g: f.earlier_moved for g, f in factors.items()}, self.group_columns)
            if moment is not None:
                moment.add(earlier, {g: f.earlier_kept for g, f in factors.items()}, self.group_columns)
        for step, parts in self._visits:
            self._moved.add(parts, {g: f.moved[step] for g, f in factors.items()}, self.group_columns)
            if moment is not None:
                moment.add(parts, {g: f.kept[step] for g, f in factors.items()}, self.group_columns)
        self._moment, self._visits, self._waiting = moment, [], 0

    def close(self, steps: Steps) -> tuple[Tensor, Tensor]:
        """End the segment and start the next.

        Args:
            steps: The optimizer steps since the last fold.

        Returns:
            Rows ``(examples, columns)`` in parameter units, and for each the loss derivative averaged over what it
            holds with the kernel as weight, ``(examples,)``.
        """
        if steps:
            self.fold(steps)
        moved, self._moved = self._moved, self._new_sum()
        return moved.rows.neg_(), moved.derivatives()


@dataclass
class _Parts:
    """Gradients of some examples, with the size that each parameter group's columns have."""

    ids: Tensor
    rows: Tensor
    derivatives: Tensor
    sizes: dict[int, Tensor]  # squared norms, (batch,)

    @classmethod
    def of(cls, ids: Tensor, rows: Tensor, derivatives: Tensor, columns: Mapping[int, slice]) -> _Parts:
        return cls(
            ids, rows, derivatives, {g: torch.linalg.vector_norm(rows[:, c], dim=1) ** 2 for g, c in columns.items()}
        )


@dataclass
class _Sum:
    """A sum of rows, and the mean of their loss derivatives weighted with the kernel, that is ‖part‖ / |derivative|."""

    rows: Tensor
    weight: Tensor
    weighted: Tensor

    def add(self, parts: _Parts, factors: Mapping[int, float], columns: Mapping[int, slice]) -> None:
        size = torch.zeros_like(parts.derivatives)
        for group, factor in factors.items():
            self.rows[:, columns[group]].index_add_(0, parts.ids, parts.rows[:, columns[group]], alpha=factor)
            size += factor**2 * parts.sizes[group]
        counted = size > 0
        weight = size.sqrt() / parts.derivatives.abs()
        self.weight.index_add_(0, parts.ids, torch.where(counted, weight, 0.0))
        self.weighted.index_add_(0, parts.ids, torch.where(counted, weight * parts.derivatives, 0.0))

    def derivatives(self) -> Tensor:
        return torch.where(self.weight == 0, 0.0, self.weighted / self.weight)


@dataclass
class FullSpaceAccount:
    """What all examples together, and weight decay, did to the parameters of a segment, ``(parameters,)`` each.

    Args:
        group_parameters: Where each parameter group lies in the flat vector.
        like: A vector of the right size, format and device.
    """

    group_parameters: Mapping[int, slice]
    like: Tensor

    def __post_init__(self) -> None:
        """Start the first segment with empty moments."""
        self._example_moment = torch.zeros_like(self.like)
        self._decay_moment = torch.zeros_like(self.like)
        self._decays = False
        self._start()

    def _start(self) -> None:
        self.examples = torch.zeros_like(self.like)
        self.decay = torch.zeros_like(self.like)

    def step(self, numbers: Mapping[int, LinearStep], gradient: Tensor, parameters: Tensor) -> None:
        """Follow one optimizer step.

        Args:
            numbers: The step's numbers for each parameter group.
            gradient: The sum of the examples' gradients, ``(parameters,)``.
            parameters: The parameters before the step, ``(parameters,)``.
        """
        for group, span in self.group_parameters.items():
            n = numbers[group]
            _follow(n, self._example_moment[span], self.examples[span], gradient[span])
            if n.coupled_decay:
                _follow(n, self._decay_moment[span], self.decay[span], n.coupled_decay * parameters[span])
                self._decays = True
            elif self._decays and n.decay:
                _follow(n, self._decay_moment[span], self.decay[span], None)
            if n.decoupled_decay:
                self.decay[span] -= n.decoupled_decay * parameters[span]

    def close(self) -> tuple[Tensor, Tensor]:
        """End the segment: return what the examples and the decay did, and start the next."""
        sums = self.examples, self.decay
        self._start()
        return sums


def _follow(n: LinearStep, moment: Tensor, total: Tensor, gradient: Tensor | None) -> None:
    moment.mul_(n.decay)
    if gradient is not None:
        moment.add_(gradient, alpha=n.gain)
        if n.gradient_step:
            total.sub_(gradient, alpha=n.gradient_step)
    total.sub_(moment, alpha=n.moment_step)
