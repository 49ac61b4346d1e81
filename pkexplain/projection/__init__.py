"""Gradients to k numbers: the kinds of projection a user picks, and the maps they become for a model.

The first are in `kinds`, the second in `maps`. The data-dependent directions of `Kronecker` are found in `_principal`.
"""
