"""The removal reading: what the output would lose, had an example been left out of training.

Leaving example i out takes its displacement away, and what is missing then passes through the rest of training, where
every step shrinks it along the directions in which the loss is curved. Read backwards, it is the covector that is
carried from the end of training to where the displacement was made (Bae et al. 2024, segmented unrolling):

    λ_T = ∇f,   c_i = Σ_t ⟨A_t λ_{t+1}, D_i,t⟩,   λ_t = B_t λ_{t+1},   A_t = (1 − e^{−M_t}) / M_t,   B_t = e^{−M_t}

M_t is the curvature that the training of segment t feels, times the learning rate summed over it. It is made from the
rows themselves, in projection space: they are gradients, and `pkexplain.explain.loss_curvature` says how much each is
curved.
How this departs from the paper:

- the curvature is that of the displacements as they happened, example by example, not a Kronecker approximation;
- ∇f is averaged over the checkpoints, not taken at the last one alone: along the run, as the displacements are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pkexplain.errors import ConfigurationError
from pkexplain.explain._output_field import OutputField
from pkexplain.explain.loss_curvature import LossCurvature, loss_curvature_of
from pkexplain.explain.outputs import Output
from pkexplain.explain.queries import QueryBatch
from pkexplain.progress import Progress, no_progress
from pkexplain.projection.maps import Projector
from pkexplain.store.trajectory import Segment, Trajectory

__all__ = ["Curvature", "FinalGradient", "Removal", "final_gradient"]

_MOST_ROWS = 16384
"""Examples that a segment's curvature is made from; of more, as many are drawn."""
_ROWS_AT_ONCE = 4096
_NO_CURVATURE = 1e-3
"""Along directions in which all of training shrinks a displacement by less than about this share, it is left alone."""


@dataclass(frozen=True)
class Removal:
    """How the removal reading is made.

    Attributes:
        strength: What the curvature of the recorded training is multiplied with. 1 for the run as it was; where a share
            of the data is taken away, that share is missing from the curvature, too.
        loss: The loss that was trained with; None for cross-entropy where the model has several outputs, and squared
            error where it has one.
        checkpoints: Over how many of the last checkpoints ∇f is averaged; None for all but the first.

    Raises:
        ConfigurationError: A number cannot be.
    """

    strength: float = 0.2
    loss: LossCurvature | None = None
    checkpoints: int | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not 0 <= self.strength < float("inf"):
            raise _refused(f"strength={self.strength!r}", "a number from 0 up", "Leave it out")
        if self.checkpoints is not None and (not isinstance(self.checkpoints, int) or self.checkpoints < 1):
            fix = "Leave it out for all, or pass 1 for the last"
            raise _refused(f"checkpoints={self.checkpoints!r}", "an integer from 1 up, or None", fix)


def _refused(got: str, expected: str, fix: str) -> ConfigurationError:
    wrong, source = "it cannot be", "the removal reading"
    return ConfigurationError("Removal", wrong, got=got, expected=expected, source=source, fix=fix)


def _without_derivatives() -> ConfigurationError:
    return ConfigurationError(
        'reading="removal"',
        "the run saw no loss derivative, and a loss's curvature is read off its size",
        got="none",
        expected="the derivative of the loss with respect to the model's output",
        source="the recording",
        fix="Let the model return a tensor, logits, or a mapping or tuple that begins with them, and record again",
    )


@dataclass(frozen=True)
class FinalGradient:
    """λ_T of a batch of queries.

    Attributes:
        projected: P ∇f, averaged over the checkpoints, ``(queries, k)``.
        audit: ⟨∇f(θ_t), D_i,t⟩ of the audited examples, summed over the segments before those checkpoints, in full
            space, in output units, ``(queries, audited)``.
        stored: The same from the rows, ``(queries, audited)``.
        checkpoints: How many checkpoints ∇f was averaged over.
    """

    projected: Tensor
    audit: Tensor
    stored: Tensor
    checkpoints: int


def final_gradient(
    field: OutputField, segments: Sequence[Segment], queries: QueryBatch, output: Output, checkpoints: int | None
) -> FinalGradient:
    """Differentiate f at the ends of the last segments.

    Args:
        field: The model and the run.
        segments: The run's segments.
        queries: The queries.
        output: What is explained, settled.
        checkpoints: How many of the last checkpoints; None for all but the first.
    """
    last = range(len(segments))[-(checkpoints or len(segments)) :]
    ids = segments[0].audit_ids
    total = torch.zeros((), dtype=field.dtype, device=field.device)
    audit = stored = torch.zeros(len(queries), len(ids), dtype=torch.float64)
    for t in last:
        field.move_to(t, 1.0)
        products = field.products(queries, output, t)
        total = total + products.projected / len(last)
        audit = audit + products.audit.double().cpu()
        stored = stored + (products.projected.cpu() @ segments[t].read_rows(ids, field.dtype).T).double()
    return FinalGradient(total, audit, stored, len(last))


@dataclass(frozen=True)
class _Shrinking:
    """The directions along which one segment shrinks displacements, in coordinates scaled by √rate.

    Attributes:
        directions: Orthonormal columns, ``(k, directions)``.
        curvatures: The eigenvalue of M_t of each, ``(directions,)``.
        scale: √rate of each column of a row, ``(k,)``.
    """

    directions: Tensor
    curvatures: Tensor
    scale: Tensor


class Curvature:
    """M_t of every segment, in projection space.

    With V the rows, each divided by the square root of its columns' rates and multiplied with that of its example's
    curvature, M_t = Vᵀ V. Its eigenvectors are found from V Vᵀ where there are fewer examples than columns.

    Args:
        trajectory: The run.
        segments: Its segments.
        projector: Its projection.
        loss: The loss that was trained with; None for a choice by the rows.
        progress: Told how many segments are done, and of how many.

    Raises:
        ConfigurationError: The run saw no loss derivative.
    """

    def __init__(
        self,
        trajectory: Trajectory,
        segments: Sequence[Segment],
        projector: Projector,
        loss: LossCurvature | None,
        progress: Progress = no_progress,
    ) -> None:
        """Read the rows of every segment once."""
        self._trajectory, self._projector = trajectory, projector
        examples = trajectory.num_examples
        chosen: Tensor | slice = slice(0, examples)
        if examples > _MOST_ROWS:
            chosen = torch.randperm(examples, generator=torch.Generator().manual_seed(0))[:_MOST_ROWS].sort().values
        derivatives = torch.stack([s.loss_derivatives for s in segments])
        sizes, unseen = derivatives.nan_to_num(0.0), derivatives.isnan()
        loss = loss or loss_curvature_of(sizes)
        largest = float(sizes.abs().max())
        if not largest > 0:
            raise _without_derivatives()
        self._segments: list[_Shrinking] = []
        for t, segment in enumerate(segments):
            share = self._batch_share(t, largest, loss)
            curved = torch.where(unseen[t], 0.0, loss.weights(sizes[t].abs() / share))[chosen]
            some = min(examples, _MOST_ROWS)
            curved *= examples / some * examples * self._steps(t) / (trajectory.summaries[t].visits * share)
            self._segments.append(self._shrinking(segment, chosen, curved))
            progress("curvature", t + 1, len(segments))

    def _steps(self, t: int) -> int:
        return self._trajectory.boundaries[t + 1] - self._trajectory.boundaries[t]

    def _batch_share(self, t: int, largest: float, loss: LossCurvature) -> float:
        """Find what the batch's loss multiplies an example's with: 1/batch, or what the largest derivative says."""
        mean = self._steps(t) / max(self._trajectory.summaries[t].visits, 1)
        if loss.largest is None:
            return mean
        return mean if largest <= 1.1 * mean * loss.largest else largest / loss.largest

    def _shrinking(self, segment: Segment, chosen: Tensor | slice, curved: Tensor) -> _Shrinking:
        device, dtype = self._projector.device, self._projector.dtype
        scale = self._rates(segment).sqrt().to(device, dtype)
        factor = curved.to(dtype).sqrt()[:, None]
        ids = torch.arange(self._trajectory.num_examples) if isinstance(chosen, slice) else chosen

        def scaled(some: Tensor) -> Tensor:
            return (segment.read_rows(ids[some], dtype) * factor[some]).to(device) / scale

        places = torch.arange(len(ids))
        if len(ids) < len(scale):
            rows = scaled(places)
            curvatures, turned = torch.linalg.eigh(rows @ rows.T)
            kept = self._felt(curvatures)
            curvatures = curvatures[kept]
            return _Shrinking(rows.T @ (turned[:, kept] / curvatures.sqrt()), curvatures, scale)
        gram = torch.zeros(len(scale), len(scale), dtype=dtype, device=device)
        for some in places.split(_ROWS_AT_ONCE):
            part = scaled(some)
            gram.addmm_(part.T, part)
        curvatures, directions = torch.linalg.eigh(gram)
        kept = self._felt(curvatures)
        return _Shrinking(directions[:, kept].contiguous(), curvatures[kept], scale)

    def _felt(self, curvatures: Tensor) -> Tensor:
        """Choose what shrinks displacements and is no rounding of the largest."""
        rounding = len(curvatures) * torch.finfo(curvatures.dtype).eps * float(curvatures.max())
        return curvatures > max(_NO_CURVATURE / len(self._trajectory), rounding)

    def _rates(self, segment: Segment) -> Tensor:
        """Give every column of a row the rate of its block; where blocks share columns, their mean."""
        rates = torch.zeros(self._projector.columns, dtype=torch.float64)
        blocks = torch.zeros_like(rates)
        for rate, part in zip(segment.rate_sums, self._projector.maps, strict=True):
            rates[part.columns] += rate
            blocks[part.columns] += 1
        rates /= blocks.clamp_min(1)
        return torch.where(rates > 0, rates, 1.0)

    def carry(self, final: Tensor, strength: float) -> Tensor:
        """Carry covectors from the end of training back through every segment.

        Args:
            final: λ_T in projection space, ``(queries, k)``.
            strength: What M_t is multiplied with.

        Returns:
            A_t λ_{t+1} of every segment, ``(queries, segments, k)``.
        """
        carried: list[Tensor] = []
        for segment in reversed(self._segments):
            m = segment.curvatures * strength
            along = (final * segment.scale) @ segment.directions
            within = torch.where(m > 0, -torch.expm1(-m) / m, 1.0) - 1
            carried.append(final + (along * within) @ segment.directions.T / segment.scale)
            final = final + (along * torch.expm1(-m)) @ segment.directions.T / segment.scale
        return torch.stack(carried[::-1], dim=1)
