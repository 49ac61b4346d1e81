"""Scores of dattri: influence functions with four solvers, TRAK and TracIn.

Its influence functions and TracIn multiply two gradients of the loss, so a positive score is of an example that lowers
the loss of the query: the sense that is wanted. TRAK's target is the margin, ``log(p / (1 - p))``, which rises
with minus the loss. No score is negated.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from _shared import Exported, batches, main
from dattri.algorithm.influence_function import IFAttributorCG, IFAttributorEKFAC, IFAttributorExplicit
from dattri.algorithm.tracin import TracInAttributor
from dattri.algorithm.trak import TRAKAttributor
from dattri.task import AttributionTask
from torch import Tensor, nn

PUBLISHED_TRAK = {"proj_dim": 512}
UNPROJECTED = {"proj_type": "identity"}


def influence(
    attributor: Callable, settings: dict, exported: Exported, size: int | None = None
) -> Callable[[], Tensor]:
    """The Hessian is of all training digits in one batch: dattri adds up the inverses of the batches otherwise."""
    model = exported.model()

    def loss(params, batch):
        inputs, labels = batch
        return nn.functional.cross_entropy(torch.func.functional_call(model, params, inputs), labels)

    task = AttributionTask(loss_func=loss, model=model, checkpoints=exported.final[0])
    attribution = attributor(task=task, **settings)
    train = batches(exported.train)
    attribution.cache(train)

    def score() -> Tensor:
        # All training digits are one batch here too: the queries would be solved again for each of their batches.
        return attribution.attribute(train, batches(exported.test, size))

    return score


def trak(models: int, exported: Exported) -> Callable[[], Tensor]:
    model = exported.model()

    def probability(params, example):
        image, label = example
        logits = torch.func.functional_call(model, params, image.unsqueeze(0))
        return torch.exp(-nn.functional.cross_entropy(logits, label.unsqueeze(0)))

    def margin(params, example):
        image, label = example
        logits = torch.func.functional_call(model, params, image.unsqueeze(0))
        log_p = -nn.functional.cross_entropy(logits, label.unsqueeze(0))
        return log_p - torch.log(1 - torch.exp(log_p))

    task = AttributionTask(loss_func=margin, model=model, checkpoints=exported.final[:models])
    attribution = TRAKAttributor(task=task, correct_probability_func=probability, projector_kwargs=PUBLISHED_TRAK)
    attribution.cache(batches(exported.train, 1500))
    return lambda: attribution.attribute(batches(exported.test))


def tracin(checkpoints: int, normalised: bool, projection: dict | None, exported: Exported) -> Callable[[], Tensor]:
    model = exported.model()

    def loss(params, example):
        image, label = example
        logits = torch.func.functional_call(model, params, image.unsqueeze(0))
        return nn.functional.cross_entropy(logits, label.unsqueeze(0))

    task = AttributionTask(loss_func=loss, model=model, checkpoints=exported.epochs[-checkpoints:])
    weights = torch.full((checkpoints,), exported.rate)
    attribution = TracInAttributor(
        task=task, weight_list=weights, normalized_grad=normalised, projector_kwargs=projection
    )
    return lambda: attribution.attribute(batches(exported.train, 1500), batches(exported.test))


METHODS = {
    "if-explicit-0": partial(influence, IFAttributorExplicit, {}),
    "if-explicit-0.1": partial(influence, IFAttributorExplicit, {"regularization": 0.1}),
    "if-cg-0": partial(influence, IFAttributorCG, {}, size=25),
    "if-cg-0.01": partial(influence, IFAttributorCG, {"regularization": 0.01}, size=25),
    "if-cg-0.1": partial(influence, IFAttributorCG, {"regularization": 0.1}, size=25),
    "ekfac-0": partial(influence, IFAttributorEKFAC, {}),
    "ekfac-0.1": partial(influence, IFAttributorEKFAC, {"damping": 0.1}),
    "trak-1": partial(trak, 1),
    "trak-10": partial(trak, 10),
    "tracin-10": partial(tracin, 10, False, UNPROJECTED),
    "tracin-10-projected": partial(tracin, 10, False, None),
    "grad-dot": partial(tracin, 1, False, UNPROJECTED),
    "grad-cos": partial(tracin, 1, True, UNPROJECTED),
}

if __name__ == "__main__":
    main(METHODS)
