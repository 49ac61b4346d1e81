"""Per-example gradients of RNN, LSTM and GRU.

The recurrence is rerun in plain torch and differentiated with respect to what each gate receives from its input,
zi_t = W_ih x_t + b_ih, and from the previous state, zh_t = W_hh h_{t-1} + b_hh. The gradient of example i is then a sum
over time, Σ_t dzi_t ⊗ x_t for W_ih and Σ_t dzh_t ⊗ h_{t-1} for W_hh, and stays in factored form.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from pkexplain.gradients._layer_rules import Parts, Use
from pkexplain.gradients.factors import DenseGradient, ExampleGradients, LinearGradient

_State = tuple[Tensor, ...]
_NAMES = re.compile(r"(weight|bias)_(ih|hh)_l\d+(_reverse)?")


def recurrent(use: Use, parts: Parts) -> list[ExampleGradients]:
    """RNN, LSTM and GRU: Σ_t dz_t ⊗ x_t and Σ_t dz_t ⊗ h_{t-1}."""
    names = tuple(name for part in parts for name in part)
    found = recurrent_gradients(use.module, use.args, use.kwargs, use.gradients, names)
    return [found[part[0]] for part in parts]


def recurrent_unfit(module: Any) -> str | None:
    """Return why a recurrent module can never be recorded; None if it can."""
    if getattr(module, "proj_size", 0):
        return f"proj_size={module.proj_size} projects its hidden state"
    strange = [name for name, _ in module.named_parameters() if not _NAMES.fullmatch(name)]
    return f"its weights are made of {', '.join(strange)} (weight_norm?)" if strange else None


def recurrent_misuse(use: Use) -> str | None:
    """Return why this call of a recurrent module cannot be recorded; None if it can."""
    x, module = use.given(0, "input"), use.module
    if isinstance(x, PackedSequence):
        return "a PackedSequence has no batch dimension; pass a padded tensor"
    if x.ndim != 3:
        return f"its input of shape {tuple(x.shape)} has no batch dimension"
    if module.dropout and use.training and module.num_layers > 1:
        return f"dropout={module.dropout} between its layers cannot be drawn again; set it to 0"
    return None


def recurrent_axes(module: Any) -> tuple[int, ...]:
    """Return the batch dimension of each of the module's output tensors: output, h_n and, for an LSTM, c_n."""
    return (0 if module.batch_first else 1), 1, 1


def recurrent_gradients(
    module: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    gradients: tuple[Tensor | None, ...],
    names: tuple[str, ...],
) -> dict[str, ExampleGradients]:
    """Compute the per-example gradients of one call.

    Args:
        module: RNN, LSTM, GRU or one of their cells.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        gradients: The gradient of each output tensor, in that tensor's shape; None if it was not used.
        names: The local parameter names wanted.

    Returns:
        For each name its gradients: a `LinearGradient` over time for a matrix, a `DenseGradient` for a bias.
    """
    like = next(g for g in gradients if g is not None)
    x = (args[0] if args else kwargs["input"]).detach().to(like.dtype)
    given = args[1] if len(args) > 1 else kwargs.get("hx")
    x = x.transpose(0, 1) if module.batch_first else x
    with torch.enable_grad(), torch.autocast(like.device.type, enabled=False):
        outputs, sweeps = _run(module, x, _initial(module, x, given, like))
        if module.batch_first:
            outputs[0] = outputs[0].transpose(0, 1)
        pairs = [(out, g) for out, g in zip(outputs, gradients, strict=False) if g is not None]
        points = [point for sweep in sweeps for point in (sweep.from_input, *sweep.from_state)]
        found = iter(
            torch.autograd.grad(
                [out for out, _ in pairs], points, [g for _, g in pairs], allow_unused=True, materialize_grads=True
            )
        )
    made: dict[str, ExampleGradients] = {}
    for sweep in sweeps:
        by_input = next(found).transpose(0, 1)
        by_state = torch.stack([next(found) for _ in sweep.from_state], dim=1)
        for side, g, given_to in (("ih", by_input, sweep.inputs), ("hh", by_state, sweep.states)):
            weight, bias = f"weight_{side}{sweep.suffix}", f"bias_{side}{sweep.suffix}"
            if weight in names:
                made[weight] = LinearGradient(given_to.detach().transpose(0, 1), g, True, False)
            if bias in names:
                made[bias] = DenseGradient(g.sum(1))
    return made


@dataclass(frozen=True)
class _Sweep:
    """One direction of one layer, time first: the inputs of the two matrices, and their outputs."""

    suffix: str
    inputs: Tensor  # (time, examples, columns)
    states: Tensor  # (time, examples, hidden)
    from_input: Tensor  # (time, examples, rows)
    from_state: list[Tensor]  # for each time, (examples, rows)


def _initial(module: Any, x: Tensor, given: Any, like: Tensor) -> _State:
    """Return the initial state, each part ``(layers · directions, examples, hidden)``."""
    parts = 2 if isinstance(module, nn.LSTM) else 1
    if given is None:
        sweeps = module.num_layers * (1 + module.bidirectional)
        return (like.new_zeros(sweeps, x.shape[1], module.hidden_size),) * parts
    given = (given,) if isinstance(given, Tensor) else given
    return tuple(part.detach().to(like.dtype) for part in given)


def _run(module: Any, x: Tensor, initial: _State) -> tuple[list[Tensor], list[_Sweep]]:
    """Run every layer and direction on x ``(time, examples, columns)``; return the outputs and the sweeps."""
    step = _step_of(module)
    sweeps: list[_Sweep] = []
    last: list[_State] = []
    for layer in range(module.num_layers):
        directions = []
        for backwards in (False, True)[: 1 + module.bidirectional]:
            suffix = f"_l{layer}" + "_reverse" * backwards
            state = tuple(part[len(sweeps)] for part in initial)
            out, state, sweep = _sweep(module, suffix, step, x.flip(0) if backwards else x, state)
            directions.append(out.flip(0) if backwards else out)
            last.append(state)
            sweeps.append(sweep)
        x = torch.cat(directions, dim=-1)
    return [x, *(torch.stack(parts) for parts in zip(*last, strict=True))], sweeps


def _sweep(
    module: Any, suffix: str, step: Callable[[Tensor, Tensor, _State], _State], x: Tensor, state: _State
) -> tuple[Tensor, _State, _Sweep]:
    matrix, bias = _affine(module, "ih", suffix, x)
    from_input = _point(F.linear(x, matrix, bias))
    matrix, bias = _affine(module, "hh", suffix, x)
    states, from_state = [state[0]], []
    for z in from_input:
        from_state.append(_point(F.linear(state[0], matrix, bias)))
        state = step(z, from_state[-1], state)
        states.append(state[0])
    sweep = _Sweep(suffix, x.detach(), torch.stack(states[:-1]).detach(), from_input, from_state)
    return torch.stack(states[1:]), state, sweep


def _affine(module: Any, side: str, suffix: str, like: Tensor) -> tuple[Tensor, Tensor | None]:
    bias = module.get_parameter(f"bias_{side}{suffix}").detach().to(like.dtype) if module.bias else None
    return module.get_parameter(f"weight_{side}{suffix}").detach().to(like.dtype), bias


def _point(z: Tensor) -> Tensor:
    return z if z.requires_grad else z.requires_grad_()  # after the first layer and step it already does


def _step_of(module: Any) -> Callable[[Tensor, Tensor, _State], _State]:
    if isinstance(module, nn.LSTM):
        return _lstm
    if isinstance(module, nn.GRU):
        return _gru
    activation = torch.tanh if module.nonlinearity == "tanh" else torch.relu
    return lambda zi, zh, state: (activation(zi + zh),)


def _lstm(zi: Tensor, zh: Tensor, state: _State) -> _State:
    i, f, g, o = (zi + zh).chunk(4, dim=-1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(zi: Tensor, zh: Tensor, state: _State) -> _State:
    (ri, ui, ni), (rh, uh, nh) = zi.chunk(3, dim=-1), zh.chunk(3, dim=-1)
    u, n = (ui + uh).sigmoid(), (ni + (ri + rh).sigmoid() * nh).tanh()
    return ((1 - u) * n + u * state[0],)
