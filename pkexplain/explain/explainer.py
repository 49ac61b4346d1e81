"""`Explainer`: queries in, explanations out; for one run or the mean of several, in either reading."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pkexplain.errors import ConfigurationError, ExampleIdError
from pkexplain.explain._ensemble import mean_checks, mean_cost, mean_ledger, mean_rows
from pkexplain.explain._failed_checks import FailedChecks
from pkexplain.explain._open_runs import OpenRuns, asked_alone
from pkexplain.explain._ranking import mean_scan, rank
from pkexplain.explain._readings import Reading, check_count, name_of, settings_of
from pkexplain.explain._single_run import RunExplainer, Setting
from pkexplain.explain.outputs import Output, as_output, settle_output
from pkexplain.explain.quadrature import Quadrature
from pkexplain.explain.queries import Queries, QueryBatch, read_queries
from pkexplain.explain.removal import Removal
from pkexplain.explain.replay import Replay
from pkexplain.explain.suspects import described, suspects
from pkexplain.gradients.model_copy import copy_model
from pkexplain.gradients.torch_state import own_torch_state
from pkexplain.ids import check_ids
from pkexplain.index.row_index import RowIndex
from pkexplain.progress import Progress, no_progress
from pkexplain.results.explanation import Explanation
from pkexplain.results.explanations import Explanations
from pkexplain.results.suspects import Suspects
from pkexplain.store.base import Store
from pkexplain.store.directory import open_store
from pkexplain.store.trajectory import Trajectory

__all__ = ["Explainer"]

_MOST_QUERIES_AT_ONCE = 128
_NUMBERS_AT_ONCE = 1 << 27
"""The most numbers (1 GiB of float64) that one call holds of covectors in progress; and of contributions of examples
that are not shown, for all its queries together: of more, they are computed again when they are read."""


class Explainer:
    """Explain predictions of a recorded model by its training examples.

    Threads may share an explainer: questions are answered one after the other, as each would be alone. If examples
    are withdrawn from the run while it is open, or its files are merged, the next question is answered from the run as
    it is then; until that question, rows that it has read stay in this process's memory. Segments that are added while
    it is open are not seen.

    A warning, once, says what is unusual about the run: a recording that did not finish, examples that were never
    visited, a model that was trained along the run but stands elsewhere. Every explanation has it as its ``notes``.

    A query is a tensor, an array or a list of numbers; a tuple of positional inputs; a mapping of named inputs, such as
    a row of a `datasets.Dataset`; or the dataclass that the model takes. A batch has one dimension more. In a list, or
    a batch of lists, lengths may differ: those of a length are explained together, without padding. The model is called
    as it was while recording. Columns that no input of the training was are left out; ``label`` is passed as ``labels``
    where the training passed that. Of several tensors that the model returns, the one from which the training's loss
    was computed is explained, or the one named in the output, ``Logit(3, of="1")``: `Explanation.prediction`.

    Args:
        run: The directory of a run, its URL (``s3://bucket/run``), or the `pkexplain.MemoryStore` it was recorded into;
            or a list of runs of one training with different seeds, which are averaged.
        model: The model. It supplies the architecture; the recorded weights are explained. It is copied, never changed.
            If its weights are not the run's last ones, each explanation has a note of it.
        index: ``"Flat"`` for exact search, any other faiss factory string for a compressed index, or ``"auto"`` to
            choose by the number of rows. The mean of several runs is always searched exactly.
        tolerance: Allowed quadrature gap before any correction, relative to |f_T − f_0|.
        quadrature: The rule of integration over a segment, and its budget.
        device: Where to compute; by default the model's device.
        progress: Receives the progress of long work, for example `pkexplain.ProgressBar`.
        group: A `torch.distributed` process group among whose processes the rows are divided: each makes an explainer,
            asks the same questions and searches its own share, and all get the same answers.
        segments: Explain only so many of the run's first segments: the model as it was at their end. A run of which
            later files are damaged can be read this way.

    Raises:
        RunNotFoundError: There is no run, or it holds no finished segment.
        RunDamagedError: A file of the run is missing, truncated or altered.
        ModelMismatchError: The model is not the one that was recorded.
        ConfigurationError: An argument is invalid, or the runs cannot be averaged.
    """

    def __init__(
        self,
        run: str | os.PathLike[str] | Store | Sequence[str | os.PathLike[str] | Store],
        model: nn.Module,
        *,
        index: str = "auto",
        tolerance: float = 0.01,
        quadrature: Quadrature | None = None,
        device: str | torch.device | None = None,
        progress: Progress | None = None,
        group: Any = None,
        segments: int | None = None,
    ) -> None:
        """Read the run and check the model against it; the index is built on first use."""
        if not tolerance > 0:
            fix = "Leave tolerance out for 1% of |f_T − f_0|"
            raise ConfigurationError(
                "Explainer(tolerance=…)", "it must be positive", tolerance, "> 0", "Explainer", fix
            )
        runs = list(run) if isinstance(run, Sequence) and not isinstance(run, (str, bytes)) else [run]
        if not runs or (group is not None and len(runs) > 1):
            fix = "Pass a run, or a list of runs without a process group"
            raise ConfigurationError(
                "Explainer([…])", "these runs cannot be averaged", len(runs), "1 or more", "Explainer", fix
            )
        report = progress or no_progress
        index = "Flat" if len(runs) > 1 else index  # an index only has the rows of one run
        setting = Setting(index, tolerance, quadrature or Quadrature(), device, report, group, segments)
        with own_torch_state():
            self._open_runs = OpenRuns([open_store(each) for each in runs], model, setting)
            self._open_runs.warn()

    def __repr__(self) -> str:
        """Describe the explainer in one line."""
        run, steps = self.trajectory, f"{self.trajectory.boundaries[-1]:,} steps"
        return f"<Explainer of {self._open_runs}: {run.num_examples:,} examples, {len(run)} segments, {steps}>"

    @property
    def _runs(self) -> list[RunExplainer]:
        return self._open_runs.all

    @property
    def _first(self) -> RunExplainer:
        return self._runs[0]

    @property
    def trajectory(self) -> Trajectory:
        """The explained run; of several, the first."""
        return self._first.trajectory

    @asked_alone
    def copy_model(self) -> nn.Module:
        """Return a copy of the model in evaluation mode, with the weights of any point of the run."""
        return copy_model(self._first.model)

    @property
    @asked_alone
    def index(self) -> RowIndex:
        """The index over the rows that this process searches, built on first use; of several runs, the first's.

        Raises:
            MissingDependencyError: faiss is not installed.
            ConfigurationError: faiss refuses the factory string.
        """
        self._first.prepare()
        return self._first.ranking.index

    @asked_alone
    def prepare(self, reading: Reading = "path") -> None:
        """Do one-time work now: build the index, and what the reading needs: curvatures, or a training taken again.

        Args:
            reading: As for `explain`.

        Raises:
            MissingDependencyError: faiss is not installed.
            ConfigurationError: faiss refuses the factory string, or ``reading`` is invalid.
        """
        settings = settings_of(reading)
        for run in self._runs:
            run.prepare()
            if isinstance(settings, Removal):
                run.curvature(settings.loss)
            elif settings is not None:
                run.replayer(settings)

    @asked_alone
    def explain(
        self,
        x: Any,
        *,
        output: Output | Callable[[Tensor], Tensor] | None = None,
        k: int = 10,
        reading: Reading = "path",
    ) -> Any:
        """Explain one output of the model for one query, or for each query of a batch.

        Args:
            x: One query in the form of the training inputs, or a batch or a list of them, see `Explainer`.
            output: What to explain; by default the logit of the predicted class, or the one number predicted.
            k: Number of proponents, and of opponents, to show.
            reading: ``"path"``: contributions that add up; ``"removal"``: how much the output would lose without the
                example; a `pkexplain.Removal`; or a `pkexplain.Replay`: the exact derivative through this run.

        Returns:
            An `Explanation`, or `Explanations`, a list of them, if ``x`` was a batch or a list.

        Raises:
            QueryError: The query or the output does not fit the model.
            ConfigurationError: ``k`` or ``reading`` is invalid.
        """
        check_count(k)
        settings, queries, explanations = settings_of(reading), self._queries(x, output), Explanations()
        about = self._open_runs.about
        self._first.prepare()
        for some, settled, names in self._chunks(queries, output, settings):
            accounts = [run.account(some, settled, settings) for run in self._runs]
            ledgers = [mean_ledger(each) for each in zip(*(account.ledgers for account in accounts), strict=True)]
            ranked = rank(
                [account.rows for account in accounts],
                [account.projected for account in accounts],
                [ledger.examples for ledger in ledgers],
                k,
                whole=[account.whole for account in accounts],
                keep=len(queries) * self.trajectory.num_examples <= _NUMBERS_AT_ONCE,
            )
            explanations += [
                Explanation(
                    output=names[q],
                    reading=name_of(settings),
                    ledger=ledgers[q],
                    proponents=ranked[q].proponents,
                    opponents=ranked[q].opponents,
                    remainder=ranked[q].remainder,
                    checks=mean_checks([account.checks[q] for account in accounts]),
                    cost=mean_cost([account.costs[q] for account in accounts]),
                    boundaries=self.trajectory.boundaries,
                    segment_sums=mean_rows([account.segment_sums[q] for account in accounts]),
                    checkpoint_outputs=mean_rows([account.outputs[q] for account in accounts]),
                    query=some.row(q),
                    prediction=some.rule.stated,
                    all_contributions=ranked[q].contributions,
                    **about,
                )
                for q in range(len(some))
            ]
        return explanations[0] if queries.single else Explanations(queries.in_order(explanations))

    @asked_alone
    def contributions(
        self,
        x: Any,
        *,
        output: Output | Callable[[Tensor], Tensor] | None = None,
        reading: Reading = "path",
    ) -> np.ndarray:
        """Compute the contributions of all training examples.

        Args:
            x: A query or a batch, as for `explain`.
            output: What to explain, as for `explain`.
            reading: As for `explain`.

        Returns:
            c_i(x), in output units, ``(queries, num_examples)``. If a check of one of the queries fails, a warning
            names it; `explain` returns the checks themselves.

        Raises:
            QueryError: The query or the output does not fit the model.
            ConfigurationError: ``reading`` is invalid.
        """
        settings = settings_of(reading)
        queries, failed = self._queries(x, output), FailedChecks("contributions()")
        parts = []
        for some, settled, _ in self._chunks(queries, output, settings):
            accounts = [run.account(some, settled, settings) for run in self._runs]
            failed.note(mean_checks(each) for each in zip(*(account.checks for account in accounts), strict=True))
            mine = mean_scan([a.rows for a in accounts], [a.projected for a in accounts]).numpy()
            parts.append(np.concatenate(accounts[0].rows.group.all_gather(mine), axis=1))
        failed.warn()
        return np.concatenate(parts)[queries.places.argsort().numpy()]

    @asked_alone
    def self_contributions(
        self,
        x: Any,
        ids: Sequence[int] | Tensor,
        *,
        output: Output | Callable[[Tensor], Tensor] | None = None,
        reading: Reading = "removal",
    ) -> np.ndarray:
        """Compute how much training examples contribute to their own outputs.

        In the removal reading of the margin of an example's own label, this measures how much the model memorised it
        (Feldman and Zhang 2020): without it, the model would predict something else. Mislabelled examples stand out.

        Args:
            x: A batch of training examples.
            ids: Their row numbers, ``(examples,)``.
            output: What to explain, as for `explain`, with a class or a target for each example.
            reading: As for `explain`.

        Returns:
            c_i(x_i), in output units, ``(examples,)``; a failed check is a warning, as for `contributions`.

        Raises:
            QueryError: The examples or the output do not fit the model.
            ExampleIdError: The ids are out of range, or their number is not that of the examples.
            ConfigurationError: ``reading`` is invalid.
        """
        settings = settings_of(reading)
        queries = self._queries(x, output)
        known = check_ids(ids, self.trajectory.num_examples, "self_contributions(ids)")
        if len(known) != len(queries):
            got, fix = f"{len(known)} ids for {len(queries)} examples", "Pass one id for each row of the batch"
            wrong, expected = "there must be one for each example", f"{len(queries)} ids"
            raise ExampleIdError(
                "self_contributions(ids)", wrong, got=got, expected=expected, source="the batch", fix=fix
            )
        parts, start, failed = [], 0, FailedChecks("self_contributions()")
        for some, settled, _ in self._chunks(queries, output, settings):
            mine = known[queries.places[start : start + len(some)]]
            accounts = [run.account(some, settled, settings) for run in self._runs]
            failed.note(mean_checks(each) for each in zip(*(account.checks for account in accounts), strict=True))
            found = [run.own(a, mine) for run, a in zip(self._runs, accounts, strict=True)]
            parts.append(np.mean(found, axis=0))
            start += len(some)
        failed.warn()
        return np.concatenate(parts)[queries.places.argsort().numpy()]

    @asked_alone
    def suspects(self, k: int = 100, *, labels: Any = None, dataset: Any = None) -> Suspects:
        """Rank training examples by how likely their label is wrong, with what they are like; see `pkexplain.suspects`.

        Args:
            k: How many to show.
            labels: As for `pkexplain.suspects`.
            dataset: The training set, rows ``(inputs, label)`` or mappings, to say what the model thinks they are.

        Raises:
            ConfigurationError: As for `pkexplain.suspects`.
        """
        return described(suspects(self._open_runs.stores, k, labels=labels), self._runs, dataset)

    def _queries(self, x: Any, output: Any) -> Queries:
        asked = None if output is None else as_output(output).of
        return read_queries(x, self.trajectory, self._first.model).asked_of(asked)

    def _chunks(
        self, queries: Queries, output: Any, settings: Removal | Replay | None
    ) -> Iterator[tuple[QueryBatch, Output, list[str]]]:
        """Resolve the output on the final prediction, and split the queries into batches that fit in memory."""
        quadrature, examples = self._first.quadrature, self.trajectory.num_examples
        nodes = len(self.trajectory) * quadrature.budget // quadrature.fewest
        kept = self._first.trajectory_model.columns * nodes
        numbers = examples * len(self.trajectory) if isinstance(settings, Replay) else max(kept, examples)
        size = max(1, min(_MOST_QUERIES_AT_ONCE, _NUMBERS_AT_ONCE // numbers))
        for batch, wanted in queries.with_output(output):
            predictions = [run.prediction(batch, _MOST_QUERIES_AT_ONCE) for run in self._runs]
            settled = settle_output(wanted, torch.stack(predictions).mean(0))
            names = settled.names(len(batch))
            for positions in torch.arange(len(batch), device="cpu").split(size):
                yield batch.select(positions), settled.select(positions), [names[int(p)] for p in positions]
