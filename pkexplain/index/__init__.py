"""Which rows could matter to a query: exact search, and compressed indices built with faiss."""

from __future__ import annotations

__all__: list[str] = []
