"""Mislabelled examples: does a score find those whose label is wrong?

Labels of a known part of the training set are changed, a model is trained on them, and every example gets a score that
is higher if it is more suspicious. With an attribution method this is often an example's contribution to its own
training loss; mind the sign. The score is judged by the area under its ROC curve, and by how many of the changed labels
are found when the examples are inspected in the score's order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pkexplain.errors import EvaluationError
from pkexplain.evaluation._checking import as_finite, as_ids
from pkexplain.evaluation._statistics import Estimate, estimate, roc_area, roc_areas
from pkexplain.results.numbers import percent
from pkexplain.results.text import tabulate

__all__ = ["MislabelDetection", "flip_labels", "mislabel_detection"]


@dataclass(frozen=True)
class MislabelDetection:
    """How well a score finds mislabelled examples.

    Attributes:
        auroc: P(a mislabelled example scores higher than a correct one), ties counted half; 0.5 is chance. The interval
            is over examples; the mislabelled and the others are resampled separately.
        precision: The share of mislabelled examples among the m most suspicious ones, m being their true number.
        found: The share of mislabelled examples among the n most suspicious ones, for n from 0 to all,
            ``(num_examples + 1,)``; for tied scores, the mean over their orders.
        num_mislabelled: Their number.
    """

    auroc: Estimate
    precision: float
    found: np.ndarray = field(repr=False)
    num_mislabelled: int

    @property
    def num_examples(self) -> int:
        """The number of examples."""
        return len(self.found) - 1

    @property
    def inspected(self) -> np.ndarray:
        """The share of all examples inspected at each position of ``found``, ``(num_examples + 1,)``."""
        return np.arange(len(self.found)) / self.num_examples

    @property
    def area(self) -> float:
        """The area under ``found`` over ``inspected``, 0 to 1; 0.5 is chance, and 1 cannot quite be reached."""
        return float((self.found[1:] + self.found[:-1]).sum() / (2.0 * self.num_examples))

    def __str__(self) -> str:
        """Show the detection as a plain-text table."""
        shares = [0.05, 0.1, 0.2, 0.5]
        rows = [
            ["area under the ROC curve", str(self.auroc)],
            [f"precision at {self.num_mislabelled:,}", f"{self.precision:.3f}"],
            ["area under the detection curve", f"{self.area:.3f}"],
            *([f"found in the first {percent(s)}", percent(np.interp(s, self.inspected, self.found))] for s in shares),
        ]
        title = f"Mislabelled examples: {self.num_mislabelled:,} of {self.num_examples:,}"
        note = f"In brackets: {self.auroc.level:.0%} of the areas on resampled examples."
        return tabulate(title, ["", "value"], rows, [note])


def flip_labels(
    labels: Any, *, fraction: float = 0.1, classes: int | None = None, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Change some labels, each to one of the other classes, all equally likely.

    Args:
        labels: One class per example, integers from 0, ``(num_examples,)``.
        fraction: The share of the examples whose labels change.
        classes: The number of classes; None for one more than the highest label.
        seed: Seed of which labels change, and to what.

    Returns:
        The labels with the changes, and which of them changed, both ``(num_examples,)``.

    Raises:
        EvaluationError: The labels are not classes, there is only one class, or none or all labels would change.

    Example:
        >>> flipped, mask = flip_labels([0, 1, 1, 0, 1, 0], fraction=1 / 3, seed=1)
        >>> int(mask.sum()), bool((flipped[mask] != np.array([0, 1, 1, 0, 1, 0])[mask]).all())
        (2, True)
    """
    array = np.array(labels.detach().cpu().numpy() if hasattr(labels, "detach") else labels)
    source = "the labels"
    if array.ndim != 1 or array.dtype.kind not in "iu" or not len(array):
        got, expected = f"{array.dtype}, shape {array.shape}", "integers, (num_examples,)"
        raise EvaluationError(
            "flip_labels(labels)", "these are not classes", got, expected, "the definition", "Pass class numbers"
        )
    known = int(array.max()) + 1 if classes is None else classes
    if array.min() < 0 or array.max() >= known or known < 2:
        got, expected = (
            f"labels from {array.min()} to {array.max()}",
            f"labels from 0 to {known - 1}, 2 or more classes",
        )
        source = "the labels" if classes is None else f"{classes=}"
        raise EvaluationError(
            "flip_labels(labels)", "labels and classes do not fit", got, expected, source, "Count classes from 0"
        )
    count = round(fraction * len(array))
    if not 0 < count < len(array):
        expected, fix = f"1 to {len(array) - 1} changed labels", "Pass fraction=0.1"
        raise EvaluationError(
            f"flip_labels(labels, {fraction=})", "none or all would change", count, expected, source, fix
        )
    random = np.random.default_rng(seed)
    changed = random.choice(len(array), count, replace=False)
    array[changed] = (array[changed].astype(np.int64) + random.integers(1, known, size=count)) % known
    mask = np.zeros(len(array), dtype=bool)
    mask[changed] = True
    return array, mask


def mislabel_detection(
    scores: Any, mislabelled: Any, *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> MislabelDetection:
    """Judge how well a score finds mislabelled examples.

    Args:
        scores: One number per example, **higher if it is more suspicious**, ``(num_examples,)``.
        mislabelled: Which examples are mislabelled: bool, ``(num_examples,)``, or their ids.
        resamples: Bootstrap resamples of the examples, for the interval.
        level: The share of the resampled areas in the interval.
        seed: Seed of the resamples.

    Returns:
        The detection.

    Raises:
        EvaluationError: A score is not finite, none or all are mislabelled, or the ids or the shape do not fit.

    Example:
        >>> detection = mislabel_detection([0.1, 0.9, 0.3, 0.2, 0.8], [1, 4])
        >>> detection.auroc.value, detection.precision
        (1.0, 1.0)
    """
    scores = as_finite(scores, (None,), "mislabel_detection(scores, …)", "(num_examples,)", "the definition")
    mask = _as_mask(mislabelled, len(scores))
    count = int(mask.sum())
    if resamples < 1:
        raise EvaluationError(
            f"{resamples=}", "there are none", resamples, "1 or more", "the bootstrap", "Pass resamples=1000"
        )
    auroc = estimate(roc_area(scores, mask), roc_areas(scores, mask, resamples, seed), level)
    found = _found(scores, mask) / count
    return MislabelDetection(auroc, float(found[count]), found, count)


def _as_mask(mislabelled: Any, num_examples: int) -> np.ndarray:
    asked = "mislabel_detection(…, mislabelled)"
    given = np.asarray(mislabelled.detach().cpu().numpy() if hasattr(mislabelled, "detach") else mislabelled)
    if given.dtype == np.bool_:
        mask = given
        if mask.shape != (num_examples,):
            expected, fix = f"shape ({num_examples},)", "Pass one truth value for each score"
            raise EvaluationError(asked, "it has another shape", f"shape {mask.shape}", expected, "the scores", fix)
    else:
        mask = np.zeros(num_examples, dtype=bool)
        mask[as_ids(given, num_examples, asked) if given.size else []] = True
    if mask.all() or not mask.any():
        wrong, got = f"{'all' if mask.all() else 'none'} are mislabelled", f"{mask.sum()} of {num_examples}"
        expected, fix = f"1 to {num_examples - 1}", "Pass the mask that flip_labels returned"
        raise EvaluationError(asked, wrong, got, expected, "the definition", fix)
    return mask


def _found(scores: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Count the mislabelled among the n highest scores, for every n; for ties, the mean over their orders."""
    groups, sizes = np.unique(-scores, return_inverse=True, return_counts=True)[1:]
    inside = np.bincount(groups, weights=mask, minlength=len(sizes))
    ends = np.concatenate([[0], np.cumsum(sizes)])
    return np.interp(np.arange(len(scores) + 1), ends, np.concatenate([[0.0], np.cumsum(inside)]))
