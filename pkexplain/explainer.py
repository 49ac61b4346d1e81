"""`Explainer`: covectors, correction, search, ranking by the stored rows, checks."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pkexplain.checks import checks_of
from pkexplain.correction import CorrectedCovectors, correct
from pkexplain.covectors import OutputField, integrate
from pkexplain.errors import ConfigurationError, QueryError, message
from pkexplain.explanation import Cost, Explanation, Ledger
from pkexplain.index import RowIndex
from pkexplain.layers import find_layers
from pkexplain.model_io import QueryBatch, as_queries
from pkexplain.outputs import Output, settle_output
from pkexplain.quadrature import Quadrature
from pkexplain.ranking import Ranking, Scan
from pkexplain.ranks import ProcessGroup, Ranks
from pkexplain.storage import damaged
from pkexplain.store import DirectoryStore, Store, open_store
from pkexplain.trajectory import Trajectory

__all__ = ["Explainer"]

_MOST_QUERIES_AT_ONCE = 128
_NUMBERS_AT_ONCE = 1 << 27

Progress = Callable[[str, int, int], None]
"""Told what is done, how much of it, and how much there is."""


class Explainer:
    """Explain predictions of a recorded model in training examples.

    Args:
        run: The directory of a run, or the `pkexplain.MemoryStore` it was recorded into.
        model: The model, at any state of its recorded parameters; it is copied, never changed.
        index: ``"Flat"`` for exact search, any other faiss factory string for a compressed index, or ``"auto"`` for a
            choice by the number of rows.
        tolerance: Allowed quadrature gap before any correction, relative to |f_T − f_0|.
        quadrature: The rule of integration over a segment, and its budget.
        device: Where to compute; by default where the model is.
        progress: Told how far long work is, for example `pkexplain.ProgressBar`.
        group: A `torch.distributed` process group whose processes share the rows out: each makes an explainer, asks
            the same questions and searches its own part, and all get the same answers.

    Raises:
        RunNotFoundError: There is no run, or it holds no finished segment.
        RunDamagedError: A file of the run is missing, truncated or altered.
        ModelMismatchError: The model is not the one that was recorded.
        ConfigurationError: An argument cannot be.
    """

    def __init__(
        self,
        run: str | os.PathLike[str] | Store,
        model: nn.Module,
        *,
        index: str = "auto",
        tolerance: float = 0.01,
        quadrature: Quadrature | None = None,
        device: str | torch.device | None = None,
        progress: Progress | None = None,
        group: Any = None,
    ) -> None:
        """Read the run and check the model against it; the index is built on first use."""
        if not tolerance > 0:
            source = "the signature of Explainer"
            fix = "Leave it out for 1% of |f_T − f_0|"
            text = message(
                "Explainer(tolerance=…)", "it must be positive", got=tolerance, expected="> 0", source=source, fix=fix
            )
            raise ConfigurationError(text)
        store = open_store(run)
        self._trajectory = store.trajectory()
        self._trajectory.fingerprint.check(model)
        directory = store.path / "index" if isinstance(store, DirectoryStore) else None
        device = torch.device(device) if device else next(model.parameters()).device
        mine = copy.deepcopy(model).to(device).eval()
        groups = {name: block.group for block in self._trajectory.fingerprint.blocks for name in block.parameters}
        for name, parameter in mine.named_parameters():
            parameter.requires_grad_(name in groups)
        layers, blocks = find_layers(mine, groups)
        if tuple(blocks) != self._trajectory.fingerprint.blocks:
            raise damaged(store, "manifest.json", "its blocks are not the model's", len(groups), "those of its layers")
        self._projector = self._trajectory.projector(device)
        self._model = mine
        self._field = OutputField(mine, layers, self._projector, self._trajectory)
        self._segments = [self._trajectory.segment(t) for t in range(len(self._trajectory))]
        self._row_sums = torch.stack([segment.row_sum for segment in self._segments])
        self._withdrawn = torch.stack([segment.withdrawn for segment in self._segments])
        self._tolerance, self._quadrature = tolerance, quadrature or Quadrature()
        self._progress = progress or (lambda what, done, total: None)
        self._whole = Ranking(self._trajectory, index, directory, device, Ranks())
        ranks = Ranks() if group is None else ProcessGroup(group)
        self._ranking = self._whole if ranks.count == 1 else Ranking(self._trajectory, index, directory, device, ranks)

    @property
    def trajectory(self) -> Trajectory:
        """The run that is explained."""
        return self._trajectory

    def copy_model(self) -> nn.Module:
        """Return a copy of the model in evaluation mode, at any point of the run."""
        return copy.deepcopy(self._model)

    @property
    def index(self) -> RowIndex:
        """The index over the rows that this process searches, made on first use.

        Raises:
            MissingDependencyError: faiss is not installed.
            ConfigurationError: faiss refuses the factory string.
        """
        self._prepare()
        return self._ranking.index

    def _prepare(self) -> None:
        if not self._ranking.index.ready:
            self._ranking.index.prepare(lambda done, total: self._progress("index", done, total))

    def explain(
        self,
        x: Any,
        *,
        output: Output | Callable[[Tensor], Tensor] | None = None,
        k: int = 10,
        reading: str = "path",
    ) -> Any:
        """Explain one output of the model for one query, or for each query of a batch.

        Args:
            x: One query in the shape of the training inputs, or a batch of them; a tensor, a tuple of positional
                inputs or a mapping of named inputs.
            output: What to explain; by default the logit of the class that the final model predicts, or the one number
                that it predicts.
            k: How many proponents and how many opponents to show.
            reading: ``"path"``: contributions that add up.

        Returns:
            An `Explanation`, or a list of them where ``x`` was a batch.

        Raises:
            QueryError: The query or the output does not fit the model.
            ConfigurationError: ``k`` or ``reading`` cannot be.
        """
        self._check(k, reading)
        queries = as_queries(x, self._trajectory.inputs, self._field.device)
        self._prepare()
        explanations: list[Explanation] = []
        for some, some_output, names in self._chunks(queries, output):
            corrected = self._corrected(some, some_output)
            scan = Scan(self._whole, corrected.projected)
            ledgers = [self._ledger(corrected, row) for row in range(len(some))]
            ranked = self._ranking.rank(corrected.projected, [ledger.examples for ledger in ledgers], k)
            audited = self._audited(corrected)
            for row, found in enumerate(ranked):
                explanations.append(
                    Explanation(
                        output=names[row],
                        reading=reading,
                        ledger=ledgers[row],
                        proponents=found.proponents,
                        opponents=found.opponents,
                        remainder=found.remainder,
                        checks=checks_of(self._trajectory, corrected, audited, row, self._tolerance),
                        cost=self._cost(corrected, row),
                        boundaries=self._trajectory.boundaries,
                        segment_sums=tuple((corrected.corrected - corrected.withdrawn)[row].tolist()),
                        checkpoint_outputs=tuple(corrected.covectors.outputs[row].tolist()),
                        query=some.row(row),
                        scan=scan.of(row),
                    )
                )
        return explanations[0] if queries.single else explanations

    def contributions(
        self, x: Any, *, output: Output | Callable[[Tensor], Tensor] | None = None, reading: str = "path"
    ) -> np.ndarray:
        """Compute the contributions of all training examples.

        Args:
            x: A query or a batch, as for `explain`.
            output: What to explain, as for `explain`.
            reading: ``"path"``.

        Returns:
            c_i(x), in output units, ``(queries, num_examples)``.

        Raises:
            QueryError: The query or the output does not fit the model.
            ConfigurationError: ``reading`` cannot be.
        """
        self._check(1, reading)
        queries = as_queries(x, self._trajectory.inputs, self._field.device)
        parts = [
            self._ranking.contributions(self._corrected(some, settled).projected)
            for some, settled, _ in self._chunks(queries, output)
        ]
        return np.concatenate(parts)

    def _check(self, k: int, reading: str) -> None:
        if reading != "path":
            fix = "Leave reading out; what removing an example would do is another question (docs/limits.md)"
            got, expected, source = repr(reading), '"path"', "this version of pkexplain"
            wrong = "this reading is not there"
        elif not isinstance(k, int) or k < 1:
            got, expected, source, fix = repr(k), "a whole number from 1 up", "the signature of explain", "Leave k out"
            wrong = "so many examples cannot be shown"
        else:
            return
        raise ConfigurationError(
            message("Explainer.explain", wrong, got=got, expected=expected, source=source, fix=fix)
        )

    def _chunks(self, queries: QueryBatch, output: Any) -> Iterator[tuple[QueryBatch, Output, list[str]]]:
        """Settle the output on the final prediction, and cut the queries into pieces that fit in memory."""
        last = len(self._trajectory) - 1
        self._field.move_to(last, 1.0)
        pieces = torch.arange(len(queries)).split(_MOST_QUERIES_AT_ONCE)
        prediction = torch.cat([self._field.prediction(queries.select(piece)) for piece in pieces])
        if prediction.isnan().any():
            raise QueryError(
                message(
                    "explaining a query",
                    "the model's prediction is not a number",
                    got=f"nan for query {int(prediction.isnan().flatten(1).any(1).nonzero()[0])}",
                    expected="numbers",
                    source="the model after training",
                    fix="Look for nan in the query, and at the learning rate of the run",
                )
            )
        again = self._field.prediction(queries.select(pieces[0]))
        if not torch.allclose(prediction[: len(again)], again, rtol=1e-3, atol=1e-5 * float(again.abs().max())):
            raise ConfigurationError(
                message(
                    "explaining a query",
                    "the model draws random numbers in evaluation mode",
                    got="two predictions that differ",
                    expected="the same prediction twice",
                    source="model.eval()",
                    fix="Make the randomness depend on self.training, as torch's Dropout does",
                )
            )
        settled = settle_output(output, prediction)
        names = settled.names(len(queries))
        kept = self._projector.columns * len(self._trajectory) * self._quadrature.budget // self._quadrature.nodes
        size = max(1, min(_MOST_QUERIES_AT_ONCE, _NUMBERS_AT_ONCE // kept))
        for start in range(0, len(queries), size):
            positions = torch.arange(start, min(start + size, len(queries)))
            chosen = [names[int(p)] for p in positions]
            yield queries.select(positions), settled.select(positions), chosen

    def _corrected(self, queries: QueryBatch, output: Output) -> CorrectedCovectors:
        report = lambda done, planned: self._progress("covectors", done, planned)  # noqa: E731 - a name for a callback
        covectors = integrate(self._field, queries, output, self._quadrature, self._tolerance, report)
        return correct(covectors, self._row_sums, self._withdrawn)

    def _cost(self, corrected: CorrectedCovectors, row: int) -> Cost:
        covectors = corrected.covectors
        budget = self._quadrature.budget * len(self._trajectory)
        passes = int(covectors.forward_passes[row]), int(covectors.backward_passes[row])
        return Cost(*passes, budget, exhausted=not covectors.settled[row])

    def _audited(self, corrected: CorrectedCovectors) -> Tensor | None:
        """Compute the audited examples' contributions from their stored rows, ``(queries, audited)``."""
        ids = self._segments[0].audit_ids
        if not len(ids):
            return None
        total = torch.zeros(len(corrected.projected), len(ids), dtype=torch.float64)
        for t, segment in enumerate(self._segments):
            covector = corrected.projected[:, t].cpu()
            total += covector @ segment.read_rows(ids, covector.dtype).T
        return total

    def _ledger(self, corrected: CorrectedCovectors, row: int) -> Ledger:
        covectors = corrected.covectors
        outputs = covectors.outputs[row]
        lines = {"decay": covectors.decay, "optimizer": covectors.optimizer}
        lines |= {"buffers": covectors.buffers} if self._field.has_statistics else {}
        lines |= {"withdrawn": corrected.withdrawn} if self._withdrawn.any() else {}
        return Ledger(
            initial=float(outputs[0]),
            final=float(outputs[-1]),
            examples=float((corrected.corrected - corrected.withdrawn)[row].sum()),
            remainders={name: float(line[row].sum()) for name, line in lines.items()},
        )
