"""Path-kernel contributions under Captum's interface for training-data influence."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from captum.influence import DataInfluence
from captum.influence._utils.common import KMostInfluentialResults
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from pkexplain.baselines.dataset import TupleDataset
from pkexplain.errors import ConfigurationError
from pkexplain.explain.explainer import Explainer
from pkexplain.explain.loss_output import Loss
from pkexplain.gradients.torch_state import own_torch_state
from pkexplain.store.base import Store

__all__ = ["PathKernelInfluence"]


class PathKernelInfluence(DataInfluence):
    """The contributions of a recorded run, with the interface of Captum's ``TracInCP``.

    Only the line that makes the object changes:

    ``TracInCP(model, train_dataset, checkpoints, load, loss_fn=loss_fn)`` becomes
    ``PathKernelInfluence(model, train_dataset, "runs/mnist", loss_fn=loss_fn)``

    A score is the example's contribution to minus the loss of the query, in units of the loss: a proponent lowered it.
    Captum's scores do not have to add up to anything; these add up to the decrease of the loss over training, up to the
    named lines of the ledger, which `Explainer.explain` shows.

    Args:
        model: The model, which supplies the architecture; the recorded weights are explained.
        train_dataset: The training set in the order of the recorded ids.
        run: The directory of the run, its store, or an `pkexplain.Explainer` of it.
        loss_fn: A torch loss, with any reduction, or a function of the prediction and the targets that returns one
            loss for each example; by default cross-entropy.
        batch_size: Training examples at a time, for `self_influence`.

    Raises:
        RunNotFoundError: There is no run, or it holds no finished segment.
        ModelMismatchError: The model is not the one that was recorded.
        ConfigurationError: The training set is not the one that was recorded.
    """

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Any,
        run: str | os.PathLike[str] | Store | Explainer,
        *,
        loss_fn: Callable[..., Tensor] | None = None,
        batch_size: int = 128,
    ) -> None:
        """Read the run and check the model against it."""
        self.model, self.train_dataset, self.batch_size = model, train_dataset, batch_size
        self.explainer = run if isinstance(run, Explainer) else Explainer(run, model)
        self._loss = _for_each(loss_fn)
        examples = self.explainer.trajectory.num_examples
        if len(train_dataset) != examples:
            got, source = f"{len(train_dataset)} examples", "num_examples of the run"
            wrong, fix = "the data set is not the one that was recorded", "Pass the whole training set"
            asked = "PathKernelInfluence(train_dataset)"
            raise ConfigurationError(asked, wrong, got=got, expected=examples, source=source, fix=fix)

    @own_torch_state()
    def influence(  # pyright: ignore[reportIncompatibleMethodOverride] - Captum's own subclasses narrow it, too
        self,
        inputs: tuple[Any, ...] | DataLoader[Any],
        k: int | None = None,
        proponents: bool = True,
        show_progress: bool = False,
        aggregate: bool = False,
    ) -> Tensor | KMostInfluentialResults:
        """Compute the contributions of the training examples to minus the loss of each query.

        Args:
            inputs: A batch ``(x, targets)``, ``(x1, x2, …, targets)`` or ``({name: x}, targets)``, or a DataLoader of
                such batches.
            k: The number of examples to return for each query; None for the scores of all.
            proponents: Whether to return the largest scores, or the smallest.
            show_progress: Only for compatibility with Captum; pass ``progress`` to the `Explainer` instead.
            aggregate: Whether to sum the scores over the queries.

        Returns:
            Scores in units of the loss, ``(queries, num_examples)``; or, with ``k``, Captum's named tuple of
            ``indices`` and ``influence_scores``, ``(queries, k)`` each. With ``aggregate`` there is one row.

        Raises:
            QueryError: The queries do not fit the model, or the targets the queries.
        """
        scores = torch.cat([self._scores(batch) for batch in _batches(inputs)])
        scores = scores.sum(0, keepdim=True) if aggregate else scores
        if k is None:
            return scores
        found = scores.topk(min(k, scores.shape[1]), dim=1, largest=proponents)
        return KMostInfluentialResults(found.indices, found.values)

    @own_torch_state()
    def self_influence(self, inputs: None = None, show_progress: bool = False) -> Tensor:
        """Compute each training example's contribution to minus its own loss: high if it is mislabelled or rare.

        It costs as much as explaining every training example. Only training examples have contributions, so other
        ``inputs`` have no self-influence.

        Args:
            inputs: None.
            show_progress: Only for compatibility with Captum.

        Returns:
            Scores in units of the loss, ``(num_examples,)``.

        Raises:
            ConfigurationError: ``inputs`` were given.
        """
        if inputs is not None:
            got, source = type(inputs).__name__, "the recorded run"
            wrong, fix = "only training examples contributed to training", "Leave inputs out"
            asked = "PathKernelInfluence.self_influence(inputs)"
            raise ConfigurationError(asked, wrong, got=got, expected="None", source=source, fix=fix)
        rows = TupleDataset(self.train_dataset, self.explainer.trajectory.inputs)
        parts, start = [], 0
        for *values, targets in DataLoader(rows, self.batch_size):
            x = dict(zip(rows.names, values, strict=True)) if rows.names else tuple(values)
            scores = -self.explainer.contributions(x, output=Loss(targets, self._loss))
            own = scores[:, start : start + len(targets)].diagonal()
            parts.append(torch.from_numpy(own.copy()))
            start += len(targets)
        return torch.cat(parts)

    def _scores(self, batch: Any) -> Tensor:
        *values, targets = batch
        x = values[0] if len(values) == 1 else tuple(values)
        return torch.from_numpy(-self.explainer.contributions(x, output=Loss(targets, self._loss)))


def _batches(inputs: Any) -> Iterator[Any]:
    return iter(inputs) if isinstance(inputs, DataLoader) else iter([inputs])


def _for_each(loss_fn: Callable[..., Tensor] | None) -> Callable[..., Tensor]:
    """Turn a Captum-style loss into a functional one with one loss for each example."""
    if loss_fn is None:
        return F.cross_entropy
    if isinstance(loss_fn, nn.Module) and hasattr(loss_fn, "reduction"):
        alone: Any = copy.deepcopy(loss_fn)
        alone.reduction = "none"
        return lambda prediction, targets, reduction: alone(prediction, targets)
    if "reduction" in inspect.signature(loss_fn).parameters:
        return loss_fn
    return lambda prediction, targets, reduction: loss_fn(prediction, targets)
