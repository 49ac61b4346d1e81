"""The steps of a segment, so that they can be taken again: ids, states of random numbers, the optimizers' options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["MOST_OPTIONS", "StepLog"]

MOST_OPTIONS = 8


@dataclass(frozen=True)
class StepLog:
    """The optimizer steps of a segment.

    Attributes:
        ids: The examples of all batches, one after another, int32, ``(visits,)``.
        lengths: How many each batch has, int32, ``(batches,)``.
        batches: On how many batches each step was taken, int32, ``(steps,)``.
        states: The different states of torch's random numbers, uint8, ``(states, bytes)``.
        state: Which of them was there before each batch's forward pass, int32, ``(batches,)``.
        options: The options of each parameter group, float64, ``(steps, groups, MOST_OPTIONS)``; see
            `pkexplain.optimizers.replayed`.
    """

    ids: Tensor
    lengths: Tensor
    batches: Tensor
    states: Tensor
    state: Tensor
    options: Tensor

    @classmethod
    def of(
        cls, ids: Sequence[Tensor], random: Sequence[Tensor], batches: Sequence[int], options: Sequence[Tensor]
    ) -> StepLog:
        """Join what was noted of each batch and step; a state that did not change is kept once."""
        states, state = [random[0]], []
        for each in random:
            if not torch.equal(each, states[-1]):
                states.append(each)
            state.append(len(states) - 1)

        def whole(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device="cpu")

        return cls(
            ids=torch.cat(list(ids)).int(),
            lengths=whole([len(each) for each in ids]),
            batches=whole(batches),
            states=torch.stack(states),
            state=whole(state),
            options=torch.stack(list(options)),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors to store."""
        return dict(vars(self))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> StepLog:
        """Rebuild the steps from stored tensors."""
        return cls(**{name: tensors[name] for name in cls.__dataclass_fields__})
