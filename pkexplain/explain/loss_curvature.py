"""The curvature of an example's loss, derived from the size of its loss derivative.

A row holds −η s Jᵀ ℓ', with ℓ' = ∂ℓ/∂y, η the learning rate and s the factor of a loss in its batch. Its outer product
is therefore ℓ' ℓ'ᵀ seen through the model, the *empirical* Fisher matrix, while training follows the Gauss-Newton
matrix Jᵀ (∂²ℓ/∂y²) J. Along ℓ' the two differ by a factor that, for the usual losses, is a function of the size of ℓ':
a well-fitted example, whose derivative has almost vanished, still has curvature.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

__all__ = ["BinaryCrossEntropy", "CrossEntropy", "LossCurvature", "SquaredError", "loss_curvature_of", "usual_largest"]

_USUAL = 0.95
_SMALLEST = 1e-3
"""Loss derivatives below this share of the largest possible are raised to it: their rows are mostly rounding error."""


class LossCurvature(ABC):
    """ℓ''/ℓ'² along the loss derivative.

    Attributes:
        largest: The largest ‖ℓ'‖ that one example can have; None if the loss has no bound.
    """

    largest: float | None = None

    @abstractmethod
    def weights(self, size: Tensor) -> Tensor:
        """Compute u·(∂²ℓ/∂y²)u / ‖ℓ'‖², with u the unit loss derivative.

        Args:
            size: ‖ℓ'‖ of each example's own loss, before any mean over a batch, ``(examples,)``.

        Returns:
            The factor that turns an outer product of loss derivatives into a curvature, ``(examples,)``.
        """


@dataclass(frozen=True)
class CrossEntropy(LossCurvature):
    """Softmax and cross-entropy: for two classes ℓ' = (1 − p)(−1, 1), so that the factor is p / (1 − p).

    For more classes ‖ℓ'‖ / √2 is between (1 − p) / √2 and 1 − p; the latter is assumed, as if a single wrong class held
    all of 1 − p.

    Example:
        >>> import torch
        >>> CrossEntropy().weights(torch.tensor([0.5]) * 2**0.5)
        tensor([1.])
    """

    largest = math.sqrt(2)

    def weights(self, size: Tensor) -> Tensor:
        """Compute p / (1 − p)."""
        missing = (size / math.sqrt(2)).clamp(_SMALLEST, 1 - _SMALLEST)
        return (1 - missing) / missing


@dataclass(frozen=True)
class BinaryCrossEntropy(LossCurvature):
    """Sigmoid and binary cross-entropy: ℓ' = p − y and ℓ'' = p (1 − p), so that the factor is p / (1 − p) exactly."""

    largest = 1.0

    def weights(self, size: Tensor) -> Tensor:
        """Compute p / (1 − p), p being the probability of the example's label."""
        missing = size.clamp(_SMALLEST, 1 - _SMALLEST)
        return (1 - missing) / missing


@dataclass(frozen=True)
class SquaredError(LossCurvature):
    """Squared error: ℓ'' is a constant, so that the factor is ℓ'' / ‖ℓ'‖².

    Attributes:
        second: ℓ'': 2 for ``torch.nn.MSELoss`` of one output, 1 for half the squared error.
    """

    second: float = 2.0

    def weights(self, size: Tensor) -> Tensor:
        """Compute ℓ'' / ‖ℓ'‖²."""
        return self.second / size.clamp_min(_SMALLEST * float(size.max()) if len(size) else 0.0).square()


def loss_curvature_of(loss_derivatives: Tensor) -> LossCurvature:
    """Choose a loss for a run: cross-entropy for several outputs, squared error for one.

    Args:
        loss_derivatives: As stored with the rows: signed if the model has one output, otherwise minus a norm.
    """
    return SquaredError() if bool((loss_derivatives > 0).any()) else CrossEntropy()


def usual_largest(sizes: Tensor) -> float:
    """The size that 19 of 20 examples do not exceed: an epoch's last batch is often smaller, and its share larger."""
    sizes = sizes[sizes > 0]
    return float(sizes.sort().values[int(_USUAL * (len(sizes) - 1))]) if len(sizes) else 0.0
