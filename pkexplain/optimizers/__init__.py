"""How a gradient becomes a displacement: the update rules, and the rows and factors that a segment gives each example.

`rules` names the optimizers that are supported and registers new ones; `scalar` is for rules that scale a gradient by
one number (SGD), `adaptive` for rules with a diagonal preconditioner (Adam).
"""

from __future__ import annotations

__all__: list[str] = []
