"""A projection bound to the blocks of a model, in one segment: every block's map, and the second stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pkexplain.gradients.factors import ExampleGradients
from pkexplain.gradients.layers import Block
from pkexplain.projection.maps import IdentityMap, Map, Pieces, TwoSidedMap, geometric_sides, rounded
from pkexplain.projection.packed import Operator

__all__ = ["Projector", "SecondStage"]


@dataclass(frozen=True)
class SecondStage:
    """What makes a segment's wide rows short when it ends: their own leading directions.

    Wide rows are divided by S, and covectors multiplied, so that both are of a similar size in every block; S is the
    root of the block's learning rate. A short row then is V (row / S), and a covector V (S ⊙ covector).

    Attributes:
        basis: V, ``(directions, width)``, its rows orthonormal.
        scale: S, ``(width,)``.
        columns: k; a segment of few rows has fewer directions, and the other numbers are 0.
    """

    basis: Tensor
    scale: Tensor
    columns: int

    def rows(self, wide: Tensor) -> Tensor:
        """Shorten rows, ``(n, k)``."""
        return self._filled((wide / self.scale) @ self.basis.T)

    def covectors(self, wide: Tensor) -> Tensor:
        """Shorten covectors, ``(n, k)``."""
        return self._filled((wide * self.scale) @ self.basis.T)

    def wide_covectors(self, short: Tensor) -> Tensor:
        """Rebuild wide covectors as far as the directions go, ``(n, width)``."""
        return (short[:, : len(self.basis)] @ self.basis) / self.scale

    def _filled(self, short: Tensor) -> Tensor:
        return F.pad(short, (0, self.columns - len(self.basis)))


class Projector:
    """A projection bound to the blocks of a model, in one segment.

    A covector's projection is P (Q ⊙ φ) and a displacement's row P (D / Q). Q is the optimizer's operator over the
    segment, less what the rows were multiplied by before they were projected. With a second stage these are wide, and
    are shortened to what is stored.

    Attributes:
        width: The number of columns that the maps fill.
        operator: Q, ``(parameters,)``; None for ones.
        second_stage: The second stage, or None.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        maps: Sequence[Map],
        like: Tensor,
        width: int,
        *,
        operator: Operator | None = None,
        second_stage: SecondStage | None = None,
    ) -> None:
        """Move the maps' tables to the device."""
        self.blocks, self.dtype, self.device, self.width = tuple(blocks), like.dtype, like.device, width
        self.maps = tuple(maps)
        self.operator = (
            None if operator is None else operator.to(like.device)
        )  # as it is stored: there are many segments
        self.second_stage = second_stage
        if second_stage is not None:
            basis, scale = second_stage.basis.to(like), second_stage.scale.to(like)
            self.second_stage = SecondStage(basis, scale, second_stage.columns)
        self._sides: dict[int, tuple[Tensor, Tensor]] = {}
        for part in maps:
            for name, value in vars(part).items():
                if isinstance(value, Tensor):
                    setattr(part, name, value.to(like if value.is_floating_point() else like.device))

    @property
    def spans(self) -> dict[int, slice]:
        """The columns of each block."""
        return {position: part.columns for position, part in enumerate(self.maps)}

    @property
    def columns(self) -> int:
        """k, the number of columns of a stored row."""
        return self.width if self.second_stage is None else self.second_stage.columns

    def with_operator(self, operator: Operator) -> Projector:
        """Return the same projection with Q, ``(parameters,)``."""
        return self._with(operator, self.second_stage)

    def with_second_stage(self, second_stage: SecondStage) -> Projector:
        """Return the same projection with a second stage."""
        return self._with(self.operator, second_stage)

    def _with(self, operator: Operator | None, second_stage: SecondStage | None) -> Projector:
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        options = {"operator": operator, "second_stage": second_stage}
        return Projector(self.blocks, self.maps, like, self.width, **options)

    def short_rows(self, wide: Tensor) -> Tensor:
        """Shorten rows ``(n, width)`` to what is stored, ``(n, columns)``."""
        return wide if self.second_stage is None else self.second_stage.rows(wide)

    def short_covectors(self, wide: Tensor) -> Tensor:
        """Shorten covectors ``(n, width)`` to what multiplies stored rows, ``(n, columns)``."""
        return wide if self.second_stage is None else self.second_stage.covectors(wide)

    def project(self, pieces: Pieces, examples: int) -> Tensor:
        """Project the captured gradients of a batch, P g, to wide rows.

        Args:
            pieces: Block positions with gradients; a block may occur several times (they are added) or not at all.
            examples: The batch size.

        Returns:
            ``(examples, width)``.
        """
        rows = torch.zeros(examples, self.width, dtype=self.dtype, device=self.device)
        for position, gradients in pieces:
            rows[:, self.maps[position].columns] += self.maps[position].gradients(gradients)
        return rows

    def project_plain(self, vectors: Tensor) -> Tensor:
        """Compute P D of plain vectors ``(n, parameters)``, to wide rows ``(n, width)``."""
        rows = vectors.new_zeros(len(vectors), self.width)
        for block, part in zip(self.blocks, self.maps, strict=True):
            rows[:, part.columns] += part.vectors(vectors[:, block.span])
        return rows

    def project_displacements(self, vectors: Tensor) -> Tensor:
        """Compute P (D / Q) of plain vectors ``(n, parameters)``, ``(n, columns)``; 0 for D / 0."""
        if self.operator is not None:
            operator = self.operator.to(vectors)
            vectors = torch.where(operator == 0, 0.0, vectors / operator)
        return self.short_rows(self.project_plain(vectors))

    def add_covectors(self, rows: Tensor, position: int, gradients: ExampleGradients) -> None:
        """Project one block's output gradients, P (Q ⊙ φ), and add them to wide rows, in place."""
        if self.operator is not None:
            gradients = gradients.scaled(self._operator_of(position))
        rows[:, self.maps[position].columns] += self.maps[position].gradients(gradients)

    def project_covectors(self, vectors: Tensor) -> Tensor:
        """Compute P (Q ⊙ φ) of plain vectors ``(n, parameters)``, ``(n, columns)``."""
        vectors = vectors if self.operator is None else vectors * self.operator.to(vectors)
        return self.short_covectors(self.project_plain(vectors))

    def covectors_from(self, other: Projector, rows: Tensor) -> Tensor:
        """Turn covectors that lie in another segment's directions, P' (Q' ⊙ φ), into P (Q ⊙ φ), ``(n, columns)``.

        Q / Q' is taken by its rows and columns.
        """
        if self.operator is None and not any(isinstance(part, TwoSidedMap) for part in self.maps):
            return rows
        rows = rows if other.second_stage is None else other.second_stage.wide_covectors(rows)
        found = rows.new_zeros(len(rows), self.width)
        for position, (mine, its) in enumerate(zip(self.maps, other.maps, strict=True)):
            part = rows[:, its.columns]
            if isinstance(mine, TwoSidedMap) and isinstance(its, TwoSidedMap):
                multiplied = its.backwards()
                if self.operator is not None and other.operator is not None:
                    (u, v), (u_its, v_its) = self._sides_of(position), other._sides_of(position)
                    multiplied = multiplied.of_multiples((u / u_its, v / v_its))
                part = mine.from_columns_of(multiplied, part)
            elif self.operator is not None and other.operator is not None:
                ratio = self._operator_of(position) / other._operator_of(position)
                ratio = torch.where(torch.isfinite(ratio), ratio, 0.0)
                part = part * (ratio if isinstance(mine, IdentityMap) else ratio.mean())
            found[:, mine.columns] = part
        return self.short_covectors(found)

    def _sides_of(self, position: int) -> tuple[Tensor, Tensor]:
        if position not in self._sides:
            self._sides[position] = geometric_sides(self._operator_of(position), self.blocks[position])
        return self._sides[position]

    def _operator_of(self, position: int) -> Tensor:
        assert self.operator is not None
        return self.operator[self.blocks[position].span].to(self.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Return what a seed cannot reproduce and must be stored: two-sided maps' bases, and the second stage."""
        kept = {}
        if self.second_stage is not None:
            basis = self.second_stage.basis  # it was rounded
            kept["second_stage"] = basis if basis.dtype == torch.float64 else basis.half()
            kept["scale"] = self.second_stage.scale
        for position, part in enumerate(self.maps):
            if isinstance(part, TwoSidedMap):
                kept[f"{position}.left"], kept[f"{position}.right"] = part.left, part.right
                if part.beside is not None:
                    kept[f"{position}.beside"] = rounded(part.beside)
        return {name: value.detach().cpu().contiguous() for name, value in kept.items()}
