"""The removal reading: how much the output would lose if an example were left out of training.

Leaving example i out removes its displacement. The difference then passes through the rest of training, where every
step shrinks it along the directions in which the loss is curved. Computed backwards, the covector is carried from the
end of training to the segment of the displacement (Bae et al. 2024, segmented unrolling):

    λ_T = ∇f,   c_i = Σ_t ⟨A_t λ_{t+1}, D_i,t⟩,   λ_t = B_t λ_{t+1},   A_t = (1 − e^{−M_t}) / M_t,   B_t = e^{−M_t}

M_t is the curvature of the loss in segment t, times the learning rate summed over it. It is computed from the rows
themselves, in projection space: they are gradients, and `pkexplain.explain.loss_curvature` gives each its curvature.
Differences from the paper:

- the curvature comes from the recorded displacements, example by example, not from a Kronecker approximation;
- ∇f is averaged over the checkpoints instead of taken at the last one: along the run, like the displacements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pkexplain.errors import ConfigurationError
from pkexplain.explain._trajectory_model import TrajectoryModel
from pkexplain.explain.loss_curvature import LossCurvature, loss_curvature_of, usual_largest
from pkexplain.explain.outputs import Output
from pkexplain.explain.queries import QueryBatch
from pkexplain.progress import Progress, no_progress
from pkexplain.projection.projector import Projector
from pkexplain.store.trajectory import Segment, Trajectory

__all__ = ["Curvature", "FinalGradient", "Removal", "final_gradient"]

_MOST_ROWS = 16384
"""The most examples from which a segment's curvature is computed; of more, this many are drawn."""
_ROWS_AT_ONCE = 4096
_NUMBERS_AT_ONCE = 1 << 26
"""The most numbers of queries' gradients held at a time."""
_NO_CURVATURE = 1e-3
"""Directions along which all of training shrinks a displacement by less than about this share are ignored."""


@dataclass(frozen=True)
class Removal:
    """Settings of the removal reading.

    Attributes:
        strength: Factor of the recorded curvature: 1 for the run as it was; if a share of the data is removed, that
            share is missing from the curvature, too.
        loss: The training loss; None for cross-entropy if the model has several outputs, and squared error if it has
            one.
        checkpoints: Number of last checkpoints over which ∇f is averaged; None for all but the first.

    Raises:
        ConfigurationError: A number is invalid.
    """

    strength: float = 0.35
    loss: LossCurvature | None = None
    checkpoints: int | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not 0 <= self.strength < float("inf"):
            got, expected, fix = f"strength={self.strength!r}", "a number from 0 up", "Leave it out"
            raise ConfigurationError("Removal", "it is invalid", got, expected, "the removal reading", fix)
        if self.checkpoints is not None and (not isinstance(self.checkpoints, int) or self.checkpoints < 1):
            got, expected = f"checkpoints={self.checkpoints!r}", "an integer from 1 up, or None"
            fix = "Leave it out for all, or pass 1 for the last one"
            raise ConfigurationError("Removal", "it is invalid", got, expected, "the removal reading", fix)


@dataclass(frozen=True)
class FinalGradient:
    """λ_T of a batch of queries.

    Attributes:
        projected: ∇f, averaged over the checkpoints, in every segment's projection, ``(queries, segments, k)``.
        audit: ⟨∇f(θ_t), D_i,t⟩ of the audited examples, summed over the segments before those checkpoints, in full
            space, in output units, ``(queries, audited)``.
        stored: The same, from the stored rows, ``(queries, audited)``.
        checkpoints: The number of checkpoints over which ∇f was averaged.
    """

    projected: Tensor
    audit: Tensor
    stored: Tensor
    checkpoints: int


def final_gradient(
    model: TrajectoryModel,
    segments: Sequence[Segment],
    projectors: Sequence[Projector],
    counted: Sequence[Projector],
    queries: QueryBatch,
    output: Output,
    checkpoints: int | None,
) -> FinalGradient:
    """Differentiate f at the ends of the last segments; each counts by its number of steps.

    Args:
        model: The model and the run.
        segments: The run's segments.
        projectors: Their projections.
        counted: The same, of what counts; see `pkexplain.explain._second_moment`.
        queries: The queries.
        output: What is explained, resolved on the final prediction.
        checkpoints: The number of last checkpoints; None for all but the first.
    """
    last, ids = range(len(segments))[-(checkpoints or len(segments)) :], segments[0].audit_ids
    steps = [model.steps(t) for t in last]
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    audited = [model.coordinates.weighted(segments[t].audit_rows.to(model.device, model.dtype)) for t in last]
    for some in torch.arange(len(queries), device="cpu").split(max(1, _NUMBERS_AT_ONCE // model.parameters)):
        mean = torch.zeros((), dtype=model.dtype, device=model.device)
        audit = stored = torch.zeros(len(some), len(ids), dtype=torch.float64, device="cpu")
        for t, weight, exact in zip(last, steps, audited, strict=True):
            model.move_to_checkpoint(t + 1)
            gradients = model.gradients(queries.select(some), output.select(some))
            mean = mean + gradients * (weight / sum(steps))
            audit = audit + (model.coordinates.of(gradients) @ exact.T).double().cpu()
            covectors = projectors[t].project_covectors(gradients).cpu()
            stored = stored + (covectors @ segments[t].read_rows(ids, model.dtype).T).double()
        projected = torch.stack([projector.project_covectors(mean) for projector in counted], dim=1)
        found.append((projected, audit, stored))
    projected, audit, stored = (torch.cat(parts) for parts in zip(*found, strict=True))
    return FinalGradient(projected, audit, stored, len(last))


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

    With V the rows, each divided by the square root of its columns' rates and multiplied by the square root of its
    example's curvature, M_t = Vᵀ V. If there are fewer examples than columns, its eigenvectors come from V Vᵀ.

    Args:
        trajectory: The run.
        segments: Its segments.
        projectors: Their projections.
        loss: The training loss; None to choose by the rows.
        progress: Told how many segments are done, and of how many.

    Raises:
        ConfigurationError: The run has no loss derivatives, or none that tell the curvature of the loss.
    """

    def __init__(
        self,
        trajectory: Trajectory,
        segments: Sequence[Segment],
        projectors: Sequence[Projector],
        loss: LossCurvature | None,
        progress: Progress = no_progress,
    ) -> None:
        """Read the rows of every segment once."""
        self._trajectory, self._projectors = trajectory, projectors
        examples = trajectory.num_examples
        chosen: Tensor | slice = slice(0, examples)
        if examples > _MOST_ROWS:
            chosen = (
                torch.randperm(examples, generator=torch.Generator().manual_seed(0), device="cpu")[:_MOST_ROWS]
                .sort()
                .values
            )
        if loss is None and (trajectory.manifest.output or "").rpartition(".")[2] == "log_probs":
            raise _of_log_probabilities()
        derivatives = torch.stack([s.loss_derivatives for s in segments])
        sizes, unseen = derivatives.nan_to_num(0.0), derivatives.isnan()
        loss = loss or loss_curvature_of(sizes)
        largest = float(sizes.abs().max())
        usual = max(usual_largest(each[~gone].abs()) for each, gone in zip(sizes, unseen, strict=True))
        if not largest > 0:
            raise ConfigurationError(
                'reading="removal"',
                "the run has no loss derivatives, from which the curvature of the loss is computed",
                got="none",
                expected="the derivative of the loss with respect to the model's output",
                source="the recording",
                fix="Let the model return logits, or a mapping or tuple that begins with them, and record again",
            )
        self._segments: list[_Shrinking] = []
        for t, segment in enumerate(segments):
            share = self._batch_share(t, usual, largest, loss)
            curved = torch.where(unseen[t], 0.0, loss.weights(sizes[t].abs() / share))[chosen]
            some = min(examples, _MOST_ROWS)
            curved *= examples / some * examples * self._steps(t) / (trajectory.summaries[t].visits * share)
            self._segments.append(self._shrinking(segment, projectors[t], chosen, curved))
            progress("curvature", t + 1, len(segments))

    def _steps(self, t: int) -> int:
        return self._trajectory.boundaries[t + 1] - self._trajectory.boundaries[t]

    def _batch_share(self, t: int, usual: float, largest: float, loss: LossCurvature) -> float:
        """Return the factor of an example's loss in its batch's: 1/batch, or, of a sum, what the largest implies."""
        mean = self._steps(t) / max(self._trajectory.summaries[t].visits, 1)
        if loss.largest is None:
            return mean
        return mean if usual <= 1.1 * mean * loss.largest else largest / loss.largest

    def _shrinking(self, segment: Segment, projector: Projector, chosen: Tensor | slice, curved: Tensor) -> _Shrinking:
        device, dtype = projector.device, projector.dtype
        scale = _rates(segment, projector).sqrt().to(device, dtype)
        factor = curved.to(dtype).sqrt()[:, None]
        ids = torch.arange(self._trajectory.num_examples, device="cpu") if isinstance(chosen, slice) else chosen

        def scaled(some: Tensor) -> Tensor:
            return (segment.read_rows(ids[some], dtype) * factor[some]).to(device) / scale

        places = torch.arange(len(ids), device="cpu")
        if len(ids) < len(scale):
            rows = scaled(places)
            rows = rows[rows.any(1)]  # a short segment saw few of the examples
            curvatures, turned = _eigenvectors(rows @ rows.T)
            kept = self._felt(curvatures)
            curvatures = curvatures[kept]
            return _Shrinking(rows.T @ (turned[:, kept] / curvatures.sqrt()), curvatures, scale)
        gram = torch.zeros(len(scale), len(scale), dtype=dtype, device=device)
        for some in places.split(_ROWS_AT_ONCE):
            part = scaled(some)
            gram.addmm_(part.T, part)
        curvatures, directions = _eigenvectors(gram)
        kept = self._felt(curvatures)
        return _Shrinking(directions[:, kept].contiguous(), curvatures[kept], scale)

    def _felt(self, curvatures: Tensor) -> Tensor:
        """Choose the curvatures that shrink displacements and are not rounding error of the largest."""
        largest = float(curvatures.max()) if len(curvatures) else 0.0
        rounding = len(curvatures) * torch.finfo(curvatures.dtype).eps * largest
        return curvatures > max(_NO_CURVATURE / len(self._trajectory), rounding)

    def carry(self, final: Tensor, strength: float) -> Tensor:
        """Carry covectors from the end of training back through every segment.

        A segment's curvature acts along the directions of its rows. What it takes from λ there is taken to the segments
        before it, block by block.

        Args:
            final: λ_T in every segment's projection, ``(queries, segments, k)``.
            strength: Factor of M_t.

        Returns:
            A_t λ_{t+1} of every segment, ``(queries, segments, k)``.
        """
        carried: list[Tensor] = []
        taken: list[tuple[Projector, Tensor]] = []
        for t in reversed(range(len(self._segments))):
            segment, projector = self._segments[t], self._projectors[t]
            here = final[:, t]
            for other, part in taken:
                here = here + projector.covectors_from(other, part)
            m = segment.curvatures * strength
            along = (here * segment.scale) @ segment.directions
            within = torch.where(m > 0, -torch.expm1(-m) / m, 1.0) - 1
            carried.append(here + (along * within) @ segment.directions.T / segment.scale)
            taken.append((projector, (along * torch.expm1(-m)) @ segment.directions.T / segment.scale))
        return torch.stack(carried[::-1], dim=1)


def _eigenvectors(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Compute eigenvalues and eigenvectors; in float32, LAPACK gives up on a matrix with many equal eigenvalues."""
    values, vectors = torch.linalg.eigh(gram.double())
    return values.to(gram), vectors.to(gram)


def _rates(segment: Segment, projector: Projector) -> Tensor:
    """Assign every column of a row the rate of its block; the second stage has divided by it already."""
    if projector.second_stage is not None:
        return torch.ones(projector.columns, dtype=torch.float64, device="cpu")
    rates = torch.zeros(projector.columns, dtype=torch.float64, device="cpu")
    blocks = torch.zeros_like(rates)
    for rate, part in zip(segment.rate_sums, projector.maps, strict=True):
        rates[part.columns] += rate
        blocks[part.columns] += 1
    rates /= blocks.clamp_min(1)
    return torch.where(rates > 0, rates, 1.0)


def _of_log_probabilities() -> ConfigurationError:
    return ConfigurationError(
        'reading="removal"',
        "the loss derivatives that were recorded are those of log-probabilities: the same for every token, however "
        "well it was predicted",
        got="a run whose loss was computed from output.log_probs",
        expected="the derivatives of the logits",
        source="the recording",
        fix="Record without activation offloading, or train with a model that returns logits; or state the curvature: "
        "pkexplain.Removal(loss=…)",
    )
