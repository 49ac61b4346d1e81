"""A recording while it runs: what happens before, during and after each step, and at the end of a segment."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pkexplain.errors import ExampleIdError, RecordingError
from pkexplain.gradients.factors import ExampleGradients
from pkexplain.gradients.interrupts import deferred_interrupts
from pkexplain.gradients.split import Split
from pkexplain.gradients.torch_state import without_autocast
from pkexplain.gradients.watch import Watch
from pkexplain.ids import check_ids
from pkexplain.optimizers.base import CapturedBatch
from pkexplain.optimizers.segment_accountant import AppliedStep, SegmentAccountant
from pkexplain.record._contract import (
    broken,
    grown_since,
    not_after_a_torn_step,
    not_all_skipped,
    not_all_stepped,
    not_between_steps,
    not_by_a_child,
    not_finite,
    without_backward,
)
from pkexplain.record._gradient_check import ROUNDING, GradientSums
from pkexplain.record._observers import InputShapes, LossDerivatives
from pkexplain.record._optimizer_steps import skips
from pkexplain.record._plan import Plan
from pkexplain.record._resume import checksum_optimizers, find_standpoint, restore_state
from pkexplain.record._roll_call import ACCUMULATE, END, REFUSED, SAVE, STEP, RollCall
from pkexplain.record._segment_ends import SegmentEnds
from pkexplain.record._segment_lengths import SegmentLengths
from pkexplain.record._split_notes import SplitNotes
from pkexplain.record._state import serialise
from pkexplain.record._step import Step
from pkexplain.store.fingerprint import ModelFingerprint
from pkexplain.store.manifest import Manifest, OptimizerEntry
from pkexplain.store.writer import RunWriter


class Session:
    """Records one training, from entering the recorder to leaving it.

    Args:
        plan: What is recorded.

    Raises:
        RunExistsError: There is a run already.
        RunBusyError: Something else is writing to it.
        RunError: The run cannot be written or resumed.
    """

    def __init__(self, plan: Plan) -> None:
        """Start or continue the run, and hook into the optimizer."""
        parameters = plan.parameters
        self._plan, self._process = plan, os.getpid()
        self._inputs, self._derivatives = InputShapes(plan.model), LossDerivatives(plan.model, plan.capture)
        self._fingerprint = ModelFingerprint.of(plan.model, plan.blocks)
        self._ended = "still recording, or killed"
        self._deleted: Sequence[int] = ()
        self._step: Step | None = None
        self._accumulated: list[CapturedBatch] = []
        self._split = SplitNotes(plan)
        self._accountant = SegmentAccountant(plan.spec())
        self._lengths = SegmentLengths(plan.num_examples, plan.segments)
        self._sums = GradientSums(plan.spec(), parameters)
        self._writer = RunWriter(plan.store, plan.group)
        self._ends = SegmentEnds(plan, self._writer, self._manifest)
        self._handles: list[Any] = []
        self._watching = ExitStack()  # what listens to the model during a step
        self._roll_call = RollCall(plan.group, plan.wrapped)
        self._writer.lock()
        try:
            if plan.resumes:
                self._continue()
            else:
                self._writer.start(self._manifest(), self._ends.checkpoint())
            self._handles.extend(self._sums.hooks(self._current_batch))
            for optimizer in plan.optimizers.all:
                self._handles.append(optimizer.register_step_pre_hook(self._before_step))
                self._handles.append(optimizer.register_step_post_hook(lambda *_: self._after_step()))
        except BaseException:
            self._remove_hooks()
            self._roll_call.close()
            self._writer.release()
            raise

    def _continue(self) -> None:
        """Continue a run from the point at which the model and the optimizer are."""
        plan, trajectory = self._plan, self._plan.store.trajectory()
        if trajectory.num_examples > plan.num_examples:
            raise grown_since(trajectory.num_examples, plan.num_examples)
        optimizer = checksum_optimizers(plan.optimizers, plan.parameters)
        settings = OptimizerEntry.of(*plan.optimizers.all)
        standpoint = find_standpoint(plan.store, trajectory, self._ends.start, optimizer, settings, plan.group)
        spec = plan.spec(trajectory.segment(0).audit_ids)
        projector = trajectory.projector(standpoint.segments - 1, plan.like.device) if standpoint.segments else None
        steps = trajectory.boundaries[standpoint.segments]
        self._accountant = SegmentAccountant(spec, projector, steps)
        self._sums = GradientSums(spec, plan.parameters)
        self._inputs.seen.update(trajectory.inputs)
        self._derivatives.output = trajectory.manifest.output
        self._deleted = trajectory.manifest.withdrawn
        if standpoint.state is not None:
            apart, self._lengths.age = restore_state(plan.store, standpoint, spec, self._accountant)
            self._sums.load_state_dict(apart)
        self._writer.resume(trajectory.manifest, self._ended, standpoint.segments)  # last: a refusal drops nothing

    def close(self, error: type[BaseException] | None) -> None:
        """Finish the last segment and remove the hooks, also after an error."""
        if os.getpid() != self._process:
            return  # a fork that exits by itself comes here, too; the run is not its
        self._remove_hooks()
        self._ended = "finished" if error is None else f"interrupted by {error.__name__}"
        try:
            if error is None:
                self._meet(END)
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

    def _stop_watching(self) -> None:
        with deferred_interrupts():
            self._watching.close()
            self._plan.capture.release()

    def _remove_hooks(self) -> None:
        self._stop_watching()  # an interrupt may have come just before that was done
        for handle in self._handles:
            handle.remove()

    def save(self) -> None:
        """End the segment here and save the momentum buffers.

        Raises:
            RecordingError: There are gradients that the optimizer has not applied yet.
            RunError: The state cannot be written.
        """
        self._refuse_to_go_on()
        if self._step is not None or self._accumulated:
            raise not_between_steps(recording=True)
        self._meet(SAVE)
        self._end_segment()
        self._plan.capture.forget()  # as a resumed run does not know the split
        if not len(self._writer):
            return
        state = {"attributed": self._sums.apart, "accounts": self._accountant.state_dict(), "age": self._lengths.age}
        optimizer = checksum_optimizers(self._plan.optimizers, self._plan.parameters)
        self._writer.state(serialise(state), optimizer or "", OptimizerEntry.of(*self._plan.optimizers.all))

    def _refuse_to_go_on(self) -> None:
        if os.getpid() != self._process:
            raise not_by_a_child()
        if self._ends.torn:
            raise not_after_a_torn_step()

    @contextmanager
    def step(self, ids: Sequence[int] | Tensor, accumulate: bool) -> Iterator[None]:
        """Record one batch; see `Recorder.step`."""
        self._refuse_to_go_on()
        if self._step is not None:
            raise broken("it is nested in another step", "a step inside a step", "End the outer 'with' block first")
        plan = self._plan
        plan.steps.refuse_unknown_parameters()
        plan.steps.refuse_movement_of_others()
        batch = self._batch(ids, accumulate)
        if self._lengths.overflows(batch.everywhere, plan.group.world_size):  # a sampler may repeat some examples
            self._end_segment()  # the loader dropped its last, smaller batch
        step = self._step = Step(batch)
        try:
            with deferred_interrupts():
                self._watching.enter_context(self._inputs.noting(len(batch.ids)))
                self._watching.enter_context(self._derivatives.noting(batch))
            with plan.capture.during_backward(len(batch.ids), partial(self._receive, batch), self._watch()):
                yield
            self._stop_watching()
            self._check_contract(step, accumulate)
            plan.steps.refuse_movement_of_others()
        except BaseException:
            self._stop_watching()
            self._forget()
            raise
        finally:
            self._step = None
        if not self._accumulated and self._lengths.full(self._accountant.elementwise):
            self._end_segment(early=True)

    def _batch(self, ids: Sequence[int] | Tensor, accumulate: bool) -> CapturedBatch:
        """Check the ids; if another process refuses its ids, none continues without it."""
        plan = self._plan
        try:
            batch = CapturedBatch(check_ids(ids, plan.num_examples, gone=self._deleted), device=plan.like.device)
        except ExampleIdError:
            self._roll_call.meet(REFUSED)
            raise
        batch.everywhere = self._meet(ACCUMULATE if accumulate else STEP, len(batch.ids))
        return batch

    def _watch(self) -> Watch:
        """What to tell the recording, and ask it, about each backward pass."""
        first = not self._accountant.steps
        return Watch(self._split.verifies(first), self._learnt, self._inputs.axes, self._begin_backward)

    def _current_batch(self) -> CapturedBatch | None:
        """The batch of the backward pass that is running; None if it is not one that adds to ``.grad``."""
        capture = self._plan.capture
        return self._step.batch if self._step and capture.running and not capture.rehearsing else None

    def _begin_backward(self) -> None:
        """Drop what earlier backward passes left, if their gradients were zeroed since."""
        if self._step is not None and self._step.begun and not self._step.done:
            raise not_all_stepped(self._step.begun, self._plan.optimizers.all)
        waiting = self._step is not None and (self._accumulated or self._step.batch.summed)
        if self._step is None or not waiting or not self._sums.dropped():
            return
        self._forget()
        self._step.batch.reset()

    def _learnt(self, split: Split) -> None:
        """Take note of what cannot be split in the backward pass that is about to run."""
        if self._split.learnt(split):
            self._sums.follow()

    def _receive(self, batch: CapturedBatch, position: int, gradients: ExampleGradients) -> None:
        self._sums.receive(position, gradients)
        self._accountant.receive(batch, position, gradients)

    def _check_contract(self, step: Step, accumulate: bool) -> None:
        if not step.batch.summed:
            raise without_backward()
        if accumulate and step.begun:
            fix = "Leave accumulate out for the batch that the optimizer steps on"
            got = "optimizer.step() inside recorder.step(ids, accumulate=True)"
            raise broken("the optimizer stepped on a batch that should only accumulate", got, fix)
        if accumulate:
            step.batch.compact()  # before the next batch may write into its inputs
            self._accumulated.append(step.batch)
        elif step.begun and not step.done:
            raise not_all_stepped(step.begun, self._plan.optimizers.all)
        elif not step.done and not self._sums.finite():
            self._skip([*self._accumulated, step.batch])  # a loss scaler saw it too
        elif not step.done:
            fix = "Call optimizer.step() inside the block, or pass accumulate=True where a later batch steps"
            raise broken("the optimizer did not step", "a backward pass without optimizer.step()", fix)

    @without_autocast()
    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        step = self._step
        if step is None:
            fix = "Call it inside 'with recorder.step(ids):'"
            raise broken("optimizer.step() was called outside a recorded step", "a step without examples", fix)
        if optimizer in step.begun:
            raise broken(
                "optimizer.step() was called a second time", "two steps in one", "Record each in its own block"
            )
        self._plan.steps.refuse_closure(args, kwargs)
        if not step.batch.summed:
            raise without_backward()
        skipped = skips(optimizer)
        if not step.begun:
            self._sums.join()
        elif skipped != (step.before is None):
            raise not_all_skipped()
        if not skipped:
            self._read(step, optimizer)
        step.begun.append(optimizer)

    def _read(self, step: Step, optimizer: torch.optim.Optimizer) -> None:
        """Read what the optimizer is given; a GPU is waited for here, before the step, and nowhere else in it."""
        sums, reader, batches = self._sums, self._plan.steps, [*self._accumulated, step.batch]
        reader.begin(optimizer)
        factors = self._accountant.compare(sums.captured, reader.applied)
        (finite,), *step.factors = reader.wait(torch.isfinite(sums.captured.sum()), *factors)
        if step.begun:
            return
        if not finite:
            raise not_finite(batches)
        self._accountant.note_capture_gap(sums.check(batches, self._split.names, self._split.allowed))
        step.batch.compact()  # before the step, as a layer's input may be a parameter
        step.before = self._plan.point()

    @deferred_interrupts()  # the optimizer has moved the parameters: the accounts must follow
    @without_autocast()
    def _after_step(self) -> None:
        step = self._step
        if step is None or len(step.begun) < len(self._plan.optimizers.all):
            return
        step.done = True
        batches = [*self._accumulated, step.batch]
        if step.before is None:
            self._skip(batches)
            return
        steps, sums = self._plan.steps, self._sums
        unsplit = self._split.share_of(sums)
        gradients, numbers = (sums.captured, sums.attributed), steps.numbers()
        with self._ends.as_a_whole():
            self._accountant.step(AppliedStep(batches, *gradients, numbers, step.before, step.factors, unsplit))
        if self._accountant.capture_gap > ROUNDING:
            sums.follow()
        self._lengths.count(sum(batch.everywhere for batch in batches), stepped=True)
        self._forget()

    def _skip(self, batches: Sequence[CapturedBatch]) -> None:
        """Count a step that was skipped."""
        self._ends.warnings.of_skipped(batches)
        self._accountant.skip(batches)
        self._lengths.count(sum(batch.everywhere for batch in batches), stepped=False)
        self._forget()

    def _forget(self) -> None:
        """Drop the gradients that the optimizer has not applied."""
        self._accumulated = []
        self._split.clear()
        self._sums.clear()

    @without_autocast()
    def _end_segment(self, early: bool = False) -> None:
        if not early:
            self._lengths.restart()
        self._ends.end(self._accountant, self._split.summary(), self._sums.apart)

    def _manifest(self) -> Manifest:
        """Describe the run; the writer adds what it has written."""
        seen = dict(self._inputs.seen), self._derivatives.output
        return self._plan.describe(self._ended, self._fingerprint, *seen)
