"""The query's own loss, as an output that refuses targets which torch would broadcast."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pkexplain.errors import QueryError
from pkexplain.explain._query_forms import as_numbers
from pkexplain.explain.outputs import Output, check_each, for_each

__all__ = ["Loss"]


@dataclass(frozen=True)
class Loss(Output):
    """The query's own loss.

    Args:
        target: The query's target: a class, or one target for each query, ``(queries, …)``.
        function: Called with the prediction and the targets of a batch; returns the sum of the losses with
            ``reduction="sum"`` and one for each query with ``reduction="none"``, like torch's own losses.
        of: Which tensor of the model's output, see `Output`.
    """

    target: Any
    function: Callable[..., Tensor] = F.cross_entropy
    of: str | None = field(default=None, kw_only=True)
    per_query = ("target",)

    def __call__(self, prediction: Tensor) -> Tensor:
        """Compute the losses, ``(queries,)``."""
        target = self._tensor(len(prediction)).to(prediction.device)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Using a target size")  # torch's own word for broadcasting
            losses = self.function(prediction, target, reduction="none")
        if losses.ndim == 0 or len(losses) != len(prediction) or losses.numel() > prediction.numel():
            raise ValueError(f"it returned losses of shape {tuple(losses.shape)}")
        return losses.reshape(len(prediction), -1).mean(1)

    def names(self, queries: int) -> list[str]:
        """Name the output of each query."""
        targets = self._tensor(queries)
        return [f"loss[{t.item():g}]" if t.numel() == 1 else "loss" for t in targets]

    def settle(self, prediction: Tensor) -> Output:
        """Check the targets against the prediction: nothing may be broadcast in silence."""
        target = None
        try:
            target = self._numbers()
            alone = len(prediction) == 1 and target.shape == prediction.shape[1:]
            settled = replace(self, target=target[None] if alone else self._tensor(len(prediction)))
            target = settled._numbers()
            elementwise = getattr(self.function, "__module__", "") == F.__name__ and target.is_floating_point()
            if elementwise and target.shape != prediction.shape:
                raise ValueError("with floating-point targets, the shapes must be the same")
            if self.function is F.cross_entropy and prediction.ndim > 1 and prediction.shape[1] == 1:
                raise ValueError("the cross-entropy of a single class is always 0")
            settled(prediction)
            if len(prediction) == 1 and target.is_floating_point():  # two queries show whether they would be mixed
                two = replace(settled, target=torch.cat([target, target + 1]))
                if not torch.allclose(two(torch.cat([prediction] * 2))[:1], settled(prediction)):
                    raise ValueError("the prediction and the target are broadcast")
        except (TypeError, ValueError, RuntimeError, IndexError, UserWarning, AttributeError) as error:
            got = f"a prediction of shape {tuple(prediction.shape)} and "
            got += "no targets" if target is None else f"targets of shape {tuple(target.shape)}, {target.dtype}"
            wrong, expected = f"the loss failed ({str(error).splitlines()[0]})", "targets that this loss takes"
            fix = self._fix(prediction, target)
            raise QueryError("output=Loss(…)", wrong, got, expected, "the model's prediction", fix) from error
        check_each(settled, prediction, "output=Loss(…)")
        return settled

    def _fix(self, prediction: Tensor, target: Tensor | None) -> str:
        if self.function is F.cross_entropy and prediction.ndim == 3:
            swapped = "lambda p, t, reduction: cross_entropy(p.transpose(1, 2), t, reduction=reduction)"
            return f"For the tokens of a sequence, pass pkexplain.Loss(target, {swapped})"
        if self.function is F.cross_entropy:
            return "Pass one class for each query, as integers; or, for regression, pkexplain.Loss(target, F.mse_loss)"
        if target is not None and target.ndim and target.shape != prediction.shape and target.dtype != torch.int64:
            return f"Give the targets the shape of the prediction, {tuple(prediction.shape)}"
        return (
            'Pass a loss like torch\'s own, called as function(prediction, target, reduction="none"), and its targets'
        )

    def _numbers(self) -> Tensor:
        target = as_numbers(self.target)
        if isinstance(target, list):
            raise ValueError("the targets differ in their shapes")
        whole = not target.is_floating_point() and not target.is_complex() and target.dtype != torch.bool
        return target.long() if whole else target  # torch's losses take no other integers

    def _tensor(self, queries: int) -> Tensor:
        return for_each(self._numbers(), queries)
