"""f(x; θ) at any point of the trajectory, and the products of its gradient that the ledger needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pkexplain.explain.outputs import Output
from pkexplain.explain.queries import QueryBatch
from pkexplain.gradients.capture import Capture
from pkexplain.gradients.collect import collect
from pkexplain.gradients.layers import Layer
from pkexplain.projection.coordinates import Coordinates
from pkexplain.projection.projector import Projector
from pkexplain.store.trajectory import Trajectory

_KEPT_BYTES = 1 << 30
"""The most memory for the checkpoints, and for the ledger's vectors, of the segments that were used last."""
_SEGMENTS_AT_LEAST = 2
_NUMBERS_AT_ONCE = 1 << 26
"""The most numbers of one block's gradients formed for a product with the ledger's vectors."""


@dataclass(frozen=True)
class Products:
    """The products of some queries' gradients that the ledger needs; being linear, they can be integrated.

    Attributes:
        values: All of them, ``(queries, 4 + audited + width)``: the products with the ledger's vectors (Δθ_t, weight
            decay, unsplit, optimizer, the audited displacements), then the projection, before its second stage.
        columns: The length of the projection.
    """

    values: Tensor
    columns: int

    def __add__(self, other: Products) -> Products:
        """Add the products of another gradient of the same queries."""
        return Products(self.values + other.values, self.columns)

    def __mul__(self, weight: float) -> Products:
        """Multiply the gradients by a number."""
        return Products(self.values * weight, self.columns)

    @property
    def displacement(self) -> Tensor:
        """⟨∇f, Δθ_t⟩, in output units, ``(queries,)``."""
        return self.values[..., 0]

    @property
    def weight_decay(self) -> Tensor:
        """⟨∇f, weight_decay_t⟩, in output units, ``(queries,)``."""
        return self.values[..., 1]

    @property
    def unsplit(self) -> Tensor:
        """⟨∇f, unsplit_t⟩, in output units, ``(queries,)``."""
        return self.values[..., 2]

    @property
    def optimizer(self) -> Tensor:
        """⟨∇f, optimizer_t⟩, in output units, ``(queries,)``."""
        return self.values[..., 3]

    @property
    def ledger(self) -> Tensor:
        """All but the projection, ``(queries, 4 + audited)``."""
        return self.values[..., : self.values.shape[-1] - self.columns]

    @property
    def audit(self) -> Tensor:
        """⟨∇f, D_i,t⟩ of the audited examples, in output units, ``(queries, audited)``."""
        return self.values[..., 4 : self.values.shape[-1] - self.columns]

    @property
    def projected(self) -> Tensor:
        """P ∇f, ``(queries, width)``."""
        return self.values[..., self.values.shape[-1] - self.columns :]


class _LastUsed:
    """Vectors of the segments that were used last, as many as fit."""

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}  # the one that was used last comes last

    def get(self, t: int, read: Callable[[], Tensor]) -> Tensor:
        """Return those of a segment; read them if they are not here."""
        found = self._kept.pop(t, None)
        found = read() if found is None else found
        self._kept[t] = found
        while len(self._kept) > _SEGMENTS_AT_LEAST and sum(each.nbytes for each in self._kept.values()) > _KEPT_BYTES:
            del self._kept[next(iter(self._kept))]
        return found


class TrajectoryModel:
    """f(x; θ) and its gradient at any point of the trajectory, on a private copy of the model.

    Args:
        model: A copy of the model in evaluation mode that may be written to.
        layers: Its recorded layers.
        projectors: The projection of every segment.
        trajectory: The run.
    """

    def __init__(
        self, model: nn.Module, layers: list[Layer], projectors: Sequence[Projector], trajectory: Trajectory
    ) -> None:
        """Read the ledger's vectors of every segment."""
        self._model, self._projectors, self._trajectory = model, projectors, trajectory
        self._capture = Capture(layers, trajectory.fingerprint.blocks, trajectory.dtype)
        self._named = dict(model.named_parameters())
        self._buffers = dict(model.named_buffers())
        some = next(iter(self._named.values()))
        self.device, self.dtype = some.device, trajectory.dtype
        self._ends, self._vectors, self._audits = _LastUsed(), _LastUsed(), _LastUsed()
        self._stored: dict[int, dict[str, Tensor]] = {}

    def _checkpoint(self, t: int) -> Tensor:
        return self._ends.get(t, lambda: self._trajectory.checkpoint(t).parameters.to(self.device))

    def _buffers_at(self, t: int) -> Mapping[str, Tensor]:
        if t not in self._stored:
            self._stored[t] = {n: b.to(self.device) for n, b in self._trajectory.checkpoint(t).buffers.items()}
        return self._stored[t]

    @property
    def columns(self) -> int:
        """The most numbers of a projected gradient, before its second stage."""
        return max(projector.width for projector in self._projectors)

    def width(self, t: int) -> int:
        """The numbers of a gradient projected as in segment t, before its second stage."""
        return self._projectors[t].width

    def short(self, t: int, projected: Tensor) -> Tensor:
        """Bring projections of segment t, ``(queries, width)``, to what multiplies its rows, ``(queries, k)``."""
        return self._projectors[t].short_covectors(projected)

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        return sum(block.numel for block in self._trajectory.fingerprint.blocks)

    def steps(self, segment: int) -> int:
        """The number of optimizer steps of a segment."""
        return self._trajectory.boundaries[segment + 1] - self._trajectory.boundaries[segment]

    @property
    def has_moving_buffers(self) -> bool:
        """Whether a buffer that is saved changed while the run was recorded."""
        return any(map(self.buffers_moved, range(len(self._trajectory))))

    def buffers_moved(self, segment: int) -> bool:
        """Whether a buffer that is saved, like a running mean, changed in a segment."""
        before, after = self._buffers_at(segment), self._buffers_at(segment + 1)
        return any(not torch.equal(before[name], after[name]) for name in before)

    @property
    def coordinates(self) -> Coordinates:
        """Where the audited displacements are kept."""
        return self._trajectory.coordinates

    def _audited(self, t: int) -> Tensor:
        """Read the audited displacements that are a sample, weighted, ``(audited, coordinates)``, or none."""

        def read() -> Tensor:
            rows = self._trajectory.segment(t).audit_rows[: 0 if self.coordinates.complete else None]
            return self.coordinates.weighted(rows.to(self.device, self.dtype))

        return self._audits.get(t, read)

    def _ledger_vectors(self, t: int) -> Tensor:
        """Stack Δθ_t, weight_decay_t, unsplit_t, optimizer_t, ``(4, parameters)``, and audited vectors if complete."""

        def read() -> Tensor:
            segment = self._trajectory.segment(t)
            moved = self._checkpoint(t + 1) - self._checkpoint(t)
            unsplit = segment.unsplit if len(segment.unsplit) else torch.zeros_like(moved)
            lines = (segment.weight_decay, unsplit, segment.optimizer)
            named = torch.stack([moved, *(line.to(moved) for line in lines)])
            return torch.cat([named, segment.audit_rows.to(moved)]) if self.coordinates.complete else named

        return self._vectors.get(t, read)

    def moved_by_gradients(self, t: int) -> Tensor:
        """Return Δθ_t less what weight decay moved, ``(parameters,)``."""
        moved = self._checkpoint(t + 1) - self._checkpoint(t)
        return moved - self._trajectory.segment(t).weight_decay.to(moved)

    def move_to_checkpoint(self, t: int) -> None:
        """Set the model's parameters and buffers to those of checkpoint t."""
        self._set(self._checkpoint(t), self._buffers_at(t))

    def move_to(self, segment: int, tau: float, buffers: float) -> None:
        """Set the model's parameters to θ_t + τ Δθ_t.

        Args:
            segment: t.
            tau: How far the parameters are on their way, 0 to 1.
            buffers: How far the buffers are on theirs, above 0 and below 1; those that are not real stay behind.
        """
        start, end = self._checkpoint(segment), self._checkpoint(segment + 1)
        before, after = self._buffers_at(segment), self._buffers_at(segment + 1)
        between = {
            name: torch.lerp(value, after[name], buffers) if value.is_floating_point() else value
            for name, value in before.items()
        }
        self._set(end if tau == 1 else torch.lerp(start, end, tau), between)

    def move_to_point(self, point: Tensor, t: int) -> None:
        """Set the model's parameters to any point, ``(parameters,)``, and its buffers to those of checkpoint t."""
        self._set(point, self._buffers_at(t))

    def _set(self, point: Tensor, buffers: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for block in self._trajectory.fingerprint.blocks:
                position = block.start
                for name in block.parameters:
                    parameter = self._named[name]
                    parameter.copy_(point[position : position + parameter.numel()].view_as(parameter))
                    position += parameter.numel()
            for name, buffer in self._buffers.items():
                buffer.copy_(buffers[name])

    def release(self) -> None:
        """Stop watching backward passes, also if an interrupt came where that should have been done."""
        self._capture.release()

    def prediction(self, queries: QueryBatch) -> Tensor:
        """Run the model at its current point, ``(queries, …)``."""
        with torch.no_grad():
            return queries.run(self._model)

    def value(self, queries: QueryBatch, output: Output) -> Tensor:
        """Compute f at the model's current point, in output units, ``(queries,)`` in float64."""
        return output(self.prediction(queries)).double()

    def products(self, queries: QueryBatch, output: Output, segments: Sequence[int]) -> tuple[list[Products], Tensor]:
        """Differentiate f at the model's current point, and keep the products that the ledger needs.

        Args:
            queries: The queries.
            output: What is explained.
            segments: The segments to whose path the point belongs: at a checkpoint, two.

        Returns:
            The products for each segment, and f, in output units, ``(queries,)`` in float64.
        """
        values: list[Tensor] = []

        def run() -> Tensor:
            values.append(output(queries.run(self._model)))
            return values[-1]

        pieces = collect(self._capture, len(queries), run)
        vectors = [(self._ledger_vectors(t), self._audited(t)) for t in segments]
        lengths = [len(named) + len(audited) for named, audited in vectors]
        widths = [self.width(t) for t in segments]
        shapes = [(len(queries), length + width) for length, width in zip(lengths, widths, strict=True)]
        found = [torch.zeros(shape, dtype=self.dtype, device=self.device) for shape in shapes]
        for position, piece in pieces:
            block = self._trajectory.fingerprint.blocks[position]
            for some in torch.arange(len(queries), device=self.device).split(max(1, _NUMBERS_AT_ONCE // block.numel)):
                start = 0
                for part in piece.select(some).parts():
                    here, start = slice(start, start + part.shape[1]), start + part.shape[1]
                    span = slice(block.start + here.start, block.start + here.stop)
                    sampled, places = self.coordinates.within(position, here)  # all of them, or a sample
                    part = part.to(self.dtype)
                    for row, (named, audited), length in zip(found, vectors, lengths, strict=True):
                        row[some, : len(named)] += part @ named[:, span].T
                        if len(audited):
                            row[some, len(named) : length] += part[:, places] @ audited[:, sampled].T
            for t, rows, length in zip(segments, found, lengths, strict=True):
                self._projectors[t].add_covectors(rows[:, length:], position, piece)
        products = [Products(rows, width) for rows, width in zip(found, widths, strict=True)]
        return products, values[-1].detach().double()

    def gradients(self, queries: QueryBatch, output: Output) -> Tensor:
        """Differentiate f at the model's current point, ``(queries, parameters)``."""
        pieces = collect(self._capture, len(queries), lambda: output(queries.run(self._model)))
        found = torch.zeros(len(queries), self.parameters, dtype=self.dtype, device=self.device)
        for position, piece in pieces:
            found[:, self._trajectory.fingerprint.blocks[position].span] += piece.dense().to(self.dtype)
        return found
