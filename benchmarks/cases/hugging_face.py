"""Hugging Face architectures from tiny configurations, with their default dropout."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from cases import EXAMPLES, Case, square

SMALL: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": 3,
}  # fmt: skip
T = 10


def tokens(count: int) -> dict[str, Any]:
    return {"input_ids": torch.randint(3, 99, (count, T))}


def text_labels(count: int) -> dict[str, Any]:
    ids = torch.randint(3, 99, (count, T))
    return {"input_ids": ids, "labels": ids}


def both_sides(count: int) -> dict[str, Any]:
    return {"input_ids": torch.randint(3, 99, (count, T)), "decoder_input_ids": torch.randint(3, 99, (count, T - 2))}


def images(size: int) -> Any:
    return lambda count: {"pixel_values": torch.randn(count, 3, size, size, dtype=torch.float64)}


def waves(length: int) -> Any:
    return lambda count: {"input_values": torch.randn(count, length, dtype=torch.float64)}


def next_token(output: Any, batch: Any) -> torch.Tensor:
    logits = output.logits[:, :-1]
    targets = batch["input_ids"][:, 1:]
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(1)


def classes(output: Any, batch: Any) -> torch.Tensor:
    y = output.logits
    return F.cross_entropy(y.flatten(1), torch.arange(len(y)) % 3, reduction="none")


def model(kind: str, head: str, **options: Any) -> Any:
    attention = options.pop("attention", "sdpa")
    drop = options.pop("drop", ())

    def build() -> nn.Module:
        import transformers

        settings = {**SMALL, **options}
        for name in drop:
            settings.pop(name)
        config = transformers.AutoConfig.for_model(kind, **settings)
        make = getattr(transformers, head)
        try:
            return make.from_config(config, attn_implementation=attention)
        except ValueError:  # it has one kind of attention only
            return make.from_config(config, attn_implementation="eager")

    return build


CAUSAL: dict[str, dict[str, Any]] = {
    "gpt2": {}, "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4},
    "gpt_neox": {}, "gptj": {"rotary_dim": 4}, "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}, "bloom": {},
    "llama": {"num_key_value_heads": 2}, "mistral": {"num_key_value_heads": 2},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 3}, "qwen2": {"num_key_value_heads": 2},
    "qwen2_moe": {"num_key_value_heads": 2, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                  "shared_expert_intermediate_size": 16},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8}, "gemma": {"num_key_value_heads": 2, "head_dim": 8},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8}, "phi": {}, "phi3": {"num_key_value_heads": 2},
    "falcon": {}, "stablelm": {"num_key_value_heads": 2}, "starcoder2": {"num_key_value_heads": 2}, "olmo": {},
    "olmo2": {"num_key_value_heads": 2}, "codegen": {"n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 4},
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48}, "biogpt": {},
    "mamba": {"state_size": 4}, "granite": {"num_key_value_heads": 2}, "cohere": {"num_key_value_heads": 2},
    "persimmon": {}, "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}, "ctrl": {"dff": 48},
    "openai-gpt": {},
}  # fmt: skip
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {}, "roberta": {}, "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    "albert": {"embedding_size": 16}, "electra": {"embedding_size": 16},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}, "mpnet": {}, "xlm-roberta": {},
    "camembert": {}, "ernie": {}, "convbert": {"embedding_size": 16}, "funnel": {"drop": ("num_hidden_layers",), "block_sizes": [1, 1], "d_model": 32,
    "n_head": 4, "d_head": 8, "d_inner": 48}, "longformer": {"attention_window": 4},
    "big_bird": {"attention_type": "original_full"}, "roformer": {"embedding_size": 16}, "squeezebert": {
    "embedding_size": 32}, "mobilebert": {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
    "layoutlm": {}, "rembert": {"input_embedding_size": 16}, "nystromformer": {"segment_means_seq_len": T,
    "num_landmarks": T}, "fnet": {}, "ibert": {}, "modernbert": {}, "data2vec-text": {}, "esm": {"position_embedding_type":
    "absolute"}, "xlnet": {"drop": ("max_position_embeddings",), "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}, "canine": {"drop": ("vocab_size",)},
}  # fmt: skip
SMALL_SEQ: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
}  # fmt: skip
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
SEQUENCES: dict[str, dict[str, Any]] = {
    "t5": T5, "mt5": T5, "umt5": T5, "longt5": {**T5, "local_radius": 4},
    "switch_transformers": {**T5, "num_experts": 3, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    **dict.fromkeys(["bart", "mbart", "pegasus", "blenderbot", "marian", "m2m_100"], SMALL_SEQ),
    "led": {**SMALL_SEQ, "attention_window": 4, "max_encoder_position_embeddings": 64,
            "max_decoder_position_embeddings": 64},
}  # fmt: skip
STAGES = {"depths": [1, 1], "hidden_sizes": [16, 32], "num_stages": 2}
VISION: dict[str, tuple[dict[str, Any], int]] = {
    "vit": ({"image_size": 16, "patch_size": 4}, 16), "deit": ({"image_size": 16, "patch_size": 4}, 16),
    "beit": ({"image_size": 16, "patch_size": 4}, 16), "dinov2": ({"image_size": 16, "patch_size": 4}, 16),
    "data2vec-vision": ({"image_size": 16, "patch_size": 4}, 16), "vit_msn": ({"image_size": 16, "patch_size": 4}, 16),
    "swin": ({"drop": ("num_attention_heads", "num_hidden_layers"), "image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
              "window_size": 4}, 16),
    "swinv2": ({"drop": ("num_attention_heads", "num_hidden_layers"), "image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
                "window_size": 4}, 16),
    "convnext": ({"depths": [1, 1], "hidden_sizes": [16, 32], "num_stages": 2, "drop_path_rate": 0.2}, 32),
    "convnextv2": ({"depths": [1, 1], "hidden_sizes": [16, 32], "num_stages": 2}, 32),
    "resnet": ({"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}, 32),
    "regnet": ({"drop": ("num_hidden_layers",), "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 8}, 32),
    "poolformer": ({"depths": [1, 1], "hidden_sizes": [16, 32], "num_encoder_blocks": 2, "patch_sizes": [3, 3],
                    "strides": [2, 2], "padding": [1, 1]}, 32),
    "pvt": ({"image_size": 32, "depths": [1, 1], "hidden_sizes": [16, 32], "num_encoder_blocks": 2,
             "num_attention_heads": [1, 2], "patch_sizes": [4, 2], "strides": [4, 2], "mlp_ratios": [2, 2],
             "sequence_reduction_ratios": [2, 1]}, 32),
    "focalnet": ({"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "hidden_sizes": [16, 32],
                  "focal_levels": [2, 2], "focal_windows": [3, 3]}, 16),
    "bit": ({"drop": ("num_hidden_layers",), "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_groups": 1}, 32),
    "mobilenet_v2": ({"image_size": 32, "depth_multiplier": 0.25}, 32),
}  # fmt: skip
WAVE = {
    "conv_dim": [16, 16], "conv_stride": [4, 4], "conv_kernel": [8, 4], "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2, "apply_spec_augment": False,
}  # fmt: skip
SPEECH = {"wav2vec2": WAVE, "hubert": WAVE, "wavlm": WAVE, "unispeech": WAVE, "sew": WAVE | {"squeeze_factor": 2}}
TOWER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def pairs(count: int) -> dict[str, Any]:
    ids = torch.randint(3, 98, (count, T))
    ids[:, -1] = 98  # the end, where CLIP looks
    return {"input_ids": ids, **images(16)(count)}


def contrast(output: Any, batch: Any) -> torch.Tensor:
    """Each image against all texts."""
    y = output.logits_per_image
    return F.cross_entropy(y, torch.arange(len(y)), reduction="none")


def clip(kind: str) -> Any:
    def build() -> nn.Module:
        import transformers

        text = {**TOWER, "vocab_size": 99, "max_position_embeddings": 16, "eos_token_id": 98, "bos_token_id": 1}
        vision = {**TOWER, "image_size": 16, "patch_size": 8}
        config = transformers.AutoConfig.for_model(kind, text_config=text, vision_config=vision, projection_dim=12)
        return transformers.AutoModel.from_config(config)

    return build


def whisper() -> nn.Module:
    import transformers

    config = transformers.WhisperConfig(
        **{**SMALL, **SMALL_SEQ}, num_mel_bins=8, max_source_positions=12, max_target_positions=16
    )
    return transformers.WhisperForConditionalGeneration(config)


def spectrogram(count: int) -> dict[str, Any]:
    features = torch.randn(count, 8, 24, dtype=torch.float64)
    return {"input_features": features, "decoder_input_ids": torch.randint(3, 99, (count, 6))}


CASES: dict[str, Case] = {}
CASES |= {f"{k} (causal)": Case(model(k, "AutoModelForCausalLM", **o), tokens, next_token) for k, o in CAUSAL.items()}
CASES |= {
    f"{k} (classifier)": Case(model(k, "AutoModelForSequenceClassification", **o), tokens, classes)
    for k, o in ENCODERS.items()
}
CASES |= {
    f"{k} (seq2seq)": Case(model(k, "AutoModelForSeq2SeqLM", **o), both_sides, square) for k, o in SEQUENCES.items()
}
CASES |= {
    f"{k} (image)": Case(model(k, "AutoModelForImageClassification", **o), images(size), classes)
    for k, (o, size) in VISION.items()
}
CASES |= {
    f"{k} (speech)": Case(model(k, "AutoModelForAudioClassification", **o), waves(400), classes)
    for k, o in SPEECH.items()
}
CASES["whisper (speech)"] = Case(whisper, spectrogram, square)
CASES |= {f"{k} (pairs)": Case(clip(k), pairs, contrast) for k in ("clip", "siglip")}
for _name in ("gpt2", "llama", "opt"):
    CASES[f"{_name} (loss inside)"] = Case(model(_name, "AutoModelForCausalLM", **CAUSAL[_name]), text_labels)
for _name in ("bert", "gpt2", "vit", "bart"):
    _known = {**CAUSAL, **ENCODERS, **SEQUENCES, **{k: o for k, (o, _) in VISION.items()}}[_name]
    _head, _batch, _loss = {
        "bert": ("AutoModelForSequenceClassification", tokens, classes),
        "gpt2": ("AutoModelForCausalLM", tokens, next_token),
        "vit": ("AutoModelForImageClassification", images(16), classes),
        "bart": ("AutoModelForSeq2SeqLM", both_sides, square),
    }[_name]
    CASES[f"{_name} (eager attention)"] = Case(model(_name, _head, attention="eager", **_known), _batch, _loss)

__all__ = ["CASES", "EXAMPLES"]
