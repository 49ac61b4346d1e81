"""A recording while it runs: beginning or continuing the run, its segments, saving, and the end."""

from __future__ import annotations

import os
from typing import Any

from pkexplain.errors import RecordingError
from pkexplain.gradients.torch_state import without_autocast
from pkexplain.optimizers.segment_accountant import SegmentAccountant
from pkexplain.record._accounts import Accounts
from pkexplain.record._contract import grown_since, not_between_steps
from pkexplain.record._gradient_check import GradientSums
from pkexplain.record._identity import InputIdentity
from pkexplain.record._observers import InputShapes, LossDerivatives
from pkexplain.record._plan import Plan
from pkexplain.record._replay_log import ReplayRecorder
from pkexplain.record._resume import checksum_optimizers, find_standpoint, restore_state
from pkexplain.record._roll_call import END, SAVE, RollCall
from pkexplain.record._segment_ends import SegmentEnds
from pkexplain.record._segment_lengths import SegmentLengths
from pkexplain.record._split_notes import SplitNotes
from pkexplain.record._state import serialise
from pkexplain.record._step import StepRecorder
from pkexplain.store.fingerprint import ModelFingerprint
from pkexplain.store.manifest import Manifest, OptimizerEntry
from pkexplain.store.writer import RunWriter


class Session:
    """Records one training, from entering the recorder to leaving it.

    Attributes:
        steps: Records its steps.

    Args:
        plan: What is recorded.

    Raises:
        RunExistsError: There is a run already.
        RunBusyError: Something else is writing to it.
        RunError: The run cannot be written or resumed.
    """

    def __init__(self, plan: Plan) -> None:
        """Start or continue the run, and hook into the optimizer."""
        self._plan, self._process = plan, os.getpid()
        self._fingerprint = ModelFingerprint.of(plan.model, plan.blocks)
        self._ended = "still recording, or killed"
        self._writer = RunWriter(plan.store, plan.group, plan.keeps)
        self._accounts = Accounts(
            inputs=InputShapes(plan.model),
            identity=InputIdentity(plan.model, plan.num_examples, plan.augmented, plan.dataset),
            derivatives=LossDerivatives(plan.model, plan.capture),
            split=SplitNotes(plan),
            accountant=SegmentAccountant(plan.spec()),
            lengths=SegmentLengths(plan.num_examples, plan.segments),
            sums=GradientSums(plan.spec(), plan.parameters),
            ends=SegmentEnds(plan, self._writer, self._manifest),
            replay=ReplayRecorder(plan),
        )
        self._handles: list[Any] = []
        self._roll_call = RollCall(plan.group, plan.wrapped)
        self.steps = StepRecorder(plan, self._accounts, self._meet, self._roll_call, self._end_segment)
        self._writer.lock()
        try:
            if plan.resumes:
                self._continue()
            else:
                self._writer.start(self._manifest(), self._accounts.ends.checkpoint(), plan.overwrite)
            self._handles.extend(self.steps.hooks())
        except BaseException:
            self._remove_hooks()
            self._roll_call.close()
            self._writer.release()
            raise

    def _continue(self) -> None:
        """Continue a run from the point at which the model and the optimizer are."""
        plan, accounts, trajectory = self._plan, self._accounts, self._plan.store.trajectory()
        if trajectory.num_examples > plan.num_examples:
            raise grown_since(trajectory.num_examples, plan.num_examples)
        optimizer = checksum_optimizers(plan.optimizers, plan.parameters)
        settings = OptimizerEntry.of(*plan.optimizers.all)
        standpoint = find_standpoint(plan.store, trajectory, accounts.ends.start, optimizer, settings, plan.group)
        spec = plan.spec(trajectory.segment(0).audit_ids)
        projector = trajectory.projector(standpoint.segments - 1, plan.like.device) if standpoint.segments else None
        steps = trajectory.boundaries[standpoint.segments]
        accounts.accountant = SegmentAccountant(spec, projector, steps)
        accounts.sums = GradientSums(spec, plan.parameters)
        accounts.inputs.seen.update(trajectory.inputs)
        accounts.identity.digests.update(trajectory.manifest.digests)
        accounts.derivatives.output = trajectory.manifest.output
        accounts.withdrawn = trajectory.manifest.withdrawn
        if standpoint.state is not None:
            sums, accounts.lengths.age = restore_state(plan.store, standpoint, spec, accounts.accountant)
            accounts.sums.load_state_dict(sums)
        self._writer.resume(trajectory.manifest, self._ended, standpoint.segments)  # last: a refusal drops nothing

    def close(self, error: type[BaseException] | None) -> None:
        """Finish the last segment and remove the hooks, also after an error."""
        if os.getpid() != self._process:
            return  # a fork that exits by itself comes here, too; the run is not its
        try:
            if error is None:
                self.steps.leave()
            else:
                self.steps.abandon()
        except BaseException as late:
            error = type(late)
            raise
        finally:
            self._remove_hooks()
            self._ended = "finished" if error is None else f"interrupted by {error.__name__}"
            try:
                if error is None:
                    self._meet(END)
                    self.steps.finish()
                if error is None or self._plan.group.world_size == 1:  # other processes may not have come here
                    self._finish()
            finally:
                self._roll_call.close()
                self._writer.release()

    def _finish(self) -> None:
        self._end_segment()
        self._writer.close(self._manifest())

    def _meet(self, doing: int, examples: int = 0) -> int:
        """Wait for all processes; if they do different things, end the run in all of them."""
        try:
            return self._roll_call.meet(doing, examples)
        except RecordingError as error:
            if self._roll_call.uneven:
                self._ended = f"interrupted by {type(error).__name__}"
                self._finish()
            raise

    def _remove_hooks(self) -> None:
        self.steps.stop_watching()  # an interrupt may have come just before that was done
        for handle in self._handles:
            handle.remove()

    def save(self) -> None:
        """End the segment here and save the momentum buffers.

        Raises:
            RecordingError: There are gradients that the optimizer has not applied yet.
            RunError: The state cannot be written.
        """
        self.steps.refuse_to_go_on()
        if not self.steps.between_steps:
            raise not_between_steps(recording=True)
        self._meet(SAVE)
        self._end_segment()
        self._plan.capture.forget()  # as a resumed run does not know the split
        if not len(self._writer):
            return
        accounts = self._accounts
        sums, age = accounts.sums.state_dict(), accounts.lengths.age
        state = {"sums": sums, "accounts": accounts.accountant.state_dict(), "age": age}
        optimizer = checksum_optimizers(self._plan.optimizers, self._plan.parameters)
        self._writer.state(serialise(state), optimizer or "", OptimizerEntry.of(*self._plan.optimizers.all))

    def end_segment(self) -> None:
        """End the segment between two steps; gradients that wait to be applied go on waiting."""
        self.steps.refuse_to_go_on()
        if self.steps.in_a_step:
            raise not_between_steps(recording=True)
        self._end_segment()

    @without_autocast()
    def _end_segment(self, early: bool = False) -> None:
        accounts = self._accounts
        if not early:
            accounts.lengths.restart()
        split, gradients = accounts.split.summary(), accounts.sums.state_dict()
        accounts.ends.end(accounts.accountant, split, gradients, accounts.replay.take)

    def _manifest(self) -> Manifest:
        """Describe the run; the writer adds what it has written."""
        accounts = self._accounts
        return self._plan.describe(
            self._ended,
            self._fingerprint,
            dict(accounts.inputs.seen),
            dict(accounts.identity.digests),
            accounts.derivatives.output,
        )
