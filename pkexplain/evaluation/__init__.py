"""Attributions judged by the field's metrics: retrain without some examples, and see whether they were right.

`Retraining` holds the user's training function and queries. Each metric has a function that does the retraining it
needs, once, and one that judges any number of attributions by the result.
"""

from __future__ import annotations

from pkexplain.evaluation._statistics import Estimate
from pkexplain.evaluation.datamodelling import (
    LinearDatamodellingScore,
    SubsetOutputs,
    linear_datamodelling_score,
    retrain_subsets,
)
from pkexplain.evaluation.leave_one_out import (
    LeaveOneOut,
    LeaveOneOutCorrelation,
    leave_one_out,
    leave_one_out_correlation,
)
from pkexplain.evaluation.mislabels import MislabelDetection, flip_labels, mislabel_detection
from pkexplain.evaluation.retraining import Retraining
from pkexplain.evaluation.subset_removal import SubsetRemoval, subset_removal

__all__ = [
    "Estimate",
    "LeaveOneOut",
    "LeaveOneOutCorrelation",
    "LinearDatamodellingScore",
    "MislabelDetection",
    "Retraining",
    "SubsetOutputs",
    "SubsetRemoval",
    "flip_labels",
    "leave_one_out",
    "leave_one_out_correlation",
    "linear_datamodelling_score",
    "mislabel_detection",
    "retrain_subsets",
    "subset_removal",
]
