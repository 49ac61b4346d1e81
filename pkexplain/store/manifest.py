"""A run's manifest: one typed object, whose parts are checked against one another whenever one is made.

A checksum shows that a manifest is the one that was written, not that a recorder wrote it. So its types and ranges are
checked on reading (by msgspec, whose errors name the path), and so is whether its parts agree: a run from somebody
else is either consistent or refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal

import msgspec
import torch

from pkexplain.store.fingerprint import ModelFingerprint

__all__ = [
    "FILE_NAME",
    "FIRST_CHECKPOINT",
    "FORMAT_VERSION",
    "FileEntry",
    "InputEntry",
    "Manifest",
    "OptimizerEntry",
    "RecordingEntry",
    "SegmentEntry",
    "SegmentFiles",
    "SegmentSummary",
    "StateEntry",
]

FORMAT_VERSION = 9
FIRST_CHECKPOINT = "checkpoints/00000.safetensors"
FILE_NAME = re.compile(r"(?:checkpoints|segments|rows|states)/[0-9]{5,9}(?:\.[0-9]{3,6})?(?:-[0-9]{1,9})?\.safetensors")
"""The names that files of tensors have."""

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 48)]


class _Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of a manifest."""


class FileEntry(_Entry, frozen=True):
    """A file of the run: its size, and its SHA-256 in hexadecimal (empty in memory)."""

    bytes: Count
    sha256: str


class InputEntry(_Entry, frozen=True):
    """One of the model's inputs: its shape without the batch, None where a size varied, and its dtype's name."""

    shape: tuple[Count | None, ...]
    dtype: str

    def __post_init__(self) -> None:
        """Refuse anything of torch that is not a dtype."""
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"torch has no dtype {self.dtype[:80]!r}")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        return getattr(torch, self.dtype)


class OptimizerEntry(_Entry, frozen=True):
    """The classes of the optimizers, each once, and their parameter groups' options without the parameters."""

    kind: str
    groups: tuple[dict[str, bool | int | float | str], ...]

    @classmethod
    def of(cls, *optimizers: torch.optim.Optimizer) -> OptimizerEntry:
        """Describe optimizers; an option that is not a number or a string is kept as its repr."""
        return cls(
            kind=" + ".join(dict.fromkeys(type(optimizer).__name__ for optimizer in optimizers)),
            groups=tuple(
                {
                    name: value if isinstance(value, (bool, int, float, str)) else repr(value)
                    for name, value in group.items()
                    if name != "params"
                }
                for optimizer in optimizers
                for group in optimizer.param_groups
            ),
        )


class RecordingEntry(_Entry, frozen=True):
    """The recorder's settings with which a resumed run continues."""

    segments: str | int
    unsplit: str = "warn"
    augmented: bool = False
    replay: tuple[str, ...] = ()
    """The optimizer of each parameter group, if the steps are noted, so that they can be taken again."""


class SplitSummary(_Entry, frozen=True):
    """How well a segment's gradients were split among the examples.

    Attributes:
        gap: The split gap, ‖Σ_i c_i g_i − coded gradient‖ / ‖coded gradient‖ for random c_i, of the block that comes
            closest to its tolerance.
        tolerance: The gap that was allowed there, by dtype and by the rounding of the gradients themselves.
        worst: The largest gaps, by block.
        unsplit: Parameters whose gradients were not split, and their largest share of a step's gradient norm.
        reasons: Why, by parameter.
        interacting: Whether examples act on one another, as in a BatchNorm.
    """

    gap: float = 0.0
    tolerance: float = 1e-4
    worst: dict[str, float] = msgspec.field(default_factory=dict)
    unsplit: dict[str, float] = msgspec.field(default_factory=dict)
    reasons: dict[str, str] = msgspec.field(default_factory=dict)
    interacting: bool = False


class SegmentSummary(_Entry, frozen=True):
    """The numbers of a segment that fit in the manifest.

    Attributes:
        last_step: Optimizer steps done when it ended.
        visits: Examples seen in it, repeats included.
        learning_rate_sum: The learning rate summed over its steps, for each parameter group.
        displacement_gap: ‖P(Δθ − weight decay − optimizer) − Σ_i rows‖ / ‖P Δθ‖.
        optimizer_share: ‖optimizer‖ / ‖Δθ‖.
        capture_gap: The largest ‖Σ_i captured − gradient‖ / ‖gradient‖ of its first and every 16th step.
        rescaled: The smallest and largest factor found between the captured and the applied gradient.
        bent: The largest share of a step's applied gradient that is no multiple of the captured one.
        skipped_steps: Steps that were not taken because a gradient was not finite (a loss scaler does that).
        split: How well the gradients were split among the examples.
    """

    last_step: Count
    visits: Count
    learning_rate_sum: tuple[float, ...]
    displacement_gap: float
    optimizer_share: float
    capture_gap: float
    rescaled: tuple[float, float]
    bent: float
    skipped_steps: Count
    split: SplitSummary = msgspec.field(default_factory=SplitSummary)


class SegmentFiles(_Entry, frozen=True):
    """Where a segment is kept.

    Attributes:
        vectors: The file of everything but rows.
        rows: The files of the rows, in the order of the examples.
        counts: How many rows each of them holds.
        checkpoint: The file of the checkpoint at its end.
    """

    vectors: str
    rows: tuple[str, ...]
    counts: tuple[Count, ...]
    checkpoint: str

    def __post_init__(self) -> None:
        """Check the names, and that every file of rows is counted."""
        _check_names("segments", [self.vectors])
        _check_names("rows", self.rows)
        _check_names("checkpoints", [self.checkpoint])
        if len(self.rows) != len(self.counts) or not self.rows:
            raise ValueError(f"{len(self.rows)} files of rows, {len(self.counts)} counts")

    @classmethod
    def named(cls, segment: int, counts: Sequence[int], revision: int = 0) -> SegmentFiles:
        """Name the files of a segment; each revision of the run has different names, so nothing is overwritten."""
        end = f"-{revision}.safetensors" if revision else ".safetensors"
        return cls(
            vectors=f"segments/{segment:05d}{end}",
            rows=tuple(f"rows/{segment:05d}.{shard:03d}{end}" for shard in range(len(counts))),
            counts=tuple(counts),
            checkpoint=f"checkpoints/{segment + 1:05d}{end}",
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all of them."""
        return (self.vectors, *self.rows, self.checkpoint)


class SegmentEntry(_Entry, frozen=True):
    """A segment: its numbers and its files."""

    summary: SegmentSummary
    files: SegmentFiles


class StateEntry(_Entry, frozen=True):
    """What a resumed recording needs, after so many segments.

    Attributes:
        segments: How many.
        files: A file of each process.
        optimizer: Checksum of the optimizer's state.
        settings: The optimizer's class and options; None in runs of older versions.
    """

    segments: Annotated[int, msgspec.Meta(ge=1)]
    files: tuple[str, ...]
    optimizer: str
    settings: OptimizerEntry | None = None

    def __post_init__(self) -> None:
        """Check the names."""
        _check_names("states", self.files)


class Manifest(_Entry, frozen=True):
    """Everything about a run that is not a tensor.

    Attributes:
        run_id: A name no other run has.
        pkexplain: The version that recorded it.
        torch: The version it was recorded with.
        ended: How recording ended, in words.
        num_examples: How many training examples there are.
        dtype: Dtype of the checkpoints and of the arithmetic.
        recording: The recorder's settings.
        optimizer: The optimizer at the end of the last segment.
        projection: Kind and settings of the projection, as `Projection.describe` gives them.
        columns: k, how many numbers a row holds.
        model: What the model must be.
        inputs: The model's inputs by name, or position; empty where none was a tensor with a batch dimension.
        digests: Digests of the inputs of some examples, by id and by the input's name or position.
        output: Which tensor of the model's output is the prediction, by its path; None if the loss did not show it.
        segments: The finished segments.
        states: The points from which a recording can be resumed.
        revision: How often files of the run were replaced.
        withdrawn: Examples that were withdrawn.
        files: Every file of tensors; the store fills this in.
        format_version: Of the manifest and the files.
    """

    run_id: str
    pkexplain: str
    torch: str
    ended: str
    num_examples: Count
    dtype: Literal["float32", "float64"]
    recording: RecordingEntry
    optimizer: OptimizerEntry
    projection: dict[str, Any]
    columns: int | None
    model: ModelFingerprint
    inputs: dict[str, InputEntry]
    digests: dict[str, dict[str, str]]
    output: str | None
    segments: tuple[SegmentEntry, ...]
    states: tuple[StateEntry, ...]
    revision: Annotated[int, msgspec.Meta(ge=0, le=999_999_999)]
    withdrawn: tuple[Count, ...]
    files: dict[str, FileEntry]
    format_version: int

    @property
    def names(self) -> set[str]:
        """The names of all files of tensors that the run consists of."""
        segments = (name for segment in self.segments for name in segment.files.names)
        states = (name for state in self.states for name in state.files)
        return {FIRST_CHECKPOINT, *segments, *states}

    def first(self, segments: int) -> Manifest:
        """Return the manifest of the run as it was after its first segments."""
        kept = self.segments[:segments]
        examples = max((sum(segment.files.counts) for segment in kept), default=self.num_examples)
        return msgspec.structs.replace(
            self,
            num_examples=examples,
            segments=kept,
            states=tuple(state for state in self.states if state.segments <= len(kept)),
            withdrawn=tuple(example for example in self.withdrawn if example < examples),
        )

    def __post_init__(self) -> None:
        """Check that its parts agree."""
        _check_names("", self.files)
        parameters = _check_blocks(self.model)
        if len(set(self.withdrawn)) < len(self.withdrawn) or max(self.withdrawn, default=-1) >= self.num_examples:
            raise ValueError("it withdraws an example twice, or one that does not exist - at `$.withdrawn`")
        if any(state.segments > len(self.segments) for state in self.states):
            raise ValueError("a state follows a segment that does not exist - at `$.states`")
        if not self.segments:
            return
        if self.columns is None or not 1 <= self.columns <= parameters:
            raise ValueError(f"rows of {self.columns} numbers, from {parameters} parameters - at `$.columns`")
        counts = [segment.files.counts for segment in self.segments]
        if max(map(sum, counts)) != self.num_examples or not self.num_examples:
            raise ValueError(f"{max(map(sum, counts))} rows - at `$.num_examples`")
        names = [name for segment in self.segments for name in segment.files.names]
        if len(set(names)) < len(names):
            raise ValueError("two segments have a file in common - at `$.segments`")
        steps = [0, *(segment.summary.last_step for segment in self.segments)]
        if any(after <= before for before, after in pairwise(steps)):
            raise ValueError("its segments do not follow one another - at `$.segments`")


def _check_names(folder: str, names: Sequence[str] | Mapping[str, FileEntry]) -> None:
    for name in names:
        if not FILE_NAME.fullmatch(name) or (folder and not name.startswith(f"{folder}/")):
            raise ValueError(f"it names a file that no run has: {name[:200]!r}")


def _check_blocks(model: ModelFingerprint) -> int:
    """Check that the blocks follow one another in the flat vector; return how many numbers they hold."""
    end, names = 0, [name for block in model.blocks for name in block.parameters]
    if not names or len(set(names)) < len(names):
        raise ValueError("its parameters' names are not unique - at `$.model.blocks`")
    for block in model.blocks:
        sizes = [*(size for shape in block.shapes for size in shape), *(block.matrix or ())]
        fits = all(0 <= size <= 1 << 48 for size in sizes) and 0 <= block.group < 1 << 31
        rows, columns = block.matrix or (block.numel, 1)
        if not fits or block.start != end or len(block.shapes) != len(block.parameters):
            raise ValueError(f"block {block.name!r} does not start at {end} - at `$.model.blocks`")
        if rows * columns != block.numel:
            raise ValueError(f"block {block.name!r} is not a matrix of {rows} × {columns} - at `$.model.blocks`")
        end += block.numel
    return end
