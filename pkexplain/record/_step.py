"""The steps of a recording: what happens before, during and after each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pkexplain.errors import ExampleIdError
from pkexplain.gradients.compiled import running_eagerly
from pkexplain.gradients.factors import ExampleGradients
from pkexplain.gradients.interrupts import deferred_interrupts
from pkexplain.gradients.split import Split
from pkexplain.gradients.torch_state import without_autocast
from pkexplain.gradients.watch import Watch
from pkexplain.ids import check_ids
from pkexplain.optimizers.base import CapturedBatch
from pkexplain.optimizers.segment_accountant import AppliedStep
from pkexplain.record._accounts import Accounts
from pkexplain.record._contract import (
    broken,
    not_after_a_torn_step,
    not_all_skipped,
    not_all_stepped,
    not_by_a_child,
    not_finite,
    warn_of_unapplied,
    without_backward,
)
from pkexplain.record._optimizer_steps import closure_of, skips, with_result
from pkexplain.record._plan import Plan
from pkexplain.record._roll_call import ACCUMULATE, BATCH, REFUSED, STEP, RollCall


@dataclass
class Step:
    """The step being recorded: its batch, and how far the optimizers have come."""

    batch: CapturedBatch
    accumulate: bool | None  # None: whether the optimizer steps is seen when it does
    before: Tensor | None = None  # θ before the step; None if the optimizers skip it, or were not called yet
    factors: list[list[float]] = field(default_factory=list)  # between captured and applied gradients
    begun: list[torch.optim.Optimizer] = field(default_factory=list)
    done: bool = False  # whether all have stepped


class StepRecorder:
    """Records one step after another.

    Args:
        plan: What is recorded.
        accounts: Where it is added up.
        meet: Waits for all processes; see `RollCall.meet`.
        roll_call: Where they meet.
        end_segment: Called where a segment ends; with whether that is before its full length.
    """

    def __init__(
        self,
        plan: Plan,
        accounts: Accounts,
        meet: Callable[[int, int], int],
        roll_call: RollCall,
        end_segment: Callable[[bool], None],
    ) -> None:
        """Wait for the first step."""
        self._plan, self._accounts, self._meet, self._roll_call = plan, accounts, meet, roll_call
        self._end_segment, self._process = end_segment, os.getpid()
        self._step: Step | None = None
        self._accumulated: list[CapturedBatch] = []
        self._watching = ExitStack()  # what listens to the model during a step

    @property
    def between_steps(self) -> bool:
        """Whether no step is open, and every gradient was applied."""
        return self._step is None and not self._accumulated

    @property
    def in_a_step(self) -> bool:
        """Whether a step is open."""
        return self._step is not None

    def hooks(self) -> Iterator[Any]:
        """Listen to the parameters' gradients and to the optimizers; yield the handles."""
        yield from self._accounts.sums.hooks(self._current_batch)
        for optimizer in self._plan.optimizers.all:
            yield optimizer.register_step_pre_hook(self._before_step)
            yield optimizer.register_step_post_hook(lambda *_: self._after_step())

    def refuse_to_go_on(self) -> None:
        """Refuse to record in a forked process, or after an error that tore a step.

        Raises:
            RecordingError: This is such a process, or there was such an error.
        """
        if os.getpid() != self._process:
            raise not_by_a_child()
        if self._accounts.ends.torn:
            raise not_after_a_torn_step()

    def begin(self, ids: Sequence[int] | Tensor, accumulate: bool | None) -> None:
        """Begin a step; see `Recorder.begin`."""
        self.refuse_to_go_on()
        if self._step is not None:
            raise broken("it is nested in another step", "a step inside a step", "End the outer one first")
        plan, accounts = self._plan, self._accounts
        plan.steps.refuse_unknown_parameters()
        plan.steps.refuse_movement_of_others()
        batch = self._batch(ids, accumulate)
        if accounts.lengths.overflows(batch.everywhere, plan.group.world_size):  # a sampler may repeat some examples
            self._end_segment(False)  # the loader dropped its last, smaller batch
        accounts.replay.begin(batch)
        self._step = Step(batch, accumulate)
        try:
            with deferred_interrupts():
                watch = self._watching.enter_context
                watch(running_eagerly())
                watch(accounts.inputs.noting(len(batch.ids)))
                watch(accounts.identity.noting(batch.ids))
                watch(accounts.derivatives.noting(batch))
                watch(plan.capture.during_backward(len(batch.ids), partial(self._receive, batch), self._watch()))
        except BaseException:
            self.abandon()
            raise

    def end(self) -> None:
        """End the step that is open, and with it the segment if that is full.

        Raises:
            RecordingError: No step is open, or the training loop broke the contract.
        """
        step, plan, accounts = self._step, self._plan, self._accounts
        if step is None:
            raise broken("recorder.end() has no step to end", "no recorder.begin(ids) before it", "Call begin first")
        try:
            self.stop_watching()
            self._check_contract(step)
            plan.steps.refuse_movement_of_others()
        except BaseException:
            self.abandon()
            raise
        self._step = None
        if not self._accumulated and accounts.lengths.full(accounts.accountant.elementwise):
            self._end_segment(True)

    def abandon(self) -> None:
        """Forget the step that is open; a step that the optimizers have taken stays recorded."""
        self.stop_watching()
        if self._step is not None:
            self._step = None
            self._forget()

    def leave(self) -> None:
        """End the step that is open if anything came of it: a loop that is left in its middle has taken it, maybe."""
        if self._step is not None and (self._step.batch.summed or self._step.done):
            self.end()
        self.abandon()

    def finish(self) -> None:
        """Say so if gradients were never applied."""
        if self._accumulated:
            if self._accounts.sums.finite():
                warn_of_unapplied(sum(len(batch.ids) for batch in self._accumulated))
                self._forget()
            else:
                self._skip(self._accumulated)  # a loss scaler saw it too

    def stop_watching(self) -> None:
        """Stop listening to the model; an interrupt may come just before that is done, so it can be called again."""
        with deferred_interrupts():
            self._watching.close()
            self._plan.capture.release()

    def _batch(self, ids: Sequence[int] | Tensor, accumulate: bool | None) -> CapturedBatch:
        """Check the ids; if another process refuses its ids, none continues without it."""
        plan = self._plan
        try:
            checked = check_ids(ids, plan.num_examples, gone=self._accounts.withdrawn, repeats=True)
        except ExampleIdError:
            self._roll_call.meet(REFUSED)
            raise
        batch = CapturedBatch(checked, device=plan.like.device)
        doing = BATCH if accumulate is None else ACCUMULATE if accumulate else STEP
        batch.everywhere = self._meet(doing, len(batch.ids))
        return batch

    def _watch(self) -> Watch:
        """What to tell the recording, and ask it, about each backward pass."""
        accounts = self._accounts
        first = not accounts.accountant.steps
        return Watch(accounts.split.verifies(first), self._learnt, accounts.inputs.axes, self._begin_backward)

    def _current_batch(self) -> CapturedBatch | None:
        """The batch of the backward pass that is running; None if it is not one that adds to ``.grad``."""
        capture = self._plan.capture
        return self._step.batch if self._step and capture.running and not capture.rehearsing else None

    def _begin_backward(self) -> None:
        """Drop what earlier backward passes left, if their gradients were zeroed since."""
        step = self._step
        if step is not None and step.begun and not step.done:
            raise not_all_stepped(step.begun, self._plan.optimizers.all)
        waiting = step is not None and (self._accumulated or step.batch.summed)
        if step is None or not waiting or not self._accounts.sums.dropped():
            return
        if step.accumulate is None and self._accumulated and not self._accounts.sums.finite():
            self._skip(self._accumulated)  # a loss scaler left the step out
        self._forget()
        step.batch.reset()

    def _learnt(self, split: Split) -> None:
        """Take note of what cannot be split in the backward pass that is about to run."""
        if self._accounts.split.learnt(split):
            self._accounts.sums.follow()

    def _receive(self, batch: CapturedBatch, position: int, gradients: ExampleGradients) -> None:
        self._accounts.sums.receive(position, gradients)
        self._accounts.accountant.receive(batch, position, gradients)

    def _check_contract(self, step: Step) -> None:
        if not step.batch.summed:
            raise without_backward()
        if step.accumulate and step.begun:
            fix = "Leave accumulate out for the batch that the optimizer steps on"
            got = "optimizer.step() inside recorder.step(ids, accumulate=True)"
            raise broken("the optimizer stepped on a batch that should only accumulate", got, fix)
        if step.accumulate or (step.accumulate is None and not step.begun):
            step.batch.compact()  # before the next batch may write into its inputs
            self._accumulated.append(step.batch)
        elif step.begun and not step.done:
            raise not_all_stepped(step.begun, self._plan.optimizers.all)
        elif not step.done and not self._accounts.sums.finite():
            self._skip([*self._accumulated, step.batch])  # a loss scaler saw it too
        elif not step.done:
            fix = "Call optimizer.step() inside the block, or pass accumulate=True where a later batch steps"
            raise broken("the optimizer did not step", "a backward pass without optimizer.step()", fix)

    @without_autocast()
    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        step = self._step
        if step is None:
            fix = "Call it inside 'with recorder.step(ids):'"
            raise broken("optimizer.step() was called outside a recorded step", "a step without examples", fix)
        if optimizer in step.begun:
            raise broken(
                "optimizer.step() was called a second time", "two steps in one", "Record each in its own block"
            )
        closure, changed = closure_of(args, kwargs), None
        if closure is not None:  # evaluated here, once; the optimizer is given its result
            with torch.enable_grad():
                changed = with_result(closure(), args, kwargs)
        if not step.batch.summed:
            raise without_backward()
        skipped = skips(optimizer)
        if not step.begun:
            self._accounts.sums.join()
        elif skipped != (step.before is None):
            raise not_all_skipped()
        if not skipped:
            self._read(step, optimizer)
        step.begun.append(optimizer)
        return changed

    def _read(self, step: Step, optimizer: torch.optim.Optimizer) -> None:
        """Read what the optimizer is given; a GPU is waited for here, before the step, and nowhere else in it."""
        accounts, reader, batches = self._accounts, self._plan.steps, [*self._accumulated, step.batch]
        sums, split = accounts.sums, accounts.split
        reader.begin(optimizer)
        factors = accounts.accountant.compare(sums.captured, reader.applied)
        (finite,), *step.factors = reader.wait(torch.isfinite(sums.captured.sum()), *factors)
        if step.begun:
            return
        if not finite:
            raise not_finite(batches)
        accounts.accountant.note_capture_gap(sums.check(batches, split.names, split.allowed))
        step.batch.compact()  # before the step, as a layer's input may be a parameter
        accounts.replay.before_step()
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
        accounts, steps = self._accounts, self._plan.steps
        accountant, sums = accounts.accountant, accounts.sums
        unsplit = accounts.split.share_of(sums)
        gradients, numbers = (sums.captured, sums.attributed), steps.numbers()
        with accounts.ends.as_a_whole():
            accountant.step(AppliedStep(batches, *gradients, numbers, step.before, step.factors, unsplit))
        accounts.replay.step(batches)
        sums.note(accountant.capture_gap)
        accounts.lengths.count(sum(batch.everywhere for batch in batches), stepped=True)
        self._forget()

    def _skip(self, batches: Sequence[CapturedBatch]) -> None:
        """Count a step that was skipped."""
        self._accounts.ends.warnings.of_skipped(batches)
        self._accounts.accountant.skip(batches)
        self._accounts.lengths.count(sum(batch.everywhere for batch in batches), stepped=False)
        self._forget()

    def _forget(self) -> None:
        """Drop the gradients that the optimizer has not applied."""
        self._accumulated = []
        self._accounts.split.clear()
        self._accounts.sums.clear()
