"""Backward passes within a step: what is in ``.grad`` when the optimizer steps counts, and the account closes."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pkexplain as pk
from pkexplain.errors import RecordingError
from pkexplain.explain.dense import path_kernel

N, B = 12, 4
X, Y = torch.randn(N, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(N) % 3


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def plain(model, optimizer, x, y):
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def adversarial(model, optimizer, x, y):
    """The gradient of the inputs by a pass that also fills the parameters' gradients, which are then zeroed."""
    x = x.clone().requires_grad_()
    F.cross_entropy(model(x), y).backward()
    x = (x + 0.1 * x.grad.sign()).detach()
    plain(model, optimizer, x, y)


def zeroed_in_place(model, optimizer, x, y):
    F.cross_entropy(3 * model(x), y).backward()
    optimizer.zero_grad(set_to_none=False)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def sharpness_aware(model, optimizer, x, y):
    """SAM: the gradient at a point uphill, applied to where the model was."""
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    moved = [0.05 * p.grad / p.grad.norm() for p in model.parameters()]
    with torch.no_grad():
        for p, e in zip(model.parameters(), moved, strict=True):
            p.add_(e)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    with torch.no_grad():
        for p, e in zip(model.parameters(), moved, strict=True):
            p.sub_(e)
    optimizer.step()


def gradient_penalty(model, optimizer, x, y):
    optimizer.zero_grad()
    x = x.clone().requires_grad_()
    out = model(x)
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    (F.cross_entropy(out, y) + slope.square().sum(1).mean()).backward()
    optimizer.step()


def looking_at_gradients(model, optimizer, x, y):
    """Derivatives that no ``.grad`` receives: by inputs, by parameters, and a backward pass to the inputs alone."""
    x = x.clone().requires_grad_()
    torch.autograd.grad(model(x).sum(), x)
    torch.autograd.grad(model(x).sum(), list(model.parameters()))
    model(x).sum().backward(inputs=[x])
    plain(model, optimizer, x.detach(), y)


def two_losses(model, optimizer, x, y):
    optimizer.zero_grad()
    out = model(x)
    F.cross_entropy(out, y).backward(retain_graph=True)
    (0.1 * out.square().mean()).backward()
    optimizer.step()


LOOPS = [plain, adversarial, zeroed_in_place, sharpness_aware, gradient_penalty, looking_at_gradients, two_losses]


def train(loop, run=None, model=None, make_optimizer=lambda p: torch.optim.SGD(p, lr=0.1), **options):
    model = model or make()
    optimizer = make_optimizer(model.parameters())
    if run is None:
        for _ in range(3):
            for ids in torch.arange(N).split(B):
                loop(model, optimizer, X[ids], Y[ids])
        return model
    options = {"projection": pk.Identity(), "dtype": torch.float64} | options
    with pk.Recorder(run, model, optimizer, num_examples=N, **options) as recorder:
        for _ in range(3):
            for ids in torch.arange(N).split(B):
                with recorder.step(ids):
                    loop(model, optimizer, X[ids], Y[ids])
    return model


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_every_loop_closes_and_is_the_unrecorded_one(loop, momentum):
    optimizer = lambda p: torch.optim.SGD(p, lr=0.1, momentum=momentum)  # noqa: E731 - used twice
    run = pk.MemoryStore()
    model, alone = train(loop, run, make_optimizer=optimizer), train(loop, make_optimizer=optimizer)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), alone.parameters(), strict=True))
    explanation = pk.Explainer(run, model).explain(X[0])
    assert explanation.passed, [check for check in explanation.checks if not check.passed]
    assert abs(explanation.ledger.remainders["optimizer"]) < 1e-10


@pytest.mark.parametrize("loop", LOOPS)
def test_a_row_is_the_examples_own_gradient(loop):
    """One step, batch by batch: the row of an example against the difference that its own loss makes."""
    model, run = make(), pk.MemoryStore()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = copy.deepcopy(model)
    ids = torch.arange(B)
    options = {"num_examples": B, "projection": pk.Identity(), "dtype": torch.float64}
    with pk.Recorder(run, model, optimizer, **options) as recorder, recorder.step(ids):
        loop(model, optimizer, X[ids], Y[ids])
    moved = torch.cat([(a - b).flatten() for a, b in zip(model.parameters(), before.parameters(), strict=True)])
    rows = run.trajectory().segment(0).read_rows(slice(None), torch.float64)
    torch.testing.assert_close(rows.sum(0), moved.detach(), rtol=1e-9, atol=1e-12)


def test_a_gradient_penalty_is_split_among_its_examples():
    model, run = make(), pk.MemoryStore()
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.arange(B)
    options = {"num_examples": B, "projection": pk.Identity(), "dtype": torch.float64}
    with pk.Recorder(run, model, optimizer, **options) as recorder, recorder.step(ids):
        gradient_penalty(model, optimizer, X[ids], Y[ids])
    rows = run.trajectory().segment(0).read_rows(slice(None), torch.float64)
    for i in range(B):
        x = X[i : i + 1].clone().requires_grad_()
        out = twin(x)
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        loss = (F.cross_entropy(out, Y[i : i + 1]) + slope.square().sum()) / B
        own = torch.cat([-0.1 * g.flatten() for g in torch.autograd.grad(loss, list(twin.parameters()))])
        torch.testing.assert_close(rows[i], own, rtol=1e-9, atol=1e-12)


def test_a_backward_pass_to_some_parameters_is_refused():
    def loop(model, optimizer, x, y):
        F.cross_entropy(model(x), y).backward(inputs=[model[0].weight])
        optimizer.step()

    with pytest.raises(RecordingError, match=r"some of the recorded parameters and not others\. Got 1 of 4"):
        train(loop, pk.MemoryStore())


# ------------------------------------------------------------------------------------------- what cannot be split


class Normalised(nn.Module):
    """The gradient of the batch is normalised on its way back: no share of it belongs to an example."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        hidden = torch.tanh(self.inner(x))
        if hidden.requires_grad and self.training:
            hidden.register_hook(lambda g: g / g.norm())
        return self.out(hidden)


def test_what_belongs_to_no_example_has_a_line_of_its_own():
    torch.manual_seed(0)
    run = pk.MemoryStore()
    with pytest.warns(UserWarning, match=r"the gradients of 2 parameters cannot be split .*inner\.weight"):
        model = train(plain, run, Normalised().double())
    alone = train(plain, None, _same_start(Normalised))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), alone.parameters(), strict=True))
    explanation = pk.Explainer(run, model).explain(X[:2])[0]
    assert explanation.passed
    assert abs(explanation.ledger.remainders["unsplit"]) > 1e-3
    assert abs(explanation.ledger.remainders["optimizer"]) < 1e-10
    assert abs(explanation.ledger.gap) < 1e-10
    summary = run.trajectory().summaries[0].split
    assert set(summary.unsplit) == {"inner.weight", "inner.bias"}
    assert all(0 < share < 1 for share in summary.unsplit.values())
    exact = path_kernel(run, model.eval(), X[:2])
    assert abs(exact.gap).max() < 1e-9
    assert exact.unsplit[0] == pytest.approx(explanation.ledger.remainders["unsplit"], rel=1e-3)
    assert "unsplit" in str(explanation)


def _same_start(kind):
    torch.manual_seed(0)
    return kind().double()


def test_what_cannot_be_split_may_be_refused():
    model = _same_start(Normalised)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RecordingError, match=r"'inner\.bias' and 1 others: its gradient cannot be split"):
        train(plain, pk.MemoryStore(), model, unsplit="refuse")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))


def test_a_second_optimizer_is_refused_at_the_first_step():
    model = make()
    head, body = torch.optim.SGD(model[2].parameters(), lr=0.1), torch.optim.SGD(model[0].parameters(), lr=0.1)

    def both(model, optimizer, x, y):
        F.cross_entropy(model(x), y).backward()
        head.step()
        body.step()

    with pytest.raises(RecordingError, match=r"beside parameter '0\.weight': it changed, and the recorder's optimizer"):
        train(both, pk.MemoryStore(), model, lambda _: head)


# ----------------------------------------------------------------------------------------------- which output it is


class Several(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.a, self.l, self.form = nn.Linear(6, 4), nn.Linear(4, 3), form

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.form(h, self.l(h))


@pytest.mark.parametrize(
    ("form", "of", "path"),
    [
        (lambda h, y: (h, y), lambda out: out[1], "1"),
        (lambda h, y: (y, h), lambda out: out[0], "0"),
        (lambda h, y: {"hidden": h, "logits": y}, lambda out: out["logits"], "logits"),
        (lambda h, y: {"hidden": h, "heads": [y]}, lambda out: out["heads"][0], "heads.0"),
    ],
)
def test_the_output_that_the_loss_uses_is_explained(form, of, path):
    torch.manual_seed(0)
    model, run = Several(form).double(), pk.MemoryStore()
    loop = lambda m, o, x, y: (o.zero_grad(), F.cross_entropy(of(m(x)), y).backward(), o.step())  # noqa: E731
    train(loop, run, model)
    assert run.trajectory().manifest.output == path
    assert pk.Explainer(run, model).explain(X[0], output=pk.Logit(2)).final == pytest.approx(
        of(model(X[:1]))[0, 2].item(), rel=1e-9
    )


def test_a_model_that_takes_one_mapping_is_asked_with_one():
    class OneDict(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(6, 3)

        def forward(self, batch):
            out = self.l(batch["x"])
            return {"loss": F.cross_entropy(out, batch["y"]), "logits": out} if "y" in batch else {"logits": out}

    torch.manual_seed(0)
    model, run = OneDict().double(), pk.MemoryStore()
    train(lambda m, o, x, y: (o.zero_grad(), m({"x": x, "y": y})["loss"].backward(), o.step()), run, model)
    wanted = model({"x": X[:2]})["logits"].detach().max(1).values.tolist()
    for query in ({"x": X[:2]}, ({"x": X[:2]},)):
        assert [e.final for e in pk.Explainer(run, model).explain(query)] == pytest.approx(wanted)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
@pytest.mark.parametrize("reading", ["path", "removal"])
def test_the_callers_torch_state_changes_no_number(mode, reading):
    run = pk.MemoryStore()
    model = train(plain, run)
    expected = pk.Explainer(run, model).contributions(X[:3], reading=reading)
    with mode():
        explainer, queries = pk.Explainer(run, model), X[:3].clone()
        found = explainer.contributions(queries, reading=reading)
        explanation = explainer.explain(queries[0], reading=reading)
    assert (found == expected).all()
    assert explanation.passed


def test_a_loss_that_would_broadcast_is_refused():
    torch.manual_seed(0)
    model, run = nn.Linear(6, 1).double(), pk.MemoryStore()
    train(lambda m, o, x, y: (o.zero_grad(), F.mse_loss(m(x)[:, 0], x[:, 0]).backward(), o.step()), run, model)
    explainer = pk.Explainer(run, model)
    with pytest.raises(pk.errors.QueryError, match=r"shape \(3, 1\) and targets of shape \(3,\)"):
        explainer.explain(X[:3], output=pk.Loss(X[:3, 0], F.mse_loss))
    fine = explainer.explain(X[:3], output=pk.Loss(X[:3, :1], F.mse_loss))
    wanted = (model(X[:3])[:, 0] - X[:3, 0]).square().tolist()
    assert [e.final for e in fine] == pytest.approx(wanted)
