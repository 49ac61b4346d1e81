"""The run, on disk or in memory: its manifest and files, checked when they are read."""

from __future__ import annotations

__all__: list[str] = []
