"""What a recording is told and asked about each backward pass."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from pkexplain.gradients.split import Split

__all__ = ["Watch"]


def _nothing(*_: object) -> None:
    pass


@dataclass(frozen=True)
class Watch:
    """What a recording wants to know about a step's backward passes.

    Attributes:
        verify: Whether the split is checked, also if nothing has changed.
        learnt: Called before each backward pass with the way in which it will be split, unless that is the last one's.
        axes: In which of the first two dimensions the model's inputs have one row per example.
        begin: Called before each backward pass that adds to the parameters' ``.grad``.
    """

    verify: bool = True
    learnt: Callable[[Split], None] = _nothing
    axes: Collection[int] = (0,)
    begin: Callable[[], None] = _nothing
