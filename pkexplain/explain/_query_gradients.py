"""Covectors: the query's output gradient, averaged over each segment, in projection space.

For each query and segment, φ_t = ∫₀¹ ∇f(x; θ_t + τ Δθ_t) dτ is never kept whole; what is kept are its projection P φ_t
and its products with the vectors of the ledger.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from pkexplain.explain.outputs import Output
from pkexplain.explain.quadrature import Part, Quadrature
from pkexplain.explain.queries import QueryBatch
from pkexplain.gradients.capture import Capture
from pkexplain.gradients.layers import Layer, find_buffer_layers
from pkexplain.projection.maps import Projector
from pkexplain.store.trajectory import Trajectory

__all__ = ["Covectors", "OutputField", "integrate", "outputs_at_checkpoints"]

_NUMBERS_AT_ONCE = 1 << 26
"""Most numbers of one block's gradients, formed for a product with the ledger's vectors."""


@dataclass(frozen=True)
class Covectors:
    """What a batch of queries needs to know of φ_t.

    Attributes:
        projected: P φ_t, ``(queries, segments, k)``.
        displacement: ⟨φ_t, Δθ_t⟩ by the quadrature, in output units, ``(queries, segments)``.
        weight_decay: ⟨φ_t, weight_decay_t⟩, in output units, ``(queries, segments)``.
        optimizer: ⟨φ_t, optimizer_t⟩, in output units, ``(queries, segments)``.
        buffers: The same of running statistics: ⟨∫ ∂f/∂b, Δb_t⟩, in output units, ``(queries, segments)``.
        audit: ⟨φ_t, D_i,t⟩ of the audited examples, in output units, ``(queries, segments, audited)``.
        outputs: f(x; θ_t) at each checkpoint, in output units, ``(queries, segments + 1)``.
        forward_passes: Forward passes of each query, ``(queries,)``.
        backward_passes: Gradients of each query, ``(queries,)``.
        settled: Whether the quadrature met its tolerance, ``(queries,)``.
    """

    projected: Tensor
    displacement: Tensor
    weight_decay: Tensor
    optimizer: Tensor
    buffers: Tensor
    audit: Tensor
    outputs: Tensor
    forward_passes: Tensor
    backward_passes: Tensor
    settled: Tensor


class OutputField:
    """f(x; θ) and its gradient at any point of the trajectory, on a private copy of the model.

    Args:
        model: A copy of the model in evaluation mode that may be written to.
        layers: Its recorded layers.
        projector: The run's projection.
        trajectory: The run.
    """

    def __init__(self, model: nn.Module, layers: list[Layer], projector: Projector, trajectory: Trajectory) -> None:
        """Read the ledger's vectors of every segment."""
        self._model, self._projector, self._trajectory = model, projector, trajectory
        blocks = len(trajectory.fingerprint.blocks)
        self._norms = find_buffer_layers(model)
        norms = [replace(n, blocks=tuple((blocks + at, names) for at, names in n.blocks)) for n in self._norms]
        self._capture = Capture([*layers, *norms], trajectory.dtype)
        self._named = dict(model.named_parameters())
        self._buffers = dict(model.named_buffers())
        some = next(iter(self._named.values()))
        self.device, self.dtype = some.device, trajectory.dtype
        self._ends: dict[int, Tensor] = {}
        self._vectors: dict[int, Tensor] = {}
        self._stored: dict[int, dict[str, Tensor]] = {}

    def _checkpoint(self, t: int) -> Tensor:
        if t not in self._ends:
            self._ends[t] = self._trajectory.checkpoint(t).parameters.to(self.device)
        return self._ends[t]

    def _buffers_at(self, t: int) -> Mapping[str, Tensor]:
        if t not in self._stored:
            self._stored[t] = {n: b.to(self.device) for n, b in self._trajectory.checkpoint(t).buffers.items()}
        return self._stored[t]

    def _statistics_moved(self, t: int, norm: int) -> Tensor:
        """Return Δb_t of one norm's running mean and variance, ``(2 * features,)``."""
        layer = self._norms[norm]
        names = [f"{layer.name}.{local}".lstrip(".") for local in layer.blocks[0][1]]
        before, after = self._buffers_at(t), self._buffers_at(t + 1)
        return torch.cat([(after[name] - before[name]).to(self.dtype) for name in names])

    @property
    def has_statistics(self) -> bool:
        """Whether the model holds running statistics that move f beside the parameters."""
        return bool(self._norms)

    def _ledger_vectors(self, t: int) -> Tensor:
        """Stack Δθ_t, weight_decay_t, optimizer_t and the audited displacements, ``(3 + audited, parameters)``."""
        if t not in self._vectors:
            segment = self._trajectory.segment(t)
            moved = self._checkpoint(t + 1) - self._checkpoint(t)
            named = torch.stack([moved, segment.weight_decay.to(self.device), segment.optimizer.to(self.device)])
            self._vectors[t] = torch.cat([named, segment.audit_rows.to(self.device)])
        return self._vectors[t]

    def move_to(self, segment: int, tau: float) -> None:
        """Set the model's parameters to θ_t + τ Δθ_t."""
        start = self._checkpoint(segment)
        point = start if tau == 0 else torch.lerp(start, self._checkpoint(segment + 1), tau) if tau < 1 else None
        point = self._checkpoint(segment + 1) if point is None else point
        with torch.no_grad():
            for block in self._trajectory.fingerprint.blocks:
                position = block.start
                for name in block.parameters:
                    parameter = self._named[name]
                    parameter.copy_(point[position : position + parameter.numel()].view_as(parameter))
                    position += parameter.numel()
            if self._buffers:
                before, after = self._buffers_at(segment), self._buffers_at(segment + 1)
                for name, buffer in self._buffers.items():
                    if 0 < tau < 1 and buffer.is_floating_point():
                        buffer.copy_(torch.lerp(before[name], after[name], tau))
                    else:
                        buffer.copy_((before if tau < 1 else after)[name])

    def prediction(self, queries: QueryBatch) -> Tensor:
        """Run the model where it was moved to, ``(queries, …)``."""
        with torch.no_grad():
            return queries.run(self._model)

    def value(self, queries: QueryBatch, output: Output) -> Tensor:
        """Compute f where the model was moved to, in output units, ``(queries,)`` in float64."""
        return output(self.prediction(queries)).double()

    def features(self, queries: QueryBatch, output: Output, segment: int) -> Tensor:
        """Differentiate f where the model was moved to, and keep what the ledger needs of the gradient.

        Returns:
            The product of the gradient of running statistics with what they moved, those of the gradient with the
            ledger's vectors, then its projection, ``(queries, 4 + audited + k)``.
        """
        vectors = self._ledger_vectors(segment)
        with torch.enable_grad(), self._capture.collecting(len(queries)) as gradients:
            pieces = gradients(output(queries.run(self._model)).sum())
        products = vectors.new_zeros(len(queries), len(vectors))
        projected = vectors.new_zeros(len(queries), self._projector.columns)
        statistics = vectors.new_zeros(len(queries), 1)
        blocks = len(self._trajectory.fingerprint.blocks)
        for position, piece in pieces:
            if position >= blocks:
                moved = self._statistics_moved(segment, position - blocks)
                statistics[:, 0] += piece.dense().to(self.dtype) @ moved
                continue
            block = self._trajectory.fingerprint.blocks[position]
            for some in torch.arange(len(queries), device=self.device).split(max(1, _NUMBERS_AT_ONCE // block.numel)):
                products[some] += piece.select(some).dense().to(self.dtype) @ vectors[:, block.span].T
            self._projector.add_covectors(projected, position, piece)
        return torch.cat([statistics, products, projected], dim=1)


@dataclass
class _Progress:
    """The parts of one query, their integrals and their errors."""

    allowed: float
    budget: int
    integrals: dict[Part, Tensor] = field(default_factory=dict)
    errors: dict[Part, float] = field(default_factory=dict)
    forward_passes: int = 0
    backward_passes: int = 0
    settled: bool = False


def integrate(
    field_: OutputField,
    queries: QueryBatch,
    output: Output,
    quadrature: Quadrature,
    tolerance: float,
    on_part: Callable[[int, int], None] = lambda done, planned: None,
) -> Covectors:
    """Integrate the output gradient over every segment, halving parts until the quadrature gap meets the tolerance.

    Each query refines its own parts, so its numbers do not depend on the batch it comes in.

    Args:
        field_: The model and the run.
        queries: The queries.
        output: What is explained, settled.
        quadrature: The rule and the budget.
        tolerance: Allowed quadrature gap, relative to |f_T − f_0|.
        on_part: Told how many parts are done and how many are planned so far.

    Returns:
        The covectors of all queries.
    """
    outputs, values = _at_checkpoints(field_, queries, output)
    segments = outputs.shape[1] - 1
    allowed = tolerance * (outputs[:, -1] - outputs[:, 0]).abs()
    progress = [_Progress(float(a), quadrature.budget * segments, forward_passes=segments + 1) for a in allowed]
    wanted: dict[Part, list[int]] = {Part(t, 0, 0): list(range(len(queries))) for t in range(segments)}
    nodes, weights = quadrature.rule()
    done = planned = 0
    while wanted:
        planned += len(wanted)
        for part in sorted(wanted):
            members = torch.tensor(wanted[part])
            some, some_output = queries.select(members), output.select(members)
            _values_at(field_, part, some, some_output, wanted[part], values, progress)
            integral = torch.zeros((), dtype=field_.dtype, device=field_.device)
            for node, weight in zip(nodes, weights, strict=True):
                field_.move_to(part.segment, part.start + part.width * float(node))
                integral = integral + field_.features(some, some_output, part.segment) * (float(weight) * part.width)
            for q, features in zip(wanted[part], integral, strict=True):
                state = progress[q]
                change = values[(part.segment, part.end)][q] - values[(part.segment, part.start)][q]
                state.integrals[part] = features
                state.errors[part] = change - float(features[0]) - float(features[1])
                state.backward_passes += len(nodes)
            done += 1
            on_part(done, planned)
        wanted = _refine(progress, quadrature)
    return _gather(field_, progress, outputs)


def outputs_at_checkpoints(field_: OutputField, queries: QueryBatch, output: Output) -> Tensor:
    """Compute f(x; θ_t) at every checkpoint, in output units, ``(queries, segments + 1)``."""
    return _at_checkpoints(field_, queries, output)[0]


_Values = dict[tuple[int, float], dict[int, float]]
"""f by place on the trajectory (segment, τ) and query."""


def _at_checkpoints(field_: OutputField, queries: QueryBatch, output: Output) -> tuple[Tensor, _Values]:
    """Compute f at every checkpoint, ``(queries, segments + 1)``, and note it at the ends of the segments."""
    segments = len(field_._trajectory)
    values: _Values = defaultdict(dict)
    ends = []
    for t in range(segments + 1):
        field_.move_to(t, 0.0) if t < segments else field_.move_to(t - 1, 1.0)
        ends.append(field_.value(queries, output).cpu())
        values[(t, 0.0)] = dict(enumerate(ends[-1].tolist()))
        if t:
            values[(t - 1, 1.0)] = values[(t, 0.0)]
    return torch.stack(ends, dim=1), values


def _values_at(
    field_: OutputField,
    part: Part,
    queries: QueryBatch,
    output: Output,
    members: list[int],
    values: _Values,
    progress: list[_Progress],
) -> None:
    """Make sure that f is known at both ends of a part."""
    for tau in (part.start, part.end):
        known = values[(part.segment, tau)]
        if any(q not in known for q in members):
            field_.move_to(part.segment, tau)
            for q, value in zip(members, field_.value(queries, output).tolist(), strict=True):
                known[q] = value
                progress[q].forward_passes += 1


def _refine(progress: list[_Progress], quadrature: Quadrature) -> dict[Part, list[int]]:
    """Choose the parts to halve for every query that is not settled, and take them out of its account."""
    wanted: dict[Part, list[int]] = defaultdict(list)
    for q, state in enumerate(progress):
        if not quadrature.unsettled(state.errors.values(), state.allowed):
            state.settled = True
            continue
        left = state.budget - state.backward_passes
        for part in quadrature.worst(state.errors, state.allowed, left):
            del state.errors[part], state.integrals[part]
            for half in part.halves():
                wanted[half].append(q)
    return wanted


def _gather(field_: OutputField, progress: list[_Progress], outputs: Tensor) -> Covectors:
    segments = outputs.shape[1] - 1
    width = len(next(iter(progress[0].integrals.values())))
    whole = torch.zeros(len(progress), segments, width, dtype=field_.dtype, device=field_.device)
    for q, state in enumerate(progress):
        for part, integral in state.integrals.items():
            whole[q, part.segment] += integral
    named = width - field_._projector.columns
    products = whole[:, :, :named].double().cpu()
    return Covectors(
        projected=whole[:, :, named:],
        buffers=products[:, :, 0],
        displacement=products[:, :, 1],
        weight_decay=products[:, :, 2],
        optimizer=products[:, :, 3],
        audit=products[:, :, 4:],
        outputs=outputs,
        forward_passes=torch.tensor([state.forward_passes for state in progress]),
        backward_passes=torch.tensor([state.backward_passes for state in progress]),
        settled=torch.tensor([state.settled for state in progress]),
    )
