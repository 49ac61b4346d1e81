"""The input of every method of a comparison: a run, its model, its training set, and queries with targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from pkexplain.baselines.dataset import TupleDataset
from pkexplain.errors import ConfigurationError, QueryError
from pkexplain.explain.queries import QueryBatch, as_queries
from pkexplain.gradients.model_copy import copy_model
from pkexplain.store.trajectory import Checkpoint, Trajectory

if TYPE_CHECKING:
    from pkexplain.explain.explainer import Explainer

__all__ = ["FinalLayer", "Setting"]


@dataclass(frozen=True)
class FinalLayer:
    """The last Linear layer that runs, and its inputs.

    Attributes:
        name: Its name in the model.
        inputs: Its inputs, ``(queries, …, features)``.
        is_output: Whether its output is the model's prediction.
    """

    name: str
    inputs: Tensor
    is_output: bool


@dataclass(frozen=True)
class Setting:
    """One question to every method: how did each training example change minus the loss of each query?

    Attributes:
        trajectory: The run.
        model: A copy of the model in evaluation mode; methods work on copies of it.
        rows: The training set.
        queries: The queries.
        targets: Their targets, ``(queries, …)``.
        loss: ``loss(prediction, targets, reduction="none")``, like torch's own losses.
    """

    trajectory: Trajectory
    model: nn.Module
    rows: TupleDataset
    queries: QueryBatch
    targets: Tensor
    loss: Callable[..., Tensor] = F.cross_entropy
    _read: dict[int, Checkpoint] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(
        cls, explainer: Explainer, x: Any, targets: Any, *, dataset: Any, loss: Callable[..., Tensor] | None = None
    ) -> Setting:
        """Gather what methods need from an explainer.

        Args:
            explainer: Of the recorded run.
            x: One query or a batch, as for `Explainer.explain`.
            targets: The target of each query, ``(queries, …)``; a class, for classification.
            dataset: The training set in the order of the recorded ids, see `TupleDataset`.
            loss: Called as ``loss(prediction, targets, reduction="none")``; by default cross-entropy.

        Returns:
            The setting.

        Raises:
            QueryError: The queries do not fit the model, or the targets the queries.
            ConfigurationError: The data set is not the one that was recorded.
        """
        model, trajectory = explainer.copy_model(), explainer.trajectory
        device = next(model.parameters()).device
        queries = as_queries(x, trajectory.inputs, device, trajectory.manifest.output)
        wanted = torch.as_tensor(targets, device=getattr(targets, "device", "cpu")).to(device)
        wanted = wanted[None] if queries.single and (wanted.ndim == 0 or len(wanted) != 1) else wanted
        if wanted.ndim == 0 or len(wanted) != len(queries):
            got, expected = f"shape {tuple(wanted.shape)}", f"{len(queries)} targets"
            source, fix = "the number of queries", "Pass one target for each query"
            wrong = "there must be one for each query"
            raise QueryError("compare(targets)", wrong, got=got, expected=expected, source=source, fix=fix)
        if len(dataset) != trajectory.num_examples:
            got, expected = f"{len(dataset)} examples", f"{trajectory.num_examples}"
            source, fix = "num_examples of the run", "Pass the whole training set, in the order of the recorded ids"
            wrong = "the data set is not the one that was recorded"
            raise ConfigurationError("compare(dataset)", wrong, got=got, expected=expected, source=source, fix=fix)
        return cls(
            trajectory, model, TupleDataset(dataset, trajectory.inputs), queries, wanted, loss or F.cross_entropy
        )

    @property
    def like(self) -> Tensor:
        """An empty tensor of the run's dtype, where the model is."""
        return torch.empty(0, dtype=self.trajectory.dtype, device=self.device)

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.targets.device

    @property
    def parameters(self) -> int:
        """The number of recorded parameters."""
        return sum(block.numel for block in self.trajectory.fingerprint.blocks)

    @property
    def rates(self) -> tuple[float, ...]:
        """The factor of one example's gradient in each segment's update, ``(segments,)``.

        Each of the N examples is in a segment's batches equally often, and each step moves the parameters by minus its
        learning rate times the batch's mean gradient, so over a segment an example's gradient has the factor

            η_t = (Σ of the segment's learning rates) / N · (1 − dampening) / (1 − momentum)

        where the last factor is the eventual effect of momentum on every gradient. Scores weighted by η_t have output
        units if the optimizer is SGD and the training loss is the mean over the batch. If parameter groups have
        different learning rates, their mean is used.
        """
        factor = 1.0 / self.trajectory.num_examples
        optimizer = self.trajectory.manifest.optimizer
        if optimizer.kind == "SGD":
            group = optimizer.groups[0]
            factor *= (1.0 - float(group.get("dampening", 0.0))) / (1.0 - float(group.get("momentum", 0.0)))
        sums = [summary.learning_rate_sum for summary in self.trajectory.summaries]
        return tuple(factor * sum(rates) / len(rates) for rates in sums)

    @property
    def has_units(self) -> bool:
        """Whether scores weighted by `rates` have output units: SGD, and one learning rate for all parameters."""
        optimizer = self.trajectory.manifest.optimizer
        one_rate = all(len(set(summary.learning_rate_sum)) == 1 for summary in self.trajectory.summaries)
        kinds = {(group.get("momentum"), group.get("dampening")) for group in optimizer.groups}
        return optimizer.kind == "SGD" and one_rate and len(kinds) == 1

    def copy_model(self, device: torch.device | None = None) -> nn.Module:
        """Return a copy of the model at the end of training.

        Args:
            device: Its device; by default that of the queries.
        """
        model = copy_model(self.model).to(device or self.device)
        self.load(model, len(self.trajectory))
        return model

    def load(self, model: nn.Module, t: int) -> None:
        """Set a copy of the model to checkpoint θ_t, 0 ≤ t ≤ T, buffers included.

        Args:
            model: A copy of the model.
            t: The checkpoint.
        """
        checkpoint = self._read.get(t) or self._read.setdefault(t, self.trajectory.checkpoint(t))
        named, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        with torch.no_grad():
            for block in self.trajectory.fingerprint.blocks:
                start = block.start
                for name in block.parameters:
                    size = named[name].numel()
                    named[name].copy_(checkpoint.parameters[start : start + size].view_as(named[name]))
                    start += size
            for name, value in checkpoint.buffers.items():
                buffers[name].copy_(value)

    def batches(self, size: int) -> Iterator[tuple[QueryBatch, Tensor]]:
        """Read the training set in order.

        Args:
            size: Examples in a batch.

        Yields:
            Inputs and targets, on the model's device.
        """
        for *values, targets in DataLoader(self.rows, size):
            values = [value.to(self.device) for value in values]
            yield self.batch(values), targets.to(self.device)

    def batch(self, values: Sequence[Tensor]) -> QueryBatch:
        """Make a batch of inputs in the order of `TupleDataset`."""
        path = self.trajectory.manifest.output
        if self.rows.names:
            return QueryBatch((), dict(zip(self.rows.names, values, strict=True)), single=False, path=path)
        return QueryBatch(tuple(values), {}, single=False, path=path)

    @property
    def query_values(self) -> tuple[Tensor, ...]:
        """The queries' inputs in the order of `TupleDataset`."""
        if not self.rows.names:
            return tuple(self.queries.args) or tuple(self.queries.kwargs.values())
        return self.queries.args or tuple(self.queries.kwargs[name] for name in self.rows.names)

    def losses(self, prediction: Tensor, targets: Tensor) -> Tensor:
        """Compute the loss of each example, ``(examples,)``; the mean over an example's further dimensions."""
        losses = self.loss(prediction, targets.to(prediction.device), reduction="none")
        return losses.reshape(len(prediction), -1).mean(1)

    def final_layer(self, model: nn.Module, inputs: QueryBatch, name: str | None = None) -> FinalLayer:
        """Run the model and watch its last Linear layer.

        Args:
            model: A copy of the model.
            inputs: Its inputs.
            name: The layer; by default the last Linear that runs.

        Returns:
            The layer.

        Raises:
            ConfigurationError: There is no such layer.
        """
        seen: list[tuple[str, Tensor, Tensor]] = []

        def watch(layer: str) -> Callable[..., None]:
            return lambda module, args, output: seen.append((layer, args[0], output))

        chosen = [(n, m) for n, m in model.named_modules() if (isinstance(m, nn.Linear) if name is None else n == name)]
        handles = [module.register_forward_hook(watch(n)) for n, module in chosen]
        try:
            with torch.no_grad():
                prediction = inputs.run(model)
        finally:
            for handle in handles:
                handle.remove()
        if not seen:
            wrong = "the model has no Linear layer that runs" if name is None else "no such layer runs"
            expected = "a model that ends in a Linear layer" if name is None else "the name of a Linear layer"
            got, fix = name or type(model).__name__, "Leave the method out"
            raise ConfigurationError(
                "a method of the last layer", wrong, got=got, expected=expected, source="the model", fix=fix
            )
        layer, given, returned = seen[-1]
        same = returned.shape == prediction.shape and bool(torch.equal(returned, prediction))
        return FinalLayer(layer, given, same)
