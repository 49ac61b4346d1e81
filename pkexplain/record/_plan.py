"""What a recorder records and how, checked before anything is written."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from pkexplain.distributed import ProcessGroup
from pkexplain.gradients.capture import Capture
from pkexplain.gradients.layers import Block, flatten_blocks
from pkexplain.optimizers.base import RecordingSpec
from pkexplain.projection.kinds import Projection
from pkexplain.record._optimizer_steps import StepReader
from pkexplain.record._optimizers import Optimizers
from pkexplain.store.base import Store
from pkexplain.store.directory import DirectoryStore


@dataclass(frozen=True)
class Plan:
    """What is recorded and how, checked before anything is written.

    Attributes:
        store: Where the run goes.
        model: The model, without a wrapper.
        optimizers: Its optimizers.
        steps: Reads their steps.
        blocks: The recorded parameters.
        capture: Hooks on the layers.
        group: The processes that train.
        num_examples: How many training examples there are.
        segments: ``"epoch"``, or a number of optimizer steps.
        lookahead: How long gradients wait, as given by the user.
        unsplit: What to do about gradients that cannot be split, ``"warn"`` or ``"refuse"``.
        projection: How gradients are compressed.
        like: An empty tensor of the dtype and device of the arithmetic.
        resumes: Whether the run already exists.
    """

    store: Store
    model: nn.Module
    optimizers: Optimizers
    steps: StepReader
    blocks: tuple[Block, ...]
    capture: Capture
    group: ProcessGroup
    num_examples: int
    segments: str | int
    lookahead: str | int
    unsplit: str
    projection: Projection
    like: Tensor
    resumes: bool = False

    @property
    def names(self) -> list[str]:
        """The names of the parameters, in the order of the flat vector."""
        return [name for block in self.blocks for name in block.parameters]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters, in the order of the flat vector."""
        named = dict(self.model.named_parameters())
        return [named[name] for name in self.names]

    def spec(self, audited: Tensor | None = None) -> RecordingSpec:
        """Return what accumulators need to know."""
        scratch = self.store.path if isinstance(self.store, DirectoryStore) else None
        return RecordingSpec(self.blocks, self.projection, self.num_examples, self.like, self.group, audited, scratch)

    def point(self) -> Tensor:
        """Return the model's current θ, ``(parameters,)``."""
        return flatten_blocks(self.blocks, dict(self.model.named_parameters()), self.like.dtype)
