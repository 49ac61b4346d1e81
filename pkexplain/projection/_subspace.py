"""The largest eigenvalues of a covariance that need not be formed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pkexplain.projection.maps import random_signs

_OVERSAMPLING, _ITERATIONS = 16, 2


def leading_eigenvectors(
    product: Callable[[Tensor], Tensor], side: int, rank: int, most: int, like: Tensor, seed: int
) -> tuple[Tensor, Tensor]:
    """Find the largest eigenvalues of a covariance, ascending, and its eigenvectors, by subspace iteration.

    Halko, Martinsson & Tropp 2011, algorithm 4.4.

    Args:
        product: Multiplies the covariance by ``(side, n)``.
        side: Its rows and columns.
        rank: The most eigenvalues that are not 0.
        most: How many are wanted.
        like: A tensor of the dtype and device to compute in.
        seed: Seed of the directions to begin with.
    """
    width = min(most + _OVERSAMPLING, side, rank)
    block = random_signs(seed, side, (width, side)).T.to(like)
    for _ in range(_ITERATIONS):
        block = torch.linalg.qr(product(block).double().cpu())[0].to(like)
    energies, turn = torch.linalg.eigh((block.T @ product(block)).double().cpu())
    return energies[-most:], (block.double().cpu() @ turn)[:, -most:]
