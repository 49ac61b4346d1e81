"""Likely wrong labels, from what every run stores: how much each example's loss pulled at the output, step by step.

A wrong label contradicts what the others teach, so that the model objects to it for longer: its loss derivative stays
large (as in the dynamics of Swayamdipta et al. 2020, *Dataset Cartography*, and Pleiss et al. 2020, *Area under the
margin*). The score is the mean of ‖ℓ'‖ over the segments. A segment counts by its steps and by how much the examples
differ in it: where all are at chance, or all are fitted, it tells nothing.
"""

from __future__ import annotations

import functools
import operator
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pkexplain.errors import ConfigurationError
from pkexplain.explain._single_run import RunExplainer
from pkexplain.explain.loss_curvature import CrossEntropy, usual_largest
from pkexplain.explain.queries import read_queries
from pkexplain.results.suspects import Suspect, Suspects
from pkexplain.store.base import Store
from pkexplain.store.directory import DirectoryStore, open_store
from pkexplain.store.trajectory import Trajectory

__all__ = ["described", "suspects", "suspicion"]

_NEIGHBOURS, _AT_ONCE = 8, 128


def suspects(
    run: str | os.PathLike[str] | Store | Sequence[str | os.PathLike[str] | Store], k: int = 100, *, labels: Any = None
) -> Suspects:
    """Rank training examples by how likely their label is wrong. Needs neither the model nor the data.

    Args:
        run: A run, or a list of runs of one training with different seeds, whose scores are averaged.
        k: How many to show.
        labels: The label of every example as it was trained, ``(num_examples,)``. Then the mean score of each label is
            subtracted: better where classes are of different difficulty, or wrong labels come from one class.

    Returns:
        The suspects; `pkexplain.Explainer.suspects` adds what the model says, and their neighbours.

    Raises:
        RunNotFoundError: There is no run, or it holds no finished segment.
        ConfigurationError: ``k`` or ``labels`` do not fit, or the run has no loss derivatives.

    Example:
        >>> suspects("runs/mnist", k=50)  # doctest: +SKIP
    """
    several = isinstance(run, Sequence) and not isinstance(run, (str, bytes))
    stores = [open_store(each) for each in ([*run] if several else [run])]  # pyright: ignore
    if not stores or not isinstance(k, int) or k < 1:
        got, fix = f"{len(stores)} runs, k={k!r}", "Leave k out"
        raise ConfigurationError("suspects", "there is nothing to rank", got, "a run, and k from 1 up", "suspects", fix)
    found = [suspicion(store.trajectory()) for store in stores]
    if len({len(scores) for scores in found}) > 1:
        got, fix = [len(scores) for scores in found], "Pass runs of one training set"
        raise ConfigurationError("suspects([…])", "the runs differ in size", got, "as many examples", "the runs", fix)
    scores = np.mean(found, axis=0)
    if labels is not None:
        scores = _centred(scores, labels)
    modes = [m for store in stores if isinstance(store, DirectoryStore) and (m := store.mode) is not None]
    mode = functools.reduce(operator.and_, modes) if modes else None
    order = np.argsort(-np.nan_to_num(scores, nan=-np.inf), kind="stable")
    order = order[np.isfinite(scores[order])][:k]  # one that was never visited is not suspected
    found = tuple(Suspect(int(i), float(scores[i])) for i in order)
    return Suspects(found, scores, labels is not None, mode)


def top(scores: np.ndarray, k: int, *, centred: bool, mode: int | None) -> Suspects:
    """Take the k highest scores; an example that was never visited has none, and is not suspected."""
    order = np.argsort(-np.nan_to_num(scores, nan=-np.inf), kind="stable")
    order = order[np.isfinite(scores[order])][:k]
    return Suspects(tuple(Suspect(int(i), float(scores[i])) for i in order), scores, centred, mode)


def suspicion(trajectory: Trajectory) -> np.ndarray:
    """Compute the score of every example, ``(num_examples,)``; nan of one that was never visited.

    Args:
        trajectory: The run.

    Raises:
        ConfigurationError: The run has no loss derivatives.
    """
    total = torch.zeros(trajectory.num_examples, dtype=torch.float64, device="cpu")
    weight, kept = torch.zeros_like(total), []
    withdrawn = torch.tensor(trajectory.manifest.withdrawn, dtype=torch.int64, device="cpu")
    for t, (before, after) in enumerate(zip(trajectory.boundaries, trajectory.boundaries[1:], strict=False)):
        sizes = trajectory.segment(t).loss_derivatives.double()
        signed = bool((sizes > 0).any())
        sizes = sizes.abs() / ((after - before) / max(trajectory.summaries[t].visits, 1))
        seen = sizes.isfinite() & (sizes > 0)
        seen[withdrawn] = False
        if int(seen.sum()) < 2:
            continue
        kept.append((after - before, sizes, seen, signed))
    if not kept:
        raise ConfigurationError(
            "suspects",
            "the run has no loss derivatives, by which labels are suspected",
            got="none",
            expected="the derivative of the loss with respect to the model's output",
            source="the recording",
            fix="Let the model return logits, or a mapping or tuple that begins with them, and record again",
        )
    usual = max(usual_largest(sizes[seen]) for _, sizes, seen, _ in kept)
    bound = None if any(signed for *_, signed in kept) else CrossEntropy.largest
    largest = max(float(sizes[seen].max()) for _, sizes, seen, _ in kept)
    scale = largest if bound is None or usual > 1.1 * bound else bound  # more than the bound: a loss that is summed
    for steps, sizes, seen, _ in kept:
        share = (sizes[seen] / scale).clamp_max(1.0)
        total[seen] += steps * float(share.var()) * share
        weight[seen] += steps * float(share.var())
    return torch.where(weight > 0, total / weight, torch.nan).numpy()


def described(found: Suspects, runs: Sequence[RunExplainer], dataset: Any) -> Suspects:
    """Add to each suspect what the first run's model says, and the examples whose rows are most like its own.

    Args:
        found: The suspects.
        runs: The runs.
        dataset: The training set, of which the model is asked; None to ask nothing.
    """
    run, ids = runs[0], torch.as_tensor(found.ids, device="cpu")
    if not len(ids):
        return found
    rows = torch.stack([segment.read_rows(ids) for segment in run.segments], dim=1)
    likeness = run.whole.scan(rows.to(run.trajectory_model.device, run.trajectory.dtype))
    sizes = torch.stack([segment.norms for segment in run.segments]).double().square().sum(0).sqrt()
    likeness /= (sizes[ids, None] * sizes).clamp_min(torch.finfo(torch.float64).tiny)
    likeness[torch.arange(len(ids), device="cpu"), ids] = -torch.inf
    near = likeness.topk(min(_NEIGHBOURS, likeness.shape[1] - 1))
    says = [None] * len(ids) if dataset is None else _predictions(run, [dataset[int(i)] for i in ids])
    pairs = zip(found, near.indices.tolist(), near.values.tolist(), says, strict=True)
    each = [replace(s, prediction=p, neighbours=tuple(zip(i, v, strict=True))) for s, i, v, p in pairs]
    return replace(found, found=tuple(each))


def _predictions(run: RunExplainer, rows: list[Any]) -> list[float | int]:
    """Ask the model for the class, or the number, of some rows of the data set."""
    inputs = [row[0] if isinstance(row, (tuple, list)) else row for row in rows]
    queries, found = read_queries(inputs, run.trajectory, run.model), []
    for batch, _ in queries.with_output(None):
        scores = run.prediction(batch, _AT_ONCE)
        several = scores.ndim > 1 and scores.shape[-1] > 1
        found += (scores.flatten(0, -2).argmax(-1) if several else scores.flatten()).tolist()
    return [found[int(i)] for i in queries.places.argsort()]


def _centred(scores: np.ndarray, labels: Any) -> np.ndarray:
    given = np.asarray(labels.detach().cpu().numpy() if isinstance(labels, Tensor) else labels)
    if given.shape != scores.shape:
        got, expected, fix = f"shape {given.shape}", f"shape {scores.shape}", "Pass one label for each example"
        raise ConfigurationError("suspects(labels=…)", "they have another shape", got, expected, "the run", fix)
    kinds = np.unique(given, return_inverse=True)[1]
    there = np.isfinite(scores)
    sums = np.bincount(kinds[there], scores[there], minlength=int(kinds.max()) + 1)
    means = sums / np.maximum(np.bincount(kinds[there], minlength=len(sums)), 1)
    return scores - means[kinds]
