"""Watches a training loop: hooks the model and the optimizer, closes segments, saves and resumes.

Start at `pkexplain.record.recorder`. Nothing here is imported by `pkexplain.explain`: the two share the store, and what
lies under it, and nothing else.
"""

from __future__ import annotations

__all__: list[str] = []
