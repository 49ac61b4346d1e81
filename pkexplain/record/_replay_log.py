"""What a step is taken again with, besides the data: which examples, the state of random numbers, and the options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pkexplain.errors import ConfigurationError
from pkexplain.optimizers.base import CapturedBatch
from pkexplain.optimizers.replayed import ReplayedStep, replayed_step
from pkexplain.record._plan import Plan
from pkexplain.store.replay_log import MOST_OPTIONS, StepLog

__all__ = ["ReplayRecorder"]


class ReplayRecorder:
    """Notes the steps of a segment.

    Args:
        plan: What is recorded.

    Raises:
        UnsupportedOptimizerError: An optimizer's step cannot be taken again.
        ConfigurationError: Several processes train.
    """

    def __init__(self, plan: Plan) -> None:
        """Find the optimizers' steps."""
        self._plan = plan
        self._steps: list[ReplayedStep] = []
        self._options: list[Tensor] = []
        self._taken: list[tuple[list[CapturedBatch], Tensor]] = []
        if not plan.replay:
            return
        if plan.group.world_size > 1:
            raise ConfigurationError(
                "Recorder(replay=True)",
                "the steps of several processes are not taken again together",
                got=f"{plan.group.world_size} processes",
                expected="one process",
                source="the process group",
                fix="Leave replay out: the path and the removal reading know such runs",
            )
        self._steps = [replayed_step(each) for each in plan.optimizers.all for _ in each.param_groups]

    def begin(self, batch: CapturedBatch) -> None:
        """Note the state of torch's random numbers, as it is before the batch's forward pass."""
        if self._steps:
            batch.random = random_state(batch.device)

    def before_step(self) -> None:
        """Note the options of every parameter group, as they are when the optimizers step."""
        if not self._steps:
            return
        rows = torch.zeros(len(self._steps), MOST_OPTIONS, dtype=torch.float64, device="cpu")
        for row, step, group in zip(rows, self._steps, self._plan.optimizers.groups, strict=True):
            numbers = step.read(group, self._plan.optimizers.state(group["params"][0]))
            row[: len(numbers)] = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        self._options = [rows]

    def step(self, batches: Sequence[CapturedBatch]) -> None:
        """Note a step that the optimizers have taken, on these batches."""
        if self._steps:
            lean = [CapturedBatch(batch.ids, random=batch.random) for batch in batches]
            self._taken.append((lean, self._options[0]))

    def take(self) -> Mapping[str, Tensor]:
        """Return the tensors of the segment's steps, and begin the next one."""
        taken, self._taken = self._taken, []
        if not taken:
            return {}
        batches = [batch for several, _ in taken for batch in several]
        return StepLog.of(
            [batch.ids for batch in batches],
            [batch.random for batch in batches if batch.random is not None],
            [len(several) for several, _ in taken],
            [options for _, options in taken],
        ).tensors()


def random_state(device: torch.device) -> Tensor:
    """The state of torch's random numbers, on the CPU and on a GPU if that is where the model is, ``(bytes,)``."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)
