"""Scores of TRAK, by its authors' package, `traker`, with its projection for CPUs.

Its output is the margin, ``log(p / (1 - p))``, which rises with minus the loss; no score is negated.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from functools import partial

import torch
from _shared import Exported, batches, main
from torch import Tensor
from trak import TRAKer
from trak.projectors import BasicProjector, ProjectionType

BATCH = 1500


def trak(models: int, proj_dim: int, exported: Exported) -> Callable[[], Tensor]:
    model = exported.model()
    size = sum(parameter.numel() for parameter in model.parameters())
    cpu = torch.device("cpu")
    traker = TRAKer(
        model=model,
        task="image_classification",
        train_set_size=len(exported.train),
        save_dir=tempfile.mkdtemp(),
        device="cpu",
        projector=BasicProjector(size, proj_dim, seed=0, proj_type=ProjectionType.rademacher, device=cpu),
        proj_dim=proj_dim,
        use_half_precision=False,
        logging_level=logging.WARNING,
    )
    for number, state in enumerate(exported.final[:models]):
        traker.load_checkpoint(state, model_id=number)
        for batch in batches(exported.train, BATCH):
            traker.featurize(batch=batch, num_samples=len(batch[1]))
    traker.finalize_features()

    def score() -> Tensor:
        for number, state in enumerate(exported.final[:models]):
            traker.start_scoring_checkpoint("queries", state, model_id=number, num_targets=len(exported.test))
            for batch in batches(exported.test):
                traker.score(batch=batch, num_samples=len(batch[1]))
        return torch.as_tensor(traker.finalize_scores("queries"))

    return score


METHODS = {
    "trak-1": partial(trak, 1, 2048),
    "trak-10": partial(trak, 10, 2048),
    "trak-1-512": partial(trak, 1, 512),
    "trak-10-512": partial(trak, 10, 512),
}

if __name__ == "__main__":
    main(METHODS)
