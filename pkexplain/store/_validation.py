"""What the files of a run must hold, given its manifest.

A checksum shows that a file is the one that was written, not that a recorder wrote it. So every tensor is checked
against the manifest before a number is computed from it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pkexplain.projection.packed import PackedVector
from pkexplain.store.manifest import FIRST_CHECKPOINT
from pkexplain.store.trajectory import DIRECTIONS, PACKABLE, Trajectory

_MOST_AUDITED = 1 << 16

Format = tuple[tuple[int, ...], tuple[torch.dtype, ...]]
"""The shape of a tensor and the dtypes that it may have."""


class MisfitError(ValueError):
    """A file does not hold what the manifest says; the store raises it as a `RunDamagedError`.

    Args:
        wrong: What is wrong.
        got: What was found.
        expected: What was expected.
    """

    def __init__(self, wrong: str, got: Any, expected: Any) -> None:
        """Keep the parts of the message."""
        super().__init__(wrong)
        self.wrong, self.got, self.expected = wrong, got, expected


@dataclass(frozen=True)
class Layout:
    """What every file of a run must hold.

    Attributes:
        trajectory: The run.
        parameters: The size of θ.
        columns: k, the size of a row.
    """

    trajectory: Trajectory
    parameters: int
    columns: int
    _roles: Mapping[str, Callable[[Mapping[str, Tensor]], None]] = field(repr=False)
    _seen: set[str] = field(default_factory=set, repr=False)

    @classmethod
    def of(cls, trajectory: Trajectory) -> Layout:
        """Derive it from a run's manifest."""
        manifest, roles = trajectory.manifest, {}
        parameters = sum(block.numel for block in manifest.model.blocks)
        layout = cls(trajectory, parameters, manifest.columns or 0, roles)
        expected = trajectory.projection.columns(manifest.model.blocks)
        if manifest.segments and expected != manifest.columns:
            raise MisfitError("its rows have other columns than its projection", manifest.columns, expected)
        roles[FIRST_CHECKPOINT] = layout._check_checkpoint
        for files in trajectory.files:
            roles[files.checkpoint] = layout._check_checkpoint
            roles[files.vectors] = layout._check_vectors
            for name, count in zip(files.rows, files.counts, strict=True):
                roles[name] = lambda tensors, count=count: layout._check_rows(tensors, count)
        return layout

    def check(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Check a file against the manifest, once.

        Raises:
            MisfitError: It does not hold what the manifest says.
        """
        if name not in self._seen and name in self._roles:
            self._roles[name](tensors)
            self._seen.add(name)

    def _check_checkpoint(self, tensors: Mapping[str, Tensor]) -> None:
        buffers = self.trajectory.fingerprint.buffers
        missing = [name for name in buffers if f"buffer.{name}" not in tensors]
        if missing:
            raise MisfitError("it lacks a buffer", sorted(tensors), missing[0])
        here = {n: ((*s,), (tensors[f"buffer.{n}"].dtype,)) for n, s in buffers.items()}
        wanted = {f"buffer.{n}": form for n, form in here.items()}
        parameters = {"parameters": ((self.parameters,), (self.trajectory.dtype,))}
        _check_tensors(tensors, wanted | parameters, may_be_odd=wanted)  # a mask may hold infinities

    def _check_vectors(self, tensors: Mapping[str, Tensor]) -> None:
        audited = _length(tensors.get("audit_ids"))
        rounded = (self.trajectory.operator_dtype,)
        vector: Format = (self.parameters,), rounded
        row: Format = (self.columns,), (torch.float64,)
        wanted: dict[str, Format] = {"row_sum": row, "withdrawn": row}
        unsplit = self.parameters if _length(tensors.get("unsplit")) else 0
        wanted["unsplit"] = ((unsplit,), rounded)
        wanted["rate_sums"] = ((len(self.trajectory.fingerprint.blocks),), (torch.float64,))
        wanted["audit_ids"] = ((min(audited, _MOST_AUDITED),), (torch.int64,))
        kinds = (self.trajectory.dtype,) if self.trajectory.projection.keeps_everything else rounded
        wanted["audit_rows"] = ((audited, len(self.trajectory.coordinates)), kinds)
        for name in PACKABLE:
            if f"{name}.codes" in tensors and rounded != (torch.float64,):
                codes, scales = PackedVector.shapes(self.parameters, name == "operator")
                wanted |= {f"{name}.codes": (codes, (torch.uint8,)), f"{name}.scales": (scales, (torch.float32,))}
            else:
                wanted[name] = vector if name != "operator" or _length(tensors.get(name)) else ((0,), rounded)
        _check_tensors(tensors, wanted)
        for name in PACKABLE:
            if f"{name}.codes" in wanted and not PackedVector.from_tensors(tensors, name, self.parameters).finite:
                raise MisfitError(f"its vector {name} is not finite", "a scale that is too large", "numbers")
        self._check_directions({n.removeprefix(DIRECTIONS): t for n, t in tensors.items() if n.startswith(DIRECTIONS)})
        ids, most = tensors["audit_ids"], self.trajectory.num_examples
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= most or len(ids.unique()) < len(ids)):
            raise MisfitError(
                "it audits examples that do not exist", ids.tolist(), f"different ids from 0 to {most - 1}"
            )

    def _check_rows(self, tensors: Mapping[str, Tensor], count: int) -> None:
        kind = self.trajectory.projection.row_dtype(self.trajectory.dtype)
        each = (min(count, _length(tensors.get("ids"))),)
        wanted: dict[str, Format] = {"rows": ((*each, self.columns), (kind,)), "scale": (each, (torch.float32,))}
        wanted["loss_derivatives"] = (each, (self.trajectory.dtype,))
        wanted["norms"] = (each, (torch.float64 if kind == torch.float64 else torch.float32,))
        wanted["ids"] = (each, (torch.int64,))
        _check_tensors(tensors, wanted, may_be_odd=("loss_derivatives",))
        ids = tensors["ids"]
        if len(ids) and (int(ids[0]) < 0 or int(ids[-1]) >= count or not bool((ids.diff() > 0).all())):
            raise MisfitError(
                "it holds rows of examples that do not exist", "other ids", f"ascending ids below {count}"
            )
        if set(tensors) != set(wanted):
            raise MisfitError("it holds other tensors", sorted(tensors), sorted(wanted))

    def _check_directions(self, directions: Mapping[str, Tensor]) -> None:
        blocks = self.trajectory.fingerprint.blocks
        matrices = {position: block.matrix for position, block in enumerate(blocks) if block.matrix is not None}
        sizes = {f"{p}.{side}": m[side == "right"] for p, m in matrices.items() for side in ("left", "right")}
        expected = sizes if self.trajectory.projection.follows_gradients else {}
        beside = {f"{p}.beside": blocks[p].numel for p in matrices} if expected else {}
        beside = beside if not beside.keys().isdisjoint(directions) else {}
        stage = {"second_stage", "scale"} if "second_stage" in directions else set()
        if set(directions) != {*expected, *beside, *stage}:
            raise MisfitError("it holds directions of other blocks", sorted(directions)[:8], sorted(expected)[:8])
        _check_tensors(directions, {n: ((numel,), (self.trajectory.operator_dtype,)) for n, numel in beside.items()})
        for name in expected:
            tensor = directions[name]
            shape = max(1, min(_length(tensor), sizes[name])), sizes[name]
            _check_tensors(directions, {name: (shape, (self.trajectory.dtype,))})
        dtype, kept = self.trajectory.dtype, {name: directions[name] for name in (*expected, *beside)}
        width = self.trajectory.projection.restore(blocks, torch.empty(0, dtype=dtype), kept).width
        if stage:
            half = torch.float64 if dtype == torch.float64 else torch.float16
            few = max(1, min(_length(directions["second_stage"]), self.columns))
            basis: Format = (few, width), (half,)
            _check_tensors(directions, {"second_stage": basis, "scale": ((width,), (dtype,))})
        elif width != self.columns:
            raise MisfitError("it has other directions than its rows have numbers", width, self.columns)


def _check_tensors(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, Format], may_be_odd: Collection[str] = ()
) -> None:
    """Check shapes, dtypes, and that numbers are finite."""
    for name, (shape, kinds) in wanted.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise MisfitError(f"it lacks the tensor {name}", sorted(tensors), name)
        if tuple(tensor.shape) != shape or tensor.dtype not in kinds:
            expected = f"{shape}, {' or '.join(map(str, kinds))}"
            raise MisfitError(
                f"its tensor {name} has another shape or type", f"{tuple(tensor.shape)}, {tensor.dtype}", expected
            )
        if name not in may_be_odd and tensor.is_floating_point() and tensor.numel():
            ends = torch.stack(torch.aminmax(tensor))  # one pass, without a table of booleans as large as the tensor
            if not ends.isfinite().all():
                raise MisfitError(f"its tensor {name} is not finite", ends.tolist(), "numbers")


def _length(tensor: Tensor | None) -> int:
    return tensor.shape[0] if tensor is not None and tensor.ndim else 0
