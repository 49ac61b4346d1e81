"""A query in, contributions out: outputs, path-averaged query gradients, the ledger, and the removal reading.

Start at `pkexplain.explain.explainer`. Nothing here is imported by `pkexplain.record`.
"""

from __future__ import annotations

__all__: list[str] = []
