"""Path-kernel contributions under quanda's interface for explainers, so that its metrics can judge them.

This module can be imported without quanda; the explainer cannot be made without it.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from pkexplain.errors import ConfigurationError, MissingDependencyError
from pkexplain.explain.explainer import Explainer
from pkexplain.explain.outputs import LogProbability, Output
from pkexplain.explain.removal import Removal
from pkexplain.gradients.layers import flatten_blocks
from pkexplain.gradients.model_copy import copy_model
from pkexplain.store.base import Store

try:
    _quanda: Any = importlib.import_module("quanda.explainers.base")
    _handlers: Any = importlib.import_module("quanda.utils.datasets.dataset_handlers")
    _base, _missing = _quanda.Explainer, ""
except ImportError as error:
    _base, _missing = cast(Any, object), str(error)

__all__ = ["PathKernelExplainer"]

_SAME = 1e-2
"""Largest ‖θ − θ_T‖ / ‖θ_T‖ of a model that is the recorded one: weights that were saved in bfloat16 pass."""


class PathKernelExplainer(_base):
    """The contributions of a recorded run, as an explainer for quanda's metrics and benchmarks.

    Where quanda makes the explainer, it takes the class and its further arguments:

    ``MislabelingDetectionMetric(model, train, flipped, PathKernelExplainer, expl_kwargs={"run": "runs/mnist"})``

    The recorded weights are explained, so a model with others is refused. A metric that changes the weights itself
    (`ModelRandomizationMetric`) cannot be used: there is no run of a training that led to random weights.

    Args:
        model: The trained model.
        train_dataset: The training set in the order of the recorded ids.
        run: The directory or URL of the run, its store, or an `pkexplain.Explainer` of it.
        task: ``"image_classification"`` or ``"text_classification"``.
        checkpoints: Where the trained weights are, if ``model`` does not have them; of several, the last counts.
        checkpoints_load_func: How they are loaded, as for quanda's own explainers.
        output: Makes the output from the targets; by default `pkexplain.LogProbability`, which is minus the
            cross-entropy. `pkexplain.Margin` and `pkexplain.Logit` fit, too.
        reading: ``"path"``, ``"removal"`` or a `pkexplain.Removal`, as for `pkexplain.Explainer.explain`.

    Raises:
        MissingDependencyError: quanda is not installed, or does not load.
        RunNotFoundError: There is no run, or it holds no finished segment.
        ModelMismatchError: The model is not the one that was recorded.
        ConfigurationError: The training set is not the one that was recorded, or the weights are not those at its end.
    """

    accepted_tasks = ("image_classification", "text_classification")

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Any,
        run: str | os.PathLike[str] | Store | Explainer,
        task: str = "image_classification",
        checkpoints: str | list[str] | None = None,
        checkpoints_load_func: Callable[[nn.Module, str], Any] | None = None,
        output: Callable[[Tensor], Output] = LogProbability,
        reading: str | Removal = "path",
    ) -> None:
        """Read the run and check the model and the training set against it."""
        if _missing:
            raise MissingDependencyError(
                "PathKernelExplainer",
                "quanda cannot be imported",
                got=_missing,
                expected="quanda 0.5 or later",
                source="the environment",
                fix="Install it: pip install quanda",
            )
        super().__init__(
            model=model,
            train_dataset=train_dataset,
            task=task,
            checkpoints=checkpoints,
            checkpoints_load_func=checkpoints_load_func,
        )
        self.explainer = run if isinstance(run, Explainer) else Explainer(run, model)
        self._output, self._reading = output, reading
        self._own: Tensor | None = None
        examples = self.explainer.trajectory.num_examples
        if len(train_dataset) != examples:
            got, source = f"{len(train_dataset)} examples", "num_examples of the run"
            wrong, fix = "the data set is not the one that was recorded", "Pass the whole training set"
            asked = "PathKernelExplainer(train_dataset)"
            raise ConfigurationError(asked, wrong, got=got, expected=examples, source=source, fix=fix)
        self._check_weights()

    def _check_weights(self) -> None:
        """Refuse weights that the run did not lead to, for example those that quanda draws at random."""
        trajectory = self.explainer.trajectory
        model = copy_model(self.model)
        if self.checkpoints:
            self.checkpoints_load_func(model, self.checkpoints[-1])
        recorded = trajectory.checkpoint(len(trajectory)).parameters.double()
        blocks, here = trajectory.fingerprint.blocks, {name: p.detach() for name, p in model.named_parameters()}
        away = float((flatten_blocks(blocks, here, torch.float64).cpu() - recorded).norm() / recorded.norm())
        if not away <= _SAME:
            raise ConfigurationError(
                "PathKernelExplainer(model)",
                "its weights are not those that the run ended with, and only those can be explained",
                got=f"weights {away:.2g} ‖θ_T‖ away",
                expected=f"{_SAME:g} at most",
                source="the run's last checkpoint",
                fix="Pass the trained model, or its checkpoints; ModelRandomizationMetric cannot be used",
            )

    def explain(self, test_data: Tensor | Mapping[str, Tensor], targets: list[int] | Tensor) -> Tensor:
        """Compute the contributions of the training examples to the output of each test sample.

        Args:
            test_data: A batch of the model's inputs, or a mapping of them; what the model was not given is ignored.
            targets: The class of each, ``(test samples,)``.

        Returns:
            Scores in output units, ``(test samples, num_examples)``; higher for proponents.

        Raises:
            QueryError: The samples do not fit the model, or the targets the samples.
        """
        x, output = self._inputs(test_data), self._output(torch.as_tensor(targets))
        return self._scores(self.explainer.contributions(x, output=output, reading=self._reading))

    def self_influence(self, batch_size: int = 32) -> Tensor:
        """Compute each training example's contribution to the output of its own label; high if it was memorised.

        Args:
            batch_size: How many training examples to read at a time.

        Returns:
            Scores in output units, ``(num_examples,)``; they are computed once.
        """
        if self._own is None:
            handler, parts, start = _handlers.get_dataset_handler(self.train_dataset), [], 0
            for batch in handler.create_dataloader(self.train_dataset, shuffle=False, batch_size=batch_size):
                data, labels = handler.process_batch(batch, self.device)
                ids = range(start, start + len(labels))
                x, output = self._inputs(data), self._output(labels)
                own = self.explainer.self_contributions(x, ids, output=output, reading=self._reading)
                parts.append(self._scores(own))
                start += len(labels)
            self._own = torch.cat(parts)
        return self._own

    def _scores(self, values: Any) -> Tensor:
        return torch.from_numpy(values).to(self.explainer.trajectory.dtype).to(self.device)

    def _inputs(self, data: Any) -> Any:
        """Leave out columns that the model was not given: quanda passes on all but the labels."""
        if not isinstance(data, Mapping):
            return data
        known = {name.removeprefix("0.") for name in self.explainer.trajectory.inputs}
        return {name: value for name, value in data.items() if not known or name in known}
