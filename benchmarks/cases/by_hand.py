"""The classic networks that people write by hand, and the ways of using parameters that the tests know."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from cases import Case, square

T, D = 6, 8


def sequences(count: int) -> Any:
    return (torch.randn(count, T, D, dtype=torch.float64),)


def vectors(count: int) -> Any:
    return (torch.randn(count, D, dtype=torch.float64),)


def tokens(count: int) -> Any:
    return (torch.randint(1, 20, (count, T)),)


def images(count: int) -> Any:
    return (torch.randn(count, 3, 16, 16, dtype=torch.float64),)


class PackedLSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.LSTM(D, 6, 2, dropout=0.2, bidirectional=True, batch_first=True), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.tensor([(2 * i) % T + 1 for i in range(len(x))])
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.out(pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0].sum(1))


class Translate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(20, 16), nn.Parameter(torch.randn(T, 16) * 0.1)
        self.core, self.out = nn.Transformer(16, 2, 2, 2, 32, batch_first=True), nn.Linear(16, 20)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.words(x) + self.places
        mask = nn.Transformer.generate_square_subsequent_mask(T, dtype=seen.dtype)
        return self.out(self.core(seen, seen, tgt_mask=mask, src_key_padding_mask=x < 3))


class UNet(nn.Module):
    def __init__(self, norm: Any = nn.BatchNorm2d) -> None:
        super().__init__()
        block = lambda a, b: nn.Sequential(nn.Conv2d(a, b, 3, padding=1), norm(b), nn.ReLU(inplace=True))  # noqa: E731
        self.down, self.low = block(3, 8), block(8, 16)
        self.up, self.last, self.out = nn.ConvTranspose2d(16, 8, 2, 2), block(16, 8), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down(x)
        return self.out(self.last(torch.cat([first, self.up(self.low(F.max_pool2d(first, 2)))], 1)))


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc, self.dec = nn.Linear(D, 8), nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, D))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log = self.enc(x).chunk(2, 1)
        noise = torch.randn_like(mean) if self.training else torch.zeros_like(mean)
        return self.dec(mean + noise * (log / 2).exp()), mean, log


def elbo(output: Any, batch: Any) -> Tensor:
    made, mean, log = output
    return (made - batch[0]).square().sum(1) + 0.5 * (mean.square() + log.exp() - log - 1).sum(1)


class DLRM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(10, 8, mode="sum") for _ in range(3))
        self.dense, self.top = nn.Linear(D, 8), nn.Linear(6 + 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        ids = (x[:, :3].abs() * 5).long().clamp_max(9)
        parts = [self.dense(x), *(table(ids[:, i : i + 1]) for i, table in enumerate(self.tables))]
        z = torch.stack(parts, 1)
        a, b = torch.triu_indices(4, 4, 1)
        pairs = (z @ z.mT)[:, a, b]
        return self.top(torch.cat([parts[0], pairs], 1))


class DeepSets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.all = nn.Sequential(nn.Linear(D, 8), nn.ReLU()), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.one(x.flatten(0, 1))
        return self.all(
            torch.zeros(len(x), 8, dtype=x.dtype).index_add(0, torch.arange(len(x)).repeat_interleave(T), rows)
        )


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.net(torch.cat([x[:, 0], x[:, 1]])).chunk(2)
        return (a - b).square()


class MultiTask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.heads, self.log = (
            nn.Linear(D, 8),
            nn.ModuleList([nn.Linear(8, 2), nn.Linear(8, 3)]),
            nn.Parameter(torch.zeros(2)),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.body(x))
        return torch.cat([head(h) * w for head, w in zip(self.heads, self.log.exp(), strict=True)], 1)


class GCN(nn.Module):
    """A graph for each example."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        edges = (x @ x.mT).softmax(-1)
        return self.b(edges @ torch.relu(self.a(edges @ x))).mean(1)


class PINN(nn.Module):
    """The residual of a differential equation: derivatives by the inputs inside the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        at = x[:, :1].detach().requires_grad_()
        with torch.enable_grad():
            y = self.net(at)
            (slope,) = torch.autograd.grad(y.sum(), at, create_graph=True)
        return slope + y


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(D, 3), nn.ModuleList(nn.Linear(D, D) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        weights, chosen = self.gate(rows).softmax(-1).max(-1)
        out = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            mine = (chosen == e).nonzero()[:, 0]
            out = out.index_add(0, mine, expert(rows[mine]) * weights[mine, None])
        return out.view_as(x)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.inner, self.last = (
            nn.Linear(D, 8),
            nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1), nn.Tanh()),
            nn.Linear(8, 3),
        )
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = torch.utils.checkpoint.checkpoint(self.inner, self.first(x), use_reentrant=self.reentrant)
        return self.last(h)


class Contrastive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.scale = nn.Linear(D, 4), nn.Linear(D, 4), nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        a, b = F.normalize(self.a(x[:, 0]), dim=1), F.normalize(self.b(x[:, 1]), dim=1)
        return self.scale.exp() * a @ b.T


def diagonal(output: Any, batch: Any) -> Tensor:
    return F.cross_entropy(output, torch.arange(len(output)), reduction="none")


class ByHandNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.g, self.l, self.o = nn.Parameter(torch.ones(8)), nn.Linear(D, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.l(x)
        return self.o(self.g * (h - h.mean(0)) / (h.var(0, correction=0) + 1e-5).sqrt())


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(3))
        self.net(torch.zeros(1, D))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Remembers(nn.Module):
    """Keeps its last output, which cannot be copied with the model."""

    def __init__(self) -> None:
        super().__init__()
        self.l, self.o, self.last = nn.Linear(D, 8), nn.Linear(8, 3), None

    def forward(self, x: Tensor) -> Tensor:
        self.last = torch.tanh(self.l(x))
        return self.o(self.last)


class MAML(nn.Module):
    """A parameter used in a matrix product of its own, three times."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.o = nn.Parameter(torch.randn(D, D) * 0.3), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(x @ self.w)
        return self.o(x)


def net(*layers: Any) -> Any:
    return lambda: nn.Sequential(*[layer() for layer in layers])


CASES = {
    "LSTM on packed sequences": Case(PackedLSTM, sequences, square),
    "nn.Transformer with its dropout": Case(Translate, tokens, square),
    "nn.TransformerEncoder, time first": Case(
        lambda: _TimeFirst(nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 2, 16), 2, enable_nested_tensor=False)),
        sequences, square,
    ),
    "U-Net, batch norm": Case(UNet, images, square),
    "U-Net, group norm": Case(lambda: UNet(lambda c: nn.GroupNorm(2, c)), images, square),
    "U-Net, instance norm": Case(
        lambda: UNet(lambda c: nn.InstanceNorm2d(c, affine=True, track_running_stats=True)), images, square
    ),
    "VAE": Case(VAE, vectors, elbo), "DLRM": Case(DLRM, vectors, square), "DeepSets": Case(DeepSets, sequences, square),
    "siamese": Case(Siamese, sequences, square), "multi-task": Case(MultiTask, vectors, square),
    "GCN": Case(GCN, sequences, square), "PINN": Case(PINN, vectors, square),
    "experts": Case(Experts, sequences, square), "checkpoint": Case(lambda: Checkpointed(False), vectors, square),
    "reentrant checkpoint": Case(lambda: Checkpointed(True), vectors, square),
    "contrastive pairs": Case(Contrastive, sequences, diagonal), "a norm by hand": Case(ByHandNorm, vectors, square),
    "lazy layers": Case(Lazy, vectors, square), "keeps its output": Case(Remembers, vectors, square),
    "a matrix used three times": Case(MAML, vectors, square),
    "spectral norm": Case(lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(D, 3))), vectors, square),
    "orthogonal": Case(lambda: nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(D, D))), vectors, square),
}  # fmt: skip


class _TimeFirst(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.out = inner, nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inner(x.transpose(0, 1)).mean(0))
