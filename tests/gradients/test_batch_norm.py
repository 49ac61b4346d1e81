"""BatchNorm: the split of a batch's gradient over its examples."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pkexplain as pk
from pkexplain.gradients.batch_norm import RowMixture
from pkexplain.gradients.capture import Capture
from pkexplain.gradients.layers import find_layers
from tests.conftest import batches, digits, train

EXAMPLES = 5


def model(image: bool, **options) -> nn.Sequential:
    torch.manual_seed(1)
    first = nn.Conv2d(2, 4, 2) if image else nn.Linear(6, 4)
    norm = (nn.BatchNorm2d if image else nn.BatchNorm1d)(4, **options)
    second = nn.Conv2d(4, 3, 2) if image else nn.Linear(4, 3)
    made = nn.Sequential(first, norm, nn.Tanh(), second).double()
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn_like(p))
    return made


def inputs(image: bool) -> Tensor:
    return torch.randn(EXAMPLES, *((2, 4, 4) if image else (6,)), dtype=torch.float64)


def with_copies(net: nn.Sequential, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Run the net with one copy of every parameter for each example, the batch's statistics over the batch."""
    copies = [p.detach().expand(EXAMPLES, *p.shape).clone().requires_grad_() for p in net.parameters()]
    first_w, first_b, *scales, second_w, second_b = copies
    each = F.conv2d if x.ndim == 4 else F.linear
    x = torch.stack([each(x[i : i + 1], first_w[i], first_b[i])[0] for i in range(EXAMPLES)])
    axes = (0, *range(2, x.ndim))
    mean = x.mean(axes, keepdim=True)
    x = (x - mean) / ((x - mean).square().mean(axes, keepdim=True) + net[1].eps).sqrt()
    if scales:
        weight, bias = (s.reshape(EXAMPLES, 4, *(1,) * (x.ndim - 2)) for s in scales)
        x = x * weight + bias
    x = torch.tanh(x)
    return torch.stack([each(x[i : i + 1], second_w[i], second_b[i])[0] for i in range(EXAMPLES)]), copies


def captured(net, parameters, run):
    """Capture a backward pass; return the gradients of every example, ``(EXAMPLES, parameters)``."""
    layers, blocks = find_layers(net, dict.fromkeys(parameters, 0))
    found = torch.zeros(EXAMPLES, sum(block.numel for block in blocks), dtype=torch.float64)

    def add(position, gradients):
        found[:, blocks[position].span] += gradients.dense()
        torch.testing.assert_close(gradients.dense().sum(0), gradients.total(), rtol=1e-10, atol=1e-10)

    with Capture(layers, blocks).during_backward(EXAMPLES, add):
        run().backward()
    return found


def through_its_own(front, normalise, x, dy, elsewhere=None):
    """Differentiate ⟨dy_j, y_j⟩, and what reached z_j otherwise, for each example j; all have the same weights."""
    rows = []
    for j in range(EXAMPLES):
        z = front(x)
        value = (normalise(z)[j] * dy[j]).sum() + (0 if elsewhere is None else (z[j] * elsewhere[j]).sum())
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, list(front.parameters()))]))
    return torch.stack(rows)


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
@pytest.mark.parametrize("image", [False, True], ids=["mlp", "cnn"])
def test_shares_go_through_an_examples_own_normalised_output_and_its_own_copies(image, options):
    net, x = model(image, **options).train(), inputs(image)
    out, copies = with_copies(net, x)
    cotangent = torch.randn_like(out)

    def loss(out):
        return (out * cotangent).sum() + out.square().sum()

    loss(out).backward()
    expected = torch.cat([c.grad.flatten(1) for c in copies], dim=1)
    y = net[1](net[0](x)).detach().requires_grad_()
    (dy,) = torch.autograd.grad(loss(net[2:](y)), y)
    front = through_its_own(net[0], net[1], x, dy)
    expected[:, : front.shape[1]] = front
    found = captured(net, dict(net.named_parameters()), lambda: loss(net(x)))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    whole = torch.cat([p.grad.flatten() for p in net.parameters()])
    torch.testing.assert_close(found.sum(0), whole, rtol=1e-10, atol=1e-10)
    bias = slice(net[0].weight.numel(), front.shape[1])
    assert found[:, bias].abs().max() < 1e-12 * found.abs().max()  # a bias before a norm moves nothing


def test_an_output_that_two_norms_and_something_else_use():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.front, self.one, self.two = nn.Linear(6, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4, affine=False)

        def forward(self, x):
            z = self.front(x)
            return self.one(z).tanh() + self.two(z).square() + z.sin()

    torch.manual_seed(2)
    net, x = Branches().double().train(), inputs(image=False)
    cotangent = torch.randn(EXAMPLES, 4, dtype=torch.float64)
    found = captured(net, ["front.weight", "front.bias"], lambda: (net(x) * cotangent).sum())
    z = net.front(x).detach()
    one, two = (norm(z).detach().requires_grad_() for norm in (net.one, net.two))
    z.requires_grad_()
    parts = torch.autograd.grad(((one.tanh() + two.square() + z.sin()) * cotangent).sum(), [one, two, z])
    expected = through_its_own(net.front, net.one, x, parts[0]) + through_its_own(
        net.front, net.two, x, parts[1], parts[2]
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_a_mixture_of_rows_is_projected_and_scaled_as_its_dense_form():
    torch.manual_seed(0)
    for weight, bias in ((True, True), (True, False), (False, True)):
        columns = 3 * weight + bias
        mixture = RowMixture(torch.randn(5, 2, 4), torch.randn(2, 4, columns), weight, bias)
        full = torch.einsum("jqm,qmn->jmn", mixture.output_gradients, mixture.matrices)
        left, right = torch.randn(2, 4), torch.randn(3, columns)
        torch.testing.assert_close(mixture.sketch(left, right), left @ full @ right.T)
        torch.testing.assert_close(mixture.sketch(None, right), full @ right.T)
        torch.testing.assert_close(mixture.sketch(left, None), left @ full)
        dense, factors = mixture.dense(), torch.rand(4 * columns)
        torch.testing.assert_close(mixture.scaled(factors).dense(), dense * factors)
        torch.testing.assert_close(mixture.total(), dense.sum(0))
        torch.testing.assert_close(mixture.select(torch.tensor([3, 0])).dense(), dense[[3, 0]])


def test_adam_behind_a_bias_that_moves_nothing_does_not_blow_contributions_up():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))
    x, y = digits(240, torch.float32)
    optimizer, store = torch.optim.AdamW(net.parameters(), lr=1e-3), pk.MemoryStore()
    recorder = pk.Recorder(store, net.train(), optimizer, num_examples=240)
    with pytest.warns(
        UserWarning, match=r"100% of what moved 0\.bias .* A bias before a BatchNorm is moved by rounding"
    ):
        train(net, optimizer, x, y, batches(240, 24, 3), recorder=recorder)
    explanation = pk.Explainer(store, net).explain(x[0], output=pk.Margin(int(y[0])))
    values = {check.name: check.value for check in explanation.checks}
    assert values["displacement gap"] < 1e-3  # constant pixels before the norm stand still, too
    assert values["audit error"] < 0.2
    assert explanation.gross < 1e3 * abs(explanation.final - explanation.initial)


def test_a_frozen_body_with_an_in_place_activation_behind_its_norm_is_explained():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(2, 4, 2), nn.BatchNorm2d(4), nn.ReLU(inplace=True)).requires_grad_(False)
    net = nn.Sequential(body, nn.Flatten(), nn.Linear(36, 3)).double()
    optimizer, store, x = torch.optim.AdamW(net.parameters(), lr=1e-2), pk.MemoryStore(), inputs(image=True)
    with pk.Recorder(
        store, net, optimizer, num_examples=EXAMPLES, projection=pk.Identity(), dtype=torch.float64, segments=2
    ) as recorder:
        for _ in range(6):
            with recorder.step(range(EXAMPLES)):
                optimizer.zero_grad()
                F.cross_entropy(net(x), torch.arange(EXAMPLES) % 3).backward()
                optimizer.step()
    explanation = pk.Explainer(store, net, tolerance=1e-5, quadrature=pk.Quadrature(8, 512)).explain(x[0])
    values = {check.name: check.value for check in explanation.checks}
    assert values["quadrature gap"] < 1e-4
    assert values["optimizer share"] < 1e-9
    assert abs(explanation.ledger.remainders["buffers"]) > 1e-3


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_recorded_step_keeps_none_of_its_activations(kind):
    net = model(image=True)
    optimizer, outputs = kind(net.parameters(), lr=1e-3), []
    net[0].register_forward_hook(lambda _, __, output: outputs.append(weakref.ref(output)))
    with pk.Recorder(
        pk.MemoryStore(),
        net,
        optimizer,
        num_examples=EXAMPLES,
        projection=pk.Identity(),
        segments=2,
        augmented=True,
    ) as recorder:
        gc.disable()  # what only the collector can free is, on a real model, memory that runs out first
        try:
            for _ in range(4):
                with recorder.step(range(EXAMPLES)):
                    optimizer.zero_grad()
                    net(inputs(image=True)).square().mean().backward()
                    optimizer.step()
        finally:
            gc.enable()
        assert [output() for output in outputs] == [None] * 4
