"""What the coming step will find: its number, its gradients with decay added, and moments taken up to date."""

from __future__ import annotations

import torch
from torch import Tensor

from warmctl.stability.rules.rule import Group, Scalar, States, Tensors


def numbers(states: States, name: str, at_first: float) -> list[Scalar]:
    """A number of each parameter's state as the last step left it."""
    return [_number(state.get(name, at_first)) for state in states]


def coming_steps(states: States) -> list[Scalar]:
    """Number of the coming step for each parameter, from 1."""
    return [step + 1 for step in numbers(states, "step", 0.0)]


def bias_correction(decay: float, step: Scalar) -> Scalar:
    return 1 - decay**step


def moments(states: States, name: str, like: Tensors) -> list[Tensor]:
    """A running average as the last step left it, zeros where there is none yet."""
    pairs = zip(states, like, strict=True)
    return [state[name] if name in state else torch.zeros_like(t) for state, t in pairs]


def averaged_square(old: Tensors, grads: Tensors, decay: float) -> list[Tensor]:
    """decay·v + (1 − decay)·g²"""
    new = list(torch._foreach_mul(list(old), decay))
    torch._foreach_addcmul_(new, list(grads), list(grads), value=1 - decay)
    return new


def weight_decay(group: Group) -> float:
    return float(group.get("weight_decay", 0.0))


@torch.no_grad()
def decayed(params: Tensors, grads: Tensors, group: Group, decay: float) -> list[Tensor]:
    """The gradients as the optimizer takes them: dense, negated to maximise, coupled decay added."""
    taken = [g.to_dense() if g.is_sparse else g.detach() for g in grads]
    if group.get("maximize"):
        taken = list(torch._foreach_neg(taken))
    if decay != 0:
        taken = list(torch._foreach_add(taken, list(params), alpha=decay))
    return taken


def betas(group: Group) -> tuple[float, float]:
    beta1, beta2 = group["betas"]
    return float(beta1), float(beta2)


def _number(value: Scalar) -> Scalar:
    """A Python float, unless reading it would wait for an accelerator."""
    return value if isinstance(value, Tensor) and value.device.type != "cpu" else float(value)
