"""Checks of the arrays passed to the metrics."""

from __future__ import annotations

from typing import Any

import numpy as np

from pkexplain.errors import EvaluationError
from pkexplain.evaluation._statistics import LEAST_UNITS


def as_finite(values: Any, shape: tuple[int | None, ...], asked: str, axes: str, source: str) -> np.ndarray:
    """Take an array, or a tensor, of finite numbers.

    Args:
        values: The value passed.
        shape: The shape it must have; None for any size.
        asked: The argument's name.
        axes: The names of its axes, for example ``"(queries, num_examples)"``.
        source: Origin of the shape.

    Returns:
        The numbers, float64.

    Raises:
        EvaluationError: They have another shape, or are not all finite.
    """
    expected = axes + "".join(f", {size} of them" for size in shape[:1] if len(shape) == 1 and size is not None)
    if len(shape) > 1:
        expected = f"{axes} = ({', '.join('any' if size is None else str(size) for size in shape)})"
    fix = "Pass one number for each"
    values = values.detach().double().cpu().numpy() if hasattr(values, "detach") else values
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise EvaluationError(asked, "these are not numbers", type(values).__name__, expected, source, fix) from error
    if array.ndim != len(shape) or any(w is not None and s != w for s, w in zip(array.shape, shape, strict=True)):
        raise EvaluationError(asked, "it has another shape", f"shape {array.shape}", expected, source, fix)
    broken = np.argwhere(~np.isfinite(array))
    if len(broken):
        places = ", ".join(str(tuple(map(int, place)) if len(place) > 1 else int(place[0])) for place in broken[:3])
        got = f"{len(broken)} that are not, at {places}{', …' if len(broken) > 3 else ''}"
        fix = "Find out where they come from: they cannot be ranked"
        raise EvaluationError(asked, "not all numbers are finite", got, "finite numbers", axes, fix)
    return array


def as_ids(ids: Any, num_examples: int, asked: str) -> np.ndarray:
    """Check example ids and keep their order.

    Args:
        ids: The value passed.
        num_examples: The number of examples.
        asked: The argument's name.

    Returns:
        The ids, int64, ``(ids,)``.

    Raises:
        EvaluationError: They are not different integers in one dimension and in range.
    """
    array = np.asarray(ids)
    expected = f"different integers from 0 to {num_examples - 1}"

    def refuse(wrong: str, got: Any, fix: str) -> EvaluationError:
        return EvaluationError(asked, wrong, got, expected, f"{num_examples=}", fix)

    if array.ndim != 1 or not len(array) or array.dtype.kind not in "iu":
        raise refuse("these are not example ids", f"{array.dtype}, shape {array.shape}", "Pass row numbers")
    outside = array[(array < 0) | (array >= num_examples)]
    if len(outside):
        raise refuse("ids are out of range", outside[:5].tolist(), "Count rows of the training set from 0")
    values, counts = np.unique(array, return_counts=True)
    if len(values) < len(array):
        raise refuse("ids are repeated", values[counts > 1][:5].tolist(), "Name every example once")
    return array.astype(np.int64)


def refuse_constant(values: np.ndarray, asked: str, over: str, fix: str, scale: np.ndarray | None = None) -> None:
    """Refuse numbers that cannot be correlated because they are all the same for some query.

    Args:
        values: One number for each unit and query, ``(units, queries)``.
        asked: What the numbers are.
        over: What the units are.
        fix: What to do.
        scale: The size of the terms of each query's sums, ``(queries,)``: a spread within their rounding error does not
            count. None if the numbers are not sums.

    Raises:
        EvaluationError: They are constant for some query.
    """
    rounding = 0.0 if scale is None else 1e-12 * scale
    constant = np.flatnonzero(np.ptp(values, axis=0) <= rounding)
    if len(constant):
        more = ", …" if len(constant) > 5 else ""
        got = f"{len(constant)} of {values.shape[1]} queries: {constant[:5].tolist()}{more}"
        raise EvaluationError(
            asked, f"for some queries they are the same for all {over}", got, "numbers that differ", over, fix
        )


def refuse_too_few(count: int, asked: str, what: str) -> None:
    """Refuse too few units to resample.

    Raises:
        EvaluationError: There are fewer than ten.
    """
    if count < LEAST_UNITS:
        wrong, fix = f"there are too few {what} for an interval", f"Take {LEAST_UNITS} or more; 100 are usual"
        raise EvaluationError(asked, wrong, count, f"{LEAST_UNITS} or more", "the bootstrap", fix)
