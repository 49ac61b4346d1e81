"""How a gradient becomes a displacement: the update rules, and each example's rows over a segment.

`rules` holds the supported optimizers and registers new ones; `scalar` is for rules that scale a gradient by
one number (SGD), `adaptive` for rules with a diagonal preconditioner (Adam).
"""
