"""`Recorder`: the context manager around the training loop."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pkexplain.distributed import find_process_group
from pkexplain.gradients.capture import Capture
from pkexplain.gradients.compiled import named_parameters, uncompiled
from pkexplain.gradients.layers import find_layers
from pkexplain.projection.base import Projection
from pkexplain.projection.kinds import Kronecker
from pkexplain.record._contract import broken, check_arguments, not_between_steps, warn_of_compiled
from pkexplain.record._optimizer_steps import StepReader
from pkexplain.record._optimizers import Optimizers
from pkexplain.record._plan import Plan
from pkexplain.record._resume import recorded_arguments
from pkexplain.record._session import Session
from pkexplain.record.loaders import DrawnIds, Draws
from pkexplain.store.base import Store
from pkexplain.store.directory import open_store
from pkexplain.store.writer import STATES_KEPT

__all__ = ["Recorder"]

_Batch = TypeVar("_Batch")


class Recorder:
    """Record a training run: how far each example moved the parameters, segment by segment.

    For every segment, Δθ_t = Σ_i D_i,t + weight_decay_t + optimizer_t. The rows P D_i,t, the checkpoints and the two
    named vectors are stored. The model, the loss and the optimizer are not changed.

    Args:
        run: A directory that does not hold a run yet, or a `pkexplain.MemoryStore`.
        model: The model to be trained.
        optimizer: Its optimizer, one that has an update rule: those of `torch.optim` but Muon, SparseAdam and L-BFGS,
            or one whose rule was passed to `pkexplain.register_update_rule`. Or a list, if several move the model;
            then each steps once in a recorded step.
        num_examples: The number of training examples; ids run from 0 to ``num_examples - 1``. Not needed with
            ``dataset``.
        projection: How gradients are compressed; ``Kronecker()`` by default.
        segments: ``"epoch"`` for a checkpoint after every ``num_examples`` visits, or a number of optimizer steps. If
            the optimizer divides by a second moment (Adam), the first segments are shorter: 1, 1, 2, 4, … steps.
        dtype: Dtype of the arithmetic and of the checkpoints, `torch.float32` or `torch.float64`.
        augmented: Whether an example's inputs are changed at random from visit to visit. If not, the inputs of 64
            examples are compared whenever these come back, and a warning says so if they differ by more than padding,
            rounding or scale: then the ids are wrong.
        dataset: The training set. Then a row of it that comes under another id than its own is found in the first
            epoch, also if all ids are shifted alike. Inputs that cannot be recognised in the rows, because a collator
            or the loop made them from these, are not complained about.
        overwrite: Whether to delete a run that is there.
        group: The `torch.distributed` group whose processes train together, where ``model`` is not its
            DistributedDataParallel.
        keep_states: How many of the states that `save` writes are kept; None for all.
        replay: Whether to note each step's ids, options and random state (5 kB where dropout draws), so that
            `pkexplain.Replay` can take the steps again; with SGD, Adam and AdamW.

    Raises:
        UnsupportedOptimizerError: The optimizer has no update rule.
        UnsupportedLayerError: A trainable layer has no per-example rule.
        ConfigurationError: An argument is invalid.

    Example:
        >>> import torch, pkexplain as pk
        >>> model, x, y = torch.nn.Linear(3, 2), torch.randn(8, 3), torch.randint(2, (8,))
        >>> optimizer, store = torch.optim.SGD(model.parameters(), lr=0.1), pk.MemoryStore()
        >>> loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4, shuffle=True)
        >>> with pk.Recorder(store, model, optimizer, num_examples=8) as recorder:
        ...     for inputs, labels in recorder.batches(loader):
        ...         optimizer.zero_grad()
        ...         torch.nn.functional.cross_entropy(model(inputs), labels).backward()
        ...         optimizer.step()
    """

    def __init__(
        self,
        run: str | os.PathLike[str] | Store,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        num_examples: int | None = None,
        projection: Projection | None = None,
        segments: str | int = "epoch",
        unsplit: str = "warn",
        dtype: torch.dtype = torch.float32,
        augmented: bool = False,
        dataset: Any = None,
        overwrite: bool = False,
        group: Any = None,
        keep_states: int | None = STATES_KEPT,
        replay: bool = False,
    ) -> None:
        """Check that everything can be recorded, without writing anything."""
        if num_examples is None and dataset is not None:
            num_examples = len(dataset)
        given = {"num_examples": num_examples, "segments": segments, "unsplit": unsplit, "augmented": augmented}
        check_arguments(model, **given, overwrite=overwrite, keep_states=keep_states, dtype=dtype)
        assert num_examples is not None
        warn_of_compiled(model)
        wrapped, (model, processes) = model, find_process_group(uncompiled(model), group)
        model = uncompiled(model)
        optimizers = Optimizers(optimizer)
        in_group = {id(p): g for g, each in enumerate(optimizers.groups) for p in each["params"]}
        named = {n: p for n, p in named_parameters(model) if p.requires_grad and id(p) in in_group}
        layers, found = find_layers(model, {name: in_group[id(p)] for name, p in named.items()})
        blocks = tuple(found)
        like = torch.empty(0, dtype=dtype, device=named[blocks[0].parameters[0]].device)
        self._plan = Plan(
            store=open_store(run, "recording into"),
            model=model,
            wrapped=wrapped,
            optimizers=optimizers,
            steps=StepReader(model, optimizers, blocks, like),
            blocks=blocks,
            capture=Capture(layers, blocks, dtype),
            group=processes,
            num_examples=num_examples,
            segments=segments,
            unsplit=unsplit,
            projection=projection or Kronecker(),
            like=like,
            overwrite=overwrite,
            augmented=augmented,
            dataset=dataset,
            keeps=keep_states,
            replay=replay,
        )
        self._session: Session | None = None
        self._drawn: dict[int, DrawnIds] = {}

    def __repr__(self) -> str:
        """Describe the recorder in one line."""
        plan, state = self._plan, "not recording" if self._session is None else "recording"
        return f"<Recorder into {plan.store}: {plan.num_examples:,} examples, {len(plan.blocks)} layers, {state}>"

    @classmethod
    def resume(
        cls,
        run: str | os.PathLike[str] | Store,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        num_examples: int | None = None,
        **options: Any,
    ) -> Recorder:
        """Continue a run that was killed, or that should be trained further.

        Load the model and the optimizer from the checkpoint you saved right after `save`. Segments that were finished
        after that are dropped, and trained again. With an optimizer that has no state yet (a new one, or one without
        momentum) the run continues from any of its checkpoints.

        Args:
            run: The run.
            model: The model, as it was at that point.
            optimizer: Its optimizer, or optimizers, as at that point, or new.
            num_examples: The number of training examples now, if there are more than before: new examples come after
                the others.
            options: ``dataset``, ``group`` and ``keep_states`` of a recorder; the others are those of the run.

        Returns:
            A recorder, to be used like any other.

        Raises:
            RunNotFoundError: There is no run, or it holds no finished segment.
            RunDamagedError: A file of the run is missing, truncated or altered.
            ConfigurationError: An argument is invalid.
        """
        store = open_store(run, "recording into")
        trajectory = store.trajectory()
        recorder = cls(store, model, optimizer, **recorded_arguments(store, trajectory, num_examples), **options)
        trajectory.fingerprint.check(recorder._plan.model)
        recorder._plan = replace(recorder._plan, resumes=True)
        return recorder

    def __enter__(self) -> Recorder:
        """Start or continue the run, and hook into the optimizer."""
        if self._session is not None:
            raise broken("the recorder is already open", "a second 'with recorder:'", "Make a recorder for each run")
        self._session = Session(self._plan)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Finish the last segment and remove the hooks, also after an error."""
        session, self._session = self._session, None
        for drawn in self._drawn.values():
            drawn.remove()
        self._drawn.clear()
        if session is not None:
            session.close(kind)

    def save(self) -> None:
        """End the segment here and save the momentum buffers, so that `resume` can continue from here.

        Call it just before you save your own checkpoint of the model and the optimizer. The run keeps the states of the
        last two calls.

        Raises:
            RecordingError: The recorder is not open, or there are gradients that the optimizer has not applied yet.
            RunError: The state cannot be written.
        """
        if self._session is None:
            raise not_between_steps(recording=False)
        self._session.save()

    def end_segment(self) -> None:
        """End the segment here, between two steps; segments end by themselves, too.

        Call it before the weights are changed by anything but a recorded step: a best checkpoint that is loaded, say.

        Raises:
            RecordingError: The recorder is not open, or a step is.
            RunError: The segment cannot be written.
        """
        self._opened().end_segment()

    def batches(self, loader: Iterable[_Batch]) -> Iterator[_Batch]:
        """Iterate over a data loader; each turn of the loop is a recorded step.

        Which examples are in a batch is read from the loader's sampler, so that data set and batches stay as they are.
        The optimizer steps in the loop's body, or leaves the gradient for a later turn.

        Args:
            loader: A `torch.utils.data.DataLoader` of the training set, also with workers, a sampler of its own, or
                prepared by Accelerate; not one of an iterable data set.

        Yields:
            The loader's batches.

        Raises:
            ConfigurationError: The loader's row numbers are not to be had, or are not those of the run.
            RecordingError: The loop broke the contract; see `step`.
        """
        session = self._opened()
        drawn = self._drawn.get(id(loader))
        if drawn is None:
            drawn = self._drawn[id(loader)] = DrawnIds(loader, self._plan.num_examples)
        draws: Draws | None = None
        for batch in loader:
            if draws is None:
                draws = drawn.follow()
            session.steps.begin(draws.take(), None)
            try:
                yield batch
            except GeneratorExit:  # the loop was left
                if self._session is session:
                    session.steps.leave()
                raise
            session.steps.end()

    def begin(self, ids: Sequence[int] | Tensor, *, accumulate: bool | None = None) -> None:
        """Begin a step whose parts are called from different places; `end` ends it. Otherwise use `step`.

        Args:
            ids: Each example's row number in the training set, ``(batch,)``.
            accumulate: Whether the batch only adds to the gradient; None where that is to be seen at `end`.

        Raises:
            ExampleIdError: The ids are out of range, or of the wrong type.
            RecordingError: A step is open already.
        """
        self._opened().steps.begin(ids, accumulate)

    def end(self) -> None:
        """End the step that `begin` began.

        Raises:
            RecordingError: No step is open, or the loop broke the contract; see `step`.
        """
        self._opened().steps.end()

    def _opened(self) -> Session:
        if self._session is None:
            fix = "Train inside 'with pkexplain.Recorder(…) as recorder:'"
            got = "a step before it was entered or after it was closed"
            raise broken("the recorder is not open", got, fix)
        return self._session

    @contextmanager
    def step(self, ids: Sequence[int] | Tensor, *, accumulate: bool = False) -> Iterator[None]:
        """Record one batch: its forward and backward passes and the optimizer's step.

        Args:
            ids: Each example's row number in the training set, ``(batch,)``. One that comes twice counts twice.
            accumulate: Whether the batch only adds to the gradient, and the optimizer steps in a later ``step``.

        Yields:
            Nothing.

        Raises:
            ExampleIdError: The ids are out of range, or of the wrong length or type.
            RecordingError: The loop broke the contract: nested, closed, no backward pass, no step, or a parameter that
                the recorder does not know.
            NonFiniteGradientError: The loss or a gradient is not finite; the optimizer did not step.
        """
        steps = self._opened().steps
        steps.begin(ids, accumulate)
        try:
            yield
        except BaseException:
            steps.abandon()
            raise
        steps.end()
