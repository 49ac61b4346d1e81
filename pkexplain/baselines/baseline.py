"""The interface of a baseline: a name, and scores of all training examples for each query."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import numpy as np

from pkexplain.baselines.setting import Setting

__all__ = ["Baseline"]


class Baseline(ABC):
    """A method that scores training examples.

    A score above zero, or above other examples' scores, marks a proponent: the example raised minus the loss of the
    query. A subclass implements `prepare`.
    """

    name: ClassVar[str]

    @abstractmethod
    def prepare(self, setting: Setting) -> Callable[[], np.ndarray]:
        """Do the one-time work that does not depend on the queries.

        Args:
            setting: The run, the training set and the queries.

        Returns:
            A function that scores the setting's queries, ``(queries, num_examples)``.

        Raises:
            ConfigurationError: The method cannot be used here; the message says why.
        """

    def scores(self, setting: Setting) -> np.ndarray:
        """Score every training example for every query.

        Args:
            setting: The run, the training set and the queries.

        Returns:
            Scores, ``(queries, num_examples)``.

        Raises:
            ConfigurationError: The method cannot be used here; the message says why.
        """
        return self.prepare(setting)()

    def adds_up(self, setting: Setting) -> bool:
        """Return whether a query's scores are meant to sum to the change of minus its loss over training.

        Args:
            setting: The run.
        """
        return False
