"""Watches a training loop: hooks the model and the optimizer, closes segments, saves and resumes.

Start at `pkexplain.record.recorder`. `pkexplain.explain` imports nothing from here: the two share only the store and
the layers below it.
"""
