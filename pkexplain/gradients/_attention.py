"""Per-example gradients of `torch.nn.MultiheadAttention`.

The layer is rerun in plain torch and differentiated with respect to the projected queries, keys and values. The
gradients of its matrices are sums over positions of such a derivative times what was projected, and stay in factored
form.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pkexplain.gradients._layer_rules import Parts, Use
from pkexplain.gradients.factors import DenseGradient, ExampleGradients, LinearGradient

_PROJECTIONS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def attention_unfit(module: nn.MultiheadAttention) -> str | None:
    """Return why a module can never be recorded; None if it can."""
    if module.bias_k is not None or module.add_zero_attn:
        return "its rule does not support add_bias_kv and add_zero_attn"
    return None


def attention_misuse(use: Use) -> str | None:
    """Return why this call of a module cannot be recorded; None if it can."""
    if use.module.dropout and use.training:
        return f"dropout={use.module.dropout} of its weights cannot be reproduced; set it to 0"
    query = use.given(0, "query")
    return None if query.ndim == 3 else f"its input of shape {tuple(query.shape)} has no batch dimension"


def attention(use: Use, parts: Parts) -> list[ExampleGradients]:
    """MultiheadAttention: Σ_t dz_t ⊗ x_t for queries, keys and values, Σ_t g_t ⊗ a_t for the output."""
    module, like = use.module, use.gradient
    given = [use.given(place, name) for place, name in enumerate(("query", "key", "value"))]
    itself = given[0] is given[1] and given[1] is given[2]
    first = (lambda x: x) if module.batch_first else (lambda x: x.transpose(0, 1))
    inputs = [first(x.detach().to(like.dtype)) for x in given]
    with torch.enable_grad(), torch.autocast(like.device.type, enabled=False):
        affine = _affine(module, like)
        points = [F.linear(x, *pair).detach().requires_grad_() for x, pair in zip(inputs, affine, strict=True)]
        mixed, weights = _attend(module, points, _mask(use, points, module.num_heads))
        matrix = module.out_proj.weight.detach().to(like.dtype)
        gradient = use.gradients[0]
        gradient = torch.zeros_like(mixed) if gradient is None else first(gradient)
        pairs = [(F.linear(mixed, matrix), gradient)]
        if len(use.gradients) > 1 and use.gradients[1] is not None:
            averaged = use.given(6, "average_attn_weights")
            pairs.append((weights if averaged is False else weights.mean(1), use.gradients[1]))
        back = torch.autograd.grad([out for out, _ in pairs], points, [g for _, g in pairs])
    found: dict[str, ExampleGradients] = {
        "in_proj_bias": DenseGradient(torch.cat([g.sum(1) for g in back], dim=1)),
        "out_proj.weight": LinearGradient(mixed.detach(), gradient, True, False),
        "out_proj.bias": DenseGradient(gradient.sum(1)),
    }
    if module.in_proj_weight is not None:
        found["in_proj_weight"] = _together(inputs, back, itself)
    for name, x, g in zip(_PROJECTIONS, inputs, back, strict=True):
        found[name] = LinearGradient(x, g, True, False)
    return [found[names[0]] for names in parts]


def _affine(module: Any, like: Tensor) -> list[tuple[Tensor, Tensor | None]]:
    """Return the matrix and the bias of the queries', keys' and values' projections."""
    if module.in_proj_weight is not None:
        matrices = module.in_proj_weight.chunk(3)
    else:
        matrices = [getattr(module, name) for name in _PROJECTIONS]
    biases = (None, None, None) if module.in_proj_bias is None else module.in_proj_bias.detach().to(like.dtype).chunk(3)
    return [(matrix.detach().to(like.dtype), bias) for matrix, bias in zip(matrices, biases, strict=True)]


def _attend(module: Any, points: list[Tensor], mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mix the values, ``(examples, targets, embedding)``, with weights ``(examples, heads, targets, sources)``."""
    q, k, v = (z.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for z in points)
    weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) + mask).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2), weights


def _mask(use: Use, points: list[Tensor], heads: int) -> Tensor:
    """Add up what is put on the scores, broadcastable to ``(examples, heads, targets, sources)``."""
    n, targets, sources = len(points[0]), points[0].shape[1], points[1].shape[1]
    total = points[0].new_zeros(1, 1, 1, 1)
    padding, mask = use.given(3, "key_padding_mask"), use.given(5, "attn_mask")
    if padding is not None:
        total = total + _as_scores(padding, total).view(n, 1, 1, sources)
    if mask is not None:
        shape = (1, 1, targets, sources) if mask.ndim == 2 else (n, heads, targets, sources)
        total = total + _as_scores(mask, total).view(shape)
    return total


def _as_scores(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.detach().to(like)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))


def _together(inputs: list[Tensor], back: tuple[Tensor, ...], itself: bool) -> LinearGradient:
    """Give the three projections as the one matrix ``(3 embedding, embedding)`` that they are stored in."""
    if itself:
        return LinearGradient(inputs[0], torch.cat(back, dim=-1), True, False)
    width = back[0].shape[-1]
    padded = [F.pad(g, (place * width, (2 - place) * width)) for place, g in enumerate(back)]
    return LinearGradient(torch.cat(inputs, dim=1), torch.cat(padded, dim=1), True, False)
