"""Covectors: the query's output gradient, averaged over each segment (path-averaged), in projection space.

For each query and segment, φ_t = ∫₀¹ ∇f(x; θ_t + τ Δθ_t) dτ is never stored in full; only its projection P φ_t and its
products with the ledger's vectors are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pkexplain.explain._trajectory_model import Products, TrajectoryModel
from pkexplain.explain.outputs import Output
from pkexplain.explain.quadrature import Interval, Quadrature
from pkexplain.explain.queries import QueryBatch
from pkexplain.progress import Progress, no_progress


@dataclass(frozen=True)
class Covectors:
    """The products of φ_t for a batch of queries.

    Attributes:
        projected: P φ_t, ``(queries, segments, k)``.
        displacement: ⟨φ_t, Δθ_t⟩ by the quadrature, in output units, ``(queries, segments)``.
        weight_decay: ⟨φ_t, weight_decay_t⟩, in output units, ``(queries, segments)``.
        unsplit: ⟨φ_t, unsplit_t⟩, in output units, ``(queries, segments)``.
        optimizer: ⟨φ_t, optimizer_t⟩, in output units, ``(queries, segments)``.
        buffers: What buffers such as running statistics changed, in output units, ``(queries, segments)``: exact
            differences of f.
        audit: ⟨φ_t, D_i,t⟩ of the audited examples, in output units, ``(queries, segments, audited)``.
        outputs: f(x; θ_t) at each checkpoint, in output units, ``(queries, segments + 1)``.
        forward_passes: Forward passes of each query, apart from those of gradients, ``(queries,)``.
        backward_passes: Gradients of each query, ``(queries,)``.
        settled: Whether the quadrature met its tolerance, ``(queries,)``.
    """

    projected: Tensor
    displacement: Tensor
    weight_decay: Tensor
    unsplit: Tensor
    optimizer: Tensor
    buffers: Tensor
    audit: Tensor
    outputs: Tensor
    forward_passes: Tensor
    backward_passes: Tensor
    settled: Tensor


_Point = tuple[int, float, float]
"""A point of the trajectory: the segment, τ, and how far the buffers are."""


@dataclass
class _State:
    """One query's nodes and intervals, with their errors."""

    budget: int
    allowed: float = 0.0
    nodes: dict[_Point, Tensor] = field(default_factory=dict)  # the values of products
    displacements: dict[_Point, float] = field(default_factory=dict)
    errors: dict[Interval, float] = field(default_factory=dict)
    forward_passes: int = 0
    backward_passes: int = 0
    settled: bool = False


def integrate(
    model: TrajectoryModel,
    queries: QueryBatch,
    output: Output,
    quadrature: Quadrature,
    tolerance: float,
    progress: Progress = no_progress,
) -> Covectors:
    """Integrate the output gradient over every segment, halving intervals until the quadrature gap is within tolerance.

    Each query refines its own intervals, so its numbers do not depend on the batch it is in.

    Args:
        model: The model and the run.
        queries: The queries.
        output: What is explained, resolved on the final prediction.
        quadrature: The rule and the budget.
        tolerance: Allowed quadrature gap, relative to |f_T − f_0|.
        progress: Told how many intervals are done, and how many are planned so far.

    Returns:
        The covectors of all queries.
    """
    segments = len(model._trajectory)
    pieces = [quadrature.pieces(model.buffers_moved(t)) for t in range(segments)]
    path = _Path(model, quadrature, pieces)
    states = [_State(quadrature.budget * segments) for _ in range(len(queries))]
    first = [whole for t in range(segments) for whole in Interval.equal(t, pieces[t])]
    wanted: dict[Interval, list[int]] = {whole: list(range(len(queries))) for whole in first}
    values: _Values = defaultdict(dict)
    outputs = None
    if quadrature.nodes is None and not model.has_moving_buffers:  # the checkpoints are nodes, so f is known there
        for points, members in path.missing(wanted, states):
            _differentiate(model, queries, output, points, members, values, states)
        nodes = [path.nodes(whole) for whole in first]
        at = [values[nodes[0][0][0]], *(values[ends[-1][0]] for ends in nodes)]
        outputs = torch.tensor([list(found.values()) for found in at], dtype=torch.float64, device="cpu").T
    known = 0 if outputs is None else segments + 1
    outputs = outputs_at_checkpoints(model, queries, output) if outputs is None else outputs
    buffers, passes = _along_lines(model, queries, output, outputs, pieces, values)
    for state, allowed in zip(states, (tolerance * (outputs[:, -1] - outputs[:, 0]).abs()).tolist(), strict=True):
        state.allowed, state.forward_passes = allowed, passes - known
    done = planned = 0
    while wanted:
        planned += len(wanted)
        for points, members in path.missing(wanted, states):
            _differentiate(model, queries, output, points, members, values, states)
        for interval in sorted(wanted):
            middle, members = path.middle(interval), wanted[interval]
            some = torch.tensor(members, device="cpu")
            asked = queries.select(some), output.select(some)
            ends = _values_at(model, interval, middle, *asked, members, values, states)
            for q in members:
                found = sum(weight * states[q].displacements[point] for point, weight in path.nodes(interval))
                states[q].errors[interval] = ends[1][q] - ends[0][q] - found
            done += 1
            progress("covectors", done, planned)
        wanted = _refine(states, quadrature)
    return _gather(model, states, outputs, buffers, path)


class _Path:
    """The nodes of intervals along the trajectory."""

    def __init__(self, model: TrajectoryModel, quadrature: Quadrature, pieces: list[int]) -> None:
        self._model, self._quadrature, self._pieces = model, quadrature, pieces

    def middle(self, interval: Interval) -> float:
        """How far the buffers are on the interval."""
        return interval.middle(self._pieces[interval.segment])

    def nodes(self, interval: Interval) -> list[tuple[_Point, float]]:
        """The nodes of an interval, with their weights."""
        middle, t = self.middle(interval), interval.segment
        return [((t, tau, middle), weight) for tau, weight in self._quadrature.nodes_of(interval)]

    def missing(
        self, wanted: dict[Interval, list[int]], states: list[_State]
    ) -> Iterator[tuple[list[_Point], list[int]]]:
        """The points at which queries have to be differentiated; two where one is the end of a segment and a start."""
        points: dict[tuple[float, float], dict[_Point, set[int]]] = defaultdict(lambda: defaultdict(set))
        for interval, members in wanted.items():
            for point, _ in self.nodes(interval):
                new = {q for q in members if point not in states[q].nodes}
                if new:
                    t, tau, middle = point
                    still = not self._model.buffers_moved(t)
                    points[t + tau, 0.0 if still else 1 + middle][point] |= new
        for place in sorted(points):
            same = points[place]
            yield sorted(same), sorted(set().union(*same.values()))


def _differentiate(
    model: TrajectoryModel,
    queries: QueryBatch,
    output: Output,
    points: list[_Point],
    members: list[int],
    values: _Values,
    states: list[_State],
) -> None:
    """Differentiate some queries at one place, which may have two names."""
    some = torch.tensor(members, device="cpu")
    model.move_to(*points[0])
    found, outputs = model.products(queries.select(some), output.select(some), [t for t, _, _ in points])
    for point, products in zip(points, found, strict=True):
        numbers = zip(members, products.values, products.displacement.tolist(), outputs.tolist(), strict=True)
        for q, row, displacement, value in numbers:
            states[q].nodes[point], states[q].displacements[point] = row, displacement
            values[point].setdefault(q, value)
    for q in members:
        states[q].backward_passes += 1


def outputs_at_checkpoints(model: TrajectoryModel, queries: QueryBatch, output: Output) -> Tensor:
    """Compute f(x; θ_t) at every checkpoint, in output units, ``(queries, segments + 1)``."""
    ends = []
    for t in range(len(model._trajectory) + 1):
        model.move_to_checkpoint(t)
        ends.append(model.value(queries, output).cpu())
    return torch.stack(ends, dim=1)


_Values = dict[_Point, dict[int, float]]
"""f by point and query."""


def _along_lines(
    model: TrajectoryModel,
    queries: QueryBatch,
    output: Output,
    outputs: Tensor,
    pieces: list[int],
    values: _Values,
) -> tuple[Tensor, int]:
    """Note f at both ends of every piece of the segments' lines.

    Returns:
        What buffers changed, f_{t+1} − f_t less the changes along the pieces, ``(queries, segments)``; the
        forward passes of a query.
    """
    changes = outputs.diff(dim=1)
    buffers, passes = torch.zeros_like(changes), outputs.shape[1]
    for t, count in enumerate(pieces):
        buffers[:, t] = changes[:, t] if model.buffers_moved(t) else 0
        for piece in range(count):
            middle, ends = (piece + 0.5) / count, [outputs[:, t], outputs[:, t + 1]]
            if model.buffers_moved(t):
                for end in (0, 1):
                    model.move_to(t, (piece + end) / count, middle)
                    ends[end] = model.value(queries, output).cpu()
                buffers[:, t] -= ends[1] - ends[0]
                passes += 2
            for end in (0, 1):
                values[(t, (piece + end) / count, middle)] = dict(enumerate(ends[end].tolist()))
    return buffers, passes


def _values_at(
    model: TrajectoryModel,
    interval: Interval,
    middle: float,
    queries: QueryBatch,
    output: Output,
    members: list[int],
    values: _Values,
    states: list[_State],
) -> tuple[dict[int, float], dict[int, float]]:
    """Return f at both ends of an interval, by query."""
    ends = [values[(interval.segment, tau, middle)] for tau in (interval.start, interval.end)]
    for tau, known in zip((interval.start, interval.end), ends, strict=True):
        if any(q not in known for q in members):
            model.move_to(interval.segment, tau, middle)
            for q, value in zip(members, model.value(queries, output).tolist(), strict=True):
                known[q] = value
                states[q].forward_passes += 1
    return ends[0], ends[1]


def _refine(states: list[_State], quadrature: Quadrature) -> dict[Interval, list[int]]:
    """Choose the intervals to refine for every query that is not settled."""
    wanted: dict[Interval, list[int]] = defaultdict(list)
    for q, state in enumerate(states):
        if not quadrature.unsettled(state.errors.values(), state.allowed):
            state.settled = True
            continue
        left = state.budget - state.backward_passes
        for interval in quadrature.worst(state.errors, state.allowed, left):
            del state.errors[interval]
            for part in quadrature.refined(interval):
                wanted[part].append(q)
    return wanted


def _gather(model: TrajectoryModel, states: list[_State], outputs: Tensor, buffers: Tensor, path: _Path) -> Covectors:
    sums: list[Products] = []
    for t in range(outputs.shape[1] - 1):
        some = next(value for (segment, _, _), value in states[0].nodes.items() if segment == t)
        sums.append(Products(some.new_zeros(len(states), len(some)), model.width(t)))
    for q, state in enumerate(states):
        for interval in state.errors:
            for point, weight in path.nodes(interval):
                sums[interval.segment].values[q].add_(state.nodes[point], alpha=weight)
    ledgers = torch.stack([each.ledger for each in sums], dim=1)
    whole = Products(ledgers, 0)
    return Covectors(
        projected=torch.stack([model.short(t, each.projected) for t, each in enumerate(sums)], dim=1),
        buffers=buffers,
        displacement=whole.displacement.double().cpu(),
        weight_decay=whole.weight_decay.double().cpu(),
        unsplit=whole.unsplit.double().cpu(),
        optimizer=whole.optimizer.double().cpu(),
        audit=whole.audit.double().cpu(),
        outputs=outputs,
        forward_passes=torch.tensor([state.forward_passes for state in states], device="cpu"),
        backward_passes=torch.tensor([state.backward_passes for state in states], device="cpu"),
        settled=torch.tensor([state.settled for state in states], device="cpu"),
    )
