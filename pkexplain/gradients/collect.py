"""The gradient of every example's own output, for models that are ours: split in one pass, or one pass for each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pkexplain.errors import ConfigurationError, UnsupportedLayerError
from pkexplain.gradients.capture import Capture
from pkexplain.gradients.factors import ExampleGradients
from pkexplain.gradients.graph import Graph
from pkexplain.gradients.watch import Watch

__all__ = ["collect"]

Pieces = list[tuple[int, ExampleGradients]]


def collect(capture: Capture, examples: int, run: Callable[[], Tensor]) -> Pieces:
    """Differentiate one number for each example.

    They are split in one backward pass if the split can be checked, and otherwise come from one pass for each example,
    which is always right.

    Args:
        capture: The layers of a model whose ``.grad`` may be written.
        examples: How many examples there are.
        run: Runs the model: ``(examples,)``, each number a function of its example alone.

    Returns:
        Positions of blocks and their gradients; several of a block add up.

    Raises:
        ConfigurationError: The numbers come from the parameters of another model.
    """
    found: Pieces = []
    capture.clear_gap()
    with torch.enable_grad():
        try:
            with capture.during_backward(examples, lambda at, piece: found.append((at, piece)), Watch(verify=False)):
                values = run()
                if not values.requires_grad:  # it does not depend on a layer
                    return []
                if capture.split is None and Graph([values], [None], capture.parameters).is_of_another_model:
                    raise _of_another_model()
                values.sum().backward()
            split = capture.split
            if split is not None and not split.unsplit and not split.interacting and not split.given_up:
                return found
        except UnsupportedLayerError:
            pass
        finally:
            _clear(capture)
        return _one_by_one(capture, examples, run)


def _of_another_model() -> ConfigurationError:
    return ConfigurationError(
        "differentiating a model's output",
        "it is computed from the parameters of another model",
        got="a forward pass that runs the model from which this one was copied",
        expected="one that uses the model's own parameters",
        source="the autograd graph of the output",
        fix="Make the model anew, as before training, and pass that; its weights are read from the run",
    )


def _one_by_one(capture: Capture, examples: int, run: Callable[[], Tensor]) -> Pieces:
    """One backward pass for each example."""
    values = run()
    dense: dict[str, list[Tensor]] = {name: [] for name in capture.parameters}
    for at in range(examples):
        values[at].backward(retain_graph=at + 1 < examples)
        for name, parameter in capture.parameters.items():
            gradient = parameter.grad
            dense[name].append(torch.zeros_like(parameter) if gradient is None else gradient.detach().clone())
        _clear(capture)
    return [capture.placed(name, torch.stack(rows)) for name, rows in dense.items()]


def _clear(capture: Capture) -> None:
    for parameter in capture.parameters.values():
        parameter.grad = None
