"""The completeness correction: a rank-one change of the covector makes a compressed ledger close.

With s_t the sum of the stored rows and E_t the total that the examples must add up to,

    q'_t = q_t + (E_t − ⟨q_t, s_t⟩) s_t / ‖s_t‖²,    so that    Σ_i ⟨q'_t, row_i,t⟩ = ⟨q'_t, s_t⟩ = E_t,

the smallest change of q_t that does so. It holds at any k and after any rounding of the rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pkexplain.explain._query_gradients import Covectors

_SMALLEST_SUM = 1e-12
"""Below this share of the largest ‖s_t‖, a segment's rows cancel too well to carry a correction."""


@dataclass(frozen=True)
class CorrectedCovectors:
    """Covectors in projection space before and after the correction.

    Attributes:
        covectors: The result of the quadrature.
        projected: q'_t, ``(queries, segments, k)``.
        explained: E_t = f(θ_{t+1}) − f(θ_t) − ⟨φ_t, weight_decay_t + unsplit_t + optimizer_t⟩ − buffers_t, in output
            units, ``(queries, segments)``.
        uncorrected: ⟨q_t, s_t⟩, the examples' total before the correction, in output units, ``(queries, segments)``.
        corrected: ⟨q'_t, s_t⟩, their total after it, in output units, ``(queries, segments)``.
        withdrawn: The share of it whose rows were withdrawn, in output units, ``(queries, segments)``.
    """

    covectors: Covectors
    projected: Tensor
    explained: Tensor
    uncorrected: Tensor
    corrected: Tensor
    withdrawn: Tensor


def correct(covectors: Covectors, row_sums: Tensor, withdrawn: Tensor) -> CorrectedCovectors:
    """Change each q_t so that the stored rows add up to E_t.

    Args:
        covectors: The result of the quadrature.
        row_sums: s_t, ``(segments, k)``, in float64.
        withdrawn: The sum of withdrawn rows, included in it, ``(segments, k)``, in float64.

    Returns:
        The covectors before and after the correction.
    """
    changes = covectors.outputs.diff(dim=1)
    explained = changes - covectors.weight_decay - covectors.unsplit - covectors.optimizer - covectors.buffers
    q = covectors.projected.double()
    s = row_sums.to(q.device)
    uncorrected = torch.einsum("qtk,tk->qt", q, s)
    size = s.square().sum(1)
    usable = size > _SMALLEST_SUM**2 * size.max()
    missing = torch.where(usable, explained.to(q.device) - uncorrected, 0.0)
    q = q + (missing / torch.where(usable, size, 1.0))[:, :, None] * s
    corrected = torch.einsum("qtk,tk->qt", q, s)
    dtype = covectors.projected.dtype
    gone = torch.einsum("qtk,tk->qt", q, withdrawn.to(q.device))
    return CorrectedCovectors(covectors, q.to(dtype), explained, uncorrected.cpu(), corrected.cpu(), gone.cpu())
