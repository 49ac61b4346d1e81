"""The training set as rows of tensors, whatever form its examples come in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pkexplain.errors import ConfigurationError
from pkexplain.store.manifest import InputEntry

__all__ = ["TupleDataset"]

_TARGET_KEYS = ("labels", "label", "target", "targets", "y")


class TupleDataset(Dataset[tuple[Tensor, ...]]):
    """The training set as tuples of tensors: the inputs in the model's order, then the target.

    Args:
        dataset: TupleDataset by number: ``(x, y)``, ``(x1, x2, …, y)``, ``(id, x, y)``, ``((x1, x2, …), y)``,
            ``({name: x}, y)``, or mappings that hold the inputs and a target by name.
        inputs: Shape and dtype of the model's inputs, as recorded.

    Attributes:
        names: Names of the inputs if the rows name them; otherwise empty.
    """

    def __init__(self, dataset: Any, inputs: Mapping[str, InputEntry]) -> None:
        """Inspect the first row."""
        self._dataset, self._inputs = dataset, inputs
        first, _ = self._split(0)
        self.names = tuple(first) if isinstance(first, Mapping) else ()

    def __len__(self) -> int:
        """Return the number of training examples."""
        return len(self._dataset)

    def __getitem__(self, position: int) -> tuple[Tensor, ...]:
        """Read one training example."""
        values, target = self._split(position)
        named = values.items() if isinstance(values, Mapping) else ((str(at), value) for at, value in enumerate(values))
        try:
            return (
                *(self._tensor(name, value) for name, value in named),
                torch.as_tensor(target, device=getattr(target, "device", "cpu")),
            )
        except (TypeError, ValueError, RuntimeError) as error:
            raise self._bad(f"row {position} does not hold numbers ({error})", type(target).__name__) from error

    def _tensor(self, name: str, value: Any) -> Tensor:
        tensor = torch.as_tensor(value, device=getattr(value, "device", "cpu"))
        kind = self._inputs[name].torch_dtype if name in self._inputs else tensor.dtype
        return tensor.to(kind) if tensor.is_floating_point() and kind.is_floating_point else tensor

    def _split(self, position: int) -> tuple[Sequence[Any] | Mapping[str, Any], Any]:
        row = self._dataset[position]
        if isinstance(row, Mapping):
            key = next((key for key in _TARGET_KEYS if key in row), None)
            if key is None:
                raise self._bad("its rows have no target", sorted(map(str, row)))
            return self._known({name: value for name, value in row.items() if name != key}), row[key]
        if not isinstance(row, (tuple, list)) or len(row) < 2:
            raise self._bad("its rows are not inputs and a target", type(row).__name__)
        *values, target = row
        if len(values) == 2 and len(self._inputs) == 1 and isinstance(values[0], int):
            values = values[1:]  # its first item is its row number
        if len(values) == 1 and isinstance(values[0], Mapping):
            return self._known(values[0]), target
        if len(values) == 1 and isinstance(values[0], (tuple, list)) and len(self._inputs) > 1:
            values = list(values[0])
        return values, target

    def _known(self, named: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in named.items() if not self._inputs or name in self._inputs}

    def _bad(self, wrong: str, got: Any) -> ConfigurationError:
        return ConfigurationError(
            "compare(dataset)",
            wrong,
            got=got,
            expected="(x, y), (x1, x2, …, y), ({name: x}, y) or a mapping with a target",
            source="what the model is trained on",
            fix="Pass the data set whose rows trained the model, in the order of the recorded ids",
        )
