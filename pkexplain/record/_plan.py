"""What a recorder records and how, checked before anything is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pkexplain.distributed import ProcessGroup
from pkexplain.gradients.capture import Capture
from pkexplain.gradients.compiled import named_parameters
from pkexplain.gradients.layers import Block, flatten_blocks
from pkexplain.optimizers.base import RecordingSpec
from pkexplain.optimizers.replayed import rule_name
from pkexplain.projection.base import Projection
from pkexplain.record._optimizer_steps import StepReader
from pkexplain.record._optimizers import Optimizers
from pkexplain.store.base import Store
from pkexplain.store.directory import DirectoryStore
from pkexplain.store.fingerprint import ModelFingerprint
from pkexplain.store.manifest import FORMAT_VERSION, InputEntry, Manifest, OptimizerEntry, RecordingEntry
from pkexplain.store.writer import STATES_KEPT
from pkexplain.version import __version__


@dataclass(frozen=True)
class Plan:
    """What is recorded and how, checked before anything is written.

    Attributes:
        store: Where the run goes.
        model: The model, without a wrapper.
        wrapped: The model as it was passed.
        optimizers: Its optimizers.
        steps: Reads their steps.
        blocks: The recorded parameters.
        capture: Hooks on the layers.
        group: The processes that train.
        num_examples: How many training examples there are.
        segments: ``"epoch"``, or a number of optimizer steps.
        unsplit: What to do about gradients that cannot be split, ``"warn"`` or ``"refuse"``.
        projection: How gradients are compressed.
        like: An empty tensor of the dtype and device of the arithmetic.
        resumes: Whether the run already exists.
        overwrite: Whether a run that is there is deleted.
        augmented: Whether an example's inputs may differ from visit to visit.
        dataset: The training set, if its rows are to be compared with the inputs.
        keeps: How many saved states are kept.
        replay: Whether the steps are noted, so that they can be taken again.
    """

    store: Store
    model: nn.Module
    wrapped: nn.Module
    optimizers: Optimizers
    steps: StepReader
    blocks: tuple[Block, ...]
    capture: Capture
    group: ProcessGroup
    num_examples: int
    segments: str | int
    unsplit: str
    projection: Projection
    like: Tensor
    resumes: bool = False
    overwrite: bool = False
    augmented: bool = False
    dataset: Any = None
    keeps: int | None = STATES_KEPT
    replay: bool = False

    @property
    def names(self) -> list[str]:
        """The names of the parameters, in the order of the flat vector."""
        return [name for block in self.blocks for name in block.parameters]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters, in the order of the flat vector."""
        named = dict(named_parameters(self.model))
        return [named[name] for name in self.names]

    def spec(self, audited: Tensor | None = None) -> RecordingSpec:
        """Return what accumulators need to know."""
        scratch = self.store.path if isinstance(self.store, DirectoryStore) else None
        return RecordingSpec(self.blocks, self.projection, self.num_examples, self.like, self.group, audited, scratch)

    def describe(
        self,
        ended: str,
        fingerprint: ModelFingerprint,
        inputs: dict[str, InputEntry],
        digests: dict[str, dict[str, str]],
        output: str | None,
    ) -> Manifest:
        """Describe the run; the writer adds what it has written.

        Args:
            ended: How recording ended, in words.
            fingerprint: What the model must be.
            inputs: The inputs that were seen.
            digests: Digests of those of some examples.
            output: Which tensor of its output is the prediction.
        """
        return Manifest(
            run_id="",
            pkexplain=__version__,
            torch=str(torch.__version__),
            ended=ended,
            num_examples=self.num_examples,
            dtype="float64" if self.like.dtype == torch.float64 else "float32",
            recording=RecordingEntry(self.segments, self.unsplit, self.augmented, self._replayed()),
            optimizer=OptimizerEntry.of(*self.optimizers.all),
            projection=self.projection.describe(),
            columns=self.projection.columns(self.blocks),
            model=fingerprint,
            inputs=inputs,
            digests=digests,
            output=output,
            segments=(),
            states=(),
            revision=0,
            withdrawn=(),
            files={},
            format_version=FORMAT_VERSION,
        )

    def _replayed(self) -> tuple[str, ...]:
        """Name the rule of each parameter group, if the run is to be replayed."""
        optimizers = self.optimizers.all if self.replay else ()
        return tuple(rule_name(each) for each in optimizers for _ in each.param_groups)

    def point(self) -> Tensor:
        """Return the model's current θ, ``(parameters,)``."""
        return flatten_blocks(self.blocks, dict(named_parameters(self.model)), self.like.dtype)
