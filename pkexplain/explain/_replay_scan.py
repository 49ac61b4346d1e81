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

_QUERIES_AT_ONCE = 64


def carry_back(training: ReplayedTraining, final: Tensor, progress: Progress) -> Tensor:
    """Differentiate outputs by the weight of every example in every segment.

    Args:
        training: The run.
        final: ∇f at the end, ``(queries, parameters)``.
        progress: Told the progress.

    Returns:
        c_i, in output units, ``(queries, segments, num_examples)``, float32, on the CPU.
    """
    segments = training.steps[-1].segment + 1
    found = torch.zeros(segments, training.num_examples, len(final), device="cpu")
    cotangents = [final.clone(), *(torch.zeros_like(final) for _ in range(training.remembered))]
    left = len(training.steps)
    with own_random_numbers(training.device):
        for some in training.blocks_backwards():
            for facts, state in reversed(some):
                own = _step_back(training, facts, state, cotangents)
                for batch, products in zip(facts.batches, own, strict=True):
                    found[facts.segment].index_add_(0, batch.ids, products.T.float().cpu())
            left -= len(some)
            progress("replaying backwards", len(training.steps) - left, len(training.steps))
    return found.permute(2, 0, 1)


def _step_back(
    training: ReplayedTraining, facts: StepFacts, state: State, cotangents: Sequence[Tensor]
) -> list[Tensor]:
    """Carry cotangents, in place, over one step, and return ⟨u, ∇ℓ_i⟩ / batch of each of its batches' examples."""
    training.move_to(state.point)
    weights, pieces = [], []
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels cannot be differentiated twice
        for batch in facts.batches:
            losses = training.losses(batch)
            weights.append(torch.ones_like(losses, requires_grad=True))
            loss = (losses * weights[-1]).mean()
            pieces.append(torch.autograd.grad(loss, training.parameters, create_graph=True, materialize_grads=True))
    totals = [torch.stack(several).sum(0) if len(several) > 1 else several[0] for several in zip(*pieces, strict=True)]
    flat = torch.cat([piece.detach().flatten() for piece in totals])
    given = training.clipped(flat)
    direction = torch.empty_like(cotangents[0])
    for part in training.parts:
        here, options = part.span, facts.options[part.group]
        memory = remembered_before(state, part, options)
        partials = partial_derivatives(part.step, state.point[here], memory, given[here], options)
        mine = [cotangents[0][:, here], *(c[:, here] for c in cotangents[1 : 1 + part.step.remembered])]
        direction[:, here] = partials.carry(mine)
        if options["step"] == 1:  # what was remembered before was not used
            for c in mine[1:]:
                c.zero_()
    if training.clip is not None:
        direction = _through_clipping(direction, flat, training.clip)
    own, curved = _through_gradient(training, totals, weights, direction)
    cotangents[0].add_(curved)
    return own


def _through_clipping(direction: Tensor, gradient: Tensor, largest: float) -> Tensor:
    """Carry a cotangent through g · min(1, c / (‖g‖ + 1e-6))."""
    norm = gradient.norm()
    factor = largest / (norm + 1e-6)
    if factor >= 1:
        return direction
    along = (direction @ gradient) / (norm * (norm + 1e-6))
    return factor * (direction - along[:, None] * gradient)


def _through_gradient(
    training: ReplayedTraining, totals: Sequence[Tensor], weights: Sequence[Tensor], direction: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Carry cotangents of the gradient to the weights and to θ: products with ∇ℓ_i, and with the Hessian."""
    known = [k for k, total in enumerate(totals) if total.requires_grad]
    inputs = [*training.parameters, *weights]
    sizes = [p.numel() for p in training.parameters]
    found: list[list[Tensor]] = []
    for some in direction.split(_QUERIES_AT_ONCE):
        pieces = some.split(sizes, dim=1)
        given = [pieces[k].reshape(len(some), *totals[k].shape) for k in known]
        found.append(training.batched_products([totals[k] for k in known], inputs, given))
    joined = [torch.cat(parts) for parts in zip(*found, strict=True)]
    curved = torch.cat([part.flatten(1) for part in joined[: len(sizes)]], dim=1)
    return joined[len(sizes) :], curved
