"""What a recording adds up and watches, together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pkexplain.optimizers.segment_accountant import SegmentAccountant
from pkexplain.record._gradient_check import GradientSums
from pkexplain.record._identity import InputIdentity
from pkexplain.record._observers import InputShapes, LossDerivatives
from pkexplain.record._replay_log import ReplayRecorder
from pkexplain.record._segment_ends import SegmentEnds
from pkexplain.record._segment_lengths import SegmentLengths
from pkexplain.record._split_notes import SplitNotes


@dataclass
class Accounts:
    """What a recording adds up, and what it watches.

    Attributes:
        inputs: Shapes of the model's inputs.
        identity: Whether ids come back with the same inputs.
        derivatives: The loss derivatives.
        split: What cannot be split.
        accountant: The displacements of the segment.
        lengths: Where segments end.
        sums: The gradients of the step.
        ends: The segments that have ended.
        replay: What steps can be taken again with.
        withdrawn: Examples that cannot come any more.
    """

    inputs: InputShapes
    identity: InputIdentity
    derivatives: LossDerivatives
    split: SplitNotes
    accountant: SegmentAccountant
    lengths: SegmentLengths
    sums: GradientSums
    ends: SegmentEnds
    replay: ReplayRecorder
    withdrawn: Sequence[int] = ()
