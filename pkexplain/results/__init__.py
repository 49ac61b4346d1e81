"""Results: plain data, shown as text, plots and an HTML report."""

from __future__ import annotations

__all__: list[str] = []
