"""`Recorder`: the context manager in the training loop."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pkexplain.distributed import find_process_group
from pkexplain.errors import ExampleIdError
from pkexplain.gradients.capture import Capture
from pkexplain.gradients.factors import ExampleGradients
from pkexplain.gradients.layers import find_layers, flatten_blocks
from pkexplain.ids import check_ids
from pkexplain.optimizers.adaptive import Lookahead
from pkexplain.optimizers.base import CapturedBatch, Setting
from pkexplain.optimizers.rules import rule_for
from pkexplain.optimizers.segment import SegmentAccountant
from pkexplain.projection.kinds import Kronecker, Projection
from pkexplain.record._contract import (
    broken,
    check_arguments,
    not_between_steps,
    not_finite,
    not_open,
    stepped_on_accumulated,
    without_backward,
    without_step,
)
from pkexplain.record._gradient_check import ROUNDING, GradientSums
from pkexplain.record._observers import InputShapes, LossDerivatives
from pkexplain.record._optimizer_steps import StepReader
from pkexplain.record._resume import checksum_optimizer, find_standpoint, recorded_arguments, take_up
from pkexplain.record._state import serialise
from pkexplain.record._warnings import SegmentWarnings
from pkexplain.store.base import Store
from pkexplain.store.directory import DirectoryStore, open_store
from pkexplain.store.fingerprint import ModelFingerprint
from pkexplain.store.trajectory import Checkpoint
from pkexplain.store.writer import RunWriter, describe_optimizer
from pkexplain.version import __version__

__all__ = ["Recorder"]


class Recorder:
    """Record a training run: how far each example moved the parameters, segment by segment.

    For every segment, Δθ_t = Σ_i D_i,t + decay_t + optimizer_t; the rows P D_i,t, the checkpoints and the two named
    vectors are stored. The model, the loss and the optimizer stay as they are.

    Args:
        run: A directory that does not hold a run yet, or a `pkexplain.MemoryStore`.
        model: The model that is trained.
        optimizer: Its optimizer: SGD, Adam, AdamW, NAdam, RAdam, Adamax, RMSprop or Adagrad of `torch.optim`, or one
            whose rule was given to `pkexplain.register_update_rule`.
        num_examples: How many training examples there are; ids run from 0 to ``num_examples - 1``.
        projection: How gradients are compressed; ``Kronecker()`` by default.
        segments: ``"epoch"`` for a checkpoint after every ``num_examples`` visits, or a number of optimizer steps.
        lookahead: How long gradients wait in memory until the optimizer's second moment of later steps is known:
            ``"auto"``, until 2% of them is left in the moment or 2 GiB wait; a number of steps; or ``"exact"``. What is
            given up is measured, on the ledger's ``optimizer`` line. Optimizers without a second moment ignore it.
        dtype: Number format of the arithmetic and of the checkpoints, `torch.float32` or `torch.float64`.

    Raises:
        UnsupportedOptimizerError: The optimizer has no update rule.
        UnsupportedLayerError: A trainable layer has no per-example rule.
        ConfigurationError: An argument cannot be.

    Example:
        >>> import torch, pkexplain as pk
        >>> model, x, y = torch.nn.Linear(3, 2), torch.randn(8, 3), torch.randint(2, (8,))
        >>> optimizer, store = torch.optim.SGD(model.parameters(), lr=0.1), pk.MemoryStore()
        >>> with pk.Recorder(store, model, optimizer, num_examples=8) as recorder:
        ...     with recorder.step(range(8)):
        ...         torch.nn.functional.cross_entropy(model(x), y).backward()
        ...         optimizer.step()
    """

    def __init__(
        self,
        run: str | os.PathLike[str] | Store,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        num_examples: int,
        projection: Projection | None = None,
        segments: str | int = "epoch",
        lookahead: str | int = "auto",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Check that everything can be recorded; nothing is written yet."""
        check_arguments(model, num_examples=num_examples, segments=segments, lookahead=lookahead, dtype=dtype)
        model, self._group = find_process_group(model)
        self._store, self._model, self._optimizer = open_store(run), model, optimizer
        self._num_examples, self._segments, self._dtype = num_examples, segments, dtype
        self._given_lookahead, self._resuming = lookahead, False
        self._gone: Sequence[int] = ()
        self._projection = projection or Kronecker()
        rule = rule_for(optimizer)
        in_group = {id(p): g for g, group in enumerate(optimizer.param_groups) for p in group["params"]}
        groups = {n: in_group[id(p)] for n, p in model.named_parameters() if p.requires_grad and id(p) in in_group}
        layers, blocks = find_layers(model, groups)
        self._blocks, self._capture = tuple(blocks), Capture(layers, dtype)
        named = dict(model.named_parameters())
        self._names = [name for block in blocks for name in block.parameters]
        self._parameters = [named[name] for name in self._names]
        self._like = torch.empty(0, dtype=dtype, device=self._parameters[0].device)
        self._steps = StepReader(model, optimizer, rule, self._blocks, self._like)
        self._lookahead = Lookahead.of(lookahead, self._like)
        self._active: CapturedBatch | None = None
        self._pending: list[CapturedBatch] = []
        self._open = False

    @classmethod
    def resume(
        cls,
        run: str | os.PathLike[str] | Store,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        num_examples: int | None = None,
    ) -> Recorder:
        """Go on with a run: one that was killed, or one that is to be trained further.

        Load the model and the optimizer from what you saved right after `save`. Segments that were finished after that
        are dropped, and trained again. With an optimizer that has no state yet (a new one, or one without a moment)
        the run goes on from any checkpoint.

        Args:
            run: The run.
            model: The model, as it was then.
            optimizer: Its optimizer, as it was then, or a new one.
            num_examples: How many training examples there are now, where they have become more: the new ones come
                behind the others.

        Returns:
            A recorder, to be entered as any other.

        Raises:
            RunNotFoundError: There is no run, or it holds no finished segment.
            RunDamagedError: A file of the run is missing, truncated or altered.
            ConfigurationError: An argument cannot be.
        """
        store = open_store(run)
        trajectory = store.trajectory()
        recorder = cls(store, model, optimizer, **recorded_arguments(store, trajectory, num_examples))
        trajectory.fingerprint.check(recorder._model)
        recorder._resuming = True
        return recorder

    def __enter__(self) -> Recorder:
        """Start the run, or go on with it, and begin to listen to the optimizer."""
        if self._open:
            raise broken("the recorder is open already", "a second 'with recorder:'", "Make a recorder for each run")
        self._start = self._flat()
        self._inputs, self._derivatives = InputShapes(self._model), LossDerivatives(self._model)
        self._fingerprint = ModelFingerprint.of(self._model, self._blocks)
        self._ended = "still recording, or killed"
        self._skipping, self._warnings = False, SegmentWarnings(self._names, [p.numel() for p in self._parameters])
        self._writer = RunWriter(self._store, self._group)
        self._writer.lock()
        try:
            if self._resuming:
                self._go_on()
            else:
                setting = self._setting()
                self._accountant = SegmentAccountant(setting, self._lookahead)
                self._sums = GradientSums(setting, self._parameters)
                self._writer.start(self._about(), self._checkpoint())
        except BaseException:
            self._writer.release()
            raise
        self._handles = [
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(lambda *_: self._after_step()),
            *self._sums.hooks(lambda: self._active),
        ]
        self._open = True
        return self

    def _setting(self, audited: Tensor | None = None) -> Setting:
        scratch = self._store.path if isinstance(self._store, DirectoryStore) else None
        return Setting(self._blocks, self._projection, self._num_examples, self._like, self._group, audited, scratch)

    def _go_on(self) -> None:
        """Take up a run where the model and the optimizer stand."""
        manifest = self._store.manifest()
        trajectory = self._store.trajectory()
        optimizer = checksum_optimizer(self._optimizer, self._parameters)
        standpoint = find_standpoint(self._store, manifest, self._start, optimizer, self._group)
        projector = trajectory.projector(self._like.device)
        setting = self._setting(trajectory.segment(0).audit_ids)
        steps = trajectory.boundaries[standpoint.segments]
        self._accountant = SegmentAccountant(setting, self._lookahead, projector, steps)
        self._sums = GradientSums(setting, self._parameters)
        self._inputs.seen.update(trajectory.inputs)
        self._gone = manifest.get("withdrawn", [])
        if standpoint.state is not None:
            self._sums.load_state_dict(take_up(self._store, standpoint, setting, self._accountant))
        self._writer.resume(manifest, {"ended": self._ended}, standpoint.segments)  # last: a refusal drops nothing

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Finish the last segment and let go of the model and the optimizer, also after an error."""
        for handle in self._handles:
            handle.remove()
        self._open = False
        self._ended = "finished" if kind is None else f"interrupted by {kind.__name__}"
        try:
            if kind is None or self._group.world_size == 1:  # others may not have come this far
                self._end_segment()
                self._writer.close(self._about())
        finally:
            self._writer.release()

    def save(self) -> None:
        """End the segment here and keep what is in the optimizer's moment, so that `resume` can go on from here.

        Call it where you save your own checkpoint of the model and the optimizer, just before. What the last two calls
        kept stays in the run.

        Raises:
            RecordingError: The recorder is not open, or gradients wait for the optimizer's step.
            RunError: The state cannot be written.
        """
        if not self._open or self._active is not None or self._pending:
            raise not_between_steps(self._open)
        self._end_segment()
        if not len(self._writer):
            return
        state = {"attributed": self._sums.apart, "accounts": self._accountant.state_dict()}
        optimizer = checksum_optimizer(self._optimizer, self._parameters)
        self._writer.state(serialise(state), optimizer or "")

    @contextmanager
    def step(self, ids: Sequence[int] | Tensor, *, accumulate: bool = False) -> Iterator[None]:
        """Record one batch: its forward and backward passes and the optimizer's step.

        Args:
            ids: Each example's row number in the training set, ``(batch,)``, without repeats.
            accumulate: The batch only adds to the gradient; the optimizer steps in a later ``step``.

        Yields:
            Nothing.

        Raises:
            ExampleIdError: The ids are out of range, repeated, or of the wrong length or type.
            RecordingError: The loop broke the contract: nested, closed, no backward pass, no step, a closure, or a
                parameter that the recorder does not know.
            NonFiniteGradientError: The loss or a gradient is not finite; the optimizer has not stepped.
        """
        if self._active is not None:
            raise broken("it is nested in another step", "a step inside a step", "End the outer 'with' block first")
        if not self._open:
            raise not_open()
        self._steps.refuse_strangers()
        batch = self._batch(ids)
        visits = self._accountant.visits + batch.everywhere  # a sampler may repeat some, so that all get as many
        if self._segments == "epoch" and visits >= self._num_examples + self._group.world_size:
            self._end_segment()  # the loader dropped its last, smaller batch
        self._active, self._stepped = batch, False
        try:
            with (
                self._inputs.noting(len(batch.ids)),
                self._derivatives.noting(batch),
                self._capture.during_backward(len(batch.ids), partial(self._receive, batch)),
            ):
                yield
            self._check_contract(batch, accumulate)
        except BaseException:
            self._forget()
            raise
        finally:
            self._active = None
        if self._segment_is_full():
            self._end_segment()

    def _batch(self, ids: Sequence[int] | Tensor) -> CapturedBatch:
        """Check the ids; where another process refuses its own, none goes on without it."""
        try:
            batch = CapturedBatch(check_ids(ids, self._num_examples, gone=self._gone).to(self._like.device))
        except ExampleIdError:
            self._group.all_reduce_int(-(1 << 40))  # less than all the others can add to it
            raise
        batch.everywhere = self._group.all_reduce_int(len(batch.ids))
        if batch.everywhere < 0:
            raise broken("another process has refused its batch", "wrong ids there", "Read that process's own error")
        return batch

    def _receive(self, batch: CapturedBatch, position: int, gradients: ExampleGradients) -> None:
        self._sums.receive(position, gradients)
        self._accountant.receive(batch, position, gradients)

    def _segment_is_full(self) -> bool:
        if self._pending:
            return False
        if isinstance(self._segments, int):
            return self._accountant.steps >= self._segments
        return self._accountant.visits >= self._num_examples

    def _check_contract(self, batch: CapturedBatch, accumulate: bool) -> None:
        if not batch.summed:
            raise without_backward()
        if accumulate and self._stepped:
            raise stepped_on_accumulated()
        if not accumulate and not self._stepped and not self._sums.finite():
            self._skip([*self._pending, batch])  # a loss scaler saw it too
            return
        if not accumulate and not self._stepped:
            raise without_step()
        if accumulate:
            batch.compact()  # before the next batch may write into its inputs
            self._pending.append(batch)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        batch = self._active
        if batch is None:
            raise broken(
                "optimizer.step() was called outside a recorded step",
                "a step that no example answers for",
                "Call it inside 'with recorder.step(ids):'",
            )
        if self._stepped:
            raise broken(
                "optimizer.step() was called a second time", "two steps in one", "Record each step in its own block"
            )
        self._steps.refuse_closure(args, kwargs)
        if not batch.summed:
            raise without_backward()
        self._sums.join()
        batches = [*self._pending, batch]
        self._skipping = self._steps.skips
        if self._skipping:
            return
        if not torch.isfinite(self._sums.captured.sum()):
            raise not_finite(batches)
        self._accountant.note_capture_gap(self._sums.check(batches))
        batch.compact()  # before the step: a layer's input may be a parameter
        self._steps.begin()
        self._before = self._flat()

    def _after_step(self) -> None:
        self._stepped = True
        batches = [*self._pending, *([self._active] if self._active else [])]
        if self._skipping:
            self._skip(batches)
            return
        gradients = self._sums.captured, self._sums.attributed, self._steps.applied
        self._accountant.step(batches, *gradients, self._steps.numbers(), self._before)
        if self._accountant.capture_gap > ROUNDING:
            self._sums.follow()
        self._forget()

    def _skip(self, batches: Sequence[CapturedBatch]) -> None:
        """Note a step that was not taken."""
        self._warnings.of_skipped(batches)
        self._accountant.skip(batches)
        self._forget()

    def _forget(self) -> None:
        """Drop the gradients that wait for the optimizer's step."""
        self._pending = []
        self._sums.clear()

    def _end_segment(self) -> None:
        if not self._accountant.steps:
            return
        end = self._flat()
        before, self._start = self._start, end
        segment, summary = self._accountant.close(end - before)
        t = len(self._writer)
        self._writer.segment(segment, summary, self._checkpoint(), self._accountant.projector, self._about())
        self._warnings.of(t, summary, segment.optimizer, end - before, self._sums.apart)

    def _flat(self) -> Tensor:
        return flatten_blocks(self._blocks, dict(self._model.named_parameters()), self._dtype)

    def _checkpoint(self) -> Checkpoint:
        return Checkpoint(self._start, {name: value.detach() for name, value in self._model.named_buffers()})

    def _about(self) -> dict[str, Any]:
        """Describe the run for its manifest."""
        return {
            "pkexplain": __version__,
            "torch": torch.__version__,
            "ended": self._ended,
            "num_examples": self._num_examples,
            "dtype": str(self._dtype).removeprefix("torch."),
            "recording": {"segments": self._segments, "lookahead": self._given_lookahead},
            "optimizer": describe_optimizer(self._optimizer),
            "projection": self._projection.describe(),
            "columns": self._accountant.projector.columns if self._accountant.projector else None,
            "model": self._fingerprint.describe(),
            "inputs": self._inputs.seen,
        }
