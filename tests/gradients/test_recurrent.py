"""Per-example gradients of recurrent layers against one `torch.autograd.grad` for each example."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pkexplain.gradients.capture import Capture
from pkexplain.gradients.collect import collect
from pkexplain.gradients.factors import DenseGradient, LinearGradient
from pkexplain.gradients.layers import find_layers, flatten_blocks

EXAMPLES, TIME, WIDTH, HIDDEN = 4, 5, 3, 2
pytestmark = pytest.mark.filterwarnings("ignore:dropout option adds dropout")


class Net(nn.Module):
    """A recurrent layer between a linear layer and a readout of the outputs named in ``use``."""

    def __init__(self, make, use="out h c", start=False):
        super().__init__()
        self.before, self.core, self.use = nn.Linear(WIDTH, WIDTH), make(), use.split()
        self.start = nn.Linear(WIDTH, HIDDEN) if start else None

    def forward(self, x):
        first = getattr(self.core, "batch_first", False)
        seq = self.before(x) if first else self.before(x).transpose(0, 1)
        state = None
        if self.start is not None:
            copies = self.core.num_layers * (1 + self.core.bidirectional)
            h = self.start(x[:, 0]).expand(copies, -1, -1)
            state = (h, h.sin()) if isinstance(self.core, nn.LSTM) else h
        if state is None:
            out, last = self.core(seq)
        elif self.core.bidirectional:
            out, last = self.core(seq, hx=state)
        else:
            out, last = self.core(seq, state)
        h, c = last if isinstance(last, tuple) else (last, last)
        parts = {"out": out if first else out.transpose(0, 1), "h": h.transpose(0, 1), "c": c.transpose(0, 1)}
        return torch.cat([parts[name].flatten(1) for name in self.use], dim=1)


class Loop(nn.Module):
    """A cell in a loop over time."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        state = None
        for step in range(TIME):
            state = self.cell(x[:, step], state)
        return torch.cat(state, dim=1) if isinstance(state, tuple) else state


class ChainedUse(nn.Module):
    """One layer used twice, the second time from the state it ended in."""

    def __init__(self):
        super().__init__()
        self.core = nn.LSTM(WIDTH, HIDDEN, batch_first=True)

    def forward(self, x):
        first, state = self.core(x)
        return self.core(x.cos(), state)[0] + first.relu_()


def frozen(model, *names):
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


CASES = {
    "rnn": lambda: Net(lambda: nn.RNN(WIDTH, HIDDEN)),
    "rnn-relu": lambda: Net(lambda: nn.RNN(WIDTH, HIDDEN, 2, nonlinearity="relu", batch_first=True)),
    "rnn-without-bias": lambda: Net(lambda: nn.RNN(WIDTH, HIDDEN, bias=False), start=True),
    "lstm": lambda: Net(lambda: nn.LSTM(WIDTH, HIDDEN)),
    "lstm-output-only": lambda: Net(lambda: nn.LSTM(WIDTH, HIDDEN), "out"),
    "lstm-hidden-only": lambda: Net(lambda: nn.LSTM(WIDTH, HIDDEN, batch_first=True), "h"),
    "lstm-cell-state-only": lambda: Net(lambda: nn.LSTM(WIDTH, HIDDEN, 2, batch_first=True), "c"),
    "lstm-deep": lambda: Net(lambda: nn.LSTM(WIDTH, HIDDEN, 2, bidirectional=True, batch_first=True), start=True),
    "lstm-start": lambda: Net(lambda: nn.LSTM(WIDTH, HIDDEN, 2, bias=False), start=True),
    "lstm-dropout-in-evaluation": lambda: Net(lambda: nn.LSTM(WIDTH, HIDDEN, 2, dropout=0.5)).eval(),
    "lstm-partly-frozen": lambda: frozen(
        Net(lambda: nn.LSTM(WIDTH, HIDDEN)), "core.weight_hh_l0", "core.bias_ih_l0", "before.weight"
    ),
    "gru": lambda: Net(lambda: nn.GRU(WIDTH, HIDDEN)),
    "gru-hidden-only": lambda: Net(lambda: nn.GRU(WIDTH, HIDDEN, bidirectional=True), "h"),
    "gru-deep": lambda: Net(lambda: nn.GRU(WIDTH, HIDDEN, 3, bidirectional=True), start=True),
    "gru-start": lambda: Net(lambda: nn.GRU(WIDTH, HIDDEN, batch_first=True, bias=False), start=True),
    "used-twice": ChainedUse,
    "rnn-cell": lambda: Loop(nn.RNNCell(WIDTH, HIDDEN, nonlinearity="relu")),
    "lstm-cell": lambda: Loop(nn.LSTMCell(WIDTH, HIDDEN)),
    "gru-cell": lambda: Loop(nn.GRUCell(WIDTH, HIDDEN, bias=False)),
}


class Case:
    def __init__(self, make, groups=None):
        torch.manual_seed(5)
        self.model = make().double()
        self.x = torch.randn(EXAMPLES, TIME, WIDTH, dtype=torch.float64)
        self.cotangent = torch.randn_like(self.model(self.x))
        trained = [name for name, p in self.model.named_parameters() if p.requires_grad]
        self.layers, self.blocks = find_layers(self.model, groups or dict.fromkeys(trained, 0))

    def loss(self, rows=slice(None)):
        return (self.model(self.x[rows]) * self.cotangent[rows]).sum()

    def outputs(self):
        return (self.model(self.x) * self.cotangent).flatten(1).sum(1)

    def one_by_one(self):
        named = dict(self.model.named_parameters())
        parameters = [named[name] for block in self.blocks for name in block.parameters]
        rows = []
        for i in range(EXAMPLES):
            found = torch.autograd.grad(self.loss(slice(i, i + 1)), parameters)
            rows.append(torch.cat([g.flatten() for g in found]))
        return torch.stack(rows)

    def recorded(self, dtype=None):
        pieces = []
        with Capture(self.layers, self.blocks, dtype).during_backward(EXAMPLES, lambda *piece: pieces.append(piece)):
            self.loss().backward()
        return pieces

    def dense(self, pieces):
        out = torch.zeros(EXAMPLES, sum(block.numel for block in self.blocks), dtype=torch.float64)
        for position, gradients in pieces:
            out[:, self.blocks[position].span] += gradients.dense()
        return out


@pytest.fixture(params=CASES)
def case(request):
    return Case(CASES[request.param])


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_both_ways_of_capturing_give_the_gradients_of_single_examples(case):
    expected = case.one_by_one()
    assert expected.abs().amax(0).gt(0).any()
    pieces = case.recorded()
    assert_equal(case.dense(pieces), expected)
    collected = collect(Capture(case.layers, case.blocks), EXAMPLES, case.outputs)
    assert_equal(case.dense(collected), expected)


def test_sums_are_the_parameters_own_gradients(case):
    found = case.dense(case.recorded()).sum(0)
    grads = {name: p.grad for name, p in case.model.named_parameters()}
    assert_equal(found, flatten_blocks(case.blocks, grads, torch.float64))


def test_every_matrix_is_a_block_in_factors_and_every_bias_a_block():
    case = Case(CASES["gru-deep"])
    kinds = dict(case.recorded())
    for position, block in enumerate(case.blocks):
        if block.name == "core":
            assert len(block.parameters) == 1
            matrix = block.shapes[0] if len(block.shapes[0]) == 2 else None
            assert block.matrix == matrix
            assert isinstance(kinds[position], LinearGradient if matrix else DenseGradient)
            assert matrix is None or kinds[position].matrix == matrix


def test_parameters_of_one_layer_in_two_optimizer_groups():
    names = [name for name, _ in CASES["lstm-deep"]().named_parameters()]
    case = Case(CASES["lstm-deep"], {name: number % 2 for number, name in enumerate(names)})
    assert [block.group for block in case.blocks] == sorted(block.group for block in case.blocks)
    assert_equal(case.dense(case.recorded()), case.one_by_one())


def test_gradients_come_in_the_number_format_asked_for():
    case = Case(CASES["lstm-deep"])
    expected = case.dense(case.recorded())
    case.model.float()
    case.x, case.cotangent = case.x.float(), case.cotangent.float()
    pieces = case.recorded(torch.float64)
    assert {gradients.dense().dtype for _, gradients in pieces} == {torch.float64}
    torch.testing.assert_close(case.dense(pieces), expected, rtol=1e-4, atol=1e-5)
