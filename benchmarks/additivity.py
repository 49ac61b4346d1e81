"""Does it add up? The demo CNN, float32, all defaults, 100 test digits. About a minute."""

from __future__ import annotations

import numpy as np
import torch
from _figures import machine, spread, table, write

import pkexplain as pk
from pkexplain.demo import build_cnn, load_digits, train_cnn

train, test = load_digits()
queries, labels = test.tensors[0][:100], test.tensors[1]
model, run = build_cnn(), pk.MemoryStore()
train_cnn(model, train, run=run)
with torch.no_grad():
    accuracy = float((model.eval()(test.tensors[0]).argmax(1) == labels).float().mean())
explainer = pk.Explainer(run, model)
rows = []
for output in (pk.Logit(), pk.Margin(), pk.LogProbability(), pk.Logit(3)):
    explanations = explainer.explain(queries, output=output)
    change = np.array([abs(e.final - e.initial) for e in explanations])
    left = np.array(
        [e.contributions.sum() + sum(e.ledger.remainders.values()) - (e.final - e.initial) for e in explanations]
    )
    checks = {c.name: np.array([e.checks[n].value for e in explanations]) for n, c in enumerate(explanations[0].checks)}
    name = type(output).__name__ + ("(3)" if output.index == 3 else "(predicted class)")
    rows.append(
        [
            f"`{name}`",
            f"{np.median(checks['quadrature gap']):.2%}",
            f"{np.quantile(checks['quadrature gap'], 0.95):.2%}",
            f"{np.median(checks['projection gap']):.1%}",
            f"{np.median(checks['audit error']):.1%}",
            f"{np.median(np.abs(left) / change):.1e}",
            f"{np.max(np.abs(left) / change):.1e}",
            f"{np.mean([e.cost.backward_passes for e in explanations]):.0f}",
            f"{np.mean([e.cost.exhausted for e in explanations]):.0%}",
        ]
    )
gross = [e.gross / abs(e.total) for e in explainer.explain(queries)]
summaries = run.trajectory().summaries
head = [
    "output",
    "quadrature gap, median",
    "95th percentile",
    "projection gap before correction, median",
    "audit error, median",
    "left after correction, median",
    "largest",
    "gradients a query",
    "budget ran out",
]
write(
    "additivity",
    f"Test accuracy {accuracy:.1%}; {len(summaries)} segments of {summaries[0].last_step} steps; "
    f"displacement gap {max(s.displacement_gap for s in summaries):.1e} at most; gross over net contribution of the "
    f"predicted class's logit {spread(gross)}. {machine()}.\n\n{table(head, rows)}",
)
