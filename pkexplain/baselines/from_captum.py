"""Captum's influence methods on a recorded run, fed from its checkpoints.

Captum is imported when a method is used. Its errors become a `ConfigurationError` that names the method; its warnings,
which concern how it is called here, are silenced.
"""

from __future__ import annotations

import tempfile
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from pkexplain.baselines._captum_inputs import (
    PositionalModel,
    ReducedLoss,
    active_layers,
    has_samplewise_rules,
    queries_at_once,
    require_final,
)
from pkexplain.baselines.baseline import Baseline
from pkexplain.baselines.setting import Setting
from pkexplain.errors import ConfigurationError, PkexplainError
from pkexplain.gradients.torch_state import defaults_of

__all__ = [
    "ArnoldiInfluenceFunction",
    "SimilarityInfluence",
    "TracInCP",
    "TracInCPFast",
    "TracInCPFastRandProj",
]


@contextmanager
def _running(name: str, setting: Setting) -> Iterator[None]:
    """Run Captum: silently, without changing the global random state, and with one type of error."""
    try:
        with warnings.catch_warnings(), defaults_of(setting.like):
            warnings.simplefilter("ignore")
            yield
    except PkexplainError:
        raise
    except Exception as error:  # Captum raises all kinds, including AssertionError and Exception itself
        said = (str(error).strip().splitlines() or [""])[0].rstrip(".")
        expected, source, fix = "a model that it supports", "Captum", "Leave the method out"
        got = f"{type(error).__name__}: {said}"
        raise ConfigurationError(
            name, "Captum could not run it", got=got, expected=expected, source=source, fix=fix
        ) from error


@dataclass(frozen=True)
class _Captum(Baseline):
    """The common part of Captum's methods."""

    batch_size: int = 64

    @abstractmethod
    def _build(self, setting: Setting) -> Any:
        """Make Captum's object."""

    def _queries_at_once(self, setting: Setting) -> int:
        return len(setting.queries)

    def prepare(self, setting: Setting) -> Callable[[], np.ndarray]:
        """Make Captum's object, which does its one-time work when it is made."""
        with _running(self.name, setting):
            method = self._build(setting)

        def scores() -> np.ndarray:
            size, queries = self._queries_at_once(setting), (*setting.query_values, setting.targets)
            starts = range(0, len(setting.queries), size)
            parts = [tuple(value[start : start + size] for value in queries) for start in starts]
            with _running(self.name, setting):
                return np.concatenate([self._influence(method, part) for part in parts])

        return scores

    def _influence(self, method: Any, queries: tuple[Tensor, ...]) -> np.ndarray:
        return method.influence(queries, k=None).detach().double().cpu().numpy()


@dataclass(frozen=True)
class _ForItself(_Captum):
    """The common part of Captum's methods that also compute self-influence."""

    def self_influence(self, setting: Setting) -> np.ndarray:
        """Score each training example as if it were a query: high if it is mislabelled or rare.

        Args:
            setting: The run and the training set.

        Returns:
            Σ_t η_t ‖∇ℓ_i(θ_t)‖² by `TracInCP`, ∇ℓ_iᵀ H⁻¹ ∇ℓ_i by `ArnoldiInfluenceFunction`, ``(num_examples,)``.

        Raises:
            ConfigurationError: Captum could not run.
        """
        with _running(self.name, setting):
            return self._build(setting).self_influence().detach().double().cpu().numpy()


@dataclass(frozen=True)
class _TracIn(_Captum):
    """The common part of the TracIn family: checkpoints with one rate each.

    The checkpoints are those at the ends of the segments, as a user would have saved them; their rates are
    `Setting.rates`, so that the scores have output units if the optimizer is SGD. Then the sum of a query's scores is
    meant to be the decrease of its loss over training.
    """

    def adds_up(self, setting: Setting) -> bool:
        """Return whether the scores have output units."""
        return setting.has_units

    def _checkpoints(self, setting: Setting) -> dict[str, Any]:
        def load(model: PositionalModel, checkpoint: str) -> float:
            setting.load(model.model, int(checkpoint))
            return setting.rates[int(checkpoint) - 1]

        names = [str(t) for t in range(1, len(setting.trajectory) + 1)]
        return {"checkpoints": names, "checkpoints_load_func": load}


@dataclass(frozen=True)
class TracInCP(_ForItself, _TracIn):
    """Captum's ``TracInCP``: Σ_t η_t ⟨∇ℓ(x; θ_t), ∇ℓ_i(θ_t)⟩ (Pruthi et al. 2020), over all recorded parameters.

    Gradients of several examples are computed at once if the trained layers are Linear and Conv2d, otherwise one by
    one, which is slow.

    Args:
        batch_size: Training examples at a time; fewer if the model is large.
    """

    name: ClassVar[str] = "TracInCP"

    def _build(self, setting: Setting) -> Any:
        from captum.influence import TracInCP as Method

        model = PositionalModel(setting.copy_model(), setting)
        together = has_samplewise_rules(model)
        return Method(
            model,
            setting.rows,
            layers=active_layers(model, setting),
            loss_fn=ReducedLoss(setting, "sum" if together else "none"),
            batch_size=max(1, min(self.batch_size, (1 << 26) // setting.parameters)),
            sample_wise_grads_per_batch=together,
            **self._checkpoints(setting),
        )

    def _queries_at_once(self, setting: Setting) -> int:
        return queries_at_once(setting, self.name)


@dataclass(frozen=True)
class TracInCPFast(_TracIn):
    """Captum's ``TracInCPFast``: TracInCP over only the weight of the final Linear layer (without its bias).

    Args:
        batch_size: Training examples at a time.
        layer: Name of the layer; by default the last Linear that runs, which must return the prediction.
    """

    name: ClassVar[str] = "TracInCPFast"
    layer: str | None = None

    def _build(self, setting: Setting) -> Any:
        from captum.influence import TracInCPFast as Method

        return Method(**self._options(setting))

    def _options(self, setting: Setting) -> dict[str, Any]:
        model = PositionalModel(setting.copy_model(), setting)
        return {
            "model": model,
            "final_fc_layer": f"model.{require_final(setting, model.model, self.layer)}",
            "train_dataset": setting.rows,
            "loss_fn": ReducedLoss(setting, "sum"),
            "batch_size": self.batch_size,
            **self._checkpoints(setting),
        }


class _NoSearch:
    """A stand-in for Captum's Annoy index, which its scores do not need and which is not installed everywhere."""

    def setup(self, data: Tensor) -> None:
        """Build nothing."""


@dataclass(frozen=True)
class TracInCPFastRandProj(TracInCPFast):
    """Captum's ``TracInCPFastRandProj``: TracInCPFast with every gradient kept, through a random projection.

    Args:
        batch_size: Training examples at a time.
        layer: As for `TracInCPFast`.
        projection_dim: The most numbers kept for each example and checkpoint.
        seed: Seed of the projection.
    """

    name: ClassVar[str] = "TracInCPFastRandProj"
    projection_dim: int = 1024
    seed: int = 0

    def _build(self, setting: Setting) -> Any:
        from captum.influence import TracInCPFastRandProj as Method

        search: Any = _NoSearch()
        options = {"nearest_neighbors": search, "projection_dim": self.projection_dim, "seed": self.seed}
        return Method(**self._options(setting), **options)


@dataclass(frozen=True)
class SimilarityInfluence(_Captum):
    """Captum's ``SimilarityInfluence``: cosine of the last Linear layer's inputs, at the end of training.

    A zero vector has score 0 (``replace_nan``). Captum writes the activations to disk, here to a temporary folder. It
    runs on the CPU.

    Args:
        batch_size: Approximate number of training examples at a time: Captum needs a divisor of their number.
        layer: Name of the layer; by default the last Linear that runs.
    """

    name: ClassVar[str] = "SimilarityInfluence"
    layer: str | None = None

    def _build(self, setting: Setting) -> Any:
        found = setting.final_layer(setting.copy_model(), setting.queries, self.layer)
        model = PositionalModel(setting.copy_model(torch.device("cpu")), setting)
        parent, _, own = f"model.{found.name}".rpartition(".")
        # Captum reads a layer's output, so an identity layer is put before the Linear; two of them, because Captum
        # 0.9 fails with a single layer (it mistakes the list of activations for the activations)
        layer = nn.Sequential(nn.Identity(), nn.Identity(), getattr(model.get_submodule(parent), own))
        setattr(model.get_submodule(parent), own, layer)
        return model, [f"model.{found.name}.{at}" for at in (0, 1)], setting

    def _influence(self, method: Any, queries: tuple[Tensor, ...]) -> np.ndarray:
        from captum.influence import SimilarityInfluence as Method

        (model, layers, setting), examples = method, len(method[2].rows)
        size = max(n for n in range(1, self.batch_size + 1) if examples % n == 0)
        with tempfile.TemporaryDirectory() as folder:
            size = size if size >= 8 else examples
            found = Method(model, layers, setting.rows, folder, "run", batch_size=size, replace_nan=0)
            order, values = found.influence(tuple(value.cpu() for value in queries[:-1]), top_k=examples)[layers[0]]
        scores = np.empty(tuple(order.shape))
        np.put_along_axis(scores, order.numpy(), values.detach().double().numpy(), axis=1)
        return scores


@dataclass(frozen=True)
class ArnoldiInfluenceFunction(_ForItself):
    """Captum's ``ArnoldiInfluenceFunction``: ∇ℓ(x)ᵀ H⁻¹ ∇ℓ_i at the end of training (Schioppa et al. 2022).

    H is approximated by its leading eigenvectors, from Hessian-vector products over some of the training examples.
    Captum's defaults are 200 products over all of them and 50 eigenvectors; the defaults here take much less time.

    Args:
        batch_size: Training examples at a time.
        projection_dim: Eigenvectors to keep.
        arnoldi_dim: Hessian-vector products.
        hessian_examples: Evenly spaced training examples over which H is computed.
        seed: Seed of the first vector.
    """

    name: ClassVar[str] = "ArnoldiInfluenceFunction"
    projection_dim: int = 30
    arnoldi_dim: int = 40
    hessian_examples: int = 256
    seed: int = 0

    def _build(self, setting: Setting) -> Any:
        from captum.influence._core.arnoldi_influence_function import ArnoldiInfluenceFunction as Method

        model = PositionalModel(setting.copy_model(), setting)
        together = has_samplewise_rules(model)
        some = np.unique(np.linspace(0, len(setting.rows) - 1, self.hessian_examples).astype(int)).tolist()
        return Method(
            model,
            setting.rows,
            checkpoint="the model as it is",
            checkpoints_load_func=lambda model, checkpoint: 1.0,
            layers=active_layers(model, setting),
            loss_fn=ReducedLoss(setting, "sum" if together else "none"),
            batch_size=max(1, min(self.batch_size, (1 << 26) // setting.parameters)),
            hessian_dataset=Subset(setting.rows, some),
            sample_wise_grads_per_batch=together,
            projection_dim=self.projection_dim,
            arnoldi_dim=self.arnoldi_dim,
            seed=self.seed,
        )
