"""Are mislabelled examples found? 10% of the labels flipped, an MLP and a CNN, ours beside Captum's self-influence.

About ten minutes.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from _figures import machine, table, write
from _retraining import CNN, MLP, Protocol, digits, train

import pkexplain as pk
from pkexplain import baselines

inputs, labels = digits()[0]
flipped, wrong = pk.evaluation.flip_labels(labels.numpy(), fraction=0.1, classes=10, seed=0)
flipped, everything = torch.as_tensor(flipped), torch.arange(len(labels))


def timed(work) -> tuple[np.ndarray, float]:
    start = time.perf_counter()
    return np.asarray(work(), dtype=np.float64), time.perf_counter() - start


def rows(protocol: Protocol, steps: int) -> list[list[str]]:
    run = pk.MemoryStore()
    model = train(protocol, (inputs, flipped), everything, 0, run=run, segments=steps)
    explainer = pk.Explainer(run, model)
    setting = baselines.Setting.of(
        explainer, inputs[:1], flipped[:1], dataset=torch.utils.data.TensorDataset(inputs, flipped)
    )
    output = pk.Margin(flipped)
    found = []
    for name, work in {
        "pkexplain, removal reading of its own margin": lambda: explainer.self_contributions(
            inputs, everything, output=output
        ),
        "pkexplain, path reading of its own margin": lambda: explainer.self_contributions(
            inputs, everything, output=output, reading="path"
        ),
        "Captum `TracInCP.self_influence`": lambda: baselines.TracInCP().self_influence(setting),
        "Captum `ArnoldiInfluenceFunction.self_influence`": lambda: baselines.ArnoldiInfluenceFunction().self_influence(
            setting
        ),
        "gradient norm": lambda: baselines.GradientNorm().scores(setting)[0],
        "loss at the end of training": lambda: baselines.TrainingLoss().scores(setting)[0],
        "random": lambda: np.random.default_rng(0).random(len(labels)),
    }.items():
        scores, seconds = timed(work)
        result = pk.evaluation.mislabel_detection(scores, wrong)
        auroc = result.auroc
        print(protocol.name, name, auroc, flush=True)
        found.append(
            [name, protocol.name, f"{auroc.value:.3f} ({auroc.low:.3f} to {auroc.high:.3f})",
             f"{result.precision:.0%}", f"{seconds:.0f} s"]
        )  # fmt: skip
    return found


torch.set_num_threads(1)
lines = sorted(rows(MLP, 355) + rows(CNN, 71), key=lambda line: line[1])
head = ["score", "model", "AUROC", "mislabelled among the 450 highest", "time, all 4,500"]
write("mislabels", f"450 of 4,500 labels flipped; 95% intervals. {machine()}.\n\n{table(head, lines)}")
