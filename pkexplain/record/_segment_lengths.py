"""When a segment ends."""

from __future__ import annotations


class SegmentLengths:
    """Counts visits and steps, and says when a segment is full.

    Under an optimizer that divides by a second moment the first segments are short, of 1, 1, 2, 4, … steps: while few
    gradients have entered that moment, it changes too fast for one operator to stand for more steps. So they are with
    every projection, since contributions are those of the same path then.

    Attributes:
        age: Steps since the optimizer began.

    Args:
        num_examples: The number of training examples.
        segments: ``"epoch"``, or a number of optimizer steps.
    """

    def __init__(self, num_examples: int, segments: str | int) -> None:
        """Begin the first segment."""
        self._num_examples, self._segments = num_examples, segments
        self.age = 0
        self.restart()

    def restart(self) -> None:
        """Count from here."""
        self._visits, self._steps = 0, 0

    def overflows(self, examples: int, spare: int) -> bool:
        """Whether so many more examples would not belong to this epoch.

        Args:
            examples: Examples in the next batch.
            spare: How many more than there are a sampler may draw, to even out processes.
        """
        return self._segments == "epoch" and self._visits + examples >= self._num_examples + spare

    def count(self, examples: int, stepped: bool) -> None:
        """Count a batch, or several that were accumulated.

        Args:
            examples: Examples in it.
            stepped: Whether the optimizer stepped, or the step was skipped.
        """
        self._visits += examples
        self._steps += stepped
        self.age += stepped

    def full(self, elementwise: bool) -> bool:
        """Whether the segment ends here.

        Args:
            elementwise: Whether the optimizer has numbers for each coordinate.
        """
        if isinstance(self._segments, int):
            whole, done = self._segments, self._steps
        else:
            whole, done = self._num_examples, self._visits
        if done >= whole:
            self.restart()
            return True
        early = elementwise and self._steps == self.age and self.age.bit_count() == 1
        return early and 2 * done <= whole
