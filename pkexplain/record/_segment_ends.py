"""The ends of segments: closing the accounts, and writing what has ended until it is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor

from pkexplain.gradients.compiled import named_buffers
from pkexplain.gradients.interrupts import deferred_interrupts
from pkexplain.optimizers.segment_accountant import SegmentAccountant
from pkexplain.record._contract import warn_of_torn_step
from pkexplain.record._plan import Plan
from pkexplain.record._warnings import SegmentWarnings
from pkexplain.store.manifest import Manifest, SegmentSummary, SplitSummary
from pkexplain.store.trajectory import Checkpoint, Segment
from pkexplain.store.writer import RunWriter


@dataclass(frozen=True)
class _Ended:
    """A segment that has ended and is to be written."""

    position: int
    segment: Segment
    summary: SegmentSummary
    checkpoint: Checkpoint
    displacement: Tensor
    gradients: Mapping[str, bool]


class SegmentEnds:
    """Ends segments and writes them.

    Attributes:
        warnings: Warns about what could not be attributed.
        torn: Whether an error left the accounts half changed, so that nothing can follow.

    Args:
        plan: What is recorded.
        writer: Writes the run.
        describe: Describes the run now.
    """

    def __init__(self, plan: Plan, writer: RunWriter, describe: Callable[[], Manifest]) -> None:
        """Begin the first segment where the model is."""
        self._plan, self._writer, self._describe = plan, writer, describe
        self._start, self.torn = plan.point(), False
        self._waiting: list[_Ended] = []
        self.warnings = SegmentWarnings(plan.names, [p.numel() for p in plan.parameters])

    @property
    def start(self) -> Tensor:
        """θ where the segment began, ``(parameters,)``."""
        return self._start

    def checkpoint(self) -> Checkpoint:
        """Copy the model at the last segment's end."""
        buffers = named_buffers(self._plan.model)
        return Checkpoint(self._start, {name: value.detach().clone() for name, value in buffers})

    @contextmanager
    def as_a_whole(self) -> Iterator[None]:
        """Change the accounts: an interrupt waits until that is done; after any other error they are torn."""
        with deferred_interrupts():
            self.torn = True
            yield
            self.torn = False

    def end(
        self,
        accountant: SegmentAccountant,
        split: SplitSummary,
        gradients: Mapping[str, bool],
        steps: Callable[[], Mapping[str, Tensor]],
    ) -> None:
        """End the segment, if there was a step, and write it.

        Args:
            accountant: Its accounts.
            split: How well its gradients were split.
            gradients: What was found about them, `GradientSums.state_dict`.
            steps: Hands over what its steps can be taken again with, if that was noted.

        Raises:
            RunError: It cannot be written now; `end` and `write` try again.
        """
        self.write(accountant)
        if self.torn:
            warn_of_torn_step(accountant.steps)
        elif accountant.steps:
            with self.as_a_whole():
                end = self._plan.point()
                displacement, self._start = end - self._start, end
                segment, summary = accountant.close(displacement, split)
                segment = replace(segment, steps=steps())
                position, checkpoint = len(self._writer), self.checkpoint()
                self._waiting = [_Ended(position, segment, summary, checkpoint, displacement, gradients)]
            self.write(accountant)

    def write(self, accountant: SegmentAccountant) -> None:
        """Write the segment that has ended, if it is not written yet."""
        for ended in self._waiting:
            if ended.position == len(self._writer):
                parts = ended.segment, ended.summary, ended.checkpoint, self._describe()
                self._writer.segment(*parts)
            self._waiting = []
            self.warnings.of(ended.position, ended.segment, ended.summary, ended.displacement, **ended.gradients)
