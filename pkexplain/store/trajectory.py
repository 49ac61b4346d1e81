"""A recorded run as frozen data: checkpoints, and the segments between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pkexplain.projection.base import Projection
from pkexplain.projection.coordinates import Coordinates
from pkexplain.projection.kinds import projection_from_description
from pkexplain.projection.packed import PackedVector, Vector
from pkexplain.projection.projector import Projector
from pkexplain.store.fingerprint import ModelFingerprint
from pkexplain.store.manifest import FIRST_CHECKPOINT, InputEntry, Manifest, SegmentFiles, SegmentSummary
from pkexplain.store.rows import Rows

__all__ = ["DIRECTIONS", "PACKABLE", "Checkpoint", "Segment", "Trajectory"]

DIRECTIONS = "directions."
_STEPS = "steps."
"""How the names of the tensors of a segment's directions begin."""

_TENSORS = ("row_sum", "unsplit", "audit_ids", "audit_rows", "withdrawn", "rate_sums")
PACKABLE = ("weight_decay", "optimizer", "operator")
"""Vectors of a segment that may be packed."""


@dataclass(frozen=True)
class Checkpoint:
    """θ_t, the trainable parameters at a segment boundary, and the buffers at that point.

    Attributes:
        parameters: Flat vector, ``(parameters,)``, in the order of the run's blocks.
        buffers: Floating-point and integer buffers by name.
    """

    parameters: Tensor
    buffers: Mapping[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors to store."""
        return {"parameters": self.parameters, **{f"buffer.{name}": value for name, value in self.buffers.items()}}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Checkpoint:
        """Rebuild the checkpoint from stored tensors."""
        buffers = {n.removeprefix("buffer."): v for n, v in tensors.items() if n.startswith("buffer.")}
        return cls(tensors["parameters"], buffers)


@dataclass(frozen=True)
class Segment:
    """The optimizer steps between two checkpoints: Δθ_t = Σ_i D_i,t + weight_decay_t + unsplit_t + optimizer_t.

    Attributes:
        shards: The rows, in parts of consecutive examples.
        row_sum: Σ_i of the rows as stored, in float64, ``(k,)``, including rows that were withdrawn since.
        weight_decay: The displacement by weight decay, ``(parameters,)``.
        unsplit: The displacement by gradients that were not split among the examples, ``(parameters,)``; ``(0,)`` if
            there were none.
        optimizer: The rest of Δθ_t, what rounding took from the other vectors included, ``(parameters,)``.
        audit_ids: Examples whose displacements were kept without projection, ``(audited,)``.
        audit_rows: Their displacements D_i,t, at `Trajectory.coordinates`, ``(audited, coordinates)``.
        withdrawn: Sum of the rows that were withdrawn, in float64, ``(k,)``.
        rate_sums: The effective learning rate of each block, summed over the steps, in float64, ``(blocks,)``; see
            `pkexplain.optimizers._learning_rates`.
        operator: What covectors are multiplied by before they are projected, ``(parameters,)``; ``(0,)`` for ones.
        directions: The directions of the segment's projection, by name; see `Projector.tensors`.
        steps: The tensors of its steps, `StepLog`, if the run can be replayed.
        examples: The run's number of examples; those that were added after this segment have rows of zeros.
    """

    shards: tuple[Rows, ...]
    row_sum: Tensor
    weight_decay: Vector
    unsplit: Tensor
    optimizer: Vector
    audit_ids: Tensor
    audit_rows: Tensor
    withdrawn: Tensor
    rate_sums: Tensor
    operator: Vector
    directions: Mapping[str, Tensor] = field(default_factory=dict)
    steps: Mapping[str, Tensor] = field(default_factory=dict)
    examples: int = 0

    def __post_init__(self) -> None:
        """Count the examples."""
        object.__setattr__(self, "examples", self.examples or sum(map(len, self.shards)))

    @property
    def loss_derivatives(self) -> Tensor:
        """The loss derivatives of all rows, ``(examples,)``."""
        known = [shard.spread("loss_derivatives") for shard in self.shards]
        return torch.cat([*known, known[0].new_zeros(self.examples - sum(map(len, known)))])

    @property
    def norms(self) -> Tensor:
        """The norms of all rows, rounded up, ``(examples,)``."""
        known = [shard.spread("norms") for shard in self.shards]
        return torch.cat([*known, known[0].new_zeros(self.examples - sum(map(len, known)))])

    def subset(self, some: slice) -> Segment:
        """Return the segment with the rows of some of the examples, without a copy."""
        parts, start = [], 0
        for shard in self.shards:
            parts.append(shard.subset(slice(max(some.start - start, 0), max(min(some.stop - start, len(shard)), 0))))
            start += len(shard)
        return replace(self, shards=tuple(parts), examples=some.stop - some.start)

    def read_rows(self, ids: Tensor | slice, dtype: torch.dtype = torch.float32) -> Tensor:
        """Read rows as stored, ``(ids, k)``, in parameter units of the projection space.

        Args:
            ids: Examples, or a slice of them.
            dtype: Dtype to read them in.
        """
        if isinstance(ids, slice):
            return self._read_range(*ids.indices(self.examples)[:2], dtype)
        return self._pick(ids, lambda shard, mine: shard.read(mine, dtype))

    def read_loss_derivatives(self, ids: Tensor) -> Tensor:
        """Read the loss derivatives of some rows, ``(ids,)``."""
        return self._pick(ids, lambda shard, mine: shard.spread("loss_derivatives")[mine])

    def _pick(self, ids: Tensor, read: Callable[[Rows, Tensor], Tensor]) -> Tensor:
        """Read something of some rows, from whichever shard holds them; zeros for examples that were added later."""
        none, start = read(self.shards[0], ids[:0]), 0
        found = none.new_zeros(len(ids), *none.shape[1:])
        for shard in self.shards:
            mine = (ids >= start) & (ids < start + len(shard))
            if mine.all():
                return read(shard, ids - start)
            found[mine] = read(shard, ids[mine] - start)
            start += len(shard)
        return found

    def _read_range(self, first: int, stop: int, dtype: torch.dtype) -> Tensor:
        parts, start = [], 0
        for shard in self.shards:
            here = slice(max(first - start, 0), min(stop - start, len(shard)))
            if here.stop > here.start:
                parts.append(shard.read(here, dtype))
            start += len(shard)
        later = max(0, stop - max(first, start))
        if later or not parts:
            parts.append(torch.zeros(later, self.shards[0].rows.shape[1], dtype=dtype, device="cpu"))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors to store with the rows."""
        vectors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        for name in PACKABLE:
            value = getattr(self, name)
            vectors |= value.tensors(name) if isinstance(value, PackedVector) else {}
        vectors |= {f"{DIRECTIONS}{name}": value for name, value in self.directions.items()}
        return vectors | {f"{_STEPS}{name}": value for name, value in self.steps.items()}

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        shards: Iterable[Mapping[str, Tensor]],
        counts: Sequence[int],
        examples: int,
        parameters: int,
    ) -> Segment:
        """Rebuild a segment from stored tensors.

        Args:
            tensors: Everything but its rows.
            shards: The tensors of its rows.
            counts: Of how many examples each shard has the rows.
            examples: How many examples there are.
            parameters: The size of θ.
        """
        named: dict[str, Any] = {name: tensors[name] for name in _TENSORS}
        for name in PACKABLE:
            packed = f"{name}.codes" in tensors
            named[name] = PackedVector.from_tensors(tensors, name, parameters) if packed else tensors[name]
        for field_name, prefix in (("directions", DIRECTIONS), ("steps", _STEPS)):
            named[field_name] = {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
        rows = tuple(Rows.from_tensors(*shard) for shard in zip(shards, counts, strict=True))
        return cls(rows, examples=examples, **named)


@dataclass(frozen=True)
class Trajectory:
    """All checkpoints and segments of a run.

    Attributes:
        manifest: The run's description.
        projection: The projection of the rows.
        num_examples: The number of training examples in this part.
        read: Reads the tensors of a file of the run, by name.
        first: The first example; more than 0 in a part of a run.
    """

    manifest: Manifest
    projection: Projection
    num_examples: int
    read: Callable[[str], Mapping[str, Tensor]]
    first: int = 0
    _open: dict[int, Segment] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        """Return the number of segments."""
        return len(self.manifest.segments)

    @property
    def run_id(self) -> str:
        """A name no other run has."""
        return self.manifest.run_id

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the checkpoints and of the arithmetic."""
        return getattr(torch, self.manifest.dtype)

    @property
    def operator_dtype(self) -> torch.dtype:
        """Dtype of the segments' vectors, apart from checkpoints."""
        return torch.float64 if self.dtype == torch.float64 else torch.bfloat16

    @cached_property
    def coordinates(self) -> Coordinates:
        """Where the audited examples' displacements are kept."""
        return self.projection.audited_coordinates(self.fingerprint.blocks)

    @property
    def fingerprint(self) -> ModelFingerprint:
        """What the model must be."""
        return self.manifest.model

    @property
    def inputs(self) -> Mapping[str, InputEntry]:
        """Shape and dtype of the model's inputs, or an empty mapping."""
        return self.manifest.inputs

    @cached_property
    def summaries(self) -> tuple[SegmentSummary, ...]:
        """The numbers of each segment."""
        return tuple(segment.summary for segment in self.manifest.segments)

    @cached_property
    def files(self) -> tuple[SegmentFiles, ...]:
        """Where each segment is kept."""
        return tuple(segment.files for segment in self.manifest.segments)

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Optimizer steps done at each checkpoint, ``(segments + 1,)``."""
        return (0, *(summary.last_step for summary in self.summaries))

    def checkpoint(self, t: int) -> Checkpoint:
        """Read checkpoint θ_t, 0 ≤ t ≤ T."""
        return Checkpoint.from_tensors(self.read(self.files[t - 1].checkpoint if t else FIRST_CHECKPOINT))

    def segment(self, t: int) -> Segment:
        """Read segment t, 0 ≤ t < T; once read, it stays, also if its files are replaced in the run."""
        if t not in self._open:
            self._open[t] = self._read_segment(t)
        return self._open[t]

    def _read_segment(self, t: int) -> Segment:
        files = self.files[t]
        whole = Segment.from_tensors(
            self.read(files.vectors),
            map(self.read, files.rows),
            files.counts,
            max(sum(files.counts), self.first + self.num_examples),
            sum(block.numel for block in self.fingerprint.blocks),
        )
        if self.first or whole.examples > self.num_examples:
            return whole.subset(slice(self.first, self.first + self.num_examples))
        return whole

    def subset(self, some: slice) -> Trajectory:
        """Return the run with the rows of some of the examples, numbered from 0 again."""
        return replace(self, first=self.first + some.start, num_examples=some.stop - some.start, _open={})

    @property
    def rows_id(self) -> str:
        """A unique name for these rows: of this run, after these segments, withdrawals and merges."""
        names = " ".join(name for files in self.files for name in files.rows)
        return f"{self.run_id} {names} {self.first} {self.num_examples}"

    def projector(self, t: int, device: torch.device) -> Projector:
        """Rebuild the projection of segment t as it was recorded."""
        self.checkpoint(0)  # shows that θ, and so P's tables, may be as large as the manifest says
        segment, like = self.segment(t), torch.empty(0, dtype=self.dtype, device=device)
        directions = {name: value.clone() for name, value in segment.directions.items()}  # in a file, they lie anywhere
        projector = self.projection.restore(self.fingerprint.blocks, like, directions)
        return projector.with_operator(segment.operator) if len(segment.operator) else projector

    @classmethod
    def of(cls, manifest: Manifest, read: Callable[[str], Mapping[str, Tensor]]) -> Trajectory:
        """Make the trajectory from a run's manifest and a function that reads its files.

        Raises:
            ConfigurationError: This version does not know its projection.
            TypeError: Its projection has other settings.
        """
        return cls(manifest, projection_from_description(manifest.projection), manifest.num_examples, read)
