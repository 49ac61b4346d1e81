"""Re-derive the path kernel of an SGD run with plain loops, in float64, without pkexplain.

Slow, obvious and meant to be right: the fast code is compared with this module, which imports nothing from it.
Parameters are flattened in the order of `model.named_parameters()` into one axis named `parameters`. A *visit* is one
row of one optimizer step's batch; an example has one visit for each time it is drawn. Each example's output must depend
on that example alone and be repeatable (no batch statistics, no dropout): `train` measures this and refuses otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Output = Callable[[Tensor], Tensor]
RECORDED = ("lr", "momentum", "dampening", "nesterov", "weight_decay")


@dataclass(frozen=True)
class OracleStep:
    """Hold one optimizer step as it happened.

    Attributes:
        parameters: `(parameters,)`, before the step.
        groups: for each parameter group, the settings named in `RECORDED` that this step used.
        ids: the example of each of the batch's rows.
        gradients: `(rows, parameters)`, (dL/dy_i)(dy_i/dtheta), L the batch loss as used (with its 1/B), unclipped.
        loss_derivatives: `(rows, *output)`, dL/dy_i, likewise.
        scale: what clipping multiplied the whole gradient by (1.0 for none).
        first: whether torch starts each group's momentum buffer at this step (then dampening does not apply).
    """

    parameters: Tensor
    groups: tuple[dict[str, Any], ...]
    ids: tuple[int, ...]
    gradients: Tensor
    loss_derivatives: Tensor
    scale: float
    first: tuple[bool, ...]

    def loss_derivative(self, row: int) -> float:
        """Return dL/dy_i of one row, clipping included, along the row's unit direction u_i.

        Where the model's output is one number u_i is +1; otherwise it is the direction in which L falls fastest.
        """
        derivative = self.scale * self.loss_derivatives[row].flatten()
        return float(derivative[0]) if len(derivative) == 1 else -float(derivative.norm())


@dataclass(frozen=True)
class OracleRun:
    """Hold a run: `owner` `(parameters,)` is the group of each parameter, `segments` are ranges of step numbers."""

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
    optimizer_factory: Callable[[nn.Module], torch.optim.SGD],
    inputs: Tensor,
    targets: Tensor,
    batches: Sequence[Sequence[int]],
    *,
    loss: Callable[[Tensor, Tensor], Tensor],
    schedule: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] | None = None,
    steps_per_segment: int,
    clip_norm: float | None = None,
) -> OracleRun:
    """Train `model` in place by an ordinary loop and keep everything.

    Args:
        model: float64; every trainable parameter is in the optimizer and takes part in every output.
        optimizer_factory: makes the SGD optimizer (any groups, momentum, dampening, Nesterov, weight decay).
        inputs: `(num_examples, ...)`.
        targets: `(num_examples, ...)`.
        batches: the example ids of each optimizer step.
        loss: (outputs `(rows, ...)`, targets `(rows, ...)`) to a scalar, with whatever reduction it has.
        schedule: makes a scheduler, stepped after each optimizer step.
        steps_per_segment: the last segment may be shorter.
        clip_norm: clips the batch gradient by `torch.nn.utils.clip_grad_norm_`.

    Raises:
        ValueError: what was given is outside the equations, or the rows' gradients do not add up to the batch gradient.
    """
    optimizer, parameters = optimizer_factory(model), [p for p in model.parameters() if p.requires_grad]
    scheduler = schedule(optimizer) if schedule else None
    if type(optimizer) is not torch.optim.SGD or any(group["maximize"] for group in optimizer.param_groups):
        raise ValueError("the oracle knows torch.optim.SGD, minimizing")
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
        groups = tuple({key: group[key] for key in RECORDED} for group in optimizer.param_groups)
        first = tuple(group["momentum"] != 0 and not begun for group, begun in zip(groups, started, strict=True))
        started = [begun or begins for begun, begins in zip(started, first, strict=True)]
        steps.append(OracleStep(before, groups, tuple(ids), gradients, loss_derivatives, scale, first))
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    starts = range(0, len(steps), steps_per_segment)
    segments = tuple(range(start, min(start + steps_per_segment, len(steps))) for start in starts)
    return OracleRun(tuple(steps), segments, _flat(parameters), owner, len(inputs))


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
    """Return `(segments, parameters)`, what weight decay moved: the same, fed by weight_decay * theta, not clipped."""
    fed = []
    for step in run.steps:
        rate = torch.tensor([group["weight_decay"] for group in step.groups], dtype=torch.float64)[run.owner]
        fed.append(rate * step.parameters)
    return _follow(run, fed)


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


def _advance(run: OracleRun, step: OracleStep, buffer: Tensor, fed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the update and the next momentum buffer that a gradient `fed` causes, as torch.optim.SGD does it."""
    update, following = torch.zeros_like(fed), buffer.clone()
    for number, group in enumerate(step.groups):
        mine, momentum = run.owner == number, group["momentum"]
        direction = fed[mine]
        if momentum != 0:
            undamped = 1 if step.first[number] else 1 - group["dampening"]
            following[mine] = momentum * buffer[mine] + undamped * fed[mine]
            direction = fed[mine] + momentum * following[mine] if group["nesterov"] else following[mine]
        update[mine] = -group["lr"] * direction
    return update, following


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
