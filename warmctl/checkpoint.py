"""The wrapper's state inside the optimizer's own state dict, in a form that every checkpoint format carries.

torch.distributed.checkpoint keeps only `state` and `param_groups`. So the numbers travel as one float64 tensor in the
first group and the eigenvector as one more entry beside each parameter's moments. The latter is there even before the
first probe (zeros): a sharded checkpoint is read into the structure that a fresh wrapper announces.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from warmctl.state import FloatState

NUMBERS, VECTOR = "warmctl", "warmctl_vector"
FORMAT = 1.0


@dataclass
class Counts(FloatState):
    """Steps and probes made, what they cost in gradient evaluations, and what the first probe found out.

    Attributes:
        method: index of the Hessian-vector product in use in `operators.METHODS`.
        replays: whether the loss can be evaluated again: 1, .5 (but for clipping or a small term), 0, or −1 before it
            was tried.
        rate: that the reading along the last update was made at, for rules that are not known.
        loss, norm: signals of the last step that an accelerator has not delivered yet.
    """

    steps: float = 0.0
    gradients: float = 0.0
    probes: float = 0.0
    hvps: float = 0.0
    cost: float = 0.0
    method: float = 0.0
    replays: float = -1.0
    rate: float = math.nan
    loss: float = math.nan
    norm: float = math.nan


def announce(optimizer: Optimizer, numbers: list[float]) -> None:
    """Put the numbers into the live first group, for formats that read the keys to restore from there."""
    optimizer.param_groups[0][NUMBERS] = torch.tensor([FORMAT, *numbers], dtype=torch.float64)


def announce_vector(optimizer: Optimizer, vector: dict[Tensor, Tensor]) -> None:
    """Put the vector beside the live moments until the next step, for formats that read the names of what to restore
    there (torch.distributed.checkpoint with flatten_optimizer_state_dict=True).

    Only after a first step, and not alone: see `pack`.
    """
    stateless = not any(optimizer.state.values())
    for p, part in vector.items():
        if not (stateless or optimizer.state.get(p)):
            continue
        optimizer.state[p][VECTOR] = _like(p, part)


def withdraw_vector(optimizer: Optimizer, params: list[Tensor]) -> None:
    """Undo `announce_vector`."""
    for p in params:
        if VECTOR in optimizer.state.get(p, ()):
            del optimizer.state[p][VECTOR]
            if not optimizer.state[p]:
                del optimizer.state[p]


def pack(
    state_dict: dict[str, Any],
    numbers: list[float],
    params: list[Tensor],
    vector: dict[Tensor, Tensor],
    stateless: bool,
) -> dict[str, Any]:
    """A copy of the wrapped optimizer's `state_dict` with the wrapper's numbers and vector in it.

    The vector goes beside the moments that are there. Alone in its entry it would break a bare optimizer that loads
    the state dict: most take an entry that is not empty for one that they have set up.

    Args:
        params: all parameters, in the order of the groups.
        vector: this process's part of the eigenvector, by trainable parameter.
        stateless: the optimizer does not mind: where it has no state at all, the vector is in entries of its own.
    """
    groups = [dict(group) for group in state_dict["param_groups"]]
    groups[0][NUMBERS] = torch.tensor([FORMAT, *numbers], dtype=torch.float64)
    state = dict(state_dict["state"])
    for index, p in enumerate(params):
        if p in vector and (index in state_dict["state"] or (stateless and not state_dict["state"])):
            state[index] = {**state.get(index, {}), VECTOR: _like(p, vector[p])}
    return {**state_dict, "state": state, "param_groups": groups}


def unpack(state_dict: dict[str, Any]) -> tuple[dict[str, Any], list[float] | None, list[Tensor | None]]:
    """The wrapped optimizer's state dict, the numbers, and the vector in the order of the parameters.

    The numbers are None if the state dict was saved by a bare optimizer.
    """
    groups = [dict(group) for group in state_dict["param_groups"]]
    numbers = groups[0].get(NUMBERS) if groups else None
    for group in groups:
        group.pop(NUMBERS, None)
    state, vectors = {}, {}
    for key, entry in state_dict["state"].items():
        if isinstance(entry, dict) and VECTOR in entry:
            vectors[key] = entry[VECTOR]
            entry = {name: value for name, value in entry.items() if name != VECTOR}
            if not entry:
                continue
        state[key] = entry
    values = None if numbers is None else [float(v) for v in numbers]
    if values is not None and values[0] != FORMAT:
        raise ValueError(f"this checkpoint has warmctl's state in format {values[0]:g}; this version reads {FORMAT:g}")
    order = [vectors.get(key) for group in groups for key in group["params"]]
    return {**state_dict, "state": state, "param_groups": groups}, values and values[1:], order


def _like(param: Any, part: Tensor) -> Tensor:
    """`part` as a DTensor where the parameter is one, so that it is saved and resharded like it."""
    if not hasattr(param, "_local_tensor"):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, param.device_mesh, param.placements, shape=param.shape, stride=param.stride(), run_check=False
    )
