"""`compare`: the path reading next to other methods, on the same run and the same queries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from pkexplain.baselines import (
    ArnoldiInfluenceFunction,
    Baseline,
    GradientNorm,
    NearestNeighbours,
    Random,
    Setting,
    SimilarityInfluence,
    TracInCP,
    TracInCPFast,
    TracInCPFastRandProj,
    TrainingLoss,
)
from pkexplain.baselines._measuring import Measurement
from pkexplain.errors import ConfigurationError
from pkexplain.explain.explainer import Explainer
from pkexplain.explain.loss_output import Loss
from pkexplain.gradients.torch_state import defaults_of, own_torch_state
from pkexplain.results.comparison import Comparison, LeftOut, Method, rank_correlation, top_overlap
from pkexplain.results.explanation import Explanation

__all__ = ["BASELINES", "choose_baselines", "compare"]

BASELINES: tuple[Baseline, ...] = (
    TracInCP(),
    TracInCPFast(),
    TracInCPFastRandProj(),
    ArnoldiInfluenceFunction(),
    SimilarityInfluence(),
    NearestNeighbours(),
    GradientNorm(),
    TrainingLoss(),
    Random(),
)
"""What `compare` runs by default."""


@own_torch_state()
def compare(
    explainer: Explainer,
    x: Any,
    targets: Any,
    *,
    dataset: Any,
    baselines: Sequence[Baseline] | None = None,
    loss: Callable[..., Tensor] | None = None,
    k: int = 10,
    metrics: Mapping[str, Callable[[np.ndarray], float]] | None = None,
) -> Comparison:
    """Run other methods of training-data attribution on a recorded run, next to the path reading.

    Every method answers the same question, how each training example changed minus the loss of each query, from the
    run's own checkpoints. A method that cannot be used here is left out, with the reason.

    Args:
        explainer: Of the recorded run.
        x: One query or a batch, as for `Explainer.explain`.
        targets: The target of each query, ``(queries, …)``; a class, for classification.
        dataset: The whole training set in the order of the recorded ids: rows ``(x, y)``, ``(x1, x2, …, y)``,
            ``({name: x}, y)`` or mappings with a target.
        baselines: The other methods; by default Captum's and cheap ones.
        loss: Called as ``loss(prediction, targets, reduction="none")``; by default cross-entropy.
        k: The number of top examples that are compared.
        metrics: Quality metrics by name; each is called with a method's scores, ``(queries, num_examples)``, and
            returns a number.

    Returns:
        The comparison, the path reading first.

    Raises:
        QueryError: The queries do not fit the model, or the targets the queries.
        ConfigurationError: The data set is not the one that was recorded, or an argument is invalid.
    """
    chosen = BASELINES if baselines is None else tuple(baselines)
    if not isinstance(k, int) or k < 1:
        got, fix, source = repr(k), "Leave k out for 10", "the signature of compare"
        wrong, expected = "this many examples cannot be compared", "an integer from 1 up"
        raise ConfigurationError("compare(k=…)", wrong, got=got, expected=expected, source=source, fix=fix)
    setting = Setting.of(explainer, x, targets, dataset=dataset, loss=loss)
    output = Loss(setting.targets, setting.loss)
    path, explanations = _reading(explainer, setting, x, output, "path")
    changes = np.array([each.initial - each.final for each in explanations])  # of minus the loss
    gaps = np.array([each.gap for each in explanations])
    found, left_out = [(*path, _relative(gaps, changes))], []
    try:
        removal, _ = _reading(explainer, setting, x, output, "removal")
        found.append((*removal, np.nan))
    except ConfigurationError as error:
        left_out.append(LeftOut("removal reading", _reason(error)))
    for baseline in chosen:
        try:
            name, scores, once, asked = _run(baseline, setting)
        except ConfigurationError as error:
            left_out.append(LeftOut(baseline.name, _reason(error)))
            continue
        gap = _relative(scores.sum(axis=1) - changes, changes) if baseline.adds_up(setting) else np.nan
        found.append((name, scores, once, asked, gap))
    return _gather(found, left_out, changes, k, metrics or {})


def choose_baselines(names: str | None) -> tuple[Baseline, ...]:
    """Choose among the default baselines by their names.

    Args:
        names: Names separated by commas, for example ``"TracInCP,random"``; None for all.

    Returns:
        The baselines, in the order of their names.

    Raises:
        ConfigurationError: There is no such baseline.
    """
    if names is None:
        return BASELINES
    known = {baseline.name.lower(): baseline for baseline in BASELINES}
    wanted = [name.strip().lower() for name in names.split(",")]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        expected, source = ", ".join(baseline.name for baseline in BASELINES), "pkexplain.baselines"
        wrong, fix = "there is no such method", "Separate the names with commas"
        raise ConfigurationError("compare(methods)", wrong, got=unknown[0], expected=expected, source=source, fix=fix)
    return tuple(known[name] for name in wanted)


_Found = tuple[str, np.ndarray, Measurement, Measurement, float]


def _reading(
    explainer: Explainer, setting: Setting, x: Any, output: Loss, reading: str
) -> tuple[tuple[str, np.ndarray, Measurement, Measurement], list[Explanation]]:
    """Explain minus the loss in one of our own readings; building the index is the one-time work."""
    with Measurement(setting.device) as once:
        explainer.prepare(reading)
    with Measurement(setting.device) as asked:
        answer = explainer.explain(x, output=output, k=1, reading=reading)
        explanations = answer if isinstance(answer, list) else [answer]
        scores = -np.stack([each.contributions for each in explanations]).astype(np.float64)
    return (f"{reading} reading", scores, once, asked), explanations


def _run(baseline: Baseline, setting: Setting) -> tuple[str, np.ndarray, Measurement, Measurement]:
    with Measurement(setting.device) as once, defaults_of(setting.like):
        ask = baseline.prepare(setting)
    with Measurement(setting.device) as asked, defaults_of(setting.like):
        scores = np.asarray(ask(), np.float64)
    expected = len(setting.queries), len(setting.rows)
    if scores.shape != expected or not np.isfinite(scores).all():
        got = f"shape {scores.shape}" if scores.shape != expected else "nan or infinity"
        source, fix = "(queries, num_examples)", "Leave the method out"
        wrong = "its scores cannot be compared"
        raise ConfigurationError(baseline.name, wrong, got=got, expected=f"numbers, {expected}", source=source, fix=fix)
    return baseline.name, scores, once, asked


def _gather(
    found: Sequence[_Found],
    left_out: Sequence[LeftOut],
    changes: np.ndarray,
    k: int,
    metrics: Mapping[str, Callable[[np.ndarray], float]],
) -> Comparison:
    overlaps = top_overlap([scores for _, scores, *_ in found], k)
    correlations = rank_correlation([scores for _, scores, *_ in found])
    methods = tuple(
        Method(
            name=name,
            scores=scores,
            gap=gap,
            overlap=float(overlaps[at, 0]),
            rank_correlation=float(correlations[at, 0]),
            setup_seconds=once.seconds,
            query_seconds=asked.seconds / len(changes),
            peak_bytes=max(once.peak_bytes, asked.peak_bytes),
            metrics={what: float(measure(scores)) for what, measure in metrics.items()},
        )
        for at, (name, scores, once, asked, gap) in enumerate(found)
    )
    return Comparison(methods, tuple(left_out), changes, k, overlaps, correlations)


def _relative(gaps: np.ndarray, changes: np.ndarray) -> float:
    """Take the median of |gap| / |change|; queries whose loss did not change are left out."""
    moved = changes != 0
    return float(np.median(np.abs(gaps[moved] / changes[moved]))) if moved.any() else float("nan")


def _reason(error: ConfigurationError) -> str:
    return str(error).splitlines()[0]
