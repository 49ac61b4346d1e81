"""The dense, slow, obvious path kernel, as a check of the fast one.

No hooks, no projection, no index, no correction, no adaptive rule: the displacements of a run recorded with `Identity`
are used as they are, the covectors come from `torch.autograd.grad`, one query at a time, at the nodes of a fixed rule,
and contributions are their inner products:

    c_i(x) = Σ_t ⟨∫₀¹ ∇f(x; θ_t + τ Δθ_t) dτ, D_i,t⟩      (Domingos 2020, Theorem 1, for finite steps)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pkexplain.errors import ConfigurationError
from pkexplain.explain.outputs import Output, as_output, settle_output
from pkexplain.explain.quadrature import BUFFER_PIECES
from pkexplain.explain.queries import read_queries
from pkexplain.gradients.model_copy import copy_model
from pkexplain.gradients.torch_state import own_torch_state
from pkexplain.projection.kinds import Identity
from pkexplain.store.base import Store
from pkexplain.store.directory import open_store
from pkexplain.store.trajectory import Trajectory

__all__ = ["ExactAccount", "path_kernel"]


@dataclass(frozen=True)
class ExactAccount:
    """The ledger of some queries, without compression and without correction.

    Attributes:
        contributions: c_i(x), in output units, ``(queries, num_examples)``.
        kernels: K(x, x_i), ``(queries, num_examples)``; a_i is ``contributions / kernels``.
        weight_decay: The effect of weight decay, in output units, ``(queries,)``.
        unsplit: The effect of gradients that were not split among the examples, in output units, ``(queries,)``.
        optimizer: What belongs to neither examples nor weight decay, in output units, ``(queries,)``.
        buffers: What buffers such as running statistics changed, in output units, ``(queries,)``.
        initial: f_0(x), in output units, ``(queries,)``.
        final: f_T(x), in output units, ``(queries,)``.
    """

    contributions: np.ndarray
    kernels: np.ndarray
    weight_decay: np.ndarray
    unsplit: np.ndarray
    optimizer: np.ndarray
    buffers: np.ndarray
    initial: np.ndarray
    final: np.ndarray

    @property
    def gap(self) -> np.ndarray:
        """The quadrature and rounding error, in output units: f_T − f_0 minus all the lines above."""
        named = self.weight_decay + self.unsplit + self.optimizer + self.buffers
        return self.final - self.initial - self.contributions.sum(1) - named


@own_torch_state()
def path_kernel(
    run: str | os.PathLike[str] | Store,
    model: nn.Module,
    x: Any,
    *,
    output: Output | Callable[[Tensor], Tensor] | None = None,
    nodes: int = 4,
    pieces: int = 8,
) -> ExactAccount:
    """Compute the path kernel and all contributions densely.

    Args:
        run: A run recorded with ``projection=pkexplain.Identity()``.
        model: The model; it is not changed.
        x: One query or a batch, as for `pkexplain.Explainer.explain`.
        output: What to explain, as for `pkexplain.Explainer.explain`.
        nodes: Gauss–Legendre nodes on each piece.
        pieces: Equal pieces of each segment; a multiple of four, or rounded up to it.

    Returns:
        The ledger; its ``gap`` is the quadrature error.

    Raises:
        ConfigurationError: The run's rows are compressed.
        ModelMismatchError: The model is not the one that was recorded.
        QueryError: The query or the output does not fit the model.
    """
    trajectory = open_store(run).trajectory()
    _refuse_what_is_not_exact(trajectory)
    model = copy_model(model).eval()  # it is moved along the run, and another thread may be using the user's
    trajectory.fingerprint.check(model)
    queries = read_queries(x, trajectory, model).asked_of(None if output is None else as_output(output).of)
    field = _Field(model, trajectory)
    contributions = torch.zeros(len(queries), trajectory.num_examples, dtype=torch.float64, device="cpu")
    kernels = torch.zeros_like(contributions)
    remainders = torch.zeros(4, len(queries), dtype=torch.float64, device="cpu")
    ends = torch.zeros(len(queries), 2, dtype=torch.float64, device="cpu")
    alone = []
    for batch, asked in queries.with_output(output):
        final = field.at_checkpoint(len(trajectory), lambda batch=batch: batch.run(model).detach())
        settled = settle_output(asked, final)
        alone += [
            (batch.select(here), settled.select(here)) for here in torch.arange(len(batch), device="cpu").split(1)
        ]
    for q, (query, wanted) in enumerate(queries.in_order(alone)):
        value = lambda query=query, wanted=wanted: wanted(query.run(model))[0]  # noqa: E731 - bound per query
        outputs = torch.stack([field.at_checkpoint(t, value).detach().double() for t in range(len(trajectory) + 1)])
        ends[q] = outputs[[0, -1]]
        for t in range(len(trajectory)):
            segment, covector = trajectory.segment(t), field.covector(t, value, nodes, pieces)
            moved = segment.read_rows(slice(None), torch.float64) @ covector
            derivatives = segment.loss_derivatives.double()
            contributions[q] += moved
            kernels[q] -= torch.where(derivatives == 0, 0.0, moved / derivatives)
            remainders[0, q] += segment.weight_decay.double() @ covector
            remainders[1, q] += segment.unsplit.double() @ covector if len(segment.unsplit) else 0.0
            remainders[2, q] += segment.optimizer.double() @ covector
            remainders[3, q] += outputs[t + 1] - outputs[t] - field.along(t, value)
    numbers = [contributions, kernels, *remainders, *ends.T]
    return ExactAccount(*(number.numpy() for number in numbers))


def _refuse_what_is_not_exact(trajectory: Trajectory) -> None:
    if not isinstance(trajectory.projection, Identity):
        raise ConfigurationError(
            "path_kernel(run)",
            "the run's rows are compressed, so nothing exact can be computed from them",
            got=f"projection {trajectory.projection}",
            expected="projection Identity()",
            source="the run's manifest",
            fix="Record the run again with projection=pkexplain.Identity()",
        )


class _Field:
    """A model at any point of the trajectory."""

    def __init__(self, model: nn.Module, trajectory: Trajectory) -> None:
        self._model, self._trajectory = model, trajectory
        named = dict(model.named_parameters())
        self._parameters = [named[name] for block in trajectory.fingerprint.blocks for name in block.parameters]
        for parameter in self._parameters:
            parameter.requires_grad_(True)

    def at(self, segment: int, tau: float, piece: int, look: Callable[[], Tensor]) -> Tensor:
        """Look at the model at θ_t + τ Δθ_t, with the buffers in the middle of a piece of the line."""
        start, end = (self._trajectory.checkpoint(t) for t in (segment, segment + 1))
        point = start.parameters + tau * (end.parameters - start.parameters)
        middle = (piece + 0.5) / BUFFER_PIECES
        between = {
            name: value + middle * (end.buffers[name] - value) if value.is_floating_point() else value
            for name, value in start.buffers.items()
        }
        return self._look(point, between, look)

    def at_checkpoint(self, t: int, look: Callable[[], Tensor]) -> Tensor:
        """Look at the model with the parameters and buffers of checkpoint t."""
        checkpoint = self._trajectory.checkpoint(t)
        return self._look(checkpoint.parameters, checkpoint.buffers, look)

    def _look(self, point: Tensor, buffers: Mapping[str, Tensor], look: Callable[[], Tensor]) -> Tensor:
        held = dict(self._model.named_buffers())
        tensors = [*self._parameters, *held.values()]
        self._set(tensors, [*point.split([p.numel() for p in self._parameters]), *(buffers[n] for n in held)])
        return look()

    def covector(self, segment: int, value: Callable[[], Tensor], nodes: int, pieces: int) -> Tensor:
        """Integrate the gradient over a segment with a Gauss–Legendre rule on equal pieces, ``(parameters,)``."""
        roots, weights = np.polynomial.legendre.leggauss(nodes)
        total = torch.zeros(sum(p.numel() for p in self._parameters), dtype=torch.float64, device="cpu")
        within = -(-pieces // BUFFER_PIECES)
        count = within * BUFFER_PIECES
        for part in range(count):
            for root, weight in zip(roots, weights, strict=True):
                tau = (part + (float(root) + 1) / 2) / count
                gradient = self.at(segment, tau, part // within, lambda: self.gradient(value()))
                total += gradient.double() * float(weight) / 2 / count
        return total

    def along(self, segment: int, value: Callable[[], Tensor]) -> Tensor:
        """How much the output changes while the parameters move and the buffers stand still."""
        total = torch.zeros((), dtype=torch.float64, device="cpu")
        for piece in range(BUFFER_PIECES):
            start, end = (self.at(segment, (piece + e) / BUFFER_PIECES, piece, value).detach() for e in (0, 1))
            total += end.double() - start.double()
        return total

    def gradient(self, value: Tensor) -> Tensor:
        parts = torch.autograd.grad(value, self._parameters, allow_unused=True, materialize_grads=True)
        return torch.cat([part.detach().flatten() for part in parts])

    def _set(self, tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value.reshape(tensor.shape))
