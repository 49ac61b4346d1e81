"""pkexplain under the interfaces of other libraries; each module imports its library."""

from __future__ import annotations

__all__: list[str] = []
