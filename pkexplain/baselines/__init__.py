"""Other methods on the same run: Captum's, and cheap ones, each with scores ``(queries, num_examples)``.

`pkexplain.compare` runs them next to one another. A single one:

``TracInCP().scores(Setting.of(explainer, x, targets, dataset=train))``
"""

from __future__ import annotations

from pkexplain.baselines.baseline import Baseline
from pkexplain.baselines.bm25 import BM25
from pkexplain.baselines.cheap import GradientNorm, NearestNeighbours, Random, TrainingLoss
from pkexplain.baselines.from_captum import (
    ArnoldiInfluenceFunction,
    SimilarityInfluence,
    TracInCP,
    TracInCPFast,
    TracInCPFastRandProj,
)
from pkexplain.baselines.setting import Setting

__all__ = [
    "BM25",
    "ArnoldiInfluenceFunction",
    "Baseline",
    "GradientNorm",
    "NearestNeighbours",
    "Random",
    "Setting",
    "SimilarityInfluence",
    "TracInCP",
    "TracInCPFast",
    "TracInCPFastRandProj",
    "TrainingLoss",
]
