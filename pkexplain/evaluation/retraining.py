"""Models retrained by the user's function, and their outputs for the queries."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pkexplain.errors import EvaluationError
from pkexplain.evaluation._kept_answers import Answers, KeptAnswers, key_of
from pkexplain.explain.outputs import Logit, LogProbability, Margin, Output, as_output
from pkexplain.explain.queries import as_queries
from pkexplain.files import checksum, local_path
from pkexplain.gradients.torch_state import own_torch_state
from pkexplain.progress import Progress, no_progress

__all__ = ["Job", "Retrain", "Retraining"]

Retrain = Callable[[np.ndarray, int], nn.Module]
Job = tuple[np.ndarray, int]
"""The example ids to train on, sorted, and the seed."""

_BLOCK = 512
"""The most queries in one forward pass."""


class Retraining:
    """Retrain the user's model on some of the examples, and ask it the queries.

    Every set of examples is trained on once for each seed: a model's outputs are remembered, and kept on disk if a
    directory is given. A directory cannot check which training function filled it: use a new one for each training
    recipe.

    Args:
        retrain: Trains from scratch and returns the model: ``retrain(ids, seed)``, with the ids of the examples to
            train on, sorted, int64, and a seed for everything random in it (initial parameters, order, dropout).
        queries: A batch of queries, as for `pkexplain.Explainer.explain`: a tensor, a tuple of positional inputs or a
            mapping of named ones, each with a batch dimension.
        output: The output of every query. Its class must be given: the predicted class can differ between retrained
            models.
        num_examples: The size of the whole training set; ids are row numbers below it.
        kept: A directory for the outputs of every retrained model, so that an interrupted evaluation can continue.
            Several processes may share one.
        progress: Told the progress of long work, for example `pkexplain.ProgressBar`.
        backwards: Whether to work from the end of the list. Two processes that share a directory, one forwards and one
            backwards, each do half of the work and both get all results.

    Raises:
        EvaluationError: The output depends on the prediction, or the directory belongs to another setting.
        QueryError: The queries are not a batch, or the output is not an output.
        ConfigurationError: ``kept`` is a URL.
    """

    def __init__(
        self,
        retrain: Retrain,
        queries: Any,
        *,
        output: Output | Callable[[Tensor], Tensor],
        num_examples: int,
        kept: str | os.PathLike[str] | None = None,
        progress: Progress | None = None,
        backwards: bool = False,
    ) -> None:
        """Check the setting, without training anything."""
        if num_examples < 2:
            expected, fix = "2 or more", "Pass num_examples=len(train)"
            raise EvaluationError(
                f"{num_examples=}", "there is nothing to leave out", num_examples, expected, "retraining", fix
            )
        self.num_examples = num_examples
        self.queries = as_queries(queries, {}, torch.device("cpu"))
        self.output = _fixed_output(output)
        self.queries.rule.asked = self.output.of
        self._retrain, self._backwards = retrain, backwards
        self._progress = progress or no_progress
        self._known: dict[str, Answers] = {}
        self._kept = None if kept is None else KeptAnswers(local_path(kept, "Retraining(kept=…)"), self._setting())
        self._uses_ids = self._uses_seed = False

    def ask(self, ids: np.ndarray, seed: int) -> Answers:
        """Return the outputs of the model trained on these examples with this seed.

        Args:
            ids: The examples to train on, sorted, ``(examples,)``.
            seed: The seed.

        Returns:
            Its outputs and the classes it predicts.

        Raises:
            EvaluationError: The function returned no model, or the model's outputs are not finite.
            QueryError: The output is not one of the model's prediction.
        """
        key = key_of(ids, seed)
        answers = self._known.get(key) or (self._kept.get(key) if self._kept else None)
        if answers is None:
            answers = self._train(ids, seed)
            if self._kept:
                self._kept.put(key, answers)
        self._known[key] = answers
        return answers

    def ask_all(self, jobs: Sequence[Job], what: str) -> list[Answers]:
        """Run a list of retrainings; the first ones show whether the function uses the ids and the seed.

        Args:
            jobs: Example ids and seed of each retraining.
            what: Name of the list, for the progress.

        Returns:
            Each model's outputs, in the order of the list.

        Raises:
            EvaluationError: The function ignores the ids or, if the seeds differ, the seed; or as for `ask`.
        """
        order = list(range(len(jobs)))
        order[3:] = order[:2:-1] if self._backwards else order[3:]
        answers: dict[int, Answers] = {}
        for done, position in enumerate(order):
            self._progress(what, done, len(jobs))
            answers[position] = self.ask(*jobs[position])
            if not (self._uses_ids and self._uses_seed):
                self._compare(jobs[order[0]], jobs[position])
        self._progress(what, len(jobs), len(jobs))
        return [answers[position] for position in range(len(jobs))]

    def _compare(self, first: Job, second: Job) -> None:
        """Compare two retrainings that differ in one thing."""
        (ids, seed), (other_ids, other_seed) = first, second
        same_ids, same_seed = np.array_equal(ids, other_ids), seed == other_seed
        if same_ids == same_seed:
            return
        alike = np.array_equal(self.ask(ids, seed).outputs, self.ask(other_ids, other_seed).outputs)
        if same_ids and not self._uses_seed:
            if alike:
                raise EvaluationError(
                    f"retrain(ids, seed={other_seed})",
                    f"it returns exactly the model of seed={seed}, so it ignores its seed",
                    f"the same outputs for all {len(self.queries)} queries",
                    "other initial parameters, or another order of the examples",
                    "seeds that differ",
                    "Seed everything random in it with `seed`; if nothing is random, one seed is enough",
                )
            self._uses_seed = True
        elif same_seed and not self._uses_ids:
            # A few examples may indeed change nothing, but half of them do not.
            if alike and np.array_equal(self.ask(ids, seed).outputs, self.ask(ids[::2], seed).outputs):
                raise EvaluationError(
                    f"retrain(ids, {seed=})",
                    "it returns exactly the same model for different ids, so it ignores them",
                    f"the same outputs for all {len(self.queries)} queries with {len(ids)}, {len(other_ids)} and "
                    f"{len(ids[::2])} examples",
                    "models that differ",
                    "three retrainings",
                    "Train only on `ids`, for example with torch.utils.data.Subset(train, ids)",
                )
            self._uses_ids = True

    @own_torch_state()
    def _train(self, ids: np.ndarray, seed: int) -> Answers:
        model = self._retrain(ids.copy(), seed)
        asked = f"retrain(ids, {seed=}) on {len(ids)} examples"
        if not isinstance(model, nn.Module):
            wrong, fix = "it did not return a model", "Return the trained model"
            raise EvaluationError(asked, wrong, type(model).__name__, "a torch.nn.Module", "the function given", fix)
        model.eval()
        with torch.no_grad():
            prediction = self._predict(model)
            outputs = self.output.settle(prediction)(prediction).detach().double().cpu().numpy()
        if len(broken := np.flatnonzero(~np.isfinite(outputs))):
            got = f"{len(broken)} of {len(outputs)}, queries {broken[:5].tolist()} first"
            fix = "Train so that it does not diverge, or leave these queries out"
            raise EvaluationError(asked, "the model's outputs are not finite", got, "finite numbers", "the output", fix)
        rows = prediction.ndim == 2 and prediction.shape[1] > 1
        return Answers(outputs, prediction.argmax(1).cpu().numpy() if rows else None)

    def _predict(self, model: nn.Module) -> Tensor:
        tensors = [*model.parameters(), *model.buffers()]
        device = tensors[0].device if tensors else torch.device("cpu")
        batch = self.queries.to(device)
        blocks = torch.arange(len(batch), device=device).split(_BLOCK)
        return torch.cat([batch.select(block).run(model) for block in blocks])

    def _setting(self) -> dict[str, Any]:
        """Describe what answers that are kept together have in common."""
        queries = checksum(*(f"{name} {_checksum(value)}" for name, value in self.queries.named()))
        parts = [type(self.output).__name__]
        fields = dataclasses.fields(self.output) if dataclasses.is_dataclass(self.output) else ()
        for field in fields:
            value = getattr(self.output, field.name)
            if field.name == "of" and value is None:
                continue  # so that the answers kept by versions without it are still found
            parts.append(f"{field.name}={_describe(value)}")
        return {
            "num_examples": self.num_examples,
            "queries": len(self.queries),
            "queries_sha256": queries,
            "output": " ".join(parts),
        }


def _fixed_output(output: Output | Callable[[Tensor], Tensor]) -> Output:
    found = as_output(output)
    if isinstance(found, (Logit, LogProbability, Margin)) and found.index is None:
        name = type(found).__name__
        raise EvaluationError(
            f"output={name}()",
            "the predicted class can differ between retrained models",
            "no class",
            "a class, or one for each query",
            "retraining",
            f"Pass output=pkexplain.{name}(labels), for example with the queries' true classes",
        )
    return found


def _describe(value: Any) -> str:
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    if callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    return _checksum(torch.as_tensor(value, device=getattr(value, "device", "cpu")))


def _checksum(value: Tensor) -> str:
    return checksum(f"{value.dtype} {tuple(value.shape)}", value)
