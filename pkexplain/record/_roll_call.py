"""Whether all processes of a training do the same: asked before every step, save and end, on a channel of its own.

If one has no batch left, or only one saves, the others would wait for it until the training's own collectives time
out, or end in a mismatch of those. So each says what it is about to do, and a difference is an error in all of them.
"""

from __future__ import annotations

from torch import nn

from pkexplain.distributed import ProcessGroup
from pkexplain.errors import RecordingError
from pkexplain.record._contract import broken

__all__ = ["RollCall"]

_DOING = ("steps", "accumulates a gradient", "refused its batch", "saves", "has left the recorder", "takes a batch")
STEP, ACCUMULATE, REFUSED, SAVE, END, BATCH = range(len(_DOING))


class RollCall:
    """Meets all processes.

    Attributes:
        uneven: Whether they met and did different things; then all know it, and can still end together.

    Args:
        group: The processes.
        model: The model as the user passed it, maybe in a wrapper.
    """

    def __init__(self, group: ProcessGroup, model: nn.Module) -> None:
        """Open the channel; every process does."""
        self._group, self._model, self.uneven = group, model, False
        group.open_channel()

    def meet(self, doing: int, examples: int = 0) -> int:
        """Say what this process is about to do, and wait for the others.

        Args:
            doing: One of the constants above.
            examples: How many examples its batch has.

        Returns:
            The number of examples in all processes.

        Raises:
            RecordingError: The processes do different things, or one has stopped.
        """
        joined = getattr(self._model, "_join_config", None)
        if getattr(joined, "enable", False):
            raise broken(
                "DistributedDataParallel.join() is active",
                "processes that may run out of batches at different times",
                "Give every process the same number of batches: DistributedSampler does, or drop the last ones",
            )
        try:
            everyone = self._group.meet(doing, examples)
        except RuntimeError as error:
            raise broken(
                "another process has stopped",
                "a closed connection",
                "Read that process's own error; what was finished is kept",
            ) from error
        others = {rank: code for rank, (code, _) in enumerate(everyone) if code != doing}
        if REFUSED in others.values():
            raise broken("another process refused its batch", "wrong ids there", "Read that process's own error")
        if others and doing != REFUSED:
            self.uneven = True
            raise self._different(doing, others)
        return sum(number for _, number in everyone)

    def _different(self, doing: int, others: dict[int, int]) -> RecordingError:
        rank, code = next(iter(others.items()))
        fix = "Give every process the same number of batches: DistributedSampler does, or drop the last ones"
        if SAVE in (doing, code):
            fix = "Call recorder.save() in every process, after the same step"
        elif ACCUMULATE in (doing, code) and END not in (doing, code):
            fix = "Accumulate over the same number of batches in every process"
        return broken(
            "the processes do different things",
            f"process {self._group.rank} {_DOING[doing]}, process {rank} {_DOING[code]}",
            f"{fix}; what was finished is kept",
        )

    def close(self) -> None:
        """Close the channel; processes that still wait are told."""
        self._group.close_channel()
