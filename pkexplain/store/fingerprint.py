"""What the explained model must have in common with the recorded one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from pkexplain.errors import ModelMismatchError
from pkexplain.files import checksum
from pkexplain.gradients.compiled import named_buffers, named_modules, named_parameters
from pkexplain.gradients.layers import Block

__all__ = ["ModelFingerprint"]


@dataclass(frozen=True)
class ModelFingerprint:
    """What must be the same in the model that is explained as in the one that was recorded.

    Attributes:
        blocks: The recorded parameters, in the order of the flat vector.
        frozen: Shape of every parameter that was not recorded, with a checksum of its values.
        buffers: Shape of every stored buffer.
        dtypes: Dtype of every parameter.
        modules: Type of every module, by path; functions called in a forward pass are not covered.
    """

    blocks: tuple[Block, ...]
    frozen: Mapping[str, tuple[tuple[int, ...], str]]
    buffers: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    modules: Mapping[str, str]

    @classmethod
    def of(cls, model: nn.Module, blocks: tuple[Block, ...]) -> ModelFingerprint:
        """Take a model's fingerprint."""
        recorded = {name for block in blocks for name in block.parameters}
        frozen = {name: (tuple(p.shape), checksum(p)) for name, p in named_parameters(model) if name not in recorded}
        dtypes = {name: str(p.dtype) for name, p in named_parameters(model)}
        buffers = {name: tuple(b.shape) for name, b in named_buffers(model)}
        return cls(blocks, frozen, buffers, dtypes, _types(model))

    def check(self, model: nn.Module) -> None:
        """Compare with a model.

        Raises:
            ModelMismatchError: A name, a shape or a frozen value differs; the message names the first one.
        """
        here = {name: tuple(p.shape) for name, p in named_parameters(model)}
        recorded = {n: s for block in self.blocks for n, s in zip(block.parameters, block.shapes, strict=True)}
        wanted = {**recorded, **{n: shape for n, (shape, _) in self.frozen.items()}}
        for name in [*wanted, *(n for n in here if n not in wanted)]:
            if here.get(name) != wanted.get(name):
                raise _mismatch(name, here.get(name, "no such parameter"), wanted.get(name, "no such parameter"))
        types = _types(model)
        for path in [*self.modules, *(p for p in types if p not in self.modules)]:
            got, expected = (where.get(path, "no such module") for where in (types, self.modules))
            if got != expected:
                raise _mismatch(path or "(the model itself)", got, expected, "module")
        named = dict(named_parameters(model))
        for name, dtype in self.dtypes.items():
            if str(named[name].dtype) != dtype:
                raise _mismatch(name, named[name].dtype, dtype)
        for name, (_, values) in self.frozen.items():
            if checksum(named[name]) != values:
                raise _mismatch(name, "other values", "the values it was frozen at")
        buffers = {n: tuple(b.shape) for n, b in named_buffers(model)}
        for name, shape in self.buffers.items():
            if buffers.get(name) != shape:
                raise _mismatch(name, buffers.get(name, "no such buffer"), shape)


def _types(model: nn.Module) -> dict[str, str]:
    return {path: type(module).__name__ for path, module in named_modules(model)}


def _mismatch(name: str, got: Any, expected: Any, kind: str = "parameter") -> ModelMismatchError:
    return ModelMismatchError(
        f"explaining with {kind} {name!r}",
        "the model is not the one that was recorded",
        got=got,
        expected=expected,
        source="the run's manifest",
        fix="Build the model with the code and the pretrained weights it was trained from",
    )
