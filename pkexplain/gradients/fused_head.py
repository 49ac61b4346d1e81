"""The scores that TRL's fused head never forms: it computes log p of each token from the last hidden states, in tiles.

In place of ``logits`` a model with such a head returns ``log_probs``, and its weight is used inside a function of
TRL's own (`trl.kernels.ChunkedLogProbFunction`). What that function saved for its backward pass gives the gradient of
the logits,

    ∂ℓ/∂z_j = g (1[j = target] − p_j),   g = ∂ℓ/∂(log p_target),

and with it what the model without the fused head would have shown: the loss derivatives and the head's gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from pkexplain.gradients.graph import packed

__all__ = ["FusedHead", "fused_head", "fused_head_below"]

_NAME = "ChunkedLogProbFunctionBackward"
_BETWEEN = ("ViewBackward", "ReshapeAliasBackward", "MaskedFillBackward", "MaskedScatterBackward", "ToCopyBackward")
"""Nodes by which TRL gives log p of the tokens its shape ``(batch, positions)``, and sets ignored ones to zero."""
_NUMBERS_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class FusedHead:
    """One use of a fused head.

    Attributes:
        hidden: Its inputs, ``(tokens, width)``, in the dtype in which it multiplies.
        weight: ``(vocabulary, width)``, in the same dtype.
        bias: ``(vocabulary,)``, or None.
        targets: The tokens, ``(tokens,)``.
        log_z: log Σ_j exp z_j, ``(tokens,)``.
        scale: What the scores are multiplied by before softcapping.
        softcap: The largest score, or None.
        inverse: 1 / temperature.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    log_z: Tensor
    scale: float
    softcap: float | None
    inverse: float

    def score_gradients(self, gradient: Tensor) -> Tensor:
        """Compute ∂ℓ/∂(hidden @ weight.T), rounded as the head rounds it, ``(tokens, vocabulary)`` in float32.

        Args:
            gradient: ∂ℓ/∂(log p), ``(tokens,)``.
        """
        return self._before_scaling(gradient, slice(None), through=True).to(self.hidden.dtype).float()

    def score_gradient_squares(self, gradient: Tensor) -> Tensor:
        """Compute ‖∂ℓ/∂(logits)‖² of each token, ``(tokens,)``, a few tokens at a time.

        The logits are what the model returns without the fused head: scaled and softcapped.

        Args:
            gradient: ∂ℓ/∂(log p), ``(tokens,)``.
        """
        rows = max(1, _NUMBERS_AT_ONCE // len(self.weight))
        starts = range(0, len(self.hidden), rows)
        each = [self._before_scaling(gradient, slice(at, at + rows)).square_().sum(1) for at in starts]
        return torch.cat(each) if each else gradient.new_zeros(0)

    def _before_scaling(self, gradient: Tensor, some: slice, through: bool = False) -> Tensor:
        """∂ℓ/∂(logits) of some tokens, or, ``through`` scaling and softcapping, ∂ℓ/∂(hidden @ weight.T)."""
        scores = self.hidden[some] @ self.weight.T
        scores = (scores if self.bias is None else scores.add_(self.bias)).float().mul_(self.scale)
        slope = None
        if self.softcap is not None:
            scores.div_(self.softcap).tanh_()
            slope = 1 - scores.square() if through else None
            scores.mul_(self.softcap)
        found = scores.mul_(self.inverse).sub_(self.log_z[some, None]).exp_().neg_()
        found[torch.arange(len(found), device=found.device), self.targets[some]] += 1
        found.mul_((gradient[some].float() * (self.inverse * (self.scale if through else 1.0)))[:, None])
        return found if slope is None else found.mul_(slope)


def fused_head(node: Node) -> FusedHead | None:
    """Read what a node of TRL's fused head has saved; None for other nodes, and if it cannot be read (if offloaded)."""
    saved: Any = node
    if node.name() != _NAME or packed(node):
        return None
    try:
        hidden, weight, bias, targets, log_z, _ = saved.saved_tensors
        kind, given = saved.compute_dtype, saved.kernel_args
        softcap = given["softcap"] if given["HAS_SOFTCAP"] else None
        numbers = given["logit_scale"], softcap, given["inv_t"]
    except (AttributeError, KeyError, ValueError):
        return None
    parts = (None if each is None else each.detach().to(kind) for each in (hidden, weight, bias))
    x, w, b = parts
    if x is None or w is None:
        return None
    return FusedHead(x, w, b, targets, log_z, *numbers)


def fused_head_below(tensor: Tensor) -> Node | None:
    """Find the node of a fused head that computed a tensor of log p, ``(batch, positions)``; None for other tensors."""
    node, place = tensor.grad_fn, tensor.output_nr
    while node is not None and node.name().startswith(_BETWEEN):
        above = [(m, number) for m, number in node.next_functions if m is not None]
        node, place = above[0] if len(above) == 1 else (None, 0)
    return node if node is not None and node.name() == _NAME and place == 0 else None
