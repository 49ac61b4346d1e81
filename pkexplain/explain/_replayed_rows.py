"""Contributions that were computed for every example and segment, ranked like those of stored rows.

In the basis of the examples every row is a unit vector, so that a covector is the contributions themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pkexplain.distributed import ProcessGroup
from pkexplain.store.trajectory import Trajectory


class _Exact:
    """There is nothing to search."""

    exact = True


class ReplayedRows:
    """Stands where a `Ranking` does, for contributions of the replay reading.

    Args:
        trajectory: The run.
    """

    index: Any = _Exact()
    first = 0

    def __init__(self, trajectory: Trajectory) -> None:
        """Keep the loss derivatives, for the kernels."""
        self.num_examples, self.group = trajectory.num_examples, ProcessGroup()
        self._segments = [trajectory.segment(t) for t in range(len(trajectory))]

    def scan(self, projected: Tensor) -> Tensor:
        """Sum contributions over the segments, ``(queries, num_examples)``, in float64."""
        return projected.sum(1, dtype=torch.float64)

    def by_segment(self, ids: Tensor, projected: Tensor) -> tuple[Tensor, Tensor]:
        """Return the contributions of some examples to one query, and their kernels.

        Args:
            ids: Examples, ``(ids,)``.
            projected: Of all, ``(segments, num_examples)``.

        Returns:
            c_i of each segment, ``(ids, segments)``, and K(x, x_i), ``(ids,)``, in float64.
        """
        contributions = projected[:, ids].T.double()
        derivatives = torch.stack([segment.read_loss_derivatives(ids) for segment in self._segments], dim=1).double()
        return contributions, torch.where(derivatives == 0, 0.0, -contributions / derivatives).sum(1)
