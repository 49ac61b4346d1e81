"""The training examples of an explanation as tables: a pandas frame, a Hugging Face data set, or sums by group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pkexplain.errors import ConfigurationError, MissingDependencyError, QueryError
from pkexplain.results.explanation import Explanation, GroupSum
from pkexplain.results.report.items import TrainingSet, read_values

if TYPE_CHECKING:
    import datasets
    import pandas

__all__ = ["join_pandas", "sum_by_group", "to_dataset", "to_pandas"]


def to_pandas(explanation: Explanation, dataset: Any = None, k: int | None = None) -> pandas.DataFrame:
    """Make a table of the training examples; see `Explanation.to_pandas`."""
    pandas, ids = _load_pandas(), _choose(explanation, k, "Explanation.to_pandas")
    columns: dict[str, Any] = _contributions(explanation, ids)
    if dataset is not None:
        training_set = TrainingSet(dataset)
        training_set.check_length(len(explanation.contributions), "Explanation.to_pandas(dataset)")
        columns |= {_renamed(name, columns): values for name, values in _read(training_set, ids).items()}
    return pandas.DataFrame(columns)


def join_pandas(explanations: Sequence[Explanation], dataset: Any = None, k: int | None = None) -> pandas.DataFrame:
    """Make one table of several explanations; see `Explanations.to_pandas`."""
    pandas = _load_pandas()
    if not explanations:
        return pandas.DataFrame({name: [] for name in ("query", "output", "id", "contribution", "weight", "kernel")})
    tables = []
    for query, explanation in enumerate(explanations):
        table = to_pandas(explanation, dataset, k)
        taken = {name: f"data_{name}" for name in ("query", "output") if name in table}
        table = table.rename(columns=taken)
        table.insert(0, "query", query)
        table.insert(1, "output", explanation.output)
        tables.append(table)
    return pandas.concat(tables, ignore_index=True)


def to_dataset(explanation: Explanation, dataset: Any, k: int | None = None) -> datasets.Dataset:
    """Make a Hugging Face data set of the training examples; see `Explanation.to_dataset`."""
    import datasets

    ids, training_set = _choose(explanation, k, "Explanation.to_dataset"), TrainingSet(dataset)
    training_set.check_length(len(explanation.contributions), "Explanation.to_dataset(dataset)")
    columns = _contributions(explanation, ids)
    if isinstance(dataset, datasets.Dataset):
        chosen = dataset.select(ids)
        chosen = chosen.rename_columns({n: _renamed(n, columns) for n in chosen.column_names if n in columns})
        for name, values in columns.items():
            chosen = chosen.add_column(name, values)  # pyright: ignore[reportArgumentType] - an array is one of its kinds
        return chosen
    theirs = _transpose([read_values(dataset[int(i)], int(i), plain=False) for i in ids])
    named = {_renamed(name, columns): values for name, values in theirs.items()}
    return datasets.Dataset.from_dict({**named, **columns})


def sum_by_group(explanation: Explanation, groups: Sequence[object] | np.ndarray) -> tuple[GroupSum, ...]:
    """Sum the contributions by group; see `Explanation.by_group`."""
    labels = [getattr(label, "item", lambda label=label: label)() for label in groups]
    if len(labels) != len(explanation.contributions):
        raise QueryError(
            "by_group(groups)",
            "there must be one label per training example",
            got=f"{len(labels)} labels",
            expected=f"{len(explanation.contributions)}",
            source="num_examples of the run",
            fix="Pass the labels of the whole training set, in its order",
        )
    members: dict[object, list[int]] = {}
    for position, label in enumerate(labels):
        members.setdefault(label, []).append(position)
    try:
        order = sorted(members)  # pyright: ignore[reportArgumentType]
    except TypeError:
        order = sorted(members, key=str)
    sums = []
    for label in order:
        part = explanation.contributions[members[label]].astype(np.float64)
        sums.append(GroupSum(label, len(part), float(part.sum()), float(np.abs(part).sum())))
    return tuple(sums)


def _choose(explanation: Explanation, k: int | None, asked: str) -> np.ndarray:
    """Choose the examples: all by id, or the k strongest, largest first."""
    if k is None:
        return np.arange(len(explanation.contributions))
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        expected, fix = "an integer from 1 up, or None for all", "Leave k out for all examples"
        raise ConfigurationError(f"{asked}(k)", "it is invalid", repr(k), expected, "its signature", fix)
    return np.argsort(-np.abs(explanation.contributions), kind="stable")[:k]


def _contributions(explanation: Explanation, ids: np.ndarray) -> dict[str, np.ndarray]:
    known = {c.id: (c.weight, c.kernel) for c in (*explanation.proponents, *explanation.opponents)}
    pairs = np.array([known.get(int(i), (np.nan, np.nan)) for i in ids], np.float64).reshape(len(ids), 2)
    values = explanation.contributions[ids].astype(np.float64)
    return {"id": ids, "contribution": values, "weight": pairs[:, 0], "kernel": pairs[:, 1]}


def _renamed(name: str, taken: Mapping[str, object]) -> str:
    return f"data_{name}" if name in taken else name


def _read(training_set: TrainingSet, ids: np.ndarray) -> dict[str, list[object]]:
    """Read the numbers and texts of some examples, by column."""
    dataset = training_set.dataset
    if hasattr(dataset, "select_columns") and isinstance(getattr(dataset, "features", None), Mapping):
        import datasets  # its features tell which columns are plain, without decoding pictures

        kinds = (datasets.Value, datasets.ClassLabel)
        names = [name for name, feature in dataset.features.items() if isinstance(feature, kinds)]
        return dataset.select_columns(names).with_format(None).select(ids).to_dict() if names else {}
    return _transpose([read_values(dataset[int(i)], int(i)) for i in ids])


def _transpose(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _load_pandas() -> Any:
    try:
        import pandas
    except ImportError as error:
        raise MissingDependencyError(
            "to_pandas()",
            "pandas is not installed",
            got=str(error),
            expected="pandas, which comes with datasets",
            source="the table",
            fix="pip install pandas",
        ) from error
    return pandas
