"""timm's families, a small member of each, with stochastic depth."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from cases import Case, _vision

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
NAMES: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": VIT, "deit_tiny_patch16_224": VIT, "deit3_small_patch16_224": VIT,
    "deit_tiny_distilled_patch16_224": VIT, "beit_base_patch16_224": VIT, "beitv2_base_patch16_224": VIT,
    "eva02_tiny_patch14_224": VIT, "cait_xxs24_224": VIT, "xcit_nano_12_p16_224": {**VIT, "patch_size": 16},
    "vit_relpos_small_patch16_224": VIT, "vit_srelpos_small_patch16_224": VIT, "vit_small_patch14_dinov2": VIT,
    "convit_tiny": {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 16, "num_heads": 2, "local_up_to_layer": 1},
    "mixer_s16_224": {"img_size": 32},
    "resmlp_12_224": {"img_size": 32},
    "gmlp_ti16_224": {"img_size": 32},
    "swin_tiny_patch4_window7_224": {"img_size": 32, "window_size": 4, "depths": [2, 2], "embed_dim": 16, "num_heads": [2, 2]},
    "swinv2_tiny_window8_256": {"img_size": 32, "window_size": 4, "depths": [2, 2], "embed_dim": 16, "num_heads": [2, 2]},
    "pvt_v2_b0": {}, "poolformer_s12": {"layers": [1, 1, 1, 1]},
    "poolformerv2_s12": {"layers": [1, 1, 1, 1]}, "coat_lite_tiny": {"img_size": 32},
    "levit_128s": {"img_size": 64}, "edgenext_xx_small": {}, "mobilevit_xxs": {"img_size": 64},
    "mobilevitv2_050": {}, "fastvit_t8": {}, "efficientformerv2_s0": {"img_size": 64},
    "efficientvit_b0": {"img_size": 64}, "inception_next_atto": {}, "hgnetv2_b0": {}, "repvit_m0_9": {}, "repghostnet_050": {},
    "convnext_atto": {}, "convnextv2_atto": {}, "resnet18": {}, "resnet26d": {}, "skresnet18": {}, "resnext26ts": {}, "ecaresnet26t": {}, "twins_svt_small": {"img_size": 64, "depths": [1, 1, 1, 2]}, "seresnet18": {}, "resnest14d": {}, "regnetx_002": {},
    "regnety_002": {}, "ghostnet_050": {}, "mobilenetv2_050": {}, "mobilenetv3_small_050": {},
    "mobilenetv4_conv_small": {}, "efficientnet_b0": {}, "mixnet_s": {}, "mnasnet_small": {},
    "fbnetc_100": {}, "tinynet_e": {}, "rexnet_100": {}, "lcnet_050": {}, "visformer_tiny": {"img_size": 64}, "starnet_s1": {}, "mambaout_femto": {}, "gernet_s": {}, "repvgg_a0": {}, "mobileone_s0": {}, }  # fmt: skip
KEEP_SIZE = ("img_size",)


def size_of(options: dict[str, Any]) -> int:
    return options.get("img_size", 32)


def make(name: str, options: dict[str, Any]) -> Any:
    def build() -> nn.Module:
        import timm

        for drop_path in (0.1, None):
            extra = {} if drop_path is None else {"drop_path_rate": drop_path}
            for given in (options, {k: v for k, v in options.items() if k not in KEEP_SIZE}):
                try:
                    return timm.create_model(name, num_classes=3, **given, **extra)
                except TypeError as error:
                    failed = error
        raise failed

    return build


def classes(output: Any, batch: Any) -> torch.Tensor:
    output = output[0] if isinstance(output, tuple) else output
    return F.cross_entropy(output, torch.arange(len(output)) % 3, reduction="none")


def images(size: int) -> Any:
    return lambda count: (torch.randn(count, 3, size, size, dtype=torch.float64),)


CASES = {name: Case(make(name, options), images(size_of(options)), classes) for name, options in NAMES.items()}
__all__ = ["CASES", "_vision"]
