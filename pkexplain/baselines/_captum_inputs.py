"""A setting in the form that Captum's methods take: a model with positional inputs, a loss with a reduction, layers."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from pkexplain.baselines._measuring import available_bytes
from pkexplain.baselines.setting import Setting
from pkexplain.errors import ConfigurationError


class PositionalModel(nn.Module):
    """A model as Captum calls it: positional tensors in, only the prediction out.

    Args:
        model: A copy of the model.
        setting: Names the inputs.
    """

    def __init__(self, model: nn.Module, setting: Setting) -> None:
        """Keep the model."""
        super().__init__()
        self.model = model
        self._batch = setting.batch

    def forward(self, *values: Tensor) -> Tensor:
        """Run the model on its device."""
        device = next(self.model.parameters()).device
        return self._batch([value.to(device) for value in values]).run(self.model)


class ReducedLoss:
    """A setting's loss in the form that Captum inspects.

    Args:
        setting: Holds the loss.
        reduction: ``"sum"`` over the examples, or ``"none"``.
    """

    def __init__(self, setting: Setting, reduction: str) -> None:
        """Keep the loss."""
        self._losses, self.reduction = setting.losses, reduction

    def __call__(self, prediction: Tensor, targets: Tensor) -> Tensor:
        """Compute the losses, ``(examples,)``, or their sum."""
        losses = self._losses(prediction, targets)
        return losses.sum() if self.reduction == "sum" else losses


def active_layers(model: PositionalModel, setting: Setting) -> list[str] | None:
    """Name the layers whose parameters were recorded; None if all were.

    Raises:
        ConfigurationError: A layer is partly frozen: Captum would count what was not trained.
    """
    recorded = {f"model.{name}" for block in setting.trajectory.fingerprint.blocks for name in block.parameters}
    if all(name in recorded for name, _ in model.named_parameters()):
        return None
    found = []
    for name, module in model.named_modules():
        own = {f"{name}.{local}" for local, _ in module.named_parameters(recurse=False)}
        below = {f"{name}.{local}" for local, _ in module.named_parameters()}
        if not own & recorded:
            continue
        if not below <= recorded:
            raise ConfigurationError(
                "gradients of the recorded parameters",
                "Captum works on whole layers, and one is partly frozen",
                got=name.removeprefix("model."),
                expected="layers that are trained or frozen as a whole",
                source="Captum's argument layers",
                fix="Leave the method out",
            )
        found.append(name)
    return found


def has_samplewise_rules(model: nn.Module) -> bool:
    """Whether Captum correctly computes the gradients of several examples at once for all trained layers.

    It supports Linear and Conv2d. It refuses or gets wrong a Conv2d with groups or padding other than zeros, and a
    parameter shared by several layers.
    """
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    if any(count > 1 for count in owners.values()):
        return False
    for module in model.modules():
        if not any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            continue
        if type(module) is nn.Conv2d:
            if module.groups != 1 or isinstance(module.padding, str) or module.padding_mode != "zeros":
                return False
        elif type(module) is not nn.Linear:
            return False
    return True


def queries_at_once(setting: Setting, name: str) -> int:
    """Choose how many queries' gradients at all checkpoints fit in a quarter of the memory.

    Raises:
        ConfigurationError: Not even one does.
    """
    numbers = setting.parameters * len(setting.trajectory)
    each = numbers * torch.empty((), dtype=setting.trajectory.dtype, device="cpu").element_size()
    room = available_bytes(setting.device)
    if 2 * each > room:
        raise ConfigurationError(
            name,
            "it holds a query's gradients at all checkpoints, and there is not enough memory",
            got=f"{room / 2**30:.1f} GiB",
            expected=f"{2 * each / 2**30:.1f} GiB",
            source="parameters × checkpoints",
            fix="Leave the method out, or record fewer segments",
        )
    return max(1, min(len(setting.queries), int(room / 4 / each))) if room != float("inf") else len(setting.queries)


def require_final(setting: Setting, model: nn.Module, name: str | None) -> str:
    """Find the Linear layer that returns the prediction.

    Raises:
        ConfigurationError: There is none.
    """
    found = setting.final_layer(model, setting.queries, name)
    if not found.is_output:
        raise ConfigurationError(
            "a method of the last layer",
            "what the last Linear layer returns is not the prediction",
            got=found.name,
            expected="a model that ends in a Linear layer",
            source="Captum's formula for the last layer",
            fix="Leave the method out",
        )
    return found.name
