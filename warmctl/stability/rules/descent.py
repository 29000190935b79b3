"""Gradient descent and momentum: SGD and ASGD."""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from torch import Tensor

from warmctl.rates import learning_rate
from warmctl.stability.rules.coming_step import coming_steps, weight_decay
from warmctl.stability.rules.rule import Group, Scalar, States, Tensors, UpdateRule, divide_


def _sgd_weight(group: Group) -> float:
    """Weight of a new gradient in the momentum buffer: 1 − dampening, which is ignored without momentum.

    Dampening 1 keeps gradients out of the buffer altogether: never unstable, kept finite here.
    """
    return max(1 - float(group["dampening"]), sys.float_info.epsilon) if group["momentum"] != 0 else 1.0


def _sgd_edge(group: Group) -> float:
    momentum, weight = float(group["momentum"]), _sgd_weight(group)
    return 2 * (1 + momentum) / (1 + momentum + momentum * weight if group["nesterov"] else weight)


def _sgd_share(states: States, group: Group) -> list[Scalar]:
    """The first gradient enters the buffer undampened."""
    first = 1.0 if group["nesterov"] else _sgd_weight(group)
    return [first if state.get("momentum_buffer") is None else 1.0 for state in states]


def _plain_edge(group: Group) -> float:
    return 2.0


def _asgd_preconditioner(params: Tensors, grads: Tensors, states: States, group: Group) -> list[Tensor]:
    """(1 + lambd·η·t)^alpha after t steps: the step taken is η over this.

    ASGD reads that rate from its state, where the step before put it, and so obeys a new η one step late.
    Here it comes from η: had η been scaled for the step before, the rate in the state would be scaled again.
    """
    drift, alpha = float(group["lambd"]) * learning_rate(group), float(group["alpha"])
    preconditioner = [torch.ones_like(p) for p in params]
    divide_(preconditioner, [(1 + drift * (step - 1)) ** -alpha for step in coming_steps(states)])
    return preconditioner


def _asgd_decay(group: Group) -> float:
    """`lambd` shrinks the parameters by the very rate of the gradient step, which is L2 decay."""
    return weight_decay(group) + float(group["lambd"])


GRADIENT_DESCENT = UpdateRule(edge=_plain_edge, coupled_decay=weight_decay)
RULES: dict[type, UpdateRule] = {
    torch.optim.SGD: replace(GRADIENT_DESCENT, edge=_sgd_edge, momentum_share=_sgd_share, tolerates_overshoot=True),
    torch.optim.ASGD: replace(
        GRADIENT_DESCENT,
        preconditioner=_asgd_preconditioner,
        coupled_decay=_asgd_decay,
        tolerates_overshoot=True,
    ),
}
