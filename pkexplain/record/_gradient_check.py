"""The gradient as autograd sums it, and the share of it that belongs to examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from pkexplain.gradients.factors import ExampleGradients
from pkexplain.optimizers.base import CapturedBatch, RecordingSpec
from pkexplain.record._contract import used_by_hand, warn_of_missing

CAPTURE_TOLERANCE = 1e-2
"""If a larger share of a gradient is missing, a layer is used in a way no hook sees, or the loss has a penalty."""
ROUNDING = 1e-4
"""A smaller gap is rounding error, also in float32."""


class GradientSums:
    """Follows the gradient of a step, parameter by parameter, and checks the examples' gradients against it.

    Attributes:
        captured: What the backward passes computed, ``(parameters,)``.
        apart: Whether examples account for only a share of it, so that their sum is followed separately.

    Args:
        spec: What is recorded, and in which dtype.
        parameters: The parameters, in the order of the flat vector.
    """

    def __init__(self, spec: RecordingSpec, parameters: Sequence[nn.Parameter]) -> None:
        """Start with zeros."""
        self._spec, self._parameters = spec, parameters
        self.captured = spec.like.new_zeros(spec.size)
        self._attributed: Tensor | None = None
        self._checked = False

    @property
    def apart(self) -> bool:
        """Whether examples account for only a share of the gradient."""
        return self._attributed is not None

    @property
    def attributed(self) -> Tensor:
        """The share that belongs to examples, ``(parameters,)``; the same vector if that is all of it."""
        return self.captured if self._attributed is None else self._attributed

    def load_state_dict(self, apart: bool) -> None:
        """Start like a recorder that has already checked its first step."""
        self._checked = True
        if apart:
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
                self.captured[start : start + gradient.numel()] += gradient.detach().flatten().to(self.captured.dtype)

        return add

    def receive(self, position: int, gradients: ExampleGradients) -> None:
        """Take one block's gradients when the backward pass reaches it."""
        if self._attributed is not None:
            self._attributed[self._spec.blocks[position].span] += gradients.total().to(self._attributed.dtype)

    def follow(self) -> None:
        """Follow the examples' share separately from now on."""
        if self._attributed is None:
            self._attributed = torch.zeros_like(self.captured)

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

    def check(self, batches: Sequence[CapturedBatch]) -> float:
        """Check the sum of what was captured against every block's gradient, once, before the first step.

        A gradient that no layer captured is refused. If examples account for only a share of one (a penalty in the
        loss), their sum is followed separately from now on, so that the rest goes to the ledger's ``optimizer`` line.

        Returns:
            The largest gap that is rounding error; larger gaps are on that line.
        """
        if self._checked:
            return 0.0
        attributed, short, rounding = torch.zeros_like(self.captured), {}, 0.0
        for position, block in enumerate(self._spec.blocks):
            whole, part = self.captured[block.span], attributed[block.span]
            pieces = [g for batch in batches for b, g in batch.pieces if b == position]
            for gradients in pieces:
                part += gradients.total().to(part.dtype)
            self._spec.group.all_reduce(part)
            gap = float((part - whole).norm() / whole.norm()) if whole.norm() > 0 else 0.0
            if gap > CAPTURE_TOLERANCE and not pieces:
                raise used_by_hand(block.parameters)
            if gap > ROUNDING:
                short.update(dict.fromkeys(block.parameters, gap))
            else:
                rounding = max(rounding, gap)
        self._checked = True
        if short:
            self._attributed = attributed
        if max(short.values(), default=0.0) > CAPTURE_TOLERANCE:
            warn_of_missing(short)
        return rounding
