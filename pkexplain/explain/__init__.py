"""A query in, contributions out: outputs, covectors (path-averaged query gradients), the ledger, the removal reading.

Start at `pkexplain.explain.explainer`. `pkexplain.record` imports nothing from here.
"""
