"""The linear datamodeling score: how well scores foretell what models trained on half of the digits say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor


@dataclass(frozen=True)
class Score:
    """Figures of one method.

    Attributes:
        mean: Over the queries, of Spearman's correlation over the subsets.
        low: The 2.5th percentile of that mean where the subsets are drawn again, with replacement.
        high: The 97.5th.
        not_finite: Queries with a score that is not finite. They count as 0: nothing is foretold.
    """

    mean: float
    low: float
    high: float
    not_finite: int


def load_truth(folder: Path, name: str) -> tuple[Tensor, Tensor]:
    """Load the subsets and what came of them, computed once for this benchmark and for that of pkexplain.

    Args:
        folder: Where they are.
        name: LR or MLP.

    Returns:
        Members ``(subsets, train)``, bool, and outputs ``(subsets, queries)``, minus the loss of each test digit.
    """
    return torch.load(folder / f"truth_{name}_0_1000.pt", weights_only=True)


def _spearman(predicted: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """Of each column; 0 where a column is constant."""
    ranks = [rankdata(values, axis=0) for values in (predicted, outputs)]
    first, second = (values - values.mean(axis=0) for values in ranks)
    scale = np.sqrt((first**2).sum(axis=0) * (second**2).sum(axis=0))
    return np.divide((first * second).sum(axis=0), scale, out=np.zeros_like(scale), where=scale > 0)


def measure(scores: Tensor, members: Tensor, outputs: Tensor, *, resamples: int = 200) -> Score:
    """Compare the sum of the scores of a subset's members with the output of the model trained on it.

    Args:
        scores: ``(train, queries)``, of the first test digits.
        members: ``(subsets, train)``.
        outputs: ``(subsets, all queries)``.
        resamples: Drawn for the interval.
    """
    finite = scores.isfinite().all(dim=0)
    predicted = (members.double() @ scores.double().where(finite, torch.zeros(()).double())).numpy()
    outputs = outputs[:, : scores.shape[1]].double().numpy()
    generator = np.random.default_rng(0)
    drawn = [generator.integers(len(members), size=len(members)) for _ in range(resamples)]
    means = [_spearman(predicted[subsets], outputs[subsets]).mean() for subsets in drawn]
    low, high = np.quantile(means, [0.025, 0.975])
    return Score(float(_spearman(predicted, outputs).mean()), float(low), float(high), int((~finite).sum()))
