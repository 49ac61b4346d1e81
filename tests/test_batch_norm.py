"""BatchNorm: the split of a batch's gradient over its examples, and the gradients of running statistics."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pkexplain as pk
from pkexplain.capture import Capture
from pkexplain.layers import find_buffer_layers, find_layers

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


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
@pytest.mark.parametrize("image", [False, True], ids=["mlp", "cnn"])
def test_an_examples_share_is_the_gradient_of_its_own_copy_of_the_weights(image, options):
    net, x = model(image, **options).train(), inputs(image)
    out, copies = with_copies(net, x)
    cotangent = torch.randn_like(out)
    ((out * cotangent).sum() + out.square().sum()).backward()
    expected = torch.cat([c.grad.flatten(1) for c in copies], dim=1)
    layers, blocks = find_layers(net, dict.fromkeys(dict(net.named_parameters()), 0))
    found = torch.zeros_like(expected)

    def add(position, gradients):
        found[:, blocks[position].span] += gradients.dense()

    with Capture(layers).during_backward(EXAMPLES, add):
        out = net(x)
        ((out * cotangent).sum() + out.square().sum()).backward()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    whole = torch.cat([p.grad.flatten() for p in net.parameters()])
    torch.testing.assert_close(found.sum(0), whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("options", [{}, {"affine": False}], ids=str)
@pytest.mark.parametrize("image", [False, True], ids=["mlp", "cnn"])
def test_gradients_of_running_statistics_are_finite_differences(image, options, trained):
    net, x = model(image, **options).eval(), inputs(image)
    net.requires_grad_(trained)
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2.0)
    layers = find_buffer_layers(net)
    assert [layer.blocks for layer in layers] == [((0, ("running_mean", "running_var")),)]
    with Capture(layers).collecting(EXAMPLES) as gradients:
        ((_, found),) = gradients(net(x).square().sum())
    for place in range(8):
        buffer, at = (net[1].running_mean, net[1].running_var)[place // 4], place % 4
        values = []
        for step in (-1e-5, 1e-5):
            buffer[at] += step
            with torch.no_grad():
                values.append(net(x).square().flatten(1).sum(1))
            buffer[at] -= step
        torch.testing.assert_close(found.dense()[:, place], (values[1] - values[0]) / 2e-5, rtol=1e-5, atol=1e-6)


def test_a_norm_without_running_statistics_has_no_buffers_to_differentiate():
    assert find_buffer_layers(nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.LayerNorm(3))) == []


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
