"""What a recording notes about how gradients are split: how well, what was not, and when to check again."""

from __future__ import annotations

from torch import Tensor

from pkexplain.gradients.split import Split
from pkexplain.record._contract import not_split, warn_of_unsplit
from pkexplain.record._gradient_check import GradientSums
from pkexplain.record._plan import Plan
from pkexplain.store.manifest import SplitSummary

_VERIFY_EVERY = 64
"""The fewest steps between two checks of the split where nothing has changed."""
_SHOWN = 8
"""Blocks whose split gap is kept, the worst first."""


class SplitNotes:
    """Notes on the split of a recording's gradients.

    Attributes:
        names: Parameters that were not split since the last step of the optimizer.

    Args:
        plan: What is recorded.
    """

    def __init__(self, plan: Plan) -> None:
        """Nothing is known yet, so that the first step is checked."""
        self._plan, self._unverified = plan, _VERIFY_EVERY
        self._shares: dict[str, float] = {}
        self.names: set[str] = set()

    def verifies(self, first: bool) -> bool:
        """Whether the split is checked in this step: a segment's first, but not more often than every 64th."""
        self._unverified += 1
        if not first or self._unverified < _VERIFY_EVERY:
            return False
        self._unverified = 0
        return True

    def learnt(self, split: Split) -> bool:
        """Take note of the split of a backward pass that is about to run; return whether something is not split.

        Raises:
            RecordingError: There is, and it is to be refused.
        """
        new = {name: why for name, why in split.unsplit.items() if name not in self._shares}
        if new and self._plan.unsplit == "refuse":
            raise not_split(new)
        if new:
            warn_of_unsplit(new)
            self._shares.update(dict.fromkeys(new, 0.0))
        self.names.update(split.unsplit)
        return bool(split.unsplit)

    def allowed(self, position: int) -> float:
        """The split gap of a block that rounding explains."""
        split = self._plan.capture.split
        return 0.0 if split is None else split.allowance(position)

    def share_of(self, sums: GradientSums) -> Tensor | None:
        """Return the gradient that was not split, ``(parameters,)``, and note its share; None if all of it was."""
        unsplit = sums.unsplit(self.names)
        if unsplit is not None:
            for name, share in sums.shares(self.names, unsplit).items():
                self._shares[name] = max(self._shares.get(name, 0.0), share)
        return unsplit

    def clear(self) -> None:
        """Begin the next step of the optimizer."""
        self.names = set()

    def summary(self) -> SplitSummary:
        """Summarise the split since the last segment, and begin the next."""
        capture, blocks = self._plan.capture, self._plan.blocks
        named = {blocks[at].name or "(the model itself)": gap for at, gap in capture.gaps.items()}
        found = SplitSummary(
            gap=self._plan.group.all_reduce_max(capture.gap / capture.tolerance) * capture.tolerance,
            tolerance=capture.tolerance,
            worst=dict(sorted(named.items(), key=lambda pair: -pair[1])[:_SHOWN]),
            unsplit={name: share for name, share in self._shares.items() if name in capture.unsplit},
            reasons=dict(capture.unsplit),
            interacting=capture.interacting,
        )
        capture.clear_gap()
        return found
