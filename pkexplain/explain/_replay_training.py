"""The training again: its batches, its losses and its steps, from the recorded log."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pkexplain.errors import ConfigurationError
from pkexplain.explain._replay_data import cross_entropy, refuse_unfit
from pkexplain.optimizers.replayed import ReplayedStep, replayed_step
from pkexplain.progress import Progress
from pkexplain.store.replay_log import StepLog
from pkexplain.store.trajectory import Trajectory

if TYPE_CHECKING:
    from pkexplain.explain.replay import Replay


@dataclass(frozen=True)
class Part:
    """The parameters of one optimizer group, as far as they are consecutive.

    Attributes:
        span: Where they are in the flat vector.
        group: The optimizer's parameter group.
        step: Its kind of step.
        members: Which parameters they are, and where in the part.
    """

    span: slice
    group: int
    step: ReplayedStep
    members: tuple[tuple[int, slice], ...]


@dataclass(frozen=True)
class Batch:
    """One batch of a step.

    Attributes:
        ids: Its examples, ``(batch,)``.
        random: The state of torch's random numbers before its forward pass.
    """

    ids: Tensor
    random: Tensor


@dataclass(frozen=True)
class StepFacts:
    """What is known of one step.

    Attributes:
        number: Its number in the run, from 0.
        segment: Its segment.
        last: Whether it is the segment's last.
        batches: Its batches.
        options: The options of each parameter group.
    """

    number: int
    segment: int
    last: bool
    batches: tuple[Batch, ...]
    options: tuple[Mapping[str, float], ...]


@dataclass(frozen=True)
class State:
    """Where a training stands.

    Attributes:
        point: θ, ``(parameters,)``.
        memory: What the optimizers remember, ``(vectors, parameters)``.
    """

    point: Tensor
    memory: Tensor


class ReplayedTraining:
    """A recorded training that can be taken again, whole or from points that were kept.

    Attributes:
        steps: All its steps.
        parts: The parameters by optimizer group.
        parameters: The parameters, in the order of the flat vector.
        sizes: How many numbers each has.
        remembered: The most vectors that an optimizer remembers.
        num_examples: How many training examples there are.
        device: Where it is computed.
        gap: How far the steps end from the recorded checkpoints, relative to ‖Δθ‖, in the worst segment.
        every: A state is kept every so many steps.

    Args:
        trajectory: The run.
        model: A copy of the model that may be written to.
        replay: The data and the loss.
        progress: Told the progress.

    Raises:
        ConfigurationError: The run cannot be replayed.
    """

    def __init__(self, trajectory: Trajectory, model: nn.Module, replay: Replay, progress: Progress) -> None:
        """Take all steps once, keeping a state every √steps of them."""
        refuse_unfit(trajectory, replay)
        self._trajectory, self._replay, self._progress = trajectory, replay, progress
        self._model = model.train()
        named, blocks = dict(model.named_parameters()), trajectory.fingerprint.blocks
        self.parameters = [named[name] for block in blocks for name in block.parameters]
        self.device = self.parameters[0].device
        self._kinds = [replayed_step(name) for name in trajectory.manifest.recording.replay]
        self.sizes = [parameter.numel() for parameter in self.parameters]
        groups = [block.group for block in blocks for _ in block.parameters]
        self.parts = list(_parts(groups, self.sizes, self._kinds))
        self.remembered = max(part.step.remembered for part in self.parts)
        self.steps = list(self._read())
        self.every = max(1, math.isqrt(len(self.steps)))
        self.gap, self._batched = 0.0, True
        self.num_examples = trajectory.num_examples
        with own_random_numbers(self.device):
            self._kept = self._take_all()

    def _read(self) -> Iterator[StepFacts]:
        number = 0
        for t in range(len(self._trajectory)):
            log = StepLog.from_tensors(self._trajectory.segment(t).steps)
            ids = iter(zip(log.ids.long().split(log.lengths.tolist()), log.state.tolist(), strict=True))
            counts = log.batches.tolist()
            for position, (count, rows) in enumerate(zip(counts, log.options.tolist(), strict=True)):
                batches = tuple(Batch(some, log.states[state]) for some, state in (next(ids) for _ in range(count)))
                pairs = zip(self._kinds, rows, strict=True)
                options = tuple(dict(zip(kind.options, row, strict=False)) for kind, row in pairs)
                yield StepFacts(number, t, position + 1 == len(counts), batches, options)
                number += 1

    def start(self) -> State:
        """Return the state before the first step."""
        point = self._trajectory.checkpoint(0).parameters.to(self.device, copy=True)
        return State(point, point.new_zeros(self.remembered, len(point)))

    def move_to(self, point: Tensor) -> None:
        """Set the model's parameters."""
        with torch.no_grad():
            pieces = point.split(self.sizes)
            for parameter, piece in zip(self.parameters, pieces, strict=True):
                parameter.copy_(piece.view_as(parameter))

    def losses(self, batch: Batch) -> Tensor:
        """Compute each example's loss at the model's current point, with the random numbers as they were."""
        rows = [self._replay.dataset[i] for i in batch.ids.tolist()]
        made = _moved((self._replay.collate or torch.utils.data.default_collate)(rows), self.device)
        _set_random_state(batch.random, self.device)  # not before: the data set may draw, too
        losses = (self._replay.loss or cross_entropy)(self._model, made)
        if not isinstance(losses, Tensor) or losses.shape != batch.ids.shape:
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ConfigurationError(
                "Replay(loss=…)",
                "it must return one loss for each example of the batch",
                got=got,
                expected=tuple(batch.ids.shape),
                source="the recorded batch",
                fix='Use reduction="none", and sum or average over what belongs to one example',
            )
        return losses

    def gradient(self, facts: StepFacts, weights: Tensor | None = None) -> Tensor:
        """Differentiate a step's loss at the model's current point, before clipping, ``(parameters,)``.

        Args:
            facts: The step.
            weights: The weight of each example's loss, ``(num_examples,)``; None for ones.
        """
        total = torch.zeros((), dtype=self.parameters[0].dtype, device=self.device)
        for batch in facts.batches:
            losses = self.losses(batch)
            loss = (losses if weights is None else losses * weights[batch.ids].to(losses)).mean()
            pieces = torch.autograd.grad(loss, self.parameters, materialize_grads=True)
            total = total + torch.cat([piece.flatten() for piece in pieces])
        return total

    def batched_products(self, outputs: list[Tensor], inputs: list[Tensor], cotangents: list[Tensor]) -> list[Tensor]:
        """Carry cotangents of a gradient back to what it depends on, for many queries at once.

        Args:
            outputs: The gradient.
            inputs: What it depends on.
            cotangents: Of each output, ``(queries, …)``.

        Returns:
            Of each input, ``(queries, …)``.
        """
        options = {"retain_graph": True, "materialize_grads": True}
        if self._batched:
            try:
                return list(torch.autograd.grad(outputs, inputs, cotangents, is_grads_batched=True, **options))
            except RuntimeError:  # something in the model cannot be vectorised
                self._batched = False
        each = [
            torch.autograd.grad(outputs, inputs, [c[q] for c in cotangents], **options)
            for q in range(len(cotangents[0]))
        ]
        return [torch.stack(parts) for parts in zip(*each, strict=True)]

    def clipped(self, gradient: Tensor) -> Tensor:
        """Clip a gradient by its norm, as torch does."""
        if self._replay.clip is None:
            return gradient
        return gradient * (self._replay.clip / (gradient.norm() + 1e-6)).clamp_max(1.0)

    @property
    def clip(self) -> float | None:
        """The largest norm of a gradient, if it is clipped."""
        return self._replay.clip

    def advance(self, state: State, facts: StepFacts, weights: Tensor | None = None) -> State:
        """Take one step."""
        self.move_to(state.point)
        gradient = self.clipped(self.gradient(facts, weights))
        point, memory = state.point.clone(), state.memory.clone()
        for part in self.parts:
            here, options = part.span, facts.options[part.group]
            mine = remembered_before(state, part, options)
            point[here], after = part.step.step(state.point[here], mine, gradient[here], options)
            for row, value in zip(memory, after, strict=False):
                row[here] = value
        return State(point, memory)

    def _follow(self, state: State, facts: StepFacts) -> State:
        """Take one step; at a segment's end, go on from the recorded checkpoint, so that rounding does not add up."""
        state = self.advance(state, facts)
        return State(self._end_of(facts), state.memory) if facts.last else state

    def _end_of(self, facts: StepFacts) -> Tensor:
        return self._trajectory.checkpoint(facts.segment + 1).parameters.to(self.device, copy=True)

    def _take_all(self) -> list[State]:
        state, kept = self.start(), []
        start = state.point
        for facts in self.steps:
            if facts.number % self.every == 0:
                kept.append(state)
                self._progress("replaying the run", facts.number, len(self.steps))
            state = self.advance(state, facts)
            if facts.last:
                end = self._end_of(facts)
                moved = float((end - start).norm())
                gap = float((state.point - end).norm()) / max(moved, torch.finfo(end.dtype).tiny)
                self.gap = max(self.gap, gap) if math.isfinite(gap) else math.inf
                start, state = end, State(end, state.memory)
        self._progress("replaying the run", len(self.steps), len(self.steps))
        return kept

    def blocks_backwards(self) -> Iterator[list[tuple[StepFacts, State]]]:
        """Yield the steps with the states before them, the last steps first; each list in the order of the run."""
        for k in reversed(range(len(self._kept))):
            states, some = [self._kept[k]], self.steps[k * self.every : (k + 1) * self.every]
            for facts in some[:-1]:
                states.append(self._follow(states[-1], facts))
            yield list(zip(some, states, strict=True))

    def without(self, ids: Tensor, what: str) -> Tensor:
        """Train again with the loss of some examples left out, and return θ at the end, ``(parameters,)``."""
        weights = torch.ones(self.num_examples, dtype=torch.float64, device="cpu")
        weights[ids] = 0.0
        state = self.start()
        with own_random_numbers(self.device):
            for facts in self.steps:
                if facts.number % self.every == 0:
                    self._progress(what, facts.number, len(self.steps))
                state = self.advance(state, facts, weights)
        self._progress(what, len(self.steps), len(self.steps))
        return state.point


def _parts(groups: Sequence[int], sizes: Sequence[int], kinds: Sequence[ReplayedStep]) -> Iterator[Part]:
    """Join consecutive parameters of one group."""
    start = 0
    for group, several in itertools.groupby(range(len(groups)), key=lambda k: groups[k]):
        members, stop = [], 0
        for k in several:
            members.append((k, slice(stop, stop + sizes[k])))
            stop += sizes[k]
        yield Part(slice(start, start + stop), group, kinds[group], tuple(members))
        start += stop


def remembered_before(state: State, part: Part, options: Mapping[str, float]) -> Sequence[Tensor]:
    """What a group's optimizer remembers before a step: nothing, where it is its first."""
    mine = state.memory[: part.step.remembered, part.span]
    return list(torch.zeros_like(mine) if options["step"] == 1 else mine)


def own_random_numbers(device: torch.device) -> AbstractContextManager[None]:
    """Restore the caller's random numbers afterwards."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def _set_random_state(state: Tensor, device: torch.device) -> None:
    size = len(torch.get_rng_state())
    torch.set_rng_state(state[:size].clone())
    if device.type == "cuda" and len(state) > size:
        torch.cuda.set_rng_state(state[size:].clone(), device)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: _moved(part, device) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_moved(part, device) for part in value]
    return value
