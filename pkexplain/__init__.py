"""Training-data attribution that adds up.

Which training examples made this model say this, by how much, and does it add up? `Recorder` records a training run,
`Explainer` answers for any later query, and every number is either a contribution in units of the output or a named,
measured remainder.

The folders follow the data, and imports go down this list only:

.. code-block:: text

    cli/  demo  integrations/  for users of a terminal and of other libraries
    evaluation/                judge: retrain and see
    baselines/                 judge: other methods on the same run
    record/                    watches a training loop, saves, resumes
    explain/                   a query in, contributions out
    optimizers/                how a gradient becomes a displacement
    index/                     which rows could matter: exact search and faiss
    store/                     the run on disk or in memory, checked
    projection/                gradients to k numbers
    gradients/                 per-example gradients from the real backward pass
    results/                   what comes back: plain data, text, plots, HTML
    ids/  files  progress  errors  distributed  version

`record` and `explain` share nothing but the store and the layers below it. A file whose name starts with an underscore
is used only inside its own folder.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pkexplain.baselines.compare import compare
from pkexplain.errors import PkexplainError
from pkexplain.explain.explainer import Explainer
from pkexplain.explain.loss_curvature import BinaryCrossEntropy, CrossEntropy, LossCurvature, SquaredError
from pkexplain.explain.loss_output import Loss
from pkexplain.explain.outputs import Custom, Logit, LogProbability, Margin, Output, Value
from pkexplain.explain.quadrature import Quadrature
from pkexplain.explain.removal import Removal
from pkexplain.explain.replay import Replay
from pkexplain.explain.suspects import suspects
from pkexplain.explain.token_outputs import TokenLogProbability
from pkexplain.optimizers.registry import register_update_rule
from pkexplain.optimizers.rules import LinearStep, UpdateRule
from pkexplain.projection.kinds import Identity, Kronecker, SparseSign
from pkexplain.record.loaders import indexed
from pkexplain.record.recorder import Recorder
from pkexplain.record.verification import verify_recording
from pkexplain.results.comparison import Comparison
from pkexplain.results.explanation import Check, Contribution, Cost, Explanation, GroupSum, Ledger, Remainder
from pkexplain.results.explanations import Explanations
from pkexplain.store.directory import DirectoryStore
from pkexplain.store.editing import merge, withdraw
from pkexplain.store.memory import MemoryStore
from pkexplain.store.upkeep import Salvaged, copy_run, salvage
from pkexplain.version import __version__

if TYPE_CHECKING:
    from pkexplain import evaluation
    from pkexplain.progress import ProgressBar
    from pkexplain.results.report import write_report

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
    "Explanations",
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
    "Replay",
    "Salvaged",
    "SparseSign",
    "SquaredError",
    "TokenLogProbability",
    "UpdateRule",
    "Value",
    "__version__",
    "compare",
    "copy_run",
    "evaluation",
    "indexed",
    "merge",
    "register_update_rule",
    "salvage",
    "suspects",
    "verify_recording",
    "withdraw",
    "write_report",
]

_LATER = {"ProgressBar": "pkexplain.progress", "write_report": "pkexplain.results.report"}
"""Names whose modules load at first use, so that importing the package stays light."""


def __getattr__(name: str) -> Any:
    if name == "evaluation":
        return importlib.import_module("pkexplain.evaluation")
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
