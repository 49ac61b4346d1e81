"""The second stage: short rows along the leading directions of a segment's own wide rows."""

from __future__ import annotations

import torch
from torch import Tensor

from pkexplain.distributed import ProcessGroup
from pkexplain.projection._principal import HELD_BACK
from pkexplain.projection.maps import random_signs, random_words

_ROWS_AT_ONCE = 1024
_TINY = 1e-30
_DRAWN = 4
"""Rows that are drawn, for each direction."""


def leading_directions(rows: Tensor, scale: Tensor, total: Tensor, k: int, *, seed: int, group: ProcessGroup) -> Tensor:
    """Find an orthonormal basis close to the leading directions of some rows, in which their sum lies exactly.

    The range of Yᵀ Y Ω, for a random Ω and the rows Y, large ones held back: a randomised range finder with half a
    power iteration (Halko, Martinsson & Tropp 2011, algorithm 4.3). More iterations improve the contributions little.

    Of many rows some are drawn, in proportion to their norms, and count alike.

    Args:
        rows: Rows, ``(n, width)``, those of this process.
        scale: What they are divided by, ``(width,)``.
        total: A vector that is to lie in the basis, ``(width,)``, divided by ``scale`` already.
        k: The most directions, at most ``width``; a few rows have no more than one each, and that of ``total``.
        seed: Seed of Ω.
        group: The processes.

    Returns:
        ``(directions, width)``.
    """
    width, k = rows.shape[1], min(k, group.all_reduce_int(len(rows)) + 1)
    start = random_signs(seed, width, (k - 1, width)).T.to(rows)
    found = start.new_zeros(width, k - 1)
    norms = torch.cat([torch.linalg.vector_norm(part / scale, dim=1) for part in rows.split(_ROWS_AT_ONCE)])
    chosen, weights = _draw(norms.clamp_min(_TINY), -(-_DRAWN * k // group.world_size), seed)
    for some, weight in zip(chosen.split(_ROWS_AT_ONCE), weights.split(_ROWS_AT_ONCE), strict=True):
        part = rows[some] / scale * weight[:, None]
        found.addmm_(part.T, part @ start)
    found = group.all_reduce(found)
    size = torch.linalg.vector_norm(found, dim=0).mean().clamp_min(_TINY)
    together = torch.cat([total[:, None] / total.norm().clamp_min(_TINY), found / size], dim=1)
    return torch.linalg.qr(together)[0].T.contiguous()


def _draw(norms: Tensor, most: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw rows without replacement, in proportion to their norms (Efraimidis & Spirakis 2006), and weight them.

    Returns:
        Their positions, ascending, and what they are multiplied by.
    """
    if len(norms) <= most:
        return torch.arange(len(norms), device=norms.device), norms**-HELD_BACK
    words = torch.from_numpy((random_words(seed, len(norms), len(norms)) >> 11).astype("float64"))
    keys = ((words + 1) / 2.0**53).log().to(norms.device) / norms.double()
    chosen = keys.topk(most).indices.sort().values
    return chosen, norms[chosen].reciprocal()
