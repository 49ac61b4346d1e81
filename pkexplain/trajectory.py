"""A recorded run as frozen data: checkpoints, the segments between them, and what is needed to read them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pkexplain.errors import ModelMismatchError, message
from pkexplain.layers import Block
from pkexplain.projection import Projection, projection_from_description
from pkexplain.projector import Projector

__all__ = ["Checkpoint", "ModelFingerprint", "Segment", "SegmentSummary", "Trajectory", "checksum_tensor"]

_ROWS_AT_ONCE = 128
"""Rows that are rounded and summed at a time, so that they stay in a core's cache."""
_MOST_HANDED_DOWN = 2**-9
"""Most rounding of larger rows that a row takes, relative to its largest number."""
_SMALLEST_EXPONENT = -126
"""Of the powers of two that float32 holds in full; a row that needs a smaller one becomes zero, not infinity."""


def checksum_tensor(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    if tensor.numel():
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Checkpoint:
    """θ_t, the trainable parameters at a segment boundary, and the buffers that were there.

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
        """Make the checkpoint again from stored tensors."""
        buffers = {n.removeprefix("buffer."): v for n, v in tensors.items() if n.startswith("buffer.")}
        return cls(tensors["parameters"], buffers)


@dataclass(frozen=True)
class Segment:
    """The optimizer steps between two checkpoints: Δθ_t = Σ_i D_i,t + decay_t + optimizer_t.

    Attributes:
        rows: Displacement rows P D_i,t as stored, ``(num_examples, k)``, divided by ``scale``.
        scale: What each row is multiplied with, ``(num_examples,)``.
        row_sum: Σ_i of the rows as stored, in float64, ``(k,)``.
        loss_derivatives: ∂ℓ_i/∂y_i of each row along its unit direction u_i, averaged over the visits that the row
            holds with the kernel as weight, ``(num_examples,)``; signed where the output is one number, otherwise
            −‖∂ℓ_i/∂y_i‖ (u_i being the direction in which the loss falls); nan where the output was not seen.
        decay: What weight decay did, ``(parameters,)``.
        optimizer: What is left of Δθ_t, ``(parameters,)``.
        audit_ids: Examples whose displacements were kept without projection, ``(audited,)``.
        audit_rows: Their displacements D_i,t, ``(audited, parameters)``.
    """

    rows: Tensor
    scale: Tensor
    row_sum: Tensor
    loss_derivatives: Tensor
    decay: Tensor
    optimizer: Tensor
    audit_ids: Tensor
    audit_rows: Tensor

    @classmethod
    def pack(cls, rows: Tensor, row_dtype: torch.dtype, **others: Tensor) -> Segment:
        """Round rows to ``row_dtype``, each with a power of two of its own, and sum them as rounded."""
        if row_dtype == torch.float16:
            largest = torch.maximum(rows.amax(dim=1), -rows.amin(dim=1)).double()
            exponent = torch.where(largest > 0, largest.log2().ceil() - 14, 0.0).clamp_min(_SMALLEST_EXPONENT)
            scale = torch.exp2(exponent).to(torch.float32)
        else:
            scale = torch.ones(len(rows), dtype=torch.float32, device=rows.device)
        stored = torch.empty(rows.shape, dtype=row_dtype, device=rows.device)
        sizes, size_of = scale.unique(return_inverse=True)
        left = torch.zeros(len(sizes), rows.shape[1], dtype=torch.float64, device=rows.device)
        for some in torch.arange(len(rows), device=rows.device).split(_ROWS_AT_ONCE):
            factors = scale[some, None].to(rows.dtype)
            stored[some] = (rows[some] / factors).to(row_dtype)
            if row_dtype != rows.dtype:
                left.index_add_(0, size_of[some], (rows[some] - stored[some].to(rows.dtype) * factors).double())
        if row_dtype != rows.dtype:
            _hand_down(rows, stored, sizes, size_of, left)
        row_sum = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
        for some, factors in zip(stored.split(_ROWS_AT_ONCE), scale.split(_ROWS_AT_ONCE), strict=True):
            row_sum += factors.double() @ some.double()
        return cls(stored, scale, row_sum, **others)

    def read_rows(self, ids: Tensor | slice, dtype: torch.dtype = torch.float32) -> Tensor:
        """Read rows as stored, ``(len(ids), k)``, in parameter units of the projection space."""
        return self.rows[ids].to(dtype) * self.scale[ids, None].to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors to store."""
        return dict(vars(self))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Segment:
        """Make the segment again from stored tensors."""
        return cls(**tensors)


def _hand_down(rows: Tensor, stored: Tensor, sizes: Tensor, size_of: Tensor, left_by_size: Tensor) -> None:
    """Let one row of each size take the rounding that the larger ones left, in place, so that the sum keeps its digits.

    Where large rows cancel, their rounding can be more than the sum that is left; it is little to the next smaller row.

    Args:
        rows: The rows, ``(num_examples, k)``.
        stored: The same, divided by their sizes and rounded.
        sizes: The sizes that occur, ascending, ``(sizes,)``.
        size_of: Which of them each row has, ``(num_examples,)``.
        left_by_size: What rounding the rows of each size left of their sum, ``(sizes, k)``.
    """
    left = torch.zeros_like(left_by_size[0])
    places = torch.arange(len(rows), device=rows.device)
    last = torch.zeros_like(sizes, dtype=torch.long).scatter_reduce_(0, size_of, places, "amax")
    for place in range(len(sizes) - 1, -1, -1):
        size, row = sizes[place].double(), last[place]
        left = left + left_by_size[place]
        most = rows[row].abs().max().double() * _MOST_HANDED_DOWN
        before = stored[row].double() * size
        stored[row] = ((before + torch.where(left.abs() <= most, left, 0.0)) / size).to(stored.dtype)
        left = left - (stored[row].double() * size - before)


@dataclass(frozen=True)
class SegmentSummary:
    """The numbers of a segment that fit in the manifest.

    Attributes:
        last_step: Optimizer steps done when it ended.
        visits: Examples seen in it, repeats included.
        learning_rate_sum: The learning rate summed over its steps, for each parameter group.
        displacement_gap: ‖P(Δθ − decay − optimizer) − Σ_i rows‖ / ‖P Δθ‖.
        optimizer_share: ‖optimizer‖ / ‖Δθ‖.
        capture_gap: The largest ‖Σ_i captured − gradient‖ / ‖gradient‖ of its first and every 16th step.
        rescaled: The smallest and largest factor found between the captured and the applied gradient.
        bent: The largest share of a step's applied gradient that is no multiple of the captured one.
        skipped_steps: Steps that were not taken because a gradient was not finite (a loss scaler does that).
    """

    last_step: int
    visits: int
    learning_rate_sum: tuple[float, ...]
    displacement_gap: float
    optimizer_share: float
    capture_gap: float
    rescaled: tuple[float, float]
    bent: float
    skipped_steps: int

    @classmethod
    def from_description(cls, described: Mapping[str, Any]) -> SegmentSummary:
        """Make the summary again from plain data."""
        plain: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in described.items()}
        return cls(**plain)


@dataclass(frozen=True)
class ModelFingerprint:
    """What must be the same in the model that is explained as in the one that was recorded.

    Attributes:
        blocks: The recorded parameters, in the order of the flat vector.
        frozen: Shape of every parameter that was not recorded, with a checksum of its values.
        buffers: Shape of every stored buffer.
        dtypes: Number format of every parameter.
        modules: Type of every module, by path; a function called in a forward pass is not seen.
    """

    blocks: tuple[Block, ...]
    frozen: Mapping[str, tuple[tuple[int, ...], str]]
    buffers: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    modules: Mapping[str, str]

    @classmethod
    def of(cls, model: nn.Module, blocks: tuple[Block, ...]) -> ModelFingerprint:
        """Take a model's fingerprint."""
        recorded = {name for block in blocks for name in block.parameters}
        frozen = {
            name: (tuple(p.shape), checksum_tensor(p)) for name, p in model.named_parameters() if name not in recorded
        }
        dtypes = {name: str(p.dtype) for name, p in model.named_parameters()}
        buffers = {name: tuple(b.shape) for name, b in model.named_buffers()}
        return cls(blocks, frozen, buffers, dtypes, _types(model))

    def describe(self) -> dict[str, Any]:
        """Describe it in plain data."""
        return asdict(self)

    @classmethod
    def from_description(cls, described: Mapping[str, Any]) -> ModelFingerprint:
        """Make it again from plain data."""
        blocks = tuple(
            Block(
                name=b["name"],
                parameters=tuple(b["parameters"]),
                shapes=tuple(tuple(shape) for shape in b["shapes"]),
                group=b["group"],
                start=b["start"],
                matrix=tuple(b["matrix"]) if b["matrix"] else None,
            )
            for b in described["blocks"]
        )
        frozen = {name: (tuple(shape), checksum) for name, (shape, checksum) in described["frozen"].items()}
        buffers = {name: tuple(shape) for name, shape in described["buffers"].items()}
        return cls(blocks, frozen, buffers, described["dtypes"], described["modules"])

    def check(self, model: nn.Module) -> None:
        """Compare with a model.

        Raises:
            ModelMismatchError: A name, a shape or a frozen value differs; the message names the first one.
        """
        here = {name: tuple(p.shape) for name, p in model.named_parameters()}
        recorded = {n: s for block in self.blocks for n, s in zip(block.parameters, block.shapes, strict=True)}
        wanted = {**recorded, **{n: shape for n, (shape, _) in self.frozen.items()}}
        for name in [*wanted, *(n for n in here if n not in wanted)]:
            if here.get(name) != wanted.get(name):
                raise _mismatch(name, here.get(name, "no such parameter"), wanted.get(name, "no such parameter"))
        types = _types(model)
        for path in [*self.modules, *(p for p in types if p not in self.modules)]:
            got, expected = (where.get(path, "no such module") for where in (types, self.modules))
            if got != expected:
                raise _mismatch(path or "(the model itself)", got, expected, "module")
        named = dict(model.named_parameters())
        for name, dtype in self.dtypes.items():
            if str(named[name].dtype) != dtype:
                raise _mismatch(name, named[name].dtype, dtype)
        for name, (_, checksum) in self.frozen.items():
            if checksum_tensor(named[name]) != checksum:
                raise _mismatch(name, "other values", "the values it was frozen at")
        buffers = {n: tuple(b.shape) for n, b in model.named_buffers()}
        for name, shape in self.buffers.items():
            if buffers.get(name) != shape:
                raise _mismatch(name, buffers.get(name, "no such buffer"), shape)


def _types(model: nn.Module) -> dict[str, str]:
    return {path: type(module).__name__ for path, module in model.named_modules()}


def _mismatch(name: str, got: Any, expected: Any, kind: str = "parameter") -> ModelMismatchError:
    return ModelMismatchError(
        message(
            f"explaining with {kind} {name!r}",
            "the model is not the one that was recorded",
            got=got,
            expected=expected,
            source="the run's manifest",
            fix="Build the model with the code and the pretrained weights it was trained from",
        )
    )


@dataclass(frozen=True)
class Trajectory:
    """All checkpoints and segments of a run.

    Attributes:
        run_id: A name no other run has.
        num_examples: How many training examples there are.
        dtype: Number format of the checkpoints and of the arithmetic.
        projection: The projection of the rows.
        fingerprint: What the model must be.
        inputs: Shape (without the batch, None where it varied) and type of the model's inputs, or an empty mapping.
        summaries: One for each segment.
        details: Everything else the manifest says, for people.
        read: Reads the tensors of a file of the run, by name.
    """

    run_id: str
    num_examples: int
    dtype: torch.dtype
    projection: Projection
    fingerprint: ModelFingerprint
    inputs: Mapping[str, Any]
    summaries: tuple[SegmentSummary, ...]
    details: Mapping[str, Any]
    read: Callable[[str], Mapping[str, Tensor]]

    def __len__(self) -> int:
        """Return the number of segments."""
        return len(self.summaries)

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Optimizer steps done at each checkpoint, ``(segments + 1,)``."""
        return (0, *(summary.last_step for summary in self.summaries))

    def checkpoint(self, t: int) -> Checkpoint:
        """Read checkpoint θ_t, 0 ≤ t ≤ T."""
        return Checkpoint.from_tensors(self.read(f"checkpoints/{t:05d}.safetensors"))

    def segment(self, t: int) -> Segment:
        """Read segment t, 0 ≤ t < T."""
        return Segment.from_tensors(self.read(f"segments/{t:05d}.safetensors"))

    def projector(self, device: torch.device) -> Projector:
        """Make the run's projection again, as it was recorded."""
        kept = self.read("projection.safetensors")
        return self.projection.restore(self.fingerprint.blocks, self.dtype, device, kept)

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any], read: Callable[[str], Mapping[str, Tensor]]) -> Trajectory:
        """Make the trajectory from a run's manifest and a function that reads its files."""
        known = ("run_id", "num_examples", "dtype", "projection", "model", "inputs", "segments", "files")
        return cls(
            run_id=manifest["run_id"],
            num_examples=manifest["num_examples"],
            dtype=getattr(torch, manifest["dtype"]),
            projection=projection_from_description(manifest["projection"]),
            fingerprint=ModelFingerprint.from_description(manifest["model"]),
            inputs=manifest["inputs"],
            summaries=tuple(SegmentSummary.from_description(s) for s in manifest["segments"]),
            details={name: value for name, value in manifest.items() if name not in known},
            read=read,
        )
