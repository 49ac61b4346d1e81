"""What a segment's gradients are projected to: its directions, what multiplies rows, and what earlier segments left.

Every segment has directions of its own if the projection follows the gradients. What the momentum buffer holds of
earlier gradients is only known along the directions of the segment before; it goes on as far as the new ones can show
it, and they are chosen with it in view.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pkexplain.gradients.batch_norm import RowMixture
from pkexplain.gradients.compressed import CompressedGradient
from pkexplain.gradients.factors import ExampleGradients
from pkexplain.gradients.layers import Block
from pkexplain.optimizers.base import RecordingSpec
from pkexplain.optimizers.displacement import RowAccumulator
from pkexplain.optimizers.operator_fit import row_factors, spread
from pkexplain.optimizers.rules import LinearStep, Number
from pkexplain.projection.maps import Map, Pieces, RowFactors, TwoSidedMap
from pkexplain.projection.projector import Projector

__all__ = ["Carry", "Target", "check_factors", "check_shape", "choose_factors", "moving_coordinates", "spread_all"]

_ROUNDING = 32
"""A sum smaller than this many ε of its terms (ε of the dtype) is taken for rounding error."""
_LEFT_OVER = 512
"""Examples from whose share of the momentum buffer directions are chosen, beside the new gradients."""


@dataclass(frozen=True)
class Target:
    """The projection, once it is fixed, and the rows that it fills.

    Attributes:
        projector: The projection P.
        factors: F, what a block's gradients are multiplied by before they are projected; none for ones.
        maps: P (F ⊙ g), for each block.
        rows: The rows.
    """

    projector: Projector
    factors: Mapping[int, RowFactors]
    maps: tuple[Map, ...]
    rows: RowAccumulator

    @classmethod
    def of(cls, spec: RecordingSpec, projector: Projector, factors: Mapping[int, RowFactors]) -> Target:
        """Make it, with rows of zeros."""
        maps = [part.of_multiples(factors[b]) if b in factors else part for b, part in enumerate(projector.maps)]
        return cls(projector, factors, tuple(maps), spec.rows(projector.spans, projector.width))

    def carried(self, spec: RecordingSpec, position: int, rows: Tensor) -> ExampleGradients | None:
        """Rebuild one block's gradients from rows, as far as its directions go; None if its map has none."""
        part, block = self.projector.maps[position], spec.blocks[position]
        if not isinstance(part, TwoSidedMap):
            return None
        back = part.backwards()
        left, right = back.left, back.right
        if position in self.factors:
            u, v = self.factors[position]
            left, right = left / u, right / v
        values = rows[:, part.columns][:, : len(left) * len(right)]
        return CompressedGradient.rebuilt(values, left, right, len(block.parameters) > 1)

    def left_over(self, spec: RecordingSpec) -> list[Pieces]:
        """Rebuild the gradients of some examples that are still in the momentum buffer."""
        rows = self.rows.some_in_buffer(_LEFT_OVER).to(spec.like)
        pieces = [(b, self.carried(spec, b, rows)) for b in range(len(spec.blocks))] if len(rows) else []
        return [[(b, g) for b, g in pieces if g is not None]] if pieces else []

    def take_over(self, earlier: Target, spec: RecordingSpec) -> None:
        """Take over what the momentum buffer holds, as far as these directions can show it."""

        def change(rows: Tensor) -> Tensor:
            changed = rows.new_zeros(len(rows), self.projector.width)
            for position, part in enumerate(self.maps):
                its = earlier.projector.maps[position]
                gradients, before = earlier.carried(spec, position, rows), rows[:, its.columns]
                changed[:, part.columns] = before if gradients is None else part.gradients(gradients)
                if isinstance(its, TwoSidedMap) and its.beside is not None:
                    direction = its.beside
                    if position in earlier.factors:
                        direction = direction / spread(earlier.factors[position], spec.blocks[position])
                    changed[:, part.columns] += before[:, -1:] * part.vectors(direction[None])
            return changed

        self.rows.take_over(earlier.rows, change)

    def project(self, vector: Tensor, spec: RecordingSpec) -> Tensor:
        """Project a vector ``(parameters,)`` like gradients, ``(columns,)``."""
        return self.projector.project_plain((vector * spread_all(spec, self.factors))[None])[0]


class Carry:
    """What was in the momentum buffer when the segment began: how far it moves the parameters, exactly and in the rows.

    With directions of their own in every segment, the rows cannot show all of it. That is a loss like any other by the
    projection, and no fault of the capture.

    Attributes:
        start: The momentum buffer at the segment's start, ``(parameters,)``.
        rows: The sum of the rows of it that were taken over, ``(columns,)``; None if they are exact.

    Args:
        spec: What is recorded.
    """

    def __init__(self, spec: RecordingSpec) -> None:
        """Begin with an empty buffer."""
        self._spec, self.start = spec, spec.like.new_zeros(0)
        self._begin()

    def _begin(self) -> None:
        self.rows: Tensor | None = None
        self._moved: dict[int, Number] = dict.fromkeys(self._spec.spans, 0.0)
        self._left: dict[int, Number] = dict.fromkeys(self._spec.spans, 1.0)

    def pass_on(self, moved: Mapping[int, Number], buffered: Mapping[int, Number]) -> None:
        """Let the momentum buffer move the parameters; see `RowAccumulator.pass_on`."""
        for block in moved:
            self._moved[block] = self._moved[block] + self._left[block] * moved[block]
            self._left[block] = self._left[block] * buffered[block]

    def close(self, spans: Mapping[int, slice], buffer: Tensor) -> tuple[Tensor, Tensor]:
        """End the segment and start the next.

        Args:
            spans: The columns of each block.
            buffer: The momentum buffer now, ``(parameters,)``.

        Returns:
            What moved, over −B, ``(parameters,)``, and the sum of the rows that stand for it, ``(columns,)``; both
            empty if the rows are exact.
        """
        moved, rows = self.start[:0], self.start[:0]
        if self.rows is not None:
            moved, rows = torch.zeros_like(self.start), torch.zeros_like(self.rows)
            for block, span in self._spec.spans.items():
                moved[span] = self._moved[block] * self.start[span]
                rows[spans[block]] = -self._moved[block] * self.rows[spans[block]]
        self._begin()
        self.start = buffer.clone() if self._spec.projection.follows_gradients else self.start
        return moved, rows


def spread_all(spec: RecordingSpec, factors: Mapping[int, RowFactors]) -> Tensor:
    """Spread F over all coordinates, ``(parameters,)``."""
    found = spec.like.new_ones(spec.size)
    for position, each in factors.items():
        block = spec.blocks[position]
        found[block.span] = spread(each, block)
    return found


def choose_factors(
    spec: RecordingSpec, numbers: Mapping[int, LinearStep], kept: Mapping[int, RowFactors]
) -> dict[int, RowFactors]:
    """Choose F. Only a two-sided map can follow it from segment to segment; the others keep their first.

    Args:
        spec: What is recorded.
        numbers: The last step's numbers, of each block.
        kept: Those of the segment before.
    """
    found: dict[int, RowFactors] = {}
    for position in numbers:
        block = spec.blocks[position]
        sides = spec.projection.takes_sides(block)
        known = None if sides else kept.get(position)
        found[position] = row_factors(numbers[position], block, sides, spec.like) if known is None else known
    return found


def moving_coordinates(spec: RecordingSpec, held: Sequence[tuple[int, Pieces]]) -> dict[int, Tensor]:
    """Find coordinates before a BatchNorm whose gradient is only the rounding error of terms that cancel.

    A bias there, or the weight of a constant input, has no gradient. Its √v̂ is rounding error too, and dividing by it
    would turn that into displacements. They belong to no example, so they go to the ``optimizer`` line.

    Args:
        spec: What is recorded.
        held: Captured gradients of some batches, with their steps.

    Returns:
        For each block before a BatchNorm, 0 for such coordinates and 1 for the others, ``(numel,)``.
    """
    mixed = {b for _, pieces in held for b, gradients in pieces if isinstance(gradients, RowMixture)}
    found: dict[int, Tensor] = {}
    for position, block in enumerate(spec.blocks):
        if not spec.group.all_reduce_max(float(position in mixed)):
            continue
        moves = spec.like.new_zeros(block.numel)
        for step in sorted({step for step, _ in held}):
            sums = spec.like.new_zeros(2, block.numel)
            for gradients in (g for at, pieces in held if at == step for b, g in pieces if b == position):
                sums += torch.stack([gradients.total(), gradients.gross()])
            total, gross = spec.group.all_reduce(sums)
            moves = torch.maximum(moves, (total.abs() > _ROUNDING * torch.finfo(sums.dtype).eps * gross).to(moves))
        found[position] = moves
    return found


def check_factors(factors: RowFactors, block: Block) -> RowFactors:
    """Check that factors fit a block.

    Raises:
        ValueError: They do not.
    """
    if isinstance(factors, Tensor):
        return check_shape(factors, (block.numel,))
    u, v = factors
    rows, columns = block.matrix or (0, 0)
    return check_shape(u, (rows,)), check_shape(v, (columns,))


def check_shape(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Check a tensor's shape.

    Raises:
        ValueError: It is another.
    """
    if tensor.shape != shape:
        raise ValueError(f"a tensor {tuple(tensor.shape)}, not {shape}")
    return tensor
