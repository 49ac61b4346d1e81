"""Cotangents of θ and of what the optimizer remembers, carried from the last step of a run to its first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pkexplain.explain._replay_training import (
    ReplayedTraining,
    State,
    StepFacts,
    own_random_numbers,
    remembered_before,
)
from pkexplain.optimizers.replayed import partial_derivatives
from pkexplain.progress import Progress

Cotangents = list[list[Tensor]]
"""Of θ, then of what is remembered: of each parameter, ``(queries, *shape)``."""


def carry_back(training: ReplayedTraining, final: Tensor, progress: Progress) -> Tensor:
    """Differentiate outputs by the weight of every example in every segment.

    Args:
        training: The run.
        final: ∇f at the end, ``(queries, parameters)``.
        progress: Told the progress.

    Returns:
        c_i, in output units, ``(queries, segments, num_examples)``, on the CPU.
    """
    segments = training.steps[-1].segment + 1
    found = torch.zeros(segments, training.num_examples, len(final), dtype=final.dtype, device="cpu")
    pairs = zip(final.split(training.sizes, dim=1), training.parameters, strict=True)
    start = [piece.reshape(-1, *parameter.shape).clone() for piece, parameter in pairs]
    cotangents = [start, *([torch.zeros_like(each) for each in start] for _ in range(training.remembered))]
    direction = [torch.empty_like(each) for each in start]
    left = len(training.steps)
    with own_random_numbers(training.device):
        for some in training.blocks_backwards():
            for facts, state in reversed(some):
                own = _step_back(training, facts, state, cotangents, direction)
                for batch, products in zip(facts.batches, own, strict=True):
                    found[facts.segment].index_add_(0, batch.ids, products.T.to("cpu", final.dtype))
            left -= len(some)
            progress("replaying backwards", len(training.steps) - left, len(training.steps))
    return found.permute(2, 0, 1)


def _step_back(
    training: ReplayedTraining, facts: StepFacts, state: State, cotangents: Cotangents, direction: list[Tensor]
) -> list[Tensor]:
    """Carry cotangents, in place, over one step, and return ⟨u, ∇ℓ_i⟩ / batch of each of its batches' examples."""
    training.move_to(state.point)
    weights: list[Tensor] = []
    pieces: list[Sequence[Tensor]] = []
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels cannot be differentiated twice
        for batch in facts.batches:
            losses = training.losses(batch)
            weights.append(torch.ones_like(losses, requires_grad=True))
            loss = (losses * weights[-1]).mean()
            pieces.append(torch.autograd.grad(loss, training.parameters, create_graph=True, materialize_grads=True))
    totals = list(pieces[0])
    for more in pieces[1:]:
        totals = [total + piece for total, piece in zip(totals, more, strict=True)]
    flat = torch.cat([piece.detach().flatten() for piece in totals])
    _through_optimizers(training, facts, state, training.clipped(flat), cotangents, direction)
    if training.clip is not None:
        _through_clipping(direction, totals, training.clip)
    known = [k for k, total in enumerate(totals) if total.requires_grad]
    inputs = [*training.parameters, *weights]
    found = training.batched_products([totals[k] for k in known], inputs, [direction[k] for k in known])
    for cotangent, curved in zip(cotangents[0], found, strict=False):
        cotangent.add_(curved)
    return list(found[len(cotangents[0]) :])


def _through_optimizers(
    training: ReplayedTraining,
    facts: StepFacts,
    state: State,
    gradient: Tensor,
    cotangents: Cotangents,
    direction: list[Tensor],
) -> None:
    """Carry cotangents, in place, to before the optimizers' step; that of the gradient is ``direction``."""
    for part in training.parts:
        here, options = part.span, facts.options[part.group]
        memory = remembered_before(state, part, options)
        partials = partial_derivatives(part.step, state.point[here], memory, gradient[here], options)
        for k, span in part.members:
            mine = [each[k].flatten(1) for each in cotangents[: 1 + part.step.remembered]]
            partials.of_slice(span).carry(mine, direction[k].flatten(1))
            if options["step"] == 1:  # what was remembered before was not used
                for each in mine[1:]:
                    each.zero_()


def _through_clipping(direction: list[Tensor], gradient: Sequence[Tensor], largest: float) -> None:
    """Carry the cotangent of a clipped gradient, in place, through g · min(1, c / (‖g‖ + 1e-6))."""
    plain = [each.detach() for each in gradient]
    norm = torch.stack([each.norm() for each in plain]).norm()
    factor = largest / (norm + 1e-6)
    if factor >= 1:
        return
    along = sum((u.flatten(1) @ g.flatten() for u, g in zip(direction, plain, strict=True)), norm.new_zeros(()))
    along = along / (norm * (norm + 1e-6))
    for u, g in zip(direction, plain, strict=True):
        u.sub_(along.view(-1, *[1] * g.ndim) * g).mul_(factor)
