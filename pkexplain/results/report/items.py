"""A training set or a query for display: a picture or a text, and a label with a name.

Rows can be tuples, mappings, pictures or strings, in tensors, arrays or PIL images. All guessing is done here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pkexplain.errors import ConfigurationError
from pkexplain.results.numbers import TEXT_LIMIT, clean

__all__ = ["Item", "TrainingSet", "name_label", "read_item", "read_values"]

_LABEL_KEYS = ("label", "labels", "target", "y", "class", "fine_label", "coarse_label")
_PICTURE_SIDE = 256


@dataclass(frozen=True)
class Item:
    """One example or query for display.

    Attributes:
        picture: Grey ``(height, width)`` or colour ``(height, width, 3 or 4)``, uint8; None if it is not a picture.
        text: The text, or a description of anything that is neither picture nor text; None for a picture.
        label: The training label as in the data set, a plain Python value; None if there is none.
    """

    picture: np.ndarray | None
    text: str | None
    label: object = None


@dataclass(frozen=True)
class TrainingSet:
    """The training examples, read for display.

    Attributes:
        dataset: Anything with a length and rows by number: tuples, mappings, pictures or strings.
        label_names: Name of each label, a sequence or a mapping; None to use the data set's own, if any.
    """

    dataset: Any
    label_names: Sequence[str] | Mapping[Any, str] | None = None

    def __post_init__(self) -> None:
        """Refuse a data set that cannot be read by row number."""
        if not (hasattr(self.dataset, "__len__") and hasattr(self.dataset, "__getitem__")):
            raise ConfigurationError(
                "dataset=…",
                "training examples must be readable by row number",
                got=type(self.dataset).__name__,
                expected="an object with __len__ and __getitem__",
                source="contributions name examples by row number",
                fix="Pass a map-style data set or a list, in the order of the recorded ids",
            )

    def check_length(self, count: int, asked: str) -> None:
        """Refuse a data set that does not have one example per contribution.

        Args:
            count: The number of contributions.
            asked: What the user called.

        Raises:
            ConfigurationError: It has more or fewer.
        """
        if len(self.dataset) != count:
            raise ConfigurationError(
                asked,
                "the data set is not the one that was recorded",
                got=f"{len(self.dataset)} examples",
                expected=f"{count}",
                source="num_examples of the run",
                fix="Pass the whole training set, in the order of the recorded ids",
            )

    def item(self, position: int) -> Item:
        """Read one example.

        Args:
            position: Its row number.

        Returns:
            The example for display.
        """
        return read_item(self.dataset[position], position)

    def name(self, label: object) -> str:
        """Name a label.

        Args:
            label: The label as in the data set.

        Returns:
            Its name; the label itself as text if it has none.
        """
        return name_label(self._names, label)

    @functools.cached_property
    def _names(self) -> Sequence[str] | Mapping[Any, str] | None:
        if self.label_names is not None:
            return self.label_names
        features = getattr(self.dataset, "features", None)
        if isinstance(features, Mapping):
            return next((features[k].names for k in _LABEL_KEYS if hasattr(features.get(k), "names")), None)
        classes = getattr(self.dataset, "classes", None)
        return classes if isinstance(classes, Sequence) else None

    @functools.cached_property
    def labels(self) -> tuple[object, ...]:
        """The label of every example, ``(num_examples,)``; empty if one has no label, or one that is not a class."""
        labels = []
        for label in self._iterate_labels():
            if not isinstance(label, (int, str)):
                return ()
            labels.append(label)
        return tuple(labels)

    def _iterate_labels(self) -> Iterator[object]:
        columns, tensors = getattr(self.dataset, "column_names", None), getattr(self.dataset, "tensors", None)
        if isinstance(columns, list):
            key = next((k for k in _LABEL_KEYS if k in columns), None)
            return map(_scalar, self.dataset[key] if key else [None])
        if isinstance(tensors, tuple) and len(tensors) == 2:
            return map(_scalar, tensors[1])
        if hasattr(self.dataset, "targets") and getattr(self.dataset, "target_transform", None) is None:
            return map(_scalar, self.dataset.targets)
        return (_scalar(_split(self.dataset[i], i)[1]) for i in range(len(self.dataset)))


def read_item(row: Any, position: int | None = None) -> Item:
    """Read one row of a data set, or one query.

    Args:
        row: ``(x, y)``, ``(position, x, y)``, a mapping with such columns, or just x. x may be a picture
            (``(H, W)``, ``(1 or 3, H, W)``, ``(H, W, 1 or 3)``, any range, or a PIL image), a text, or anything else.
        position: Its row number; a leading integer only counts as the row number if it equals this.

    Returns:
        The picture or the text, and the label. Floats are scaled from their own range to 0…255; uint8 is unchanged.
    """
    x, y = _split(row, position)
    label = _scalar(y)
    if isinstance(x, Mapping):
        picture = next((p for p in map(_picture, x.values()) if p is not None), None)
        texts = [(str(k), v) for k, v in x.items() if isinstance(v, str)]
        lines = texts or [(str(k), _describe(v)) for k, v in x.items() if picture is None]
        text = texts[0][1] if len(texts) == 1 else "\n".join(f"{k}: {v}" for k, v in lines)
        return Item(picture, clean(text) if lines else None, label)
    picture = _picture(x)
    return Item(picture, None if picture is not None else clean(x if isinstance(x, str) else _describe(x)), label)


def read_values(row: Any, position: int | None = None, *, plain: bool = True) -> dict[str, Any]:
    """Read one row of a data set as named values.

    Args:
        row: As for `read_item`; of a mapping, the names are its own, otherwise ``x``, or ``text``, and ``label``.
        position: Its row number, as for `read_item`.
        plain: Whether only numbers and texts are kept; otherwise tensors become arrays, and everything is.

    Returns:
        The values, without those that are None.
    """
    if not isinstance(row, Mapping):
        x, y = _split(row, position)
        row = {"text" if isinstance(x, str) else "x": x, "label": y}
    found = {str(name): _plain(value) for name, value in row.items()}
    if not plain:
        whole = {str(name): value if (array := _array(value)) is None else array for name, value in row.items()}
        found = {name: whole[name] if value is None else value for name, value in found.items()}
    return {name: value for name, value in found.items() if value is not None}


def _plain(value: Any) -> object:
    if hasattr(value, "item") and math.prod(getattr(value, "shape", ())) == 1:
        value = value.item()
    return value if isinstance(value, (bool, int, float, str)) else None


def _split(row: Any, position: int | None) -> tuple[Any, Any]:
    if isinstance(row, Mapping):
        key = next((k for k in _LABEL_KEYS if k in row), None)
        return {k: v for k, v in row.items() if k != key}, row[key] if key else None
    if not isinstance(row, (tuple, list)):
        return row, None
    parts = list(row)
    if len(parts) > 2 and _is_position(parts[0], position):
        parts = parts[1:]
    elif isinstance(row, list) and parts and isinstance(_scalar(parts[0]), (int, float)):
        return row, None
    return (parts[0], parts[-1] if len(parts) > 1 else None) if parts else ("", None)


def _is_position(value: Any, position: int | None) -> bool:
    whole = value.item() if hasattr(value, "item") and math.prod(getattr(value, "shape", ())) == 1 else value
    return type(whole) is int and whole == position


def _scalar(value: Any) -> object:
    if hasattr(value, "item") and math.prod(getattr(value, "shape", ())) == 1:
        value = value.item()
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, (int, float, str)) else None


def _array(value: Any) -> np.ndarray | None:
    if type(value).__module__.startswith("PIL."):
        return np.asarray(value if value.mode in ("L", "RGB") else value.convert("RGB"))
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).numpy()
    return value if isinstance(value, np.ndarray) and value.dtype.kind in "buif" else None


def _picture(value: Any) -> np.ndarray | None:
    array = _array(value)
    if array is None:
        return None
    while array.ndim > 3 and array.shape[0] == 1:
        array = array[0]
    if array.ndim == 3 and array.shape[0] in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or min(array.shape[:2]) < 2 or (array.ndim == 3 and array.shape[-1] not in (3, 4)):
        return None
    stride = -(-max(array.shape[:2]) // _PICTURE_SIDE)
    return _to_bytes(array[::stride, ::stride])


def _to_bytes(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    values = np.nan_to_num(array.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = values.min(), values.max()
    if high == low:
        return np.full(values.shape, round(255 * min(max(low, 0.0), 1.0)), np.uint8)
    return np.rint((values - low) / (high - low) * 255.0).astype(np.uint8)


def _describe(value: Any) -> str:
    array = _array(value)
    if array is None:
        return repr(value)[:TEXT_LIMIT]
    flat = array.ravel()
    head = ", ".join(f"{v:.4g}" for v in flat[:12].tolist())
    return f"{' × '.join(map(str, array.shape)) or '1'} numbers: {head}{', …' if flat.size > 12 else ''}"


def name_label(names: Sequence[str] | Mapping[Any, str] | None, label: object) -> str:
    """Name a label.

    Args:
        names: Name of each label, a sequence or a mapping; None if labels have no names.
        label: The label as in the data set.

    Returns:
        Its name; the label itself as text if it has none.
    """
    if isinstance(names, Mapping):
        return clean(str(names.get(label, label)))
    if names is not None and isinstance(label, int) and 0 <= label < len(names):
        return clean(str(names[label]))
    return clean(f"{label:.6g}" if isinstance(label, float) else str(label))
