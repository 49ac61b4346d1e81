"""What can go wrong, as a tree.

.. code-block:: text

    PkexplainError
    ├── ConfigurationError (ValueError)     a Recorder, Explainer or projection with an invalid argument
    │   ├── UnsupportedLayerError (TypeError)      a trainable layer without a per-example rule
    │   ├── UnsupportedOptimizerError (TypeError)  an optimizer without an update rule
    │   └── MissingDependencyError (ImportError)   an extra that is not installed
    ├── RecordingError (RuntimeError)       the training loop broke the recorder's contract
    │   ├── ExampleIdError (ValueError)            ids out of range, repeated, of the wrong length or type
    │   └── NonFiniteGradientError (ArithmeticError)  a batch whose loss or gradients are not finite
    ├── RunError (OSError)                  the files of a run
    │   ├── RunExistsError (FileExistsError)       the directory already holds a run
    │   ├── RunBusyError (BlockingIOError)         something else is writing to it
    │   ├── RunNotFoundError (FileNotFoundError)   there is no run, or it holds no finished segment
    │   ├── RunDamagedError                        a file is missing, truncated or altered
    │   └── ModelMismatchError (ValueError)        the model is not the one that was recorded
    ├── ExplanationFileError (OSError)      a file that is not a saved explanation of this version
    ├── QueryError (ValueError)             a query or an output that the recorded model cannot answer
    └── EvaluationError (ValueError)        retrainings or attributions that cannot be judged

Every message reads ``<what was asked>: <what is wrong>. Got …; expected … (from …). <One fix>.``
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

__all__ = [
    "ConfigurationError",
    "EvaluationError",
    "ExampleIdError",
    "ExplanationFileError",
    "MissingDependencyError",
    "ModelMismatchError",
    "NonFiniteGradientError",
    "PkexplainError",
    "QueryError",
    "RecordingError",
    "RunBusyError",
    "RunDamagedError",
    "RunError",
    "RunExistsError",
    "RunNotFoundError",
    "UnsupportedLayerError",
    "UnsupportedOptimizerError",
    "warn",
]


class PkexplainError(Exception):
    """The root of every error this package raises on purpose.

    Args:
        asked: What the user asked for, as they wrote it.
        wrong: What is wrong with it, without a full stop.
        got: The value or shape received.
        expected: The value or shape expected.
        source: Origin of the expectation.
        fix: One concrete thing to do, without a full stop.

    Example:
        >>> print(ExampleIdError("ids", "out of range", 7, "0 to 4", "num_examples=5", "Pass row numbers"))
        ids: out of range. Got 7; expected 0 to 4 (from num_examples=5). Pass row numbers.
    """

    def __init__(self, asked: str, wrong: str, got: Any, expected: Any, source: str, fix: str) -> None:
        """Keep the fields, and compose the message."""
        super().__init__(f"{asked}: {wrong}. Got {got}; expected {expected} (from {source}). {fix}.")
        self.asked, self.wrong, self.got, self.expected = asked, wrong, got, expected
        self.source, self.fix = source, fix

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by field, as text: worker processes pass errors on, and the received value may not be picklable."""
        fields = {"got": str(self.got), "expected": str(self.expected), "source": self.source, "fix": self.fix}
        return _rebuild, (type(self), self.asked, self.wrong, fields)


class ConfigurationError(PkexplainError, ValueError):
    """An argument is invalid."""


class UnsupportedLayerError(ConfigurationError, TypeError):
    """A trainable layer has no per-example gradient rule."""


class UnsupportedOptimizerError(ConfigurationError, TypeError):
    """An optimizer, or one of its options, has no update rule."""


class MissingDependencyError(ConfigurationError, ImportError):
    """A package that an extra provides is not installed or does not load."""


class RecordingError(PkexplainError, RuntimeError):
    """The training loop did something the recorder cannot account for."""


class ExampleIdError(RecordingError, ValueError):
    """Example ids are out of range, repeated, or of the wrong length or type."""


class NonFiniteGradientError(RecordingError, ArithmeticError):
    """A batch has a loss or a gradient that is not finite."""


class RunError(PkexplainError, OSError):
    """The files of a run cannot be used."""


class RunExistsError(RunError, FileExistsError):
    """The directory already holds a run."""


class RunBusyError(RunError, BlockingIOError):
    """Something else is writing to the run."""


class RunNotFoundError(RunError, FileNotFoundError):
    """There is no run here, or it holds no finished segment."""


class RunDamagedError(RunError):
    """A file of the run is missing, truncated or altered."""


class ModelMismatchError(RunError, ValueError):
    """The model's names or shapes are not those that were recorded."""


class ExplanationFileError(PkexplainError, OSError):
    """A file is damaged, of another version, or not a saved explanation."""


class QueryError(PkexplainError, ValueError):
    """A query or an output does not fit the recorded model."""


class EvaluationError(PkexplainError, ValueError):
    """A retraining, or the attributions compared with it, cannot be judged."""


def _rebuild(kind: type[PkexplainError], asked: str, wrong: str, fields: dict[str, str]) -> PkexplainError:
    return kind(asked, wrong, **fields)


_NOT_THE_USERS = {"pkexplain", "torch", "contextlib"}
"""Packages whose frames are between a warning and the user's line that caused it: hooks and `with` blocks."""


def warn(text: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the user's own line, however many frames of ours and torch's are in between.

    Args:
        text: The message.
        category: Its class.
    """
    frame, level = sys._getframe(1), 2  # level 1 is this function
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_THE_USERS:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, category, stacklevel=level)
