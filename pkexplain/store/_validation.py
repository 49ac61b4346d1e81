"""What the files of a run must hold, given what its manifest says.

A checksum tells that a file is the one that was written, not that it was written by a recorder. So everything that a
number is made of is checked against the manifest, and the manifest against itself, before it is used: a run that comes
from somebody else can be refused, and cannot do anything else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from itertools import pairwise
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from pkexplain.store.trajectory import FIRST_CHECKPOINT, SegmentFiles, SegmentSummary, Trajectory

__all__ = ["FILE_NAME", "Layout", "MisfitError"]

FILE_NAME = re.compile(
    r"(?:(?:checkpoints|segments|rows|states)/[0-9]{5,9}(?:\.[0-9]{3,6})?(?:-[0-9]{1,9})?|projection)\.safetensors"
)
"""The names that files of tensors have."""
_PROJECTION = "projection.safetensors"
_MOST_AUDITED = 1 << 16

Format = tuple[tuple[int, ...], tuple[torch.dtype, ...]]
"""The shape of a tensor and the dtypes that it may have."""


class MisfitError(ValueError):
    """A file does not hold what the manifest says; the store makes a `RunDamagedError` of it.

    Args:
        wrong: What is wrong.
        got: What was found.
        expected: What would do.
    """

    def __init__(self, wrong: str, got: Any, expected: Any) -> None:
        """Keep the parts of the message."""
        super().__init__(wrong)
        self.wrong, self.got, self.expected = wrong, got, expected


@dataclass(frozen=True)
class Layout:
    """What every file of a run must hold.

    Attributes:
        trajectory: The run, as its manifest describes it.
        parameters: How many numbers θ holds.
        columns: k, how many numbers a row holds.
    """

    trajectory: Trajectory
    parameters: int
    columns: int
    _roles: Mapping[str, Callable[[Mapping[str, Tensor]], None]] = field(repr=False)
    _seen: set[str] = field(default_factory=set, repr=False)

    @classmethod
    def of(cls, trajectory: Trajectory) -> Layout:
        """Hold a manifest against itself.

        Raises:
            MisfitError: It is not that of a run.
        """
        columns, parameters = trajectory.details["columns"], _check_model(trajectory)
        _number("columns", columns, 1, parameters)
        _check_segments(trajectory)
        _check_rest(trajectory)
        roles: dict[str, Callable[[Mapping[str, Tensor]], None]] = {}
        layout = cls(trajectory, parameters, columns, roles)
        roles[FIRST_CHECKPOINT], roles[_PROJECTION] = layout._check_checkpoint, layout._check_projection
        for files in trajectory.files:
            roles[files.checkpoint] = layout._check_checkpoint
            roles[files.vectors] = layout._check_vectors
            for name, count in zip(files.rows, files.counts, strict=True):
                roles[name] = lambda tensors, count=count: layout._check_rows(tensors, count)
        return layout

    def check(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Hold a file against the manifest, once.

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
        vector, row = ((self.parameters,), (self.trajectory.dtype,)), ((self.columns,), (torch.float64,))
        wanted: dict[str, Format] = {"row_sum": row, "withdrawn": row, "weight_decay": vector, "optimizer": vector}
        wanted["rate_sums"] = ((len(self.trajectory.fingerprint.blocks),), (torch.float64,))
        wanted["audit_ids"] = ((min(audited, _MOST_AUDITED),), (torch.int64,))
        wanted["audit_rows"] = ((audited, self.parameters), (self.trajectory.dtype,))
        _check_tensors(tensors, wanted)
        ids, most = tensors["audit_ids"], self.trajectory.num_examples
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= most or len(ids.unique()) < len(ids)):
            raise MisfitError("it audits examples that are none", ids.tolist(), f"different ids from 0 to {most - 1}")

    def _check_rows(self, tensors: Mapping[str, Tensor], count: int) -> None:
        kind = self.trajectory.projection.row_dtype(self.trajectory.dtype)
        each = (count,)
        wanted: dict[str, Format] = {"rows": ((count, self.columns), (kind,)), "scale": (each, (torch.float32,))}
        wanted["loss_derivatives"] = (each, (self.trajectory.dtype,))
        wanted["norms"] = (each, (torch.float64 if kind == torch.float64 else torch.float32,))
        _check_tensors(tensors, wanted, may_be_odd=("loss_derivatives",))
        if set(tensors) != set(wanted):
            raise MisfitError("it holds other tensors", sorted(tensors), sorted(wanted))

    def _check_projection(self, tensors: Mapping[str, Tensor]) -> None:
        blocks = self.trajectory.fingerprint.blocks
        matrices = {position: block.matrix for position, block in enumerate(blocks) if block.matrix is not None}
        sizes = {f"{p}.{side}": m[side == "right"] for p, m in matrices.items() for side in ("left", "right")}
        for name, tensor in tensors.items():
            shape: tuple[int, ...] = (self.parameters,)
            if name in sizes:
                shape = max(1, min(_length(tensor), sizes[name])), sizes[name]
            elif name != "preconditioner":
                raise MisfitError(
                    "it holds a tensor that the projection has no use for", name, [*sizes, "preconditioner"][:8]
                )
            _check_tensors(tensors, {name: (shape, (self.trajectory.dtype,))})
        try:
            found = self.trajectory.projection.columns(blocks, tensors)
        except KeyError as error:
            raise MisfitError("it lacks a basis", sorted(tensors), error.args[0]) from error
        if found != self.columns:
            raise MisfitError("it has other columns than the rows", found, self.columns)


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


def _check_model(trajectory: Trajectory) -> int:
    """Check that the blocks lie side by side; return how many numbers they hold."""
    end, names = 0, [name for block in trajectory.fingerprint.blocks for name in block.parameters]
    if not names or len(set(names)) < len(names) or not all(isinstance(name, str) for name in names):
        raise MisfitError("its parameters have no names of their own", names[:8], "different names")
    for block in trajectory.fingerprint.blocks:
        for size in [*(size for shape in block.shapes for size in shape), *(block.matrix or ())]:
            _number("shapes", size, 0, 1 << 48)
        rows, columns = block.matrix or (block.numel, 1)
        if block.start != end or len(block.shapes) != len(block.parameters) or rows * columns != block.numel:
            raise MisfitError("its blocks do not lie side by side", f"{block}", f"one that starts at {end}")
        _number("group", block.group, 0, 1 << 31)
        end += block.numel
    return end


def _check_segments(trajectory: Trajectory) -> None:
    """Check the counts, the names and the numbers of the segments."""
    _number("num_examples", trajectory.num_examples, 1, 1 << 48)
    names: list[Any] = [name for files in trajectory.files for name in files.names]
    for files in trajectory.files:
        if len(files.rows) != len(files.counts) or not files.rows:
            raise MisfitError("it does not count every file of rows", len(files.counts), len(files.rows))
        for count in files.counts:
            _number("counts", count, 0, trajectory.num_examples)
        _check_names(files)
    if len(set(names)) < len(names):
        raise MisfitError("two segments have a file in common", len(names), len(set(names)))
    most = max(sum(files.counts) for files in trajectory.files)
    if most != trajectory.num_examples:
        raise MisfitError("num_examples is not what its rows hold", trajectory.num_examples, most)
    for summary in trajectory.summaries:
        for each in fields(SegmentSummary):
            value = getattr(summary, each.name)
            for part in value if isinstance(value, tuple) else (value,):
                if isinstance(part, bool) or not isinstance(part, Real):
                    raise MisfitError(f"{each.name} is not a number", repr(part)[:80], "a number")
        for name in ("last_step", "visits", "skipped_steps"):
            _number(name, getattr(summary, name), 0, 1 << 62)
        if not isinstance(summary.learning_rate_sum, tuple) or len(summary.rescaled) != 2:
            got = summary.learning_rate_sum, summary.rescaled
            raise MisfitError("its learning rates are no list, or rescaled is no range", got, "a list, and two numbers")
    if any(after <= before for before, after in pairwise(trajectory.boundaries)):
        raise MisfitError("its segments do not follow one another", trajectory.boundaries[:8], "ascending steps")


def _check_names(files: SegmentFiles) -> None:
    folders = {"segments": (files.vectors,), "rows": files.rows, "checkpoints": (files.checkpoint,)}
    for folder, names in folders.items():
        for name in names:
            if not (isinstance(name, str) and FILE_NAME.fullmatch(name) and name.startswith(f"{folder}/")):
                raise MisfitError("it names a file that no run has", repr(name)[:200], f"{folder}/00000…")


def _check_rest(trajectory: Trajectory) -> None:
    """Check what is shown to people, and what a run is gone on with: inputs, states and settings."""
    for shape, kind in ((said["shape"], said["dtype"]) for said in trajectory.inputs.values()):
        if not isinstance(getattr(torch, kind), torch.dtype):
            raise MisfitError("its inputs have no dtype", repr(kind)[:80], "one of torch")
        for size in shape:
            _number("inputs", 0 if size is None else size, 0, 1 << 48)
    details = trajectory.details
    said = [trajectory.run_id, details["ended"], details["pkexplain"], details["torch"], details["optimizer"]["kind"]]
    if not all(isinstance(text, str) for text in said) or not isinstance(details["optimizer"]["groups"], list):
        raise MisfitError("it does not say what was recorded", repr(said)[:200], "words")
    gone = details.get("withdrawn", [])
    for example in gone:
        _number("withdrawn", example, 0, trajectory.num_examples - 1)
    if not isinstance(gone, list) or len(set(gone)) < len(gone):
        raise MisfitError("it withdraws what it cannot", repr(gone)[:80], "different examples")
    _number("revision", details["revision"], 0, 999_999_999)
    if not isinstance(details["recording"], Mapping) or not details["recording"].keys() >= {"segments", "lookahead"}:
        raise MisfitError("it does not say how it was recorded", repr(details["recording"])[:80], "its settings")
    for state in details["states"]:
        _number("states", state["segments"], 1, len(trajectory))
        for name in state["files"]:
            if not (isinstance(name, str) and FILE_NAME.fullmatch(name) and name.startswith("states/")):
                raise MisfitError("it names a file that no run has", repr(name)[:200], "states/00000…")


def _length(tensor: Tensor | None) -> int:
    return tensor.shape[0] if tensor is not None and tensor.ndim else 0


def _number(name: str, value: Any, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise MisfitError(f"{name} cannot be", repr(value)[:80], f"an integer from {least} to {most}")
