"""Every way of using parameters is split exactly, or named: against single-example passes through the same graph."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from pkexplain.errors import ExampleIdError
from pkexplain.gradients.capture import Capture
from pkexplain.gradients.collect import collect
from pkexplain.gradients.factors import DenseGradient
from pkexplain.gradients.layers import find_layers
from pkexplain.gradients.watch import Watch

B, T, D = 5, 6, 4


def split_and_truth(model, x, losses=lambda y: y.flatten(1).square().sum(1)):
    """Per-example gradients as captured, and from one backward pass for each example, by parameter; and the capture."""
    layers, blocks = find_layers(model, {name: 0 for name, p in model.named_parameters() if p.requires_grad})
    pieces, named = [], dict(model.named_parameters())
    capture = Capture(layers, blocks)
    with capture.during_backward(B, lambda *piece: pieces.append(piece)):
        each = losses(model(x))
        truth = [
            torch.autograd.grad(one, list(named.values()), retain_graph=True, allow_unused=True, materialize_grads=True)
            for one in each
        ]
        each.mean().backward()
    found = torch.zeros(B, sum(block.numel for block in blocks), dtype=torch.float64)
    for at, piece in pieces:
        found[:, blocks[at].span] += piece.dense()
    order = [name for block in blocks for name in block.parameters]
    by_name = [dict(zip(named, [g.to_dense() if g.is_sparse else g for g in one], strict=True)) for one in truth]
    true = torch.stack([torch.cat([one[name].flatten() for name in order]) for one in by_name]) / B
    return found, true, capture


def module(forward, **parts):
    class Made(nn.Module):
        def __init__(self):
            super().__init__()
            for name, part in parts.items():
                setattr(self, name, part() if callable(part) and not isinstance(part, nn.Module) else part)

    Made.forward = forward
    return Made


def tokens():
    return torch.randint(0, 9, (B, T))


def vectors():
    return torch.randn(B, D, dtype=torch.float64)


def sequences():
    return torch.randn(B, T, D, dtype=torch.float64)


def images():
    return torch.randn(B, 3, 6, 6, dtype=torch.float64)


def packed(self, x):
    out, _ = self.r(pack_padded_sequence(x, [3, 6, 1, 4, 6], batch_first=True, enforce_sorted=False))
    return self.o(pad_packed_sequence(out, batch_first=True)[0].sum(1))


def routed(self, x):
    rows, out = x.flatten(0, 1), torch.zeros_like(x.flatten(0, 1))
    for expert, part in enumerate((self.a, self.b)):
        mine = rows[:, 0] > 0 if expert else rows[:, 0] <= 0
        out[mine] = part(rows[mine])
    return out.view_as(x)


def bag(self, x):
    return self.o(self.e(x.flatten(), torch.arange(0, B * T, T)))


def group_norm(self, x):
    return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps).relu()


def batch_norm(self, x):
    return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False).relu()


PARAMETER = lambda *shape: lambda: nn.Parameter(torch.randn(shape))  # noqa: E731 - a table below
LINEAR = lambda *sizes: lambda: nn.Linear(*sizes)  # noqa: E731
CASES = {
    "a layer of one row": (
        module(lambda m, x: m.l(x) * F.softplus(m.t(x.new_ones(1, 2))).sum(), l=LINEAR(D, 3), t=LINEAR(2, 1)), vectors
    ),
    "positions": (
        module(
            lambda m, x: m.o(torch.tanh(m.e(x) + m.p(torch.arange(T) + 2))),
            e=lambda: nn.Embedding(9, D), p=lambda: nn.Embedding(20, D), o=LINEAR(D, 3),
        ), tokens,
    ),
    "positions as many as examples": (
        module(
            lambda m, x: m.o(torch.tanh(m.e(x[:, :B]) + m.p(torch.arange(B)))),
            e=lambda: nn.Embedding(9, D), p=lambda: nn.Embedding(B, D), o=LINEAR(D, 3),
        ), tokens,
    ),
    "positions with dropout": (
        module(
            lambda m, x: m.o(m.l(x) + m.d(m.p(torch.arange(T)[None]))),
            l=LINEAR(D, D), p=lambda: nn.Embedding(T, D), d=lambda: nn.Dropout(0.5), o=LINEAR(D, 3),
        ), sequences,
    ),
    "a table of classes": (
        module(lambda m, x: m.l(x) @ m.e(torch.arange(3)).T, l=LINEAR(D, D), e=lambda: nn.Embedding(3, D)), vectors
    ),
    "flattened tokens": (
        module(
            lambda m, x: m.o(m.e(x.flatten()).tanh()).view(B, T, -1), e=lambda: nn.Embedding(9, D), o=LINEAR(D, 3)
        ), tokens,
    ),
    "time first": (
        module(lambda m, x: m.o(m.r(x.transpose(0, 1))[0]).mean(0), r=lambda: nn.LSTM(D, 5), o=LINEAR(5, 3)), sequences
    ),
    "rows as many as time, time first": (
        module(
            lambda m, x: m.o(m.r(x[:, :B].transpose(0, 1))[0]).mean(0), r=lambda: nn.GRU(D, 5), o=LINEAR(5, 3)
        ), sequences,
    ),
    "packed sequences": (module(packed, r=lambda: nn.LSTM(D, 3, bidirectional=True), o=LINEAR(6, 2)), sequences),
    "dropout inside an LSTM": (
        module(lambda m, x: m.r(x)[0], r=lambda: nn.LSTM(D, 3, 2, dropout=0.5, batch_first=True)), sequences
    ),
    "a projected LSTM": (
        module(lambda m, x: m.r(x)[0], r=lambda: nn.LSTM(D, 5, proj_size=2, batch_first=True)), sequences
    ),
    "cells": (
        module(
            lambda m, x: torch.cat(m.c(x[:, 1], m.c(x[:, 0])), 1), c=lambda: nn.LSTMCell(D, 3)
        ), sequences,
    ),
    "weight norm": (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(D, 3)), nn.Tanh()), vectors),
    "spectral norm": (lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(D, 3)), nn.Tanh()), vectors),
    "attention with dropout": (
        module(lambda m, x: m.a(x, x, x)[0], a=lambda: nn.MultiheadAttention(D, 2, dropout=0.5, batch_first=True)),
        sequences,
    ),
    "attention with more keys": (
        module(
            lambda m, x: m.a(x, x, x)[0], a=lambda: nn.MultiheadAttention(D, 2, add_zero_attn=True, add_bias_kv=True)
        ),
        sequences,
    ),
    "a torch encoder": (lambda: nn.TransformerEncoderLayer(D, 2, 8, batch_first=True), sequences),
    "a torch encoder, time first": (
        module(lambda m, x: m.e(x.transpose(0, 1)).mean(0), e=lambda: nn.TransformerEncoderLayer(D, 2, 8)), sequences
    ),
    "a bare parameter beside dropout": (
        module(
            lambda m, x: m.d(torch.cat([m.c.expand(len(x), 1, D), x], 1) + m.p),
            c=PARAMETER(1, 1, D), p=PARAMETER(1, T + 1, D), d=lambda: nn.Dropout(0.3),
        ), sequences,
    ),
    "a bias for pairs of positions": (
        module(
            lambda m, x: (m.l(x) @ x.mT + m.t[torch.arange(T)[:, None] - torch.arange(T) + T]).softmax(-1) @ x,
            l=LINEAR(D, D), t=PARAMETER(2 * T),
        ), sequences,
    ),
    "bags of embeddings": (module(bag, e=lambda: nn.EmbeddingBag(9, D, mode="mean"), o=LINEAR(D, 3)), tokens),
    "sparse gradients": (
        module(lambda m, x: m.o(m.e(x)), e=lambda: nn.Embedding(9, D, sparse=True), o=LINEAR(D, 3)), tokens
    ),
    "scaled by frequency": (
        module(lambda m, x: m.o(m.e(x)), e=lambda: nn.Embedding(9, D, scale_grad_by_freq=True), o=LINEAR(D, 3)), tokens
    ),
    "a scalar": (module(lambda m, x: m.l(x) * m.s.exp(), l=LINEAR(D, 3), s=PARAMETER()), vectors),
    "a weight used by hand": (
        module(lambda m, x: F.linear(x, m.l.weight), l=lambda: nn.Linear(D, 3, bias=False)), vectors
    ),
    "an expert for each token": (module(routed, a=LINEAR(D, D), b=LINEAR(D, D)), sequences),
    "a product of parameters": (module(lambda m, x: x @ (m.a @ m.b), a=PARAMETER(D, 2), b=PARAMETER(2, 3)), vectors),
    "convolutions on windows": (
        module(
            lambda m, x: m.c(x.unfold(2, 3, 3).permute(0, 2, 1, 3, 4).flatten(0, 1)[..., :3, :3]).view(B, -1),
            c=lambda: nn.Conv2d(3, 2, 2),
        ), images,
    ),
    "grouped and transposed convolutions": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 2, groups=3), nn.ReLU(inplace=True), nn.ConvTranspose2d(6, 2, 2)), images
    ),
    "a group norm of another class": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 2), type("Own", (nn.GroupNorm,), {"forward": group_norm})(2, 4)), images
    ),
    "a batch norm in evaluation mode": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 2), type("Own", (nn.BatchNorm2d,), {"forward": batch_norm})(4)), images
    ),
    "an instance norm": (lambda: nn.Sequential(nn.Conv2d(3, 4, 2), nn.InstanceNorm2d(4, affine=True)), images),
    "a checkpoint": (
        module(
            lambda m, x: torch.utils.checkpoint.checkpoint(lambda y: m.d(m.b(m.a(y).tanh())), x, use_reentrant=False),
            a=LINEAR(D, 6), b=LINEAR(6, 3), d=lambda: nn.Dropout(0.2),
        ), vectors,
    ),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request):
    torch.manual_seed(0)
    make, inputs = CASES[request.param]
    return make().double().train(), inputs()


def test_the_split_is_that_of_single_examples(case):
    found, true, capture = split_and_truth(*case)
    torch.testing.assert_close(found, true, rtol=1e-9, atol=1e-11)
    assert not capture.unsplit
    assert capture.gap < 1e-10


def test_the_training_does_not_notice(case):
    model, x = case
    other, grads = copy.deepcopy(model), []
    for each, capturing in ((model, False), (other, True)):
        torch.manual_seed(1)
        if capturing:
            split_into_nothing(each, x)
        else:
            each(x).flatten(1).square().sum(1).mean().backward()
        grads.append([p.grad.to_dense() if p.grad.is_sparse else p.grad for p in each.parameters()])
        grads[-1] += [*each.buffers(), torch.get_rng_state()]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def split_into_nothing(model, x):
    layers, blocks = find_layers(model, {name: 0 for name, _ in model.named_parameters()})
    with Capture(layers, blocks).during_backward(B, lambda *piece: None):
        model(x).flatten(1).square().sum(1).mean().backward()


def test_the_share_through_a_batch_norm_is_checked_too(monkeypatch):
    from pkexplain.gradients import _uses

    def wrong(rule, use, norms, parts):
        found = true(rule, use, norms, parts)
        own = [DenseGradient(g.dense().roll(1, 0)) for g in found[0]]
        return [own, *found[1:]]

    torch.manual_seed(0)
    make = lambda: nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.ReLU()).double()  # noqa: E731 - twice
    _, _, capture = split_and_truth(make(), images())
    assert 0 in capture.split.rules
    assert capture.interacting
    true = _uses.before_norms
    monkeypatch.setattr(_uses, "before_norms", wrong)
    _, _, capture = split_and_truth(make(), images())
    assert 0 not in capture.split.rules


def test_rows_that_are_not_the_ids_are_refused():
    model = nn.Linear(D, 3).double()
    layers, blocks = find_layers(model, {"weight": 0, "bias": 0})
    x = torch.randn(7, D, dtype=torch.float64)
    with (
        pytest.raises(ExampleIdError, match=r"no tensor between the loss and the parameters .* Got 5 ids"),
        Capture(layers, blocks).during_backward(5, lambda *piece: None),
    ):
        model(x).square().mean().backward()


def test_what_examples_share_is_named_and_not_split():
    def forward(m, x):  # the gate sees the mean of the batch
        return m.l(x) * torch.sigmoid(m.g(x.mean(0, keepdim=True)))

    torch.manual_seed(0)
    model = module(forward, l=LINEAR(D, 3), g=LINEAR(D, 3))().double()
    found, true, capture = split_and_truth(model, vectors())
    # the gate's output is one row that all examples multiply with: each example's share of it is known
    torch.testing.assert_close(found, true, rtol=1e-9, atol=1e-11)
    assert not capture.unsplit


def test_a_rule_that_is_wrong_fails_the_check(monkeypatch):
    from pkexplain.gradients import layers as module_of_rules
    from pkexplain.gradients._layer_rules import linear

    def swapped(use, parts):
        return [DenseGradient(g.dense().roll(1, 0)) for g in linear(use, parts)]

    monkeypatch.setitem(module_of_rules._RULES, nn.Linear, swapped)
    torch.manual_seed(0)
    found, true, capture = split_and_truth(nn.Linear(D, 3).double(), vectors())
    torch.testing.assert_close(found, true, rtol=1e-9, atol=1e-11)  # from the graph
    assert capture.split.rules == set()


@pytest.mark.parametrize("error", [0.0, 0.05])
def test_rounding_is_not_taken_for_a_wrong_split_nor_a_wrong_split_for_rounding(monkeypatch, error):
    """Inputs far from zero before a BatchNorm: the gradient is a small rest of large terms, rounded in float32."""
    from pkexplain.gradients import _uses

    torch.manual_seed(0)
    x = torch.randn(64, D, dtype=torch.float64) + 300
    model = nn.Sequential(nn.Linear(D, 3, bias=False), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1)).double()

    def rows(model, x):
        layers, blocks = find_layers(model, {name: 0 for name, _ in model.named_parameters()})
        capture, pieces = Capture(layers, blocks), []
        with capture.during_backward(64, lambda *piece: pieces.append(piece)):
            model(x).square().mean().backward()
        return sum(piece.dense() for at, piece in pieces if at == 0), capture

    true, exact = rows(copy.deepcopy(model), x)
    assert exact.tolerance == 1e-8
    before_norms = _uses.before_norms

    def wrong(*given):
        found = before_norms(*given)
        return [[g.scaled(torch.full((g.matrix[0] * g.matrix[1],), 1 + error)) for g in each] for each in found]

    monkeypatch.setattr(_uses, "before_norms", wrong)
    found, capture = rows(copy.deepcopy(model).float(), x.float())
    assert (0 in capture.split.rules) == (not error)
    assert not capture.unsplit  # the graph's own split, where the rule is wrong
    if not error:
        assert 1e-6 < capture.gap <= capture.tolerance
        torch.testing.assert_close(found.double(), true, rtol=0.02, atol=0.02 * float(true.norm(dim=1).mean()))


def test_layouts_are_found_under_autocast():
    """Gradients of float32 layers (norms, embeddings) are rounded there by the half-precision layers behind them."""

    def forward(m, x):
        return m.head(m.norm(m.encoder(m.words(x))).mean(1))

    def encoder():
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 3)

    parts = {"words": lambda: nn.Embedding(9, 16), "norm": lambda: nn.LayerNorm(16), "head": lambda: nn.Linear(16, 3)}
    torch.manual_seed(0)
    model = module(forward, encoder=encoder, **parts)()
    x = torch.randint(0, 9, (8, T))
    layers, blocks = find_layers(model, {name: 0 for name, _ in model.named_parameters()})
    capture, pieces = Capture(layers, blocks), []
    with capture.during_backward(8, lambda *piece: pieces.append(piece)):
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        each = F.cross_entropy(y.float(), torch.arange(8) % 3, reduction="none")
        named = dict(model.named_parameters())
        truth = [torch.autograd.grad(one, list(named.values()), retain_graph=True) for one in each]
        each.mean().backward()
    assert not capture.unsplit
    found = torch.zeros(8, sum(block.numel for block in blocks))
    for at, piece in pieces:
        found[:, blocks[at].span] += piece.dense()
    order = [name for block in blocks for name in block.parameters]
    true = torch.stack(
        [torch.cat([dict(zip(named, one, strict=True))[name].flatten() for name in order]) for one in truth]
    )
    assert ((found - true / 8).norm(dim=1) < 0.02 * (true / 8).norm(dim=1)).all()


def test_what_is_allowed_for_one_block_is_not_allowed_for_another():
    from pkexplain.gradients._step_capture import StepCapture
    from pkexplain.gradients.split import Split
    from pkexplain.gradients.watch import Watch

    layers, blocks = find_layers(nn.Linear(2, 2), {"weight": 0, "bias": 0})
    capture = Capture(layers, blocks)
    split = Split(4, tolerance=1e-4, allowed={0: 0.1})
    StepCapture(capture, 4, print, Watch())._note(split, {0: 0.02, 1: 0.001})
    assert (capture.gap, capture.tolerance) == (0.001, 1e-4)


@pytest.mark.parametrize("examples", [5, 12, 15, 20, 33])
def test_a_loss_of_one_token_of_each_example_is_split(examples):
    """As in a BERT classifier: of the last layers' gradients only one row in 64 is not zero."""

    def forward(m, x):
        for norm, layer in zip(m.norms, m.layers, strict=True):
            x = norm(x + layer(x))
        return m.head(x[:, 0] if m.first else x[torch.arange(len(x)), torch.arange(len(x)) % x.shape[1]])

    parts = {
        "norms": lambda: nn.ModuleList([nn.LayerNorm(64) for _ in range(6)]),
        "layers": lambda: nn.ModuleList([nn.Linear(64, 64) for _ in range(6)]),
        "head": lambda: nn.Linear(64, 3),
    }
    for first in (True, False):
        torch.manual_seed(0)
        model = module(forward, first=first, **parts)().double()
        layers, blocks = find_layers(model, {name: 0 for name, _ in model.named_parameters()})
        capture, x = Capture(layers, blocks), torch.randn(examples, 64, 64, dtype=torch.float64)
        with capture.during_backward(examples, lambda *piece: None):
            F.cross_entropy(model(x), torch.arange(examples) % 3).backward()
        assert not capture.unsplit
        assert capture.gap < 1e-12
        assert len(capture.split.rules) == len(blocks)


class LowRank(nn.Module):
    """As LoRA begins: the second factor is zero, so that nothing reaches the first one."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(D, D, dtype=torch.float64).requires_grad_(False)
        self.down = nn.Linear(D, 2, bias=False, dtype=torch.float64)
        self.up = nn.Linear(2, D, bias=False, dtype=torch.float64)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Adapted(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = LowRank(), LowRank()

    def forward(self, x):
        return self.second(self.first(x).tanh())


@pytest.mark.parametrize("dead", [1, 3, 12])
def test_a_layer_without_a_gradient_is_learnt_when_it_gets_one(dead):
    torch.manual_seed(0)
    model, x = Adapted(), sequences()
    names = {name: 0 for name, p in model.named_parameters() if p.requires_grad}
    layers, blocks = find_layers(model, names)
    capture = Capture(layers, blocks)

    def step():
        pieces = {}
        watch = Watch(verify=dead > 8)
        with capture.during_backward(B, lambda at, piece: pieces.setdefault(at, []).append(piece), watch):
            each = model(x).flatten(1).square().sum(1)
            parameters = [model.get_parameter(block.parameters[0]) for block in blocks]
            truth = [torch.autograd.grad(one, parameters, retain_graph=True) for one in each]
            each.sum().backward()
        for at, block in enumerate(blocks):
            true = torch.stack([one[at].flatten() for one in truth])
            found = sum((piece.dense() for piece in pieces.get(at, ())), torch.zeros_like(true))
            yield block.parameters[0], true, found

    for _ in range(dead):
        assert all(torch.allclose(true, found, atol=1e-12) for _, true, found in step())
    with torch.no_grad():
        model.first.up.weight.normal_()
        model.second.up.weight.normal_()
    if dead > 8:  # it is no longer expected, and only the next check of the split finds out
        list(step())
    for name, true, found in step():
        assert true.any(), name
        torch.testing.assert_close(found, true, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dead", [1, 12])
def test_explaining_it_is_right_from_the_first_gradient_on(dead):
    torch.manual_seed(0)
    model, x = Adapted(), sequences()
    layers, blocks = find_layers(model, {name: 0 for name, p in model.named_parameters() if p.requires_grad})
    capture = Capture(layers, blocks)

    def outputs():
        return model(x).flatten(1).square().sum(1)

    for _ in range(dead):
        collect(capture, B, outputs)
    with torch.no_grad():
        model.first.up.weight.normal_()
        model.second.up.weight.normal_()
    found = torch.zeros(B, sum(block.numel for block in blocks), dtype=torch.float64)
    for at, piece in collect(capture, B, outputs):
        found[:, blocks[at].span] += piece.dense()
    parameters = [model.get_parameter(name) for block in blocks for name in block.parameters]
    truth = [torch.autograd.grad(one, parameters, retain_graph=True) for one in outputs()]
    true = torch.stack([torch.cat([g.flatten() for g in one]) for one in truth])
    torch.testing.assert_close(found, true, rtol=1e-10, atol=1e-12)
