"""torchvision's classifiers on small images, with their default dropout and stochastic depth."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from cases import Case, _vision

SIZES = {
    "resnet18": 32, "resnext50_32x4d": 32, "densenet121": 32, "googlenet": 32,
    "mobilenet_v2": 32, "mobilenet_v3_small": 32, "shufflenet_v2_x0_5": 32, "squeezenet1_1": 64, "mnasnet0_5": 32,
    "efficientnet_b0": 32, "regnet_y_400mf": 32, "convnext_tiny": 32, "swin_t": 32, "swin_v2_t": 32,
    "maxvit_t": 64, "vit": 32,
}  # fmt: skip
SMALLER: dict[str, dict[str, Any]] = {
    "vit_b_16": {"image_size": 32},
    "googlenet": {"aux_logits": False, "init_weights": False},
}


def make(name: str) -> Any:
    def build() -> nn.Module:
        from torchvision import models

        if name == "vit":
            return models.VisionTransformer(32, 8, 2, 2, 32, 64, dropout=0.1, attention_dropout=0.1, num_classes=3)
        if name == "maxvit_t":
            return models.maxvit.MaxVit(
                input_size=(64, 64), stem_channels=8, partition_size=2, block_channels=[8, 16], block_layers=[1, 1],
                head_dim=4, stochastic_depth_prob=0.2, num_classes=3,
            )  # fmt: skip
        return getattr(models, name)(num_classes=3, **SMALLER.get(name, {}))

    return build


def classes(output: Any, batch: Any) -> torch.Tensor:
    return F.cross_entropy(output, torch.arange(len(output)) % 3, reduction="none")


def images(size: int) -> Any:
    return lambda count: (torch.randn(count, 3, size, size, dtype=torch.float64),)


CASES = {name: Case(make(name), images(size), classes) for name, size in SIZES.items()}
__all__ = ["CASES", "_vision"]
