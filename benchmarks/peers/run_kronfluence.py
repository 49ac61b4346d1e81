"""Scores of kronfluence: influence functions with EK-FAC, and with the identity in place of the inverse.

It multiplies the gradient of a measurement by that of the training loss. The measurement here is the loss of the query,
so a positive score is of an example that lowers it; no score is negated.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial

import torch
from _shared import Exported, main
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch import Tensor, nn

BATCH = 500


class Digits(Task):
    """The training loss and the measurement: cross-entropy, added up over a batch."""

    def compute_train_loss(self, batch, model: nn.Module, sample: bool = False) -> Tensor:
        inputs, labels = batch
        logits = model(inputs)
        if sample:
            labels = torch.multinomial(logits.detach().softmax(dim=-1), 1).flatten()
        return nn.functional.cross_entropy(logits, labels, reduction="sum")

    def compute_measurement(self, batch, model: nn.Module) -> Tensor:
        inputs, labels = batch
        return nn.functional.cross_entropy(model(inputs), labels, reduction="sum")


def influence(strategy: str, damping: float | None, exported: Exported) -> Callable[[], Tensor]:
    task = Digits()
    model = prepare_model(exported.model(), task)
    analyzer = Analyzer("digits", model, task, cpu=True, disable_tqdm=True, output_dir=tempfile.mkdtemp())
    factors = FactorArguments(strategy=strategy)
    analyzer.fit_all_factors("factors", exported.train, per_device_batch_size=BATCH, factor_args=factors)

    def score() -> Tensor:
        analyzer.compute_pairwise_scores(
            "scores",
            "factors",
            query_dataset=exported.test,
            train_dataset=exported.train,
            per_device_query_batch_size=len(exported.test),
            per_device_train_batch_size=BATCH,
            score_args=ScoreArguments(damping_factor=damping),
        )
        return analyzer.load_pairwise_scores("scores")["all_modules"].T

    return score


DEFAULT_DAMPING = ScoreArguments().damping_factor

METHODS = {
    "ekfac": partial(influence, "ekfac", DEFAULT_DAMPING),
    "ekfac-heuristic": partial(influence, "ekfac", None),
    "identity": partial(influence, "identity", DEFAULT_DAMPING),
}

if __name__ == "__main__":
    main(METHODS)
