"""Training-data attribution that adds up.

Which training examples made this model say this, by how much, and does it add up? `Recorder` records a training run,
`Explainer` answers for any later query, and every number is either a contribution in units of the output or a named,
measured remainder.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pkexplain.comparing import compare
from pkexplain.comparison import Comparison
from pkexplain.editing import merge, withdraw
from pkexplain.errors import PkexplainError
from pkexplain.explainer import Explainer
from pkexplain.explanation import Check, Contribution, Cost, Explanation, GroupSum, Ledger, Remainder
from pkexplain.loss_curvature import BinaryCrossEntropy, CrossEntropy, LossCurvature, SquaredError
from pkexplain.outputs import Custom, Logit, LogProbability, Loss, Margin, Output, TokenLogProbability, Value
from pkexplain.projection import Identity, Kronecker, SparseSign
from pkexplain.quadrature import Quadrature
from pkexplain.recorder import Recorder
from pkexplain.removal import Removal
from pkexplain.store import DirectoryStore, MemoryStore
from pkexplain.update_rules import LinearStep, UpdateRule, register_update_rule
from pkexplain.version import __version__

if TYPE_CHECKING:
    from pkexplain import evaluation
    from pkexplain.progress import ProgressBar
    from pkexplain.report import write_report

__all__ = [
    "BinaryCrossEntropy",
    "Check",
    "Comparison",
    "Contribution",
    "Cost",
    "CrossEntropy",
    "Custom",
    "DirectoryStore",
    "Explainer",
    "Explanation",
    "GroupSum",
    "Identity",
    "Kronecker",
    "Ledger",
    "LinearStep",
    "LogProbability",
    "Logit",
    "Loss",
    "LossCurvature",
    "Margin",
    "MemoryStore",
    "Output",
    "PkexplainError",
    "ProgressBar",
    "Quadrature",
    "Recorder",
    "Remainder",
    "Removal",
    "SparseSign",
    "SquaredError",
    "TokenLogProbability",
    "UpdateRule",
    "Value",
    "__version__",
    "compare",
    "evaluation",
    "merge",
    "register_update_rule",
    "withdraw",
    "write_report",
]

_LATER = {"ProgressBar": "pkexplain.progress", "write_report": "pkexplain.report"}
"""Names whose modules load at first use, so that importing the package stays light."""


def __getattr__(name: str) -> Any:
    if name == "evaluation":
        return importlib.import_module("pkexplain.evaluation")
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
