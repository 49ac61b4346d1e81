"""Torch's global states change no number of ours, and are not changed: bit for bit the same, or refused by name."""

from __future__ import annotations

import contextlib
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pkexplain as pk
from pkexplain.evaluation import Retraining, leave_one_out
from pkexplain.integrations.captum import PathKernelInfluence
from tests.conftest import digits

EXAMPLES = 48


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic_algorithms():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def anomaly_mode():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Anomaly Detection has been enabled")
        with torch.autograd.detect_anomaly():
            yield


STATES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default float64": lambda: default_dtype(torch.float64),
    "default float16": lambda: default_dtype(torch.float16),
    "default device": lambda: default_device("meta"),  # a tensor that does not name its device has no numbers
    "anomaly mode": anomaly_mode,
    "deterministic algorithms": deterministic_algorithms,
}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=False),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
}


def seen_from_outside():
    """Every state that a program can ask for."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.get_default_dtype(),
        str(torch.get_default_device()),
        torch.is_anomaly_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.get_num_threads(),
        torch.get_rng_state().tolist(),
    )


def model():
    net = nn.Sequential(nn.Linear(64, 12), nn.LayerNorm(12), nn.GELU(), nn.Linear(12, 10)).float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / 8 if p.ndim > 1 else torch.ones(p.shape))
    return net


def record(kind, state=contextlib.nullcontext):
    """Train under a state; the forward pass is the user's own, so it is kept out of autocast."""
    net, store, (x, y) = model(), pk.MemoryStore(), digits(EXAMPLES, dtype=torch.float32)
    optimizer = OPTIMIZERS[kind](net.parameters())
    loop = torch.arange(2 * EXAMPLES).remainder(EXAMPLES).split(8)
    recorder = pk.Recorder(
        store, net, optimizer, num_examples=EXAMPLES, projection=pk.Kronecker(64, warm_up_examples=20)
    )
    with state():
        before = seen_from_outside()
        with recorder:
            for ids in loop:
                with recorder.step(ids):
                    optimizer.zero_grad()
                    F.cross_entropy(net(x[ids]), y[ids]).backward()
                    optimizer.step()
        assert seen_from_outside() == before
    return net, store


def tensors(store):
    return {f"{name}/{key}": t for name in store.manifest().files for key, t in store.read(name).items()}


@pytest.fixture(scope="module", params=list(OPTIMIZERS))
def recorded(request):
    return request.param, *record(request.param)


@pytest.mark.parametrize("state", [s for s in STATES if s not in ("no_grad", "inference_mode", "autocast")])
def test_what_is_recorded_does_not_depend_on_it(recorded, state):
    kind, _, store = recorded
    if (kind, state) == ("adamw", "default device"):
        pytest.skip("torch's own AdamW keeps its step counter on the default device")
    _, other = record(kind, STATES[state])
    here, there = tensors(store), tensors(other)
    assert here.keys() == there.keys()
    for name, tensor in here.items():
        assert torch.equal(tensor.nan_to_num(), there[name].nan_to_num()), name
        assert tensor.dtype == there[name].dtype


@pytest.mark.parametrize("kind", list(OPTIMIZERS))
def test_a_training_in_autocast_with_its_backward_pass_is_not_changed(kind):
    """Torch advises against it: the backward pass is rounded, too. The account shows that on its line, and closes."""

    def trained(recorder_of):
        net, (x, y) = model(), digits(EXAMPLES, dtype=torch.float32)
        optimizer, store = OPTIMIZERS[kind](net.parameters()), pk.MemoryStore()
        with recorder_of(store, net, optimizer) as recorder:
            for ids in torch.arange(2 * EXAMPLES).remainder(EXAMPLES).split(8):
                with recorder.step(ids) if recorder else contextlib.nullcontext(), STATES["autocast"]():
                    optimizer.zero_grad()
                    F.cross_entropy(net(x[ids]).float(), y[ids]).backward()
                    optimizer.step()
        return net, store

    plain, _ = trained(lambda *_: contextlib.nullcontext())
    net, store = trained(lambda *parts: pk.Recorder(*parts, num_examples=EXAMPLES, projection=pk.Identity()))
    for one, other in zip(plain.parameters(), net.parameters(), strict=True):
        assert torch.equal(one, other)
    for segment in store.manifest().segments:
        assert segment.summary.displacement_gap < 1e-5
        assert segment.summary.optimizer_share < 0.03  # of a single step, in the first ones


def explained(net, store, x, y):
    """Every number that a user can ask for."""
    explainer, found = pk.Explainer(store, net), {}
    for reading in ("path", "removal"):
        explanations = explainer.explain(x[:4], reading=reading, output=pk.LogProbability(3))
        for q, each in enumerate(explanations):
            found[f"{reading} {q}"] = (
                each.ledger,
                each.proponents,
                each.opponents,
                [(check.name, check.value) for check in each.checks],
                each.contributions.tolist(),
            )
        found[reading] = explainer.contributions(x[:4], reading=reading).tolist()
    found["self"] = explainer.self_contributions(x[:5], range(5), output=pk.Margin(y[:5])).tolist()
    compressed = pk.Explainer(store, net, index="PCA16,SQ8").explain(x[0])
    found["compressed"] = (compressed.proponents, np.asarray(compressed.contributions).tolist())
    return found


@pytest.mark.parametrize("state", STATES)
def test_what_is_explained_does_not_depend_on_it(recorded, state):
    _, net, store = recorded
    x, y = digits(EXAMPLES, dtype=torch.float32)
    expected = explained(net, store, x, y)
    with STATES[state]():
        before = seen_from_outside()
        found = explained(net, store, x, y)
        assert seen_from_outside() == before
    for name in expected:
        assert found[name] == expected[name], name


@pytest.mark.parametrize("state", STATES)
def test_explanations_that_are_read_later_do_not_depend_on_it(recorded, state):
    _, net, store = recorded
    (x, _), explainer = digits(4, dtype=torch.float32), pk.Explainer(store, net, index="PCA16,SQ8")
    expected = explainer.explain(x[0]).contributions
    later = explainer.explain(x[0])
    with STATES[state]():
        assert later.contributions.tolist() == expected.tolist()


@pytest.mark.parametrize("state", STATES)
def test_comparing_does_not_depend_on_it(recorded, state):
    kind, net, store = recorded
    if kind != "sgd":
        pytest.skip("one optimizer is enough")
    x, y = digits(EXAMPLES + 4, dtype=torch.float32)
    data = list(zip(x[:EXAMPLES], y[:EXAMPLES].tolist(), strict=True))

    def compared():
        found = pk.compare(pk.Explainer(store, net), x[EXAMPLES:], y[EXAMPLES:], dataset=data)
        assert not found.left_out
        influence = PathKernelInfluence(net, data, store)
        return {method.name: method.scores.tolist() for method in found.methods} | {
            "captum": influence.influence((x[EXAMPLES:], y[EXAMPLES:])).tolist()
        }

    expected = compared()
    with STATES[state]():
        before = seen_from_outside()[:-1]  # Captum's methods draw random numbers
        found = compared()
        assert seen_from_outside()[:-1] == before
    for name in expected:
        assert found[name] == expected[name], name


@pytest.mark.parametrize("state", [s for s in STATES if not s.startswith("default")])  # the user's function has those
def test_retraining_does_not_depend_on_it(state):
    x, y = digits(EXAMPLES + 4, dtype=torch.float32)

    def retrain(ids, seed):
        net = model()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, foreach=False)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(net(x[torch.from_numpy(ids)]), y[torch.from_numpy(ids)]).backward()
            optimizer.step()
        return net

    def judged():
        retraining = Retraining(retrain, x[EXAMPLES:], output=pk.Logit(3), num_examples=EXAMPLES)
        return leave_one_out(retraining, range(0, 40, 4)).differences.tolist()

    expected = judged()
    with STATES[state]():
        assert judged() == expected
