"""Per-example gradients of every kind of layer against one `torch.autograd.grad` for each example."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from pkexplain.errors import ConfigurationError
from pkexplain.gradients.capture import Capture
from pkexplain.gradients.collect import collect
from pkexplain.gradients.factors import MatrixGradient
from pkexplain.gradients.layers import find_layers, flatten_blocks

EXAMPLES = 5
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


class Scaled(nn.Module):
    """A leaf that owns bare parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(6))
        self.shift = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor, *, twice: bool = False) -> Tensor:
        return torch.tanh(x * self.scale) * (1 + twice) + self.shift


class Mixed(nn.Module):
    """A module that owns a bare parameter and has children with parameters of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.inner = nn.Linear(6, 4)
        self.out = nn.Sequential(nn.GELU(), nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
        return self.out(self.inner(x)).mean(1) + self.token.sum()


class Twice(nn.Module):
    """One layer used twice in a forward pass, another whose result is thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.unused = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.unused(x)
        return self.norm(self.shared(torch.tanh(self.norm(self.shared(x)))))


class Named(nn.Module):
    """Layers that are called with named arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scaled = nn.Linear(6, 6), Scaled()

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(x=self.linear(input=x), twice=True)


class LearnedQueries(nn.Module):
    """A layer whose input is a parameter, spread over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(3, 6))
        self.linear = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.queries.expand(len(x), 3, 6)) * x[:, :3, :1]


class Tied(nn.Module):
    """An embedding and an output layer with one weight, the output's bias being its own, and two tied Linears."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(7, 6), nn.Linear(6, 7)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.out.weight, self.second.weight = self.embedding.weight, self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.second(torch.tanh(self.first(self.embedding(x)))))


class TiedUnlike(nn.Module):
    """A weight that one owner takes for a matrix and the other by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scaled = nn.Linear(6, 6, bias=False), Scaled()
        self.scaled.scale = self.linear.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(self.linear(x)[:, None, :])


class Positions(nn.Module):
    """Positions that are looked up once and added to every example."""

    def __init__(self, plain: bool) -> None:
        super().__init__()
        self.plain, self.tokens, self.places = plain, nn.Embedding(7, 4), nn.Embedding(6, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        added = self.places(places) if self.plain else self.norm(self.places(places[None]))
        return self.norm(self.tokens(x) + added)


class Attends(nn.Module):
    """Attention of every kind: masks, other keys and values, weights that are used."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.cross, self.mask = options.pop("cross", False), options.pop("mask", None)
        self.weights = options.pop("weights", False)
        self.core = nn.MultiheadAttention(6, 2, **options)
        self.before = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        q = self.before(x)
        k, v = (x[:, :2].cos()[..., : self.core.kdim], x[:, :2].sin()[..., : self.core.vdim]) if self.cross else (q, q)
        given = {"need_weights": self.weights}
        if self.mask == "padding":
            given["key_padding_mask"] = torch.arange(x.shape[1])[None].expand(len(x), -1) >= 2
        if self.mask == "causal":
            given["attn_mask"] = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
        if self.mask == "scores":
            given["attn_mask"] = torch.linspace(-1, 1, x.shape[1] ** 2).view(x.shape[1], -1).to(x.dtype)
        if not self.core.batch_first:
            q, k, v = (
                (q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)) if self.cross else (q.transpose(0, 1),) * 3
            )
        out, weights = self.core(q, k, v, **given)
        out = out if self.core.batch_first else out.transpose(0, 1)
        return (
            out
            if weights is None
            else out + weights.sum(2, keepdim=True) + weights[:, :1].square().sum((1, 2))[:, None, None]
        )


def transformer() -> nn.Module:
    return nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)


def vectors(*shape: int):
    return lambda: torch.randn(EXAMPLES, *shape)


def tokens():
    made = torch.randint(0, 7, (EXAMPLES, 6))
    made[:, 1] = made[:, 0]  # a token twice in one example
    made[::2, 2] = 3  # and the padding token
    return made


def frozen(model: nn.Module, *names: str) -> nn.Module:
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


CASES = {
    "linear": (lambda: nn.Linear(6, 4), vectors(6)),
    "linear-tokens": (lambda: nn.Linear(6, 4), vectors(3, 6)),
    "linear-grid": (lambda: nn.Linear(6, 4), vectors(3, 2, 6)),
    "linear-without-bias": (lambda: nn.Linear(6, 4, bias=False), vectors(3, 6)),
    "linear-weight-frozen": (lambda: frozen(nn.Linear(6, 4), "weight"), vectors(3, 6)),
    "linear-bias-frozen": (lambda: frozen(nn.Linear(6, 4), "bias"), vectors(3, 6)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1), vectors(2, 9)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 3), vectors(2, 6, 7)),
    "conv2d-stride": (lambda: nn.Conv2d(2, 3, (3, 2), stride=(2, 3), padding=(1, 2)), vectors(2, 7, 8)),
    "conv2d-same": (lambda: nn.Conv2d(2, 3, 4, padding="same"), vectors(2, 6, 5)),
    "conv2d-valid": (lambda: nn.Conv2d(2, 3, 3, padding="valid", dilation=2), vectors(2, 6, 7)),
    "conv2d-dilation": (lambda: nn.Conv2d(2, 3, (3, 2), dilation=(2, 3), padding=2), vectors(2, 7, 6)),
    "conv2d-reflect": (lambda: nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode="reflect"), vectors(2, 6, 5)),
    "conv2d-circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular", bias=False), vectors(2, 6, 5)),
    "conv2d-groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), vectors(4, 5, 5)),
    "conv2d-weight-frozen": (lambda: frozen(nn.Conv2d(2, 3, 3), "weight"), vectors(2, 5, 5)),
    "conv2d-bias-frozen": (lambda: frozen(nn.Conv2d(2, 3, 3), "bias"), vectors(2, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, (2, 3, 2), (1, 2, 1), padding=1, dilation=(1, 1, 2)), vectors(2, 4, 5, 6)),
    "conv-transposed": (lambda: nn.ConvTranspose2d(2, 3, 3, stride=2), vectors(2, 4, 4)),
    "embedding": (lambda: nn.Embedding(7, 4), tokens),
    "embedding-padding": (lambda: nn.Embedding(7, 4, padding_idx=3), tokens),
    "embedding-one-token": (lambda: nn.Embedding(7, 4), lambda: tokens()[:, 0]),
    "layernorm": (lambda: nn.LayerNorm(6), vectors(6)),
    "layernorm-tokens": (lambda: nn.LayerNorm(6), vectors(3, 6)),
    "layernorm-two-axes": (lambda: nn.LayerNorm((3, 6)), vectors(2, 3, 6)),
    "layernorm-without-bias": (lambda: nn.LayerNorm(6, bias=False), vectors(3, 6)),
    "groupnorm": (lambda: nn.GroupNorm(2, 4), vectors(4, 3, 3)),
    "groupnorm-flat": (lambda: nn.GroupNorm(2, 4), vectors(4)),
    "instancenorm": (lambda: nn.InstanceNorm2d(4, affine=True), vectors(4, 3, 3)),
    "rmsnorm": (lambda: nn.RMSNorm(6), vectors(3, 6)),
    "prelu": (lambda: nn.Sequential(nn.Linear(6, 4), nn.PReLU(4)), vectors(6)),
    "bilinear-like": (lambda: nn.Sequential(Scaled(), nn.Linear(6, 2)), vectors(3, 6)),
    "bare-leaf": (Scaled, vectors(6)),
    "bare-with-children": (Mixed, vectors(3, 6)),
    "bare-as-input": (LearnedQueries, vectors(3, 6)),
    "used-twice": (Twice, vectors(6)),
    "named-arguments": (Named, vectors(6)),
    "tied": (Tied, tokens),
    "tied-unlike": (TiedUnlike, vectors(6)),
    "positions": (lambda: Positions(False), tokens),
    "positions-plain": (lambda: Positions(True), tokens),
    "attention": (lambda: Attends(batch_first=True), vectors(3, 6)),
    "attention-without-bias": (lambda: Attends(bias=False), vectors(3, 6)),
    "attention-padding": (lambda: Attends(mask="padding"), vectors(3, 6)),
    "attention-causal": (lambda: Attends(mask="causal", batch_first=True), vectors(3, 6)),
    "attention-scores": (lambda: Attends(mask="scores", weights=True, batch_first=True), vectors(3, 6)),
    "attention-cross": (lambda: Attends(cross=True, batch_first=True), vectors(3, 6)),
    "attention-other-sizes": (lambda: Attends(cross=True, kdim=4, vdim=5), vectors(3, 6)),
    "attention-partly-frozen": (lambda: frozen(Attends(), "core.in_proj_weight", "core.out_proj.bias"), vectors(3, 6)),
    "transformer": (transformer, vectors(3, 6)),
    "transformer-dropout": (lambda: nn.TransformerEncoderLayer(6, 2, 8, batch_first=True).eval(), vectors(3, 6)),
    "batchnorm-evaluation": (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 2, 2)).eval(), vectors(4, 3, 3)),
    "in-place": (lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(inplace=True), nn.Linear(4, 3)), vectors(6)),
    "in-place-norm": (lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(True), nn.Conv2d(4, 2, 1)), vectors(4, 3, 3)),
}  # fmt: skip


class Case:
    """A model with a loss that is linear in its output, differentiated together and one example at a time."""

    def __init__(self, make, inputs, groups=None, dtype=torch.float64):
        torch.manual_seed(3)
        self.model = make().double()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(torch.randn_like(parameter))
        made = inputs()
        self.inputs = made.double() if made.is_floating_point() else made
        self.cotangent = torch.randn_like(self.model(self.inputs)).to(dtype)
        self.model.to(dtype)
        self.inputs = self.inputs.to(dtype) if made.is_floating_point() else made
        trained = [n for n, p in self.model.named_parameters() if p.requires_grad]
        self.groups = groups or dict.fromkeys(trained, 0)
        self.layers, self.blocks = find_layers(self.model, self.groups)
        self.size = sum(block.numel for block in self.blocks)

    def loss(self, rows=slice(None)):
        return (self.model(self.inputs[rows]) * self.cotangent[rows]).sum()

    def outputs(self):
        return (self.model(self.inputs) * self.cotangent).flatten(1).sum(1)

    def one_by_one(self):
        named = dict(self.model.named_parameters())
        parameters = [named[name] for block in self.blocks for name in block.parameters]
        rows = []
        for i in range(EXAMPLES):
            loss = self.loss(slice(i, i + 1))
            found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            rows.append(torch.cat([g.flatten() for g in found]))
        return torch.stack(rows)

    def recorded(self):
        pieces = []
        with Capture(self.layers, self.blocks).during_backward(EXAMPLES, lambda *piece: pieces.append(piece)):
            self.loss().backward()
        return pieces

    def dense(self, pieces, of=lambda gradients: gradients.dense()):
        first = of(pieces[0][1])
        out = first.new_zeros(*first.shape[:-1], self.size)
        for position, gradients in pieces:
            out[..., self.blocks[position].span] += of(gradients)
        return out


@pytest.fixture(params=CASES)
def case(request):
    return Case(*CASES[request.param])


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_gradients_of_a_backward_pass_are_those_of_single_examples(case):
    pieces = case.recorded()
    assert_equal(case.dense(pieces), case.one_by_one())


def test_gradients_of_an_output_are_those_of_single_examples(case):
    pieces = collect(Capture(case.layers, case.blocks), EXAMPLES, case.outputs)
    assert_equal(case.dense(pieces), case.one_by_one())
    assert all(p.grad is None for p in case.model.parameters())


def test_sums_are_the_parameters_own_gradients(case):
    pieces = case.recorded()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in case.model.named_parameters()}
    assert_equal(case.dense(pieces, lambda g: g.total()), flatten_blocks(case.blocks, grads, torch.float64))
    assert_equal(case.dense(pieces).sum(0), case.dense(pieces, lambda g: g.total()))


def test_selected_examples_are_the_rows(case):
    chosen = torch.tensor([4, 0, 2])
    pieces = case.recorded()
    assert_equal(case.dense(pieces, lambda g: g.select(chosen).dense()), case.dense(pieces)[chosen])
    assert all(g.select(chosen[:1]).nbytes < g.nbytes for _, g in pieces)


def test_sketches_are_two_sided_products(case):
    for position, gradients in case.recorded():
        block = case.blocks[position]
        assert isinstance(gradients, MatrixGradient) == (block.matrix is not None)
        if block.matrix is None:
            continue
        rows, columns = block.matrix
        full = gradients.dense()
        if gradients.weight and gradients.bias:
            split = rows * (columns - 1)
            matrix = torch.cat([full[:, :split].reshape(EXAMPLES, rows, -1), full[:, split:, None]], dim=2)
        else:
            matrix = full.reshape(EXAMPLES, rows, columns)
        left, right = torch.randn(2, rows, dtype=full.dtype), torch.randn(3, columns, dtype=full.dtype)
        assert_equal(gradients.sketch(left, right), left @ matrix @ right.T)
        assert_equal(gradients.sketch(left, None), left @ matrix)
        assert_equal(gradients.sketch(None, right), matrix @ right.T)
        assert_equal(gradients.sketch(None, None), matrix)


@pytest.mark.parametrize(
    "make", [CASES[n] for n in ("linear-tokens", "conv2d-stride", "layernorm-tokens", "bare-leaf")]
)
def test_parameters_of_one_layer_in_two_optimizer_groups(make):
    plain = Case(*make)
    names = list(plain.groups)
    case = Case(*make, groups={name: 1 - number for number, name in enumerate(names)})
    assert [block.group for block in case.blocks] == [0, 1]
    assert [block.parameters for block in case.blocks] == [(names[1],), (names[0],)]
    assert_equal(case.dense(case.recorded()), case.one_by_one())


def test_blocks_lie_side_by_side_and_group_after_group():
    case = Case(*CASES["bare-with-children"], groups={
        "token": 2, "inner.weight": 0, "inner.bias": 2, "out.1.weight": 1, "out.1.bias": 1
    })  # fmt: skip
    assert [block.group for block in case.blocks] == sorted(block.group for block in case.blocks)
    starts = [0]
    for block in case.blocks:
        assert block.span == slice(starts[-1], starts[-1] + sum(math.prod(shape) for shape in block.shapes))
        starts.append(block.span.stop)
    assert_equal(case.dense(case.recorded()), case.one_by_one())


@pytest.mark.parametrize("name", ["linear", "conv2d", "embedding", "layernorm", "groupnorm", "bare-leaf"])
def test_single_precision_agrees_with_double(name):
    single, double = Case(*CASES[name], dtype=torch.float32), Case(*CASES[name])
    torch.testing.assert_close(
        single.dense(single.recorded()).double(), double.dense(double.recorded()), rtol=1e-3, atol=1e-4
    )


def test_a_batch_of_one_is_captured():
    for name in ("linear-tokens", "conv2d", "embedding", "bare-with-children"):
        case = Case(*CASES[name])
        expected = case.one_by_one()[:1]
        case.inputs, case.cotangent = case.inputs[:1], case.cotangent[:1]
        pieces = []
        with Capture(case.layers, case.blocks).during_backward(1, lambda *piece, to=pieces: to.append(piece)):
            case.loss().backward()
        assert_equal(case.dense(pieces), expected)
        assert_equal(case.dense(pieces, lambda g: g.total()[None]), expected)


def test_dropout_is_captured_with_the_mask_that_was_drawn():
    make = lambda: nn.Sequential(nn.Linear(6, 40), nn.Dropout(0.5), nn.Linear(40, 3))  # noqa: E731 - one line
    case = Case(make, vectors(6))
    case.model.train()
    pieces = case.recorded()
    grads = {name: p.grad for name, p in case.model.named_parameters()}
    assert_equal(case.dense(pieces).sum(0), flatten_blocks(case.blocks, grads, torch.float64))
    another = case.dense(case.recorded())
    assert (another - case.dense(pieces)).abs().max() > 0.1


def test_forward_passes_without_gradients_are_not_captured():
    case = Case(*CASES["linear"])
    pieces = []
    with Capture(case.layers, case.blocks).during_backward(EXAMPLES, lambda *piece: pieces.append(piece)):
        with torch.no_grad():
            case.model(case.inputs[:2])  # a look at the model, of another size
        case.loss().backward()
    assert len(pieces) == 1


def test_no_hook_is_left_on_the_layers():
    case = Case(*CASES["bare-with-children"])
    cotangent, case.cotangent = case.cotangent, None  # the loss fails behind the forward pass
    with pytest.raises(TypeError), Capture(case.layers, case.blocks).during_backward(EXAMPLES, lambda *piece: None):
        case.loss()
    case.cotangent = cotangent
    case.recorded()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in case.model.modules())


# ---------------------------------------------------------------------------------------------------------- refusals


def find(model):
    return find_layers(model, {n: 0 for n, p in model.named_parameters() if p.requires_grad})


class Bare(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.gate, self.part = nn.Parameter(torch.ones(6)), part

    def forward(self, x):
        return self.part(x * self.gate)


def test_dropout_that_drops_nothing_is_no_reason_to_refuse():
    case = Case(lambda: Bare(nn.Dropout(0.0)), vectors(6))
    assert_equal(case.dense(case.recorded()), case.one_by_one())


def test_a_frozen_batchnorm_in_evaluation_mode_is_a_fixed_map():
    def make():
        model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
        model[1].eval().requires_grad_(False)
        return model

    case = Case(make, vectors(6))
    assert_equal(case.dense(case.recorded()), case.one_by_one())


def test_a_shared_parameter_is_a_block_of_its_own():
    blocks = find(Tied())[1]
    assert [block.parameters for block in blocks] == [
        ("embedding.weight",), ("out.bias",), ("first.weight",), ("first.bias",)
    ]  # fmt: skip


@pytest.mark.parametrize("names", [["0.weight"], ["0.weight", "2.bias"], ["0.weight", "0.bias"]])
def test_what_is_frozen_after_the_start_gets_no_gradient(names):
    case = Case(lambda: nn.Sequential(nn.Linear(6, 4), nn.GELU(), nn.Linear(4, 3)), vectors(6))
    expected = case.one_by_one()
    frozen(case.model, *names)
    for block in case.blocks:
        for name, start, shape in zip(block.parameters, [0, math.prod(block.shapes[0])], block.shapes, strict=False):
            if name in names:
                expected[:, block.start + start : block.start + start + math.prod(shape)] = 0
    assert_equal(case.dense(case.recorded()), expected)


def test_one_module_under_two_names_is_one_layer():
    def make():
        shared = nn.Linear(6, 6)
        return nn.Sequential(shared, nn.Tanh(), shared)

    case = Case(make, vectors(6))
    assert len(case.layers) == 1
    assert_equal(case.dense(case.recorded()), case.one_by_one())


def test_a_layer_may_return_several_tensors():
    class Pair(Scaled):
        def forward(self, x):
            first = super().forward(x)
            return first, (first.relu().square(), x.cos())

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair = Pair()

        def forward(self, x):
            first, (second, _) = self.pair(x)
            return first.cos() + second

    case = Case(Around, vectors(6))
    assert_equal(case.dense(case.recorded()), case.one_by_one())


def test_a_model_without_a_trainable_parameter_is_refused():
    with pytest.raises(ConfigurationError, match=r"no parameter would change\. .* Set requires_grad=True"):
        find(nn.Linear(2, 2).requires_grad_(False))
