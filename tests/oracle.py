"""Re-derive the path kernel of a training run with plain loops, in float64, without pkexplain.

Slow, obvious and meant to be right: the fast code is compared with this module, which imports nothing from it.
Parameters are flattened in the order of `model.named_parameters()` into one axis named `parameters`. A *visit* is one
row of one optimizer step's batch; an example has one visit for each time it is drawn. Each example's output must depend
on that example alone and be repeatable (no batch statistics, no dropout): `train` measures this and refuses otherwise.

An adaptive optimizer divides by a vector made of all gradients so far (Adam's sqrt(vhat) + eps). With these *divisors*
held as they were, the update is linear in the gradients: what an example's gradient moves, at its step and through the
momentum at every later one, is what the optimizer's recursion makes of that gradient alone with those divisors.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Output = Callable[[Tensor], Tensor]
KNOWN = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.Adamax,
)


@dataclass(frozen=True)
class OracleStep:
    """Hold one optimizer step as it happened.

    Attributes:
        parameters: `(parameters,)`, before the step.
        groups: for each parameter group, its settings as this step used them, and of its state after the step `step`
            (the count of steps, this one included) and NAdam's `mu_product`, where the optimizer has them.
        ids: the example of each of the batch's rows.
        gradients: `(rows, parameters)`, (dL/dy_i)(dy_i/dtheta), L the batch loss as used (with its 1/B), unclipped.
        loss_derivatives: `(rows, *output)`, dL/dy_i, likewise.
        scale: what clipping multiplied the whole gradient by (1.0 for none).
        first: whether SGD starts each group's momentum buffer at this step (then dampening does not apply).
        divisors: `(parameters,)`, what this step divided by, parameter by parameter (1 where by nothing).
    """

    parameters: Tensor
    groups: tuple[dict[str, Any], ...]
    ids: tuple[int, ...]
    gradients: Tensor
    loss_derivatives: Tensor
    scale: float
    first: tuple[bool, ...]
    divisors: Tensor

    def loss_derivative(self, row: int) -> float:
        """Return dL/dy_i of one row, clipping included, along the row's unit direction u_i.

        Where the model's output is one number u_i is +1; otherwise it is the direction in which L falls fastest.
        """
        derivative = self.scale * self.loss_derivatives[row].flatten()
        return float(derivative[0]) if len(derivative) == 1 else -float(derivative.norm())


@dataclass(frozen=True)
class OracleRun:
    """Hold a run: `owner` `(parameters,)` is the group of each parameter, `segments` are ranges of step numbers.

    `optimizer` is the class of the optimizer, one of `KNOWN`.
    """

    optimizer: type[torch.optim.Optimizer]
    steps: tuple[OracleStep, ...]
    segments: tuple[range, ...]
    final: Tensor
    owner: Tensor
    num_examples: int

    @property
    def checkpoints(self) -> Tensor:
        """Return `(segments + 1, parameters)`, the parameters at each boundary."""
        return torch.stack([self.steps[segment.start].parameters for segment in self.segments] + [self.final])


def train(
    model: nn.Module,
    optimizer_factory: Callable[[nn.Module], torch.optim.Optimizer],
    inputs: Tensor,
    targets: Tensor,
    batches: Sequence[Sequence[int]],
    *,
    loss: Callable[[Tensor, Tensor], Tensor],
    schedule: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] | None = None,
    steps_per_segment: int,
    clip_norm: float | None = None,
    short_first: bool = False,
) -> OracleRun:
    """Train `model` in place by an ordinary loop and keep everything.

    Args:
        model: float64; every trainable parameter is in the optimizer and takes part in every output.
        optimizer_factory: makes the optimizer, fresh and of a class in `KNOWN`; any groups and settings but maximize.
        inputs: `(num_examples, ...)`.
        targets: `(num_examples, ...)`.
        batches: the example ids of each optimizer step.
        loss: (outputs `(rows, ...)`, targets `(rows, ...)`) to a scalar, with whatever reduction it has.
        schedule: makes a scheduler, stepped after each optimizer step.
        steps_per_segment: the last segment may be shorter.
        clip_norm: clips the batch gradient by `torch.nn.utils.clip_grad_norm_`.
        short_first: whether segments end after 1, 2, 4, … steps, too, up to half of the first one.

    Raises:
        ValueError: what was given is outside the equations, or the rows' gradients do not add up to the batch gradient.
    """
    optimizer, parameters = optimizer_factory(model), [p for p in model.parameters() if p.requires_grad]
    scheduler = schedule(optimizer) if schedule else None
    if type(optimizer) not in KNOWN or any(group["maximize"] for group in optimizer.param_groups):
        raise ValueError(f"the oracle knows {', '.join(kind.__name__ for kind in KNOWN)} of torch.optim, minimizing")
    if any(p.dtype != torch.float64 for p in parameters):
        raise ValueError("the oracle wants float64 parameters")
    group_of = {id(p): number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
    owner = torch.cat([torch.full((p.numel(),), group_of[id(p)]) for p in parameters])
    started = [False] * len(optimizer.param_groups)
    steps = []
    model.train()
    for ids in batches:
        before = _flat(parameters)
        outputs = model(inputs[list(ids)])
        value = loss(outputs, targets[list(ids)])
        (loss_derivatives,) = torch.autograd.grad(value, outputs, retain_graph=True)
        optimizer.zero_grad()
        value.backward()
        gradients = _row_gradients(model, parameters, inputs[list(ids)], loss_derivatives)
        if not torch.allclose(gradients.sum(dim=0), _flat([p.grad for p in parameters]), rtol=1e-9, atol=1e-12):
            raise ValueError(
                "rows' gradients do not sum to the batch's: rows mix, forwards differ or training diverged"
            )
        scale = 1.0
        if clip_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
            scale = min(1.0, clip_norm / (float(norm) + 1e-6))
        groups = tuple(_settings(group) for group in optimizer.param_groups)
        first = tuple(group.get("momentum", 0) != 0 and not begun for group, begun in zip(groups, started, strict=True))
        started = [begun or begins for begun, begins in zip(started, first, strict=True)]
        optimizer.step()
        divisors = []
        for p in parameters:
            group, state = groups[group_of[id(p)]], optimizer.state[p]
            group.update({key: float(state[key]) for key in ("step", "mu_product") if key in state})
            divisors.append(_divisor(type(optimizer), group, state, p))
        divisors = _flat(divisors)
        steps.append(OracleStep(before, groups, tuple(ids), gradients, loss_derivatives, scale, first, divisors))
        if scheduler is not None:
            scheduler.step()
    boundaries = {*range(0, len(steps), steps_per_segment), len(steps)}
    if short_first:
        boundaries |= {power for power in (2**n for n in range(64)) if 2 * power <= steps_per_segment}
    segments = tuple(range(*pair) for pair in itertools.pairwise(sorted(b for b in boundaries if b <= len(steps))))
    return OracleRun(type(optimizer), tuple(steps), segments, _flat(parameters), owner, len(inputs))


def displacements(run: OracleRun) -> Tensor:
    """Return D_{i,t} `(segments, num_examples, parameters)`, parameter units.

    For each example, follow through all of training a momentum buffer that only its own gradients feed.
    """
    result = torch.zeros(len(run.segments), run.num_examples, len(run.final), dtype=torch.float64)
    for example in range(run.num_examples):
        fed = []
        for step in run.steps:
            mine = torch.zeros_like(run.final)
            for row, visitor in enumerate(step.ids):
                if visitor == example:
                    mine = mine + step.scale * step.gradients[row]
            fed.append(mine)
        result[:, example] = _follow(run, fed)
    return result


def decay(run: OracleRun) -> Tensor:
    """Return `(segments, parameters)`, what weight decay moved.

    Coupled (L2): the same, fed by weight_decay * theta, not clipped. Decoupled: -lr * weight_decay * theta at once.
    """
    fed, at_once = [], []
    for step in run.steps:
        coupled, decoupled = torch.zeros_like(run.final), torch.zeros_like(run.final)
        for number, group in enumerate(step.groups):
            mine = run.owner == number
            pull = group["weight_decay"] * step.parameters[mine]
            if group.get("decoupled_weight_decay", False):
                decoupled[mine] = -group["lr"] * pull
            else:
                coupled[mine] = pull
        fed.append(coupled)
        at_once.append(decoupled)
    result = _follow(run, fed)
    for t, segment in enumerate(run.segments):
        for s in segment:
            result[t] += at_once[s]
    return result


def optimizer_line(run: OracleRun) -> Tensor:
    """Return `(segments, parameters)`: delta theta - sum_i D_i - decay, what nothing else explains."""
    return run.checkpoints.diff(dim=0) - displacements(run).sum(dim=1) - decay(run)


def covectors(
    run: OracleRun, model: nn.Module, queries: Tensor, output: Output, *, nodes: int = 64, pieces: int = 8
) -> Tensor:
    """Return phi_t(x) `(segments, queries, parameters)`, output units per parameter unit.

    The integral over tau in [0, 1] of grad f(x; theta_t + tau * delta theta_t), by Gauss-Legendre with `nodes` nodes in
    each of `pieces` equal pieces; `output` maps one row of the model's output to a scalar; the model is in eval mode.
    """
    points, weights = np.polynomial.legendre.leggauss(nodes)
    checkpoints = run.checkpoints
    result = torch.zeros(len(run.segments), len(queries), len(run.final), dtype=torch.float64)
    for t in range(len(run.segments)):
        for piece in range(pieces):
            for point, weight in zip(points, weights, strict=True):
                tau = (piece + (float(point) + 1) / 2) / pieces
                theta = (1 - tau) * checkpoints[t] + tau * checkpoints[t + 1]
                for q in range(len(queries)):
                    theta = theta.detach().requires_grad_()
                    value = _evaluate(model, theta, queries[q], output)
                    result[t, q] += float(weight) / 2 / pieces * torch.autograd.grad(value, theta)[0]
    return result


def outputs_at_checkpoints(run: OracleRun, model: nn.Module, queries: Tensor, output: Output) -> Tensor:
    """Return f(x; theta_t) `(segments + 1, queries)`, output units."""
    with torch.no_grad():
        return torch.stack(
            [torch.stack([_evaluate(model, theta, x, output) for x in queries]) for theta in run.checkpoints]
        )


def contributions_by_segment(covectors: Tensor, displacements: Tensor) -> Tensor:
    """Return <phi_t(x), D_{i,t}> `(segments, queries, num_examples)`, output units."""
    return torch.stack([phi @ rows.T for phi, rows in zip(covectors, displacements, strict=True)])


def contributions(covectors: Tensor, displacements: Tensor) -> Tensor:
    """Return c_i(x) = sum_t <phi_t(x), D_{i,t}> `(queries, num_examples)`, output units."""
    return contributions_by_segment(covectors, displacements).sum(dim=0)


def row_loss_derivatives(run: OracleRun) -> Tensor:
    """Return the one l' of each row `(segments, num_examples)`; 0 where the row is zero.

    A row's parts are its visits in the segment, and one lump for all the momentum it carried in. l' of the row is the
    mean of the parts' l', weighted by the kernel: by the norms of their displacements in the segment, each over its own
    l'. l' of the next segment's lump is their mean weighted alike by the parts' momentum buffers at the segment's end.
    """
    result = torch.zeros(len(run.segments), run.num_examples, dtype=torch.float64)
    zero = torch.zeros_like(run.final)
    for example in range(run.num_examples):
        lump, lump_derivative = zero, 0.0
        for t, segment in enumerate(run.segments):
            buffers, moved, derivatives = [lump], [zero], [lump_derivative]
            for s in segment:
                step = run.steps[s]
                fed = [zero] * len(buffers)
                for row, visitor in enumerate(step.ids):
                    if visitor == example:
                        fed.append(step.scale * step.gradients[row])
                        buffers.append(zero)
                        moved.append(zero)
                        derivatives.append(step.loss_derivative(row))
                for part in range(len(buffers)):
                    update, buffers[part] = _advance(run, step, buffers[part], fed[part])
                    moved[part] = moved[part] + update
            result[t, example] = _mean(derivatives, moved)
            lump, lump_derivative = sum(buffers, zero), _mean(derivatives, buffers)
    return result


def kernel_and_weight(run: OracleRun, covectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return K(x, x_i) and a_i, each `(queries, num_examples)`, from one l' a row; K * a = c.

    K = sum_t <phi_t, -D_{i,t}> / l'_{i,t} and a = c / K, both 0 for an example that never moved anything.
    """
    by_segment = contributions_by_segment(covectors, displacements(run))
    derivatives = row_loss_derivatives(run)
    kernel = torch.zeros_like(by_segment[0])
    for t in range(len(run.segments)):
        for example in range(run.num_examples):
            if derivatives[t, example] != 0:
                kernel[:, example] -= by_segment[t, :, example] / derivatives[t, example]
    return kernel, _weight(by_segment.sum(dim=0), kernel)


def exact_kernel_and_weight(run: OracleRun, covectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return K(x, x_i) and a_i as defined, each visit divided by its own l': what `kernel_and_weight` approximates."""
    kernel = torch.zeros(covectors.shape[1], run.num_examples, dtype=torch.float64)
    total = torch.zeros_like(kernel)
    for s, step in enumerate(run.steps):
        for row, example in enumerate(step.ids):
            fed = [torch.zeros_like(run.final) for _ in run.steps]
            fed[s] = step.scale * step.gradients[row]
            credit = sum(phi @ moved for phi, moved in zip(covectors, _follow(run, fed), strict=True))
            total[:, example] += credit
            if step.loss_derivative(row) != 0:
                kernel[:, example] -= credit / step.loss_derivative(row)
    return kernel, _weight(total, kernel)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def _row_gradients(model: nn.Module, parameters: list[Tensor], inputs: Tensor, loss_derivatives: Tensor) -> Tensor:
    """Return `(rows, parameters)`: each row's dL/dy_i pulled back through the model on that row alone."""
    result = []
    for row, loss_derivative in enumerate(loss_derivatives):
        own = model(inputs[row : row + 1])[0]
        result.append(_flat(torch.autograd.grad(own, parameters, grad_outputs=loss_derivative)))
    return torch.stack(result)


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a parameter group, copied: schedulers change even a learning rate tensor in place."""
    settings = {key: value for key, value in group.items() if key not in ("params", "betas")}
    settings = {key: float(value) if isinstance(value, Tensor) else value for key, value in settings.items()}
    if "betas" in group:
        settings["beta1"], settings["beta2"] = (float(beta) for beta in group["betas"])
    return settings


def _divisor(
    kind: type[torch.optim.Optimizer], group: dict[str, Any], state: dict[str, Any], parameter: Tensor
) -> Tensor:
    """Return what the step just done divided by, shaped as the parameter, from the optimizer's state after the step."""
    if kind in (torch.optim.Adam, torch.optim.AdamW):
        square = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
        return (square / (1 - group["beta2"] ** group["step"])).sqrt() + group["eps"]
    if kind is torch.optim.NAdam:
        return (state["exp_avg_sq"] / (1 - group["beta2"] ** group["step"])).sqrt() + group["eps"]
    if kind is torch.optim.RAdam:
        correction = 1 - group["beta2"] ** group["step"]
        longest = 2 / (1 - group["beta2"]) - 1
        length = longest - 2 * group["step"] * group["beta2"] ** group["step"] / correction
        if length <= 5:  # too few steps to estimate a variance from: momentum alone
            return torch.ones_like(parameter)
        rectified = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
        return (state["exp_avg_sq"].sqrt() + group["eps"]) / (correction * rectified) ** 0.5  # eps before correction
    if kind is torch.optim.RMSprop:
        mean = state["grad_avg"] if group["centered"] else torch.zeros_like(parameter)
        return (state["square_avg"] - mean * mean).sqrt() + group["eps"]
    if kind is torch.optim.Adagrad:
        return state["sum"].sqrt() + group["eps"]
    if kind is torch.optim.Adamax:
        return state["exp_inf"]  # its eps is in the maximum already
    return torch.ones_like(parameter)


def _advance(run: OracleRun, step: OracleStep, buffer: Tensor, fed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the update and the next momentum buffer that a gradient `fed` causes, the step's divisors as they were."""
    update, following = torch.zeros_like(fed), buffer.clone()
    for number, group in enumerate(step.groups):
        mine = run.owner == number
        update[mine], following[mine] = _advance_group(
            run.optimizer, group, step.first[number], step.divisors[mine], buffer[mine], fed[mine]
        )
    return update, following


def _advance_group(
    kind: type[torch.optim.Optimizer], group: dict[str, Any], first: bool, divisor: Tensor, buffer: Tensor, fed: Tensor
) -> tuple[Tensor, Tensor]:
    """Return `_advance` of one group's parameters, as `kind` does it; tensors are `(parameters of the group,)`."""
    lr = group["lr"]
    if kind is torch.optim.SGD:
        momentum = group["momentum"]
        if momentum == 0:
            return -lr * fed, buffer
        buffer = momentum * buffer + (1 if first else 1 - group["dampening"]) * fed
        return -lr * (fed + momentum * buffer if group["nesterov"] else buffer), buffer
    if kind is torch.optim.RMSprop:  # divides before the momentum
        if group["momentum"] == 0:
            return -lr * fed / divisor, buffer
        buffer = group["momentum"] * buffer + fed / divisor
        return -lr * buffer, buffer
    if kind is torch.optim.Adagrad:
        return -lr / (1 + (group["step"] - 1) * group["lr_decay"]) * fed / divisor, buffer
    beta = group["beta1"]
    buffer = beta * buffer + (1 - beta) * fed
    if kind is torch.optim.NAdam:  # the gradient itself, and the momentum as it will be one step on
        now = beta * (1 - 0.5 * 0.96 ** (group["step"] * group["momentum_decay"]))
        ahead = beta * (1 - 0.5 * 0.96 ** ((group["step"] + 1) * group["momentum_decay"]))
        of_fed = (1 - now) / (1 - group["mu_product"])
        of_buffer = ahead / (1 - group["mu_product"] * ahead)
        return -lr * (of_fed * fed + of_buffer * buffer) / divisor, buffer
    return -lr / (1 - beta ** group["step"]) * buffer / divisor, buffer  # Adam, AdamW, RAdam, Adamax


def _follow(run: OracleRun, fed: Sequence[Tensor]) -> Tensor:
    """Return `(segments, parameters)`: the updates that the gradients `fed`, one a step, cause over all of training."""
    result = torch.zeros(len(run.segments), len(run.final), dtype=torch.float64)
    buffer = torch.zeros_like(run.final)
    for t, segment in enumerate(run.segments):
        for s in segment:
            update, buffer = _advance(run, run.steps[s], buffer, fed[s])
            result[t] += update
    return result


def _evaluate(model: nn.Module, theta: Tensor, query: Tensor, output: Output) -> Tensor:
    """Return f(query; theta), a scalar, with the model in eval mode; the model is left as it was."""
    named, place, was_training = {}, 0, model.training
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            named[name] = theta[place : place + parameter.numel()].view_as(parameter)
            place += parameter.numel()
    model.eval()
    value = output(torch.func.functional_call(model, named, (query[None],))[0])
    model.train(was_training)
    return value.squeeze()


def _mean(values: Sequence[float], vectors: Sequence[Tensor]) -> float:
    """Return the mean of `values`, weighted by the norm of each one's vector over its size; 0 if all are zero."""
    weights = [float(d.norm()) / abs(v) if float(d.norm()) > 0 else 0.0 for v, d in zip(values, vectors, strict=True)]
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights) if sum(weights) > 0 else 0.0


def _weight(contribution: Tensor, kernel: Tensor) -> Tensor:
    return torch.where(kernel == 0, torch.zeros_like(kernel), contribution / kernel)
