"""One run's answers to queries: covectors of either reading, their ledgers, and the rows to rank."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pkexplain.distributed import ProcessGroup, TorchProcessGroup
from pkexplain.errors import ConfigurationError, QueryError
from pkexplain.explain._checks import checks_of, removal_checks
from pkexplain.explain._completeness import CorrectedCovectors, correct
from pkexplain.explain._query_gradients import integrate, outputs_at_checkpoints
from pkexplain.explain._ranking import Ranking
from pkexplain.explain._replayed_rows import ReplayedRows
from pkexplain.explain._run_notes import Note, notes_on_run
from pkexplain.explain._second_moment import credited
from pkexplain.explain._trajectory_model import TrajectoryModel
from pkexplain.explain.loss_curvature import LossCurvature
from pkexplain.explain.outputs import Output
from pkexplain.explain.quadrature import Quadrature
from pkexplain.explain.queries import QueryBatch
from pkexplain.explain.removal import Curvature, Removal, final_gradient
from pkexplain.explain.replay import Replay, Replayer
from pkexplain.gradients.layers import find_layers
from pkexplain.gradients.model_copy import copy_model
from pkexplain.progress import Progress
from pkexplain.results.explanation import Check, Cost, Ledger
from pkexplain.store.base import Store, damaged


@dataclass(frozen=True)
class Account:
    """One run's answer to a batch of queries, before rows are ranked.

    Attributes:
        projected: The covectors that multiply the rows, ``(queries, segments, k)``.
        ledgers: The ledger of each query's output.
        segment_sums: Σ_i c_i of each segment, in output units, ``(queries, segments)``.
        outputs: f(x; θ_t) at each checkpoint, in output units, ``(queries, segments + 1)``.
        checks: The checks of each query.
        costs: The cost of each query.
        rows: What the covectors multiply, as far as this process searches it.
        whole: The same for all examples.
    """

    projected: Tensor
    ledgers: tuple[Ledger, ...]
    segment_sums: Tensor
    outputs: Tensor
    checks: tuple[tuple[Check, ...], ...]
    costs: tuple[Cost, ...]
    rows: Any
    whole: Any


@dataclass(frozen=True)
class Setting:
    """How runs are explained.

    Attributes:
        index: A faiss factory string, or ``"auto"``.
        tolerance: Allowed quadrature gap, relative to |f_T − f_0|.
        quadrature: The rule of integration over a segment, and its budget.
        device: Where to compute; None for the model's device.
        progress: Told the progress of long work.
        group: A `torch.distributed` process group among whose processes the rows are divided, or None.
        segments: Only so many of a run's first segments; None for all.
    """

    index: str
    tolerance: float
    quadrature: Quadrature
    device: str | torch.device | None
    progress: Progress
    group: Any
    segments: int | None


class RunExplainer:
    """Answers queries from one recorded run.

    Args:
        store: The run.
        model: The model; it is copied.
        setting: How it is explained.
    """

    def __init__(self, store: Store, model: nn.Module, setting: Setting) -> None:
        """Read the run and check the model against it."""
        self.trajectory = store.trajectory(setting.segments)
        whole = len(store.manifest().segments)
        self.run_segments = whole if setting.segments is not None and whole > setting.segments else None
        device = torch.device(setting.device) if setting.device else next(model.parameters()).device
        self.model = copy_model(model).to(device).eval()
        self.trajectory.fingerprint.check(self.model)
        groups = {name: block.group for block in self.trajectory.fingerprint.blocks for name in block.parameters}
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in groups)
        layers, blocks = find_layers(self.model, groups)
        if tuple(blocks) != self.trajectory.fingerprint.blocks:
            raise damaged(store, "manifest.json", "its blocks are not the model's", len(groups), "those of its layers")
        self.projectors = [self.trajectory.projector(t, device) for t in range(len(self.trajectory))]
        self.trajectory_model = TrajectoryModel(self.model, layers, self.projectors, self.trajectory)
        self.segments = [self.trajectory.segment(t) for t in range(len(self.trajectory))]
        self._counted = credited(self.trajectory, self.trajectory_model, self.projectors)
        self._row_sums = torch.stack([segment.row_sum for segment in self.segments])
        self._withdrawn = torch.stack([segment.withdrawn for segment in self.segments])
        self._tolerance, self.quadrature, self._progress = setting.tolerance, setting.quadrature, setting.progress
        self._curvatures: dict[LossCurvature | None, Curvature] = {}
        self._replayers: dict[Any, Replayer] = {}
        rows = self.trajectory, setting.index, store, device
        self.whole = self.ranking = Ranking(*rows, ProcessGroup())
        group = ProcessGroup() if setting.group is None else TorchProcessGroup(setting.group)
        if group.world_size > 1:
            self.ranking = Ranking(*rows, group)

    @functools.cached_property
    def notes(self) -> list[Note]:
        """What every explanation of the run should say about it."""
        return notes_on_run(self.trajectory, self.segments)

    def prepare(self) -> None:
        """Build the index, if there is none yet."""
        if not self.ranking.index.ready:
            self.ranking.index.prepare(self._progress)

    def prediction(self, queries: QueryBatch, at_once: int) -> Tensor:
        """Run the final model, ``(queries, …)``.

        Args:
            queries: The queries.
            at_once: The most queries in one forward pass.

        Raises:
            QueryError: The prediction is not a number.
            ConfigurationError: The model draws random numbers in evaluation mode.
        """
        self.trajectory_model.move_to_checkpoint(len(self.trajectory))
        pieces = torch.arange(len(queries), device="cpu").split(at_once)
        prediction = torch.cat([self.trajectory_model.prediction(queries.select(piece)) for piece in pieces])
        if prediction.isnan().any():
            raise QueryError(
                "explaining a query",
                "the model's prediction is not a number",
                got=f"nan for query {int(prediction.isnan().flatten(1).any(1).nonzero()[0])}",
                expected="numbers",
                source="the model after training",
                fix="Check the query for nan, and the run's learning rate",
            )
        again = self.trajectory_model.prediction(queries.select(pieces[0]))
        if not torch.allclose(prediction[: len(again)], again, rtol=1e-3, atol=1e-5 * float(again.abs().max())):
            raise ConfigurationError(
                "explaining a query",
                "the model draws random numbers in evaluation mode",
                got="two predictions that differ",
                expected="the same prediction twice",
                source="model.eval()",
                fix="Make the randomness depend on self.training, as torch's Dropout does",
            )
        return prediction

    def account(self, queries: QueryBatch, output: Output, reading: Removal | Replay | None) -> Account:
        """Answer a batch of queries.

        Args:
            queries: The queries.
            output: What is explained, resolved on the final prediction.
            reading: Settings of the removal or the replay reading; None for the path reading.
        """
        if isinstance(reading, Replay):
            return self._replay(queries, output, reading)
        return self._path(queries, output) if reading is None else self._removal(queries, output, reading)

    def corrected(self, queries: QueryBatch, output: Output) -> CorrectedCovectors:
        """Integrate the output gradient over every segment, and correct it so that the rows add up."""
        covectors = integrate(self.trajectory_model, queries, output, self.quadrature, self._tolerance, self._progress)
        return correct(covectors, self._row_sums, self._withdrawn)

    def _path(self, queries: QueryBatch, output: Output) -> Account:
        corrected = self.corrected(queries, output)
        covectors, every = corrected.covectors, range(len(queries))
        audited = self._audited(corrected)
        budget = self.quadrature.budget * len(self.trajectory)
        lines = {"weight_decay": covectors.weight_decay, "optimizer": covectors.optimizer}
        lines |= {"unsplit": covectors.unsplit} if any(len(segment.unsplit) for segment in self.segments) else {}
        lines |= {"buffers": covectors.buffers} if self.trajectory_model.has_moving_buffers else {}
        lines |= {"withdrawn": corrected.withdrawn} if self._withdrawn.any() else {}
        sums = corrected.corrected - corrected.withdrawn
        return Account(
            projected=corrected.projected,
            ledgers=tuple(_ledger(covectors.outputs[q], sums[q], {n: v[q] for n, v in lines.items()}) for q in every),
            segment_sums=sums,
            outputs=covectors.outputs,
            checks=tuple(checks_of(self.trajectory, corrected, audited, q, self._tolerance) for q in every),
            costs=tuple(
                Cost(
                    int(covectors.forward_passes[q]),
                    int(covectors.backward_passes[q]),
                    budget,
                    exhausted=not covectors.settled[q],
                )
                for q in every
            ),
            rows=self.ranking,
            whole=self.whole,
        )

    def _audited(self, corrected: CorrectedCovectors) -> Tensor | None:
        """Compute the audited examples' contributions from their stored rows, ``(queries, audited)``."""
        ids = self.segments[0].audit_ids
        if not len(ids):
            return None
        total = torch.zeros(len(corrected.projected), len(ids), dtype=torch.float64, device="cpu")
        for t, segment in enumerate(self.segments):
            covector = corrected.projected[:, t].cpu()
            total += covector @ segment.read_rows(ids, covector.dtype).T
        return total

    def own(self, account: Account, ids: Tensor) -> np.ndarray:
        """Multiply each query by the rows of one example, ``(queries,)``, in float64.

        Args:
            account: The answer to the queries.
            ids: The example of each query, ``(queries,)``.
        """
        projected = account.projected
        if isinstance(account.rows, ReplayedRows):
            return projected.sum(1, dtype=torch.float64)[torch.arange(len(ids)), ids].numpy()
        total = torch.zeros(len(ids), dtype=torch.float64, device="cpu")
        for t, segment in enumerate(self.segments):
            covector = projected[:, t].cpu()
            total += (covector * segment.read_rows(ids, covector.dtype)).double().sum(1)
        return total.numpy()

    def curvature(self, loss: LossCurvature | None) -> Curvature:
        """Compute the curvature of every segment, once for each loss."""
        if loss not in self._curvatures:
            pieces = self.trajectory, self.segments, self._counted
            self._curvatures[loss] = Curvature(*pieces, loss, self._progress)
        return self._curvatures[loss]

    def _removal(self, queries: QueryBatch, output: Output, removal: Removal) -> Account:
        curvature = self.curvature(removal.loss)
        pieces = self.trajectory_model, self.segments, self.projectors, self._counted
        final = final_gradient(*pieces, queries, output, removal.checkpoints)
        carried = curvature.carry(final.projected, removal.strength)
        outputs = outputs_at_checkpoints(self.trajectory_model, queries, output)
        kept = self._row_sums - self._withdrawn
        sums = torch.einsum("qtk,tk->qt", carried.double().cpu(), kept.cpu())
        cost = Cost(outputs.shape[1], final.checkpoints, final.checkpoints)
        return Account(
            projected=carried,
            ledgers=tuple(_ledger(outputs[q], sums[q], {}) for q in range(len(queries))),
            segment_sums=sums,
            outputs=outputs,
            checks=tuple(removal_checks(self.trajectory, final, q) for q in range(len(queries))),
            costs=(cost,) * len(queries),
            rows=self.ranking,
            whole=self.whole,
        )

    def replayer(self, replay: Replay) -> Replayer:
        """Train the run again, once for each setting."""
        if replay.key not in self._replayers:
            self._replayers[replay.key] = Replayer(self.trajectory, self.model, replay, self._progress)
        return self._replayers[replay.key]

    def _replay(self, queries: QueryBatch, output: Output, replay: Replay) -> Account:
        found = self.replayer(replay).answer(self.trajectory_model, queries, output, len(self.trajectory))
        outputs = outputs_at_checkpoints(self.trajectory_model, queries, output)
        sums = found.contributions.sum(2, dtype=torch.float64)
        rows, cost = ReplayedRows(self.trajectory), Cost(outputs.shape[1] + found.trials, 1, 1)
        return Account(
            projected=found.contributions,
            ledgers=tuple(_ledger(outputs[q], sums[q], {}) for q in range(len(queries))),
            segment_sums=sums,
            outputs=outputs,
            checks=found.checks,
            costs=(cost,) * len(queries),
            rows=rows,
            whole=rows,
        )


def _ledger(outputs: Tensor, sums: Tensor, lines: dict[str, Tensor]) -> Ledger:
    return Ledger(
        initial=float(outputs[0]),
        final=float(outputs[-1]),
        examples=float(sums.sum()),
        remainders={name: float(line.sum()) for name, line in lines.items()},
    )
