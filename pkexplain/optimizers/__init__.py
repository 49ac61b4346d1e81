"""How a gradient becomes a displacement: the update rules, and each example's rows over a segment.

`rules` holds the supported optimizers; `accumulator` adds up rows, `operator_fit` finds the operator of rules that
divide by a second moment (Adam), `row_target` what a segment's gradients are projected to.
"""
