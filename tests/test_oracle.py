"""Test the oracle against truths not its own: pencil, finite differences, torch's optimizer, closed forms."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from tests import oracle


@pytest.fixture(autouse=True)
def one_thread():
    """Run on one thread, and give the others back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def small_mlp(seed: int = 0) -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 3)).double()
    for number, parameter in enumerate(model.parameters()):
        parameter.data = 0.7 * random(*parameter.shape, seed=100 * seed + number)
    return model


def linear(weights: list[float]) -> nn.Module:
    model = nn.Linear(len(weights), 1, bias=False).double()
    model.weight.data = torch.tensor([weights], dtype=torch.float64)
    return model


def half_squares(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return 0.5 * (outputs.squeeze(-1) - targets).square().sum()


def first(row: torch.Tensor) -> torch.Tensor:
    return row[0]


INPUTS = random(6, 3, seed=1)
LABELS = torch.tensor([0, 1, 2, 2, 1, 0])
BATCHES = [[0, 1, 2], [3, 4], [5, 0, 0], [1, 5], [2, 3, 4], [0, 4], [5, 1, 3]]
PARAMETERS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.3},
    "nesterov": {"momentum": 0.9, "nesterov": True},
}

# Short memories of the squares, so that they fall as well as rise within these few steps.
OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3}),
    "Adam": (torch.optim.Adam, {}),
    "Adam amsgrad": (torch.optim.Adam, {"betas": (0.8, 0.5), "amsgrad": True}),
    "Adam decoupled": (torch.optim.Adam, {"decoupled_weight_decay": True}),
    "AdamW": (torch.optim.AdamW, {"betas": (0.8, 0.7), "eps": 1e-3}),
    "AdamW amsgrad": (torch.optim.AdamW, {"betas": (0.8, 0.5), "amsgrad": True}),
    "NAdam": (torch.optim.NAdam, {"betas": (0.8, 0.7), "momentum_decay": 0.3}),
    "NAdam decoupled": (torch.optim.NAdam, {"decoupled_weight_decay": True}),
    "RAdam": (torch.optim.RAdam, {"eps": 1e-3}),
    "RAdam decoupled": (torch.optim.RAdam, {"betas": (0.8, 0.9), "decoupled_weight_decay": True}),
    "RMSprop": (torch.optim.RMSprop, {"alpha": 0.7, "eps": 1e-3}),
    "RMSprop momentum": (torch.optim.RMSprop, {"alpha": 0.7, "momentum": 0.8}),
    "RMSprop centered": (torch.optim.RMSprop, {"alpha": 0.7, "centered": True}),
    "RMSprop centered momentum": (torch.optim.RMSprop, {"momentum": 0.8, "centered": True}),
    "Adagrad": (torch.optim.Adagrad, {"eps": 1e-3}),
    "Adagrad decay": (torch.optim.Adagrad, {"lr_decay": 0.3, "initial_accumulator_value": 0.1}),
    "Adamax": (torch.optim.Adamax, {"betas": (0.8, 0.7), "eps": 1e-3}),
}
WAYS = {
    "plain": {},
    "weight decay": {"weight_decay": 0.2},
    "clip and schedule": {"clip_norm": 0.3, "schedule": True},
    "all and two groups": {"weight_decay": 0.2, "clip_norm": 0.3, "schedule": True, "two_groups": True},
}


def sgd(model: nn.Module, *, two_groups: bool = False, **options) -> torch.optim.SGD:
    if not two_groups:
        return torch.optim.SGD(model.parameters(), lr=0.2, **options)
    biases = [p for p in model.parameters() if p.ndim == 1]
    weights = [p for p in model.parameters() if p.ndim > 1]
    special = {"params": biases, "lr": 0.05, "weight_decay": 0.0, "momentum": 0.5 * options.get("momentum", 0.0)}
    return torch.optim.SGD([special, {"params": weights}], lr=0.2, **options)


def train_mlp(*, schedule=None, clip_norm=None, steps_per_segment=3, loss=nn.functional.cross_entropy, **options):
    model = small_mlp()
    run = oracle.train(
        model,
        lambda m: sgd(m, **options),
        INPUTS,
        LABELS,
        BATCHES,
        loss=loss,
        schedule=schedule,
        steps_per_segment=steps_per_segment,
        clip_norm=clip_norm,
    )
    return model, run


def exponential(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.8)


def train_adaptive(name, *, weight_decay=0.0, schedule=None, clip_norm=None, two_groups=False, **options):
    """Train with one of `OPTIMIZERS`; return the model, the run and the states of the parameters after each step."""
    kind, special = OPTIMIZERS[name]
    states = []

    def make(model):
        groups = [{"params": list(model.parameters())}]
        if two_groups:
            biases = [p for p in model.parameters() if p.ndim == 1]
            weights = [p for p in model.parameters() if p.ndim > 1]
            groups = [{"params": biases, "lr": 0.01, "weight_decay": 0.3, "eps": 1e-2}, {"params": weights}]
            if kind is torch.optim.SGD:
                del groups[0]["eps"]
        optimizer = kind(groups, **{"lr": 0.05, "weight_decay": weight_decay, **special, **options})

        def keep(optimizer, _args, _kwargs):
            states.append([copy.deepcopy(optimizer.state[p]) for p in model.parameters()])

        optimizer.register_step_post_hook(keep)
        return optimizer

    model = small_mlp()
    run = oracle.train(
        model,
        make,
        INPUTS,
        LABELS,
        BATCHES,
        loss=nn.functional.cross_entropy,
        schedule=exponential if schedule is True else schedule,
        steps_per_segment=3,
        clip_norm=clip_norm,
    )
    return model, run, states


def explains_every_segment(run: oracle.OracleRun) -> bool:
    moved = run.checkpoints.diff(dim=0)
    return bool((oracle.optimizer_line(run).norm(dim=1) < 1e-10 * moved.norm(dim=1)).all())


@pytest.mark.parametrize(("name", "way"), list(itertools.product(OPTIMIZERS, WAYS)))
def test_every_optimizers_displacements_and_decay_add_up(name, way):
    _, run, _ = train_adaptive(name, **WAYS[way])
    assert explains_every_segment(run)
    assert "clip" not in way or min(step.scale for step in run.steps) < 0.9
    assert bool((oracle.decay(run).norm(dim=1) > 1e-4).all()) == ("weight_decay" in WAYS[way])


@pytest.mark.parametrize("name", ["Adam", "AdamW amsgrad", "NAdam", "RAdam", "Adamax", "RMSprop momentum"])
def test_a_schedule_that_moves_the_betas_too_leaves_nothing(name):
    def one_cycle(optimizer):
        if "momentum" in optimizer.defaults:
            return torch.optim.lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, step_size_up=3)
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=len(BATCHES) + 1)

    _, run, _ = train_adaptive(name, weight_decay=0.2, schedule=one_cycle)
    assert len({step.groups[0].get("beta1", step.groups[0].get("momentum")) for step in run.steps}) > 3
    assert explains_every_segment(run)


def test_a_learning_rate_tensor_is_recorded_as_it_was():
    lr = torch.tensor(0.05, dtype=torch.float64)
    _, run, _ = train_adaptive("AdamW", schedule=True, weight_decay=0.2, lr=lr)
    assert [step.groups[0]["lr"] for step in run.steps] == pytest.approx([0.05 * 0.8**s for s in range(len(BATCHES))])
    assert explains_every_segment(run)


def squares_before(state: dict[str, torch.Tensor], group: dict, gradient: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what the squares must be before a step on `gradient` for it to leave them as they are in `state`."""
    keep, square = group.get("alpha", group.get("beta2")), gradient.square()
    undo = {
        "exp_avg_sq": lambda after: (after - (1 - keep) * square) / keep,
        "max_exp_avg_sq": lambda after: after,
        "square_avg": lambda after: (after - (1 - keep) * square) / keep,
        "grad_avg": lambda after: (after - (1 - keep) * gradient) / keep,
        "sum": lambda after: after - square,
        "exp_inf": lambda after: after / keep,
    }
    return {key: undo[key](after) for key, after in state.items() if key in undo}


@pytest.mark.parametrize(("name", "way"), list(itertools.product(OPTIMIZERS, WAYS)))
def test_every_displacement_is_what_torch_makes_of_that_examples_gradients_alone(name, way):
    # torch's own optimizer moves a zero vector by one example's gradients. Before each step its squares are set so that
    # they come out of the step as they did in training; the gradients are made small, to be under Adamax's maximum.
    _, run, states = train_adaptive(name, **WAYS[way])
    kind, special = OPTIMIZERS[name]
    small, found = 1e-3, oracle.displacements(run)
    for example, (number, group) in itertools.product([0, 4], enumerate(run.steps[0].groups)):
        mine = run.owner == number
        vector = nn.Parameter(torch.zeros(int(mine.sum()), dtype=torch.float64))
        vector.grad = torch.zeros_like(vector)
        optimizer = kind([vector], **{**special, "weight_decay": 0.0})
        if "eps" in group:
            optimizer.param_groups[0]["eps"] = group["eps"]
        if kind is not torch.optim.SGD:  # torch makes its state in the first step: one on zero, taken back
            optimizer.step()
            optimizer.state[vector]["step"].zero_()
            if "mu_product" in optimizer.state[vector]:
                optimizer.state[vector]["mu_product"].fill_(1.0)
        for t, segment in enumerate(run.segments):
            start = vector.detach().clone()
            for s in segment:
                rows = [row for row, visitor in enumerate(run.steps[s].ids) if visitor == example]
                vector.grad = small * run.steps[s].scale * run.steps[s].gradients[rows].sum(dim=0)[mine]
                vectors = [key for key, value in states[s][0].items() if torch.is_tensor(value) and value.ndim > 0]
                recorded = {key: torch.cat([state[key].flatten() for state in states[s]])[mine] for key in vectors}
                for key, before in squares_before(recorded, group, vector.grad).items():
                    optimizer.state[vector][key].copy_(before)
                optimizer.param_groups[0]["lr"] = group["lr"] * (0.8**s if "schedule" in WAYS[way] else 1.0)
                optimizer.step()
            moved = (vector.detach() - start) / small
            assert float((moved - found[t, example, mine]).norm()) <= 1e-10 * float(moved.norm())
            assert float(moved.norm()) > 1e-5 or example not in run.steps[segment.start].ids


def closed_form(run, share, divisors) -> torch.Tensor:
    """Return `(segments, examples, parameters)`: minus the sum over visits, at r, and s >= r of share(r, s) g_r / d."""
    result = torch.zeros(len(run.segments), run.num_examples, len(run.final), dtype=torch.float64)
    for r, visited in enumerate(run.steps):
        for row, example in enumerate(visited.ids):
            for s in range(r, len(run.steps)):
                moved = share(r, s) * visited.scale * visited.gradients[row]
                result[s // 3, example] -= 0.05 * 0.8**s * moved / divisors(r, s)
    return result


def running_mean(run: oracle.OracleRun, keep: float) -> list[torch.Tensor]:
    """Return, after each step s, the sum over q <= s of (1 - keep) keep^(s - q) G_q^2, from the gradients alone."""
    wholes = [step.scale * step.gradients.sum(dim=0) for step in run.steps]
    return [sum((1 - keep) * keep ** (s - q) * wholes[q].square() for q in range(s + 1)) for s in range(len(run.steps))]


def test_adam_in_closed_form():
    _, run, _ = train_adaptive("Adam", clip_norm=0.3, schedule=True)
    v = running_mean(run, 0.999)

    def share(r, s):
        return 0.1 * 0.9 ** (s - r) / (1 - 0.9 ** (s + 1))

    expected = closed_form(run, share, lambda r, s: (v[s] / (1 - 0.999 ** (s + 1))).sqrt() + 1e-8)
    torch.testing.assert_close(oracle.displacements(run), expected, rtol=1e-9, atol=1e-14)


def test_radam_without_and_with_rectification_in_closed_form():
    _, run, _ = train_adaptive("RAdam", clip_norm=0.3, schedule=True)
    v = running_mean(run, 0.999)

    def rectified(s):
        n, longest = s + 1, 1999.0
        length = longest - 2 * n * 0.999**n / (1 - 0.999**n)
        return ((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)) ** 0.5

    def divisor(r, s):
        if s < 5:  # Liu et al.: with beta2 = 0.999 the first five steps are momentum alone
            return torch.ones_like(run.final)
        return (v[s].sqrt() + 1e-3) / (1 - 0.999 ** (s + 1)) ** 0.5 / rectified(s)

    expected = closed_form(run, lambda r, s: 0.1 * 0.9 ** (s - r) / (1 - 0.9 ** (s + 1)), divisor)
    torch.testing.assert_close(oracle.displacements(run), expected, rtol=1e-9, atol=1e-14)


def test_nadam_in_closed_form():
    _, run, _ = train_adaptive("NAdam", clip_norm=0.3, schedule=True)
    v = running_mean(run, 0.7)
    mu = [0.8 * (1 - 0.5 * 0.96 ** (0.3 * (s + 1))) for s in range(len(BATCHES) + 1)]
    products = list(itertools.accumulate(mu, lambda product, factor: product * factor))

    def share(r, s):
        ahead = mu[s + 1] * 0.2 * 0.8 ** (s - r) / (1 - products[s + 1])
        return ahead + (s == r) * (1 - mu[s]) / (1 - products[s])

    expected = closed_form(run, share, lambda r, s: (v[s] / (1 - 0.7 ** (s + 1))).sqrt() + 1e-8)
    # torch keeps the product of mu in float32
    torch.testing.assert_close(oracle.displacements(run), expected, rtol=1e-6, atol=1e-14)


def test_rmsprop_with_momentum_in_closed_form():
    # Each gradient is divided at its own step, not when the momentum moves the parameters.
    _, run, _ = train_adaptive("RMSprop momentum", clip_norm=0.3, schedule=True)
    v = running_mean(run, 0.7)
    expected = closed_form(run, lambda r, s: 0.8 ** (s - r), lambda r, s: v[r].sqrt() + 1e-8)
    torch.testing.assert_close(oracle.displacements(run), expected, rtol=1e-9, atol=1e-14)


def test_coupled_and_decoupled_decay_in_closed_form():
    for name, coupled in [("Adam", True), ("Adam decoupled", False)]:
        _, run, _ = train_adaptive(name, weight_decay=0.2, schedule=True)
        expected = torch.zeros(len(run.segments), len(run.final), dtype=torch.float64)
        for r, step in enumerate(run.steps):
            if not coupled:
                expected[r // 3] -= 0.05 * 0.8**r * 0.2 * step.parameters
                continue
            for s in range(r, len(run.steps)):
                wholes = [past.gradients.sum(dim=0) + 0.2 * past.parameters for past in run.steps[: s + 1]]
                v = sum(0.001 * 0.999 ** (s - q) * whole.square() for q, whole in enumerate(wholes))
                divisor = (v / (1 - 0.999 ** (s + 1))).sqrt() + 1e-8
                share = 0.05 * 0.8**s * 0.1 * 0.9 ** (s - r) / (1 - 0.9 ** (s + 1))
                expected[s // 3] -= share * 0.2 * step.parameters / divisor
        torch.testing.assert_close(oracle.decay(run), expected, rtol=1e-9, atol=1e-14)


def test_unknown_optimizers_and_maximizing_are_refused():
    class MyAdam(torch.optim.Adam):
        pass

    for make in [
        lambda m: torch.optim.Rprop(m.parameters()),
        lambda m: torch.optim.LBFGS(m.parameters()),
        lambda m: torch.optim.Adadelta(m.parameters()),
        lambda m: MyAdam(m.parameters()),
        lambda m: torch.optim.Adam(m.parameters(), maximize=True),
        lambda m: torch.optim.SGD(m.parameters(), lr=0.1, maximize=True),
    ]:
        with pytest.raises(ValueError, match=r"the oracle knows SGD, Adam, .* minimizing"):
            oracle.train(
                small_mlp(), make, INPUTS, LABELS, BATCHES, loss=nn.functional.cross_entropy, steps_per_segment=3
            )


@pytest.mark.parametrize("name", ["AdamW", "NAdam", "RAdam", "RMSprop centered momentum", "Adagrad decay", "Adamax"])
def test_kernel_times_weight_is_the_contribution_of_adaptive_optimizers_too(name):
    model, run, _ = train_adaptive(name, clip_norm=0.3, schedule=True, weight_decay=0.2)
    phi = oracle.covectors(run, model, random(2, 3, seed=7), first, nodes=8, pieces=1)
    expected = oracle.contributions(phi, oracle.displacements(run))
    for kernel, weight in (oracle.kernel_and_weight(run, phi), oracle.exact_kernel_and_weight(run, phi)):
        torch.testing.assert_close(kernel * weight, expected, rtol=1e-10, atol=1e-14)
    assert (oracle.row_loss_derivatives(run) < 0).any()


@pytest.mark.parametrize(
    ("kind", "weight_decay", "schedule", "two_groups", "clip_norm"),
    list(itertools.product(PARAMETERS, [0.0, 0.1], [None, exponential], [False, True], [None, 0.3])),
)
def test_nothing_is_left_on_the_optimizer_line(kind, weight_decay, schedule, two_groups, clip_norm):
    _, run = train_mlp(
        schedule=schedule,
        clip_norm=clip_norm,
        two_groups=two_groups,
        weight_decay=weight_decay,
        **PARAMETERS[kind],
    )
    assert oracle.optimizer_line(run).abs().max() < 3e-15
    assert run.checkpoints.diff(dim=0).abs().max() > 1e-3
    assert clip_norm is None or min(step.scale for step in run.steps) < 0.9
    assert (oracle.decay(run).abs().max() > 1e-3) == (weight_decay > 0)


def test_a_schedule_that_moves_momentum_too_leaves_nothing():
    def one_cycle(optimizer):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=len(BATCHES) + 1)

    _, run = train_mlp(schedule=one_cycle, momentum=0.9, weight_decay=0.1)
    assert len({step.groups[0]["momentum"] for step in run.steps}) > 3
    assert oracle.optimizer_line(run).abs().max() < 3e-15


@pytest.mark.parametrize("kind", PARAMETERS)
def test_displacements_follow_the_table_of_shares(kind):
    options = PARAMETERS[kind]
    _, run = train_mlp(schedule=exponential, clip_norm=0.3, **options)
    mu, dampening = options.get("momentum", 0.0), options.get("dampening", 0.0)
    expected = torch.zeros(len(run.segments), 6, len(run.final), dtype=torch.float64)
    for r, visited in enumerate(run.steps):
        for row, example in enumerate(visited.ids):
            for s in range(r, len(run.steps)):
                if options.get("nesterov"):
                    share = mu ** (s - r + 1) + (s == r)
                else:
                    share = mu ** (s - r) * (1 if r == 0 else 1 - dampening)
                share *= 0.2 * 0.8**s * visited.scale
                expected[s // 3, example] -= share * visited.gradients[row]
    torch.testing.assert_close(oracle.displacements(run), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", PARAMETERS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_contributions_and_named_lines_add_up_to_the_change_of_the_output(kind, reduction):
    def loss(outputs, targets):
        return nn.functional.cross_entropy(outputs, targets, reduction=reduction)

    def margin(row):
        return row[1] - torch.logsumexp(row, 0)

    model, run = train_mlp(loss=loss, schedule=exponential, clip_norm=0.5, weight_decay=0.1, **PARAMETERS[kind])
    queries = random(2, 3, seed=7)
    phi = oracle.covectors(run, model, queries, margin, nodes=16, pieces=2)
    lines = oracle.decay(run) + oracle.optimizer_line(run)
    outputs = oracle.outputs_at_checkpoints(run, model, queries, margin)
    by_segment = oracle.contributions_by_segment(phi, oracle.displacements(run))
    remainders = torch.einsum("tqp,tp->tq", phi, lines)
    torch.testing.assert_close(by_segment.sum(2) + remainders, outputs.diff(dim=0), rtol=0, atol=1e-9)
    total = oracle.contributions(phi, oracle.displacements(run)).sum(1) + remainders.sum(0)
    torch.testing.assert_close(total, outputs[-1] - outputs[0], rtol=0, atol=1e-9)
    assert outputs.diff(dim=0).abs().max() > 1e-2
    with torch.no_grad():
        torch.testing.assert_close(outputs[-1], torch.stack([margin(row) for row in model(queries)]))
        torch.testing.assert_close(
            outputs[0], torch.stack([margin(row) for row in small_mlp()(queries)]), rtol=0, atol=1e-14
        )


def test_default_quadrature_is_converged():
    model, run = train_mlp(steps_per_segment=7, momentum=0.9)
    full = oracle.covectors(run, model, INPUTS[:1], first)
    half = oracle.covectors(run, model, INPUTS[:1], first, nodes=24, pieces=5)
    torch.testing.assert_close(full, half, rtol=0, atol=1e-13)


def test_gradients_agree_with_finite_differences_of_one_examples_term():
    _, run = train_mlp(momentum=0.9, weight_decay=0.1)
    step, width = run.steps[4], 1e-5
    model, basis = small_mlp(), torch.eye(len(run.final), dtype=torch.float64)

    def outputs_at(theta):
        nn.utils.vector_to_parameters(theta, model.parameters())
        with torch.no_grad():
            return model(INPUTS[list(step.ids)])

    labels, here = LABELS[list(step.ids)], outputs_at(step.parameters)
    for row in range(len(step.ids)):
        for place in range(0, len(run.final), 5):
            values = []
            for sign in (1, -1):
                moved = here.clone()
                moved[row] = outputs_at(step.parameters + sign * width * basis[place])[row]
                values.append(nn.functional.cross_entropy(moved, labels))
            slope = (values[0] - values[1]) / (2 * width)
            assert float(step.gradients[row, place]) == pytest.approx(float(slope), abs=1e-9)


def test_pencil_momentum_one_visit_each():
    # y = w x; x = 1, 2; targets 1, 0; w = 0, lr 0.1, momentum 0.5; loss = sum of half squares; query x = 3.
    # step 0, example 0: y = 0,   dL/dy = -1,  g = -1,  buffer = -1,   w = 0.1
    # step 1, example 1: y = 0.2, dL/dy = 0.2, g = 0.4, buffer = -0.1, w = 0.11
    inputs, targets = torch.tensor([[1.0], [2.0]]).double(), torch.tensor([1.0, 0.0]).double()
    model = linear([0.0])
    run = oracle.train(
        model,
        lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.5),
        inputs,
        targets,
        [[0], [1]],
        loss=half_squares,
        steps_per_segment=1,
    )
    phi = oracle.covectors(run, model, torch.tensor([[3.0]]).double(), first, nodes=2, pieces=1)
    kernel, weight = oracle.kernel_and_weight(run, phi)
    close(run.checkpoints.flatten(), [0.0, 0.1, 0.11])
    close(phi.flatten(), [3.0, 3.0])
    close(oracle.displacements(run)[:, :, 0], [[0.1, 0.0], [0.05, -0.04]])
    close(oracle.row_loss_derivatives(run), [[-1.0, 0.0], [-1.0, 0.2]])
    close(oracle.contributions(phi, oracle.displacements(run)), [[0.45, -0.12]])
    close(kernel, [[0.45, 0.6]])
    close(weight, [[1.0, -0.2]])
    close(oracle.outputs_at_checkpoints(run, model, torch.tensor([[3.0]]).double(), first).flatten(), [0.0, 0.3, 0.33])


def test_pencil_full_batch_with_decay_in_one_segment():
    # y = w x; x = 1, 2; targets 3, 0; w = 1, lr 0.1, weight decay 0.5; loss = mean of half squares.
    # step 0: y = 1, 2       dL/dy = -1, 1          g = -1, 2        decay 0.5    w = 1 - 0.15 = 0.85
    # step 1: y = 0.85, 1.7  dL/dy = -1.075, 0.85   g = -1.075, 1.7  decay 0.425  w = 0.85 - 0.105 = 0.745
    inputs, targets = torch.tensor([[1.0], [2.0]]).double(), torch.tensor([3.0, 0.0]).double()
    run = oracle.train(
        linear([1.0]),
        lambda m: torch.optim.SGD(m.parameters(), lr=0.1, weight_decay=0.5),
        inputs,
        targets,
        [[0, 1], [0, 1]],
        loss=lambda outputs, wanted: half_squares(outputs, wanted) / 2,
        steps_per_segment=2,
    )
    close(run.checkpoints.flatten(), [1.0, 0.745])
    close(oracle.displacements(run)[0, :, 0], [0.2075, -0.37])
    close(oracle.decay(run).flatten(), [-0.0925])
    # kernel-weighted: -(0.1 + 0.1075) / (0.1 / 1 + 0.1075 / 1.075) and (0.2 + 0.17) / (0.2 / 1 + 0.17 / 0.85)
    close(oracle.row_loss_derivatives(run)[0], [-1.0375, 0.925])


def test_pencil_carried_momentum_is_one_lump():
    # As the first, but example 0 twice, then example 1 alone twice in the second segment of two steps.
    # step 0: dL/dy = -1,   g = -1,   w = 0.1      step 1: dL/dy = -0.9, g = -0.9, buffer = -1.4, w = 0.24
    # in segment 0: visit 0 moves 0.1 + 0.05, visit 1 moves 0.09; left in the buffer: -0.5 and -0.9
    # in segment 1: the lump of -1.4 moves 0.07 + 0.035; its l' is -1.4 / (0.5 / 1 + 0.9 / 0.9)
    inputs, targets = torch.tensor([[1.0], [2.0]]).double(), torch.tensor([1.0, 0.0]).double()
    run = oracle.train(
        linear([0.0]),
        lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.5),
        inputs,
        targets,
        [[0], [0], [1], [1]],
        loss=half_squares,
        steps_per_segment=2,
    )
    close(oracle.displacements(run)[:, 0, 0], [0.24, 0.105])
    close(oracle.row_loss_derivatives(run)[:, 0], [-0.96, -1.4 / 1.5])


def test_pencil_clipping_scales_the_displacement_and_so_its_weight():
    # y = w, target 1, lr 1. step 0: dL/dy = -1, g = -1 clipped to -0.5, w = 0.5; step 1: dL/dy = g = -0.5, not clipped.
    # Of the loss as applied l' is -0.5 twice (torch's 1e-6 in the clipping scalar aside), and K(1, 1) = 1 + 1.
    one, model = torch.ones(1, 1, dtype=torch.float64), linear([0.0])
    run = oracle.train(
        model,
        lambda m: torch.optim.SGD(m.parameters(), lr=1.0),
        one,
        one[0],
        [[0], [0]],
        loss=half_squares,
        steps_per_segment=2,
        clip_norm=0.5,
    )
    phi = oracle.covectors(run, model, one, first, nodes=2, pieces=1)
    for found, expected in [
        (oracle.displacements(run), 1.0),
        (oracle.row_loss_derivatives(run), -0.5),
        (oracle.kernel_and_weight(run, phi)[0], 2.0),
        (oracle.exact_kernel_and_weight(run, phi)[0], 2.0),
        (oracle.exact_kernel_and_weight(run, phi)[1], 0.5),
    ]:
        assert found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", PARAMETERS)
def test_kernel_times_weight_is_the_contribution(kind):
    model, run = train_mlp(schedule=exponential, clip_norm=0.3, **PARAMETERS[kind])
    phi = oracle.covectors(run, model, random(2, 3, seed=7), first, nodes=8, pieces=1)
    expected = oracle.contributions(phi, oracle.displacements(run))
    for kernel, weight in (oracle.kernel_and_weight(run, phi), oracle.exact_kernel_and_weight(run, phi)):
        torch.testing.assert_close(kernel * weight, expected, rtol=1e-10, atol=1e-14)


def domingos(steps_per_segment: int, steps: int = 12):
    """Full-batch gradient descent on half squares for f linear in the parameters, solved by matrix powers."""
    inputs, targets, queries, rate = random(5, 3, seed=3), random(5, seed=4), random(4, 3, seed=5), 0.04
    model = linear([0.3, -0.5, 0.8])
    residual = inputs @ model.weight[0].detach() - targets
    run = oracle.train(
        model,
        lambda m: torch.optim.SGD(m.parameters(), lr=rate),
        inputs,
        targets,
        [list(range(5))] * steps,
        loss=half_squares,
        steps_per_segment=steps_per_segment,
    )
    shrink = torch.eye(5, dtype=torch.float64) - rate * inputs @ inputs.T
    residuals = torch.stack([torch.linalg.matrix_power(shrink, s) @ residual for s in range(steps)])
    phi = oracle.covectors(run, model, queries, first, nodes=2, pieces=1)
    return run, phi, rate * steps * queries @ inputs.T, -residuals.mean(dim=0).expand(4, 5)


@pytest.mark.parametrize("steps_per_segment", [1, 4, 12])
def test_domingos_setting_in_closed_form(steps_per_segment):
    run, phi, kernel, weight = domingos(steps_per_segment)
    for found in (oracle.kernel_and_weight(run, phi), oracle.exact_kernel_and_weight(run, phi)):
        torch.testing.assert_close(found[0], kernel, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found[1], weight, rtol=1e-9, atol=1e-12)
    displacements = oracle.displacements(run)
    torch.testing.assert_close(oracle.contributions(phi, displacements), kernel * weight, rtol=1e-9, atol=1e-12)


def test_kernels_agree_where_every_row_holds_one_visit_of_a_vector_output():
    model, run = train_mlp(steps_per_segment=1, weight_decay=0.1)
    # BATCHES draws example 0 twice in its third step, from one output: both visits have the same derivative.
    phi = oracle.covectors(run, model, random(2, 3, seed=7), first, nodes=8, pieces=1)
    for found, exact in zip(oracle.kernel_and_weight(run, phi), oracle.exact_kernel_and_weight(run, phi), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(3), nn.Dropout(0.5)])
def test_models_that_mix_rows_or_are_random_are_refused(layer):
    model = nn.Sequential(nn.Linear(3, 3), layer, nn.Linear(3, 3)).double()
    with pytest.raises(ValueError, match=r"rows mix, forwards differ|more than 1 value per channel"):
        oracle.train(
            model,
            sgd,
            INPUTS,
            LABELS,
            BATCHES,
            loss=nn.functional.cross_entropy,
            steps_per_segment=3,
        )


def close(found: torch.Tensor, expected: list) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-14)
