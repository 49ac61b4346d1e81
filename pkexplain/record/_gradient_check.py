"""The gradient as autograd sums it, and the share of it that belongs to examples."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from pkexplain.gradients.devices import fetch
from pkexplain.gradients.factors import ExampleGradients
from pkexplain.optimizers.base import CapturedBatch, RecordingSpec
from pkexplain.record._contract import warn_of_missing

CAPTURE_TOLERANCE = 1e-2
"""If a larger share of a gradient is missing, a layer is used in a way no hook sees, or the loss has a penalty."""
ROUNDING = 1e-4
"""A smaller gap is rounding error, also in float32."""


class GradientSums:
    """Follows the gradient of a step, parameter by parameter, and checks the examples' gradients against it.

    Attributes:
        captured: What the backward passes computed, ``(parameters,)``.
        apart: Whether examples account for only a share of it, so that their sum is followed separately.
        missing: Whether that is more than rounding; a warning has said so.

    Args:
        spec: What is recorded, and in which dtype.
        parameters: The parameters, in the order of the flat vector.
    """

    def __init__(self, spec: RecordingSpec, parameters: Sequence[nn.Parameter]) -> None:
        """Start with zeros."""
        self._spec, self._parameters = spec, parameters
        self.captured = spec.like.new_zeros(spec.size)
        self._attributed: Tensor | None = None
        self._checked = self.missing = False

    @property
    def apart(self) -> bool:
        """Whether examples account for only a share of the gradient."""
        return self._attributed is not None

    @property
    def attributed(self) -> Tensor:
        """The share that belongs to examples, ``(parameters,)``; the same vector if that is all of it."""
        return self.captured if self._attributed is None else self._attributed

    def state_dict(self) -> dict[str, bool]:
        """Return what was found about the gradients."""
        return {"apart": self.apart, "missing": self.missing}

    def load_state_dict(self, state: Mapping[str, bool]) -> None:
        """Start like a recorder that has already checked its first step."""
        self._checked, self.missing = True, state["missing"]
        if state["apart"]:
            self.follow()

    def hooks(self, active: Callable[[], CapturedBatch | None]) -> Iterator[torch.utils.hooks.RemovableHandle]:
        """Start listening to every parameter's gradient, before it is averaged over processes.

        Args:
            active: Returns the batch of the current backward pass; None for one of the user's own, between steps.
        """
        start = 0
        for index, parameter in enumerate(self._parameters):
            yield parameter.register_hook(self._adder(index, start, active))
            start += parameter.numel()

    def _adder(self, index: int, start: int, active: Callable[[], CapturedBatch | None]) -> Callable[[Tensor], None]:
        def add(gradient: Tensor) -> None:
            batch = active()
            if batch is not None:
                batch.summed.add(index)
                mine.add_((gradient.to_dense() if gradient.is_sparse else gradient).detach())

        parameter = self._parameters[index]
        mine = self.captured[start : start + parameter.numel()].view(parameter.shape)
        return add

    def receive(self, position: int, gradients: ExampleGradients) -> None:
        """Take one block's gradients when the backward pass reaches it."""
        if self._attributed is not None:
            self._attributed[self._spec.blocks[position].span] += gradients.total().to(self._attributed.dtype)

    def note(self, gap: float) -> None:
        """Note a gap that a later step's check has found."""
        self.missing |= gap > CAPTURE_TOLERANCE
        if gap > ROUNDING:
            self.follow()

    def follow(self) -> None:
        """Follow the examples' share separately from now on."""
        if self._attributed is None:
            self._attributed = self.captured.clone()

    def unsplit(self, names: Collection[str]) -> Tensor | None:
        """The part of the gradient of some parameters that belongs to no example, ``(parameters,)``; None if none."""
        if self._attributed is None or not names:
            return None
        found = torch.zeros_like(self.captured)
        for span in self._spans_of(names):
            found[span] = self.captured[span] - self._attributed[span]
        return found

    def shares(self, names: Collection[str], unsplit: Tensor) -> dict[str, float]:
        """The size of each parameter's unsplit gradient relative to the whole gradient."""
        norms = [self.captured.norm(), *(unsplit[span].norm() for span in self._spans_of(names))]
        (whole,), *sizes = fetch(norms)
        ordered = [name for name in self._names if name in names]
        return {name: size / whole if whole > 0 else 0.0 for name, (size,) in zip(ordered, sizes, strict=True)}

    @property
    def _names(self) -> list[str]:
        return [name for block in self._spec.blocks for name in block.parameters]

    def _spans_of(self, names: Collection[str]) -> list[slice]:
        sizes = [parameter.numel() for parameter in self._parameters]
        ends = list(itertools.accumulate(sizes))
        return [slice(e - n, e) for name, e, n in zip(self._names, ends, sizes, strict=True) if name in names]

    def dropped(self) -> bool:
        """Whether gradients were captured that no ``.grad`` holds any more (a second pass after ``zero_grad()``)."""
        if not self.captured.any():
            return False
        held = [p.grad for p in self._parameters if p.grad is not None]
        return not any(bool((g.coalesce().values() if g.is_sparse else g).any()) for g in held)

    def join(self) -> None:
        """Sum over all processes."""
        self._spec.group.all_reduce(self.captured)
        if self._attributed is not None:
            self._spec.group.all_reduce(self._attributed)

    def finite(self) -> bool:
        """Whether the gradient is finite in every process."""
        return self._spec.group.all_reduce_max(float(not torch.isfinite(self.captured.sum()))) == 0

    def clear(self) -> None:
        """Drop the sums of a step that is done, or was skipped."""
        for vector in (self.captured, self._attributed):
            if vector is not None:
                vector.zero_()

    def check(
        self, batches: Sequence[CapturedBatch], unsplit: Collection[str], allowed: Callable[[int], float]
    ) -> float:
        """Check the sum of what was captured against every block's gradient, once, before the first step.

        If examples account for only a share of a gradient (a penalty in the loss), their sum is followed separately
        from now on, so that the rest goes to the ledger's ``optimizer`` line. Parameters in ``unsplit`` have a line of
        their own.

        Args:
            batches: The batches of the step.
            unsplit: Parameters that are not split.
            allowed: The split gap that rounding explains, for each block's position.

        Returns:
            The largest gap that is rounding error; larger gaps are on that line.
        """
        if self._checked:
            return 0.0
        attributed, short, largest, rounded = torch.zeros_like(self.captured), {}, 0.0, True
        size, worth_saying = self.captured.norm(), set[str]()
        for position, block in enumerate(self._spec.blocks):
            whole, part = self.captured[block.span], attributed[block.span]
            pieces = [g for batch in batches for b, g in batch.pieces if b == position]
            for gradients in pieces:
                part += gradients.total().to(part.dtype)
            self._spec.group.all_reduce(part)
            split = torch.ones_like(whole)
            for span in self._spans_of(set(unsplit).intersection(block.parameters)):
                split[span.start - block.start : span.stop - block.start] = 0
            miss = ((part - whole) * split).norm()
            gap = float(miss / whole.norm()) if whole.norm() > 0 else 0.0
            if not gap <= ROUNDING:  # also if it is nan
                short.update(dict.fromkeys(block.parameters, gap))
                if bool(miss > ROUNDING * size):  # the bias of an attention's keys has a gradient of rounding errors
                    worth_saying |= {*block.parameters}
            if gap <= min(CAPTURE_TOLERANCE, max(ROUNDING, allowed(position))):
                largest = max(largest, gap)
            elif gap > CAPTURE_TOLERANCE:
                rounded &= gap <= allowed(position)
        self._checked = True
        if short or unsplit:
            self._attributed = attributed
        said = {name: gap for name, gap in short.items() if name in worth_saying}
        if max(said.values(), default=0.0) > CAPTURE_TOLERANCE:
            self.missing = True
            warn_of_missing(said, rounded)
        return largest
