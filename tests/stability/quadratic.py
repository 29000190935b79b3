"""Any optimizer on a small quadratic: at a given stability ratio, and what becomes of it there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import (
    ASGD,
    Optimizer,
)

from warmctl.stability.update_rules import UpdateRule, update_rule

Make = Callable[[list[Tensor]], Optimizer]


SHAPES = ((2, 2), (3,))


SIZE = 7


MOMENTUM = ("exp_avg", "momentum_buffer")


LONG_RUN = 10**9  # steps after which bias corrections and NAdam's momentum schedule are over


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parameters() -> list[Tensor]:
    return [normal(i, *shape).requires_grad_() for i, shape in enumerate(SHAPES)]


def all_parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def set_gradients(params: Sequence[Tensor], values: Tensor) -> None:
    for param, part in zip(params, torch.split(values, [p.numel() for p in params]), strict=True):
        param.grad = part.view_as(param).clone()


def random_steps(optimizer: Optimizer, steps: int) -> None:
    for step in range(steps):
        set_gradients(all_parameters(optimizer), normal(100 + step, SIZE))
        optimizer.step()


def rule_of(optimizer: Optimizer) -> UpdateRule:
    rule = update_rule(optimizer)
    assert rule is not None
    return rule


def arguments(optimizer: Optimizer, group: dict[str, Any]) -> tuple[Any, ...]:
    params = group["params"]
    return params, [p.grad for p in params], [optimizer.state.get(p, {}) for p in params], group


def hessian() -> Tensor:
    """Dense over all parameters, so that groups are coupled; eigenvalues .3 to 1."""
    basis: Tensor = torch.linalg.qr(normal(5, SIZE, SIZE))[0]
    return basis @ torch.diag(torch.linspace(0.3, 1, SIZE, dtype=torch.float64)) @ basis.T


def stability_ratio(optimizer: Optimizer) -> float:
    """λ_max(D^½ (H + c) D^½ + ηw/2) by dense linear algebra, from what the rule says of each group."""
    rule, scales, coupled, shrinkage = rule_of(optimizer), [], [], []
    for group in optimizer.param_groups:
        scale = flat(rule.scale(*arguments(optimizer, group)))
        scales.append(scale)
        coupled.append(torch.full_like(scale, rule.coupled_decay(group)))
        shrinkage.append(torch.full_like(scale, group["lr"] * rule.decoupled_decay(group)))
    root = torch.cat(scales).sqrt()
    matrix = root[:, None] * (hessian() + torch.diag(torch.cat(coupled))) * root
    return float(torch.linalg.eigvalsh(matrix + torch.diag(torch.cat(shrinkage)) / 2)[-1])


def start_from(optimizer: Optimizer, next_step: int) -> None:
    """Empties the momentum and sets the counters so that the coming step is number `next_step`."""
    for group in optimizer.param_groups:
        for state in (optimizer.state[p] for p in group["params"]):
            for name in MOMENTUM:
                if isinstance(state.get(name), Tensor):
                    state[name].zero_()
            if "step" in state:
                state["step"].fill_(next_step - 1)
            if "mu_product" in state:
                decay = group["momentum_decay"]
                done = range(1, min(next_step, 2000))
                state["mu_product"].fill_(math.prod(group["betas"][0] * (1 - 0.5 * 0.96 ** (t * decay)) for t in done))


def at_ratio(make: Make, next_step: int, target: float) -> Optimizer:
    """An optimizer close to the minimum of the quadratic, its rates scaled to the ratio `target`."""
    optimizer = make(parameters())
    random_steps(optimizer, 6)
    start_from(optimizer, next_step)
    with torch.no_grad():  # so close that gradients do not count in the second moments
        for p in all_parameters(optimizer):
            p.mul_(1e-12 / p.norm())
    set_gradients(all_parameters(optimizer), torch.zeros(SIZE, dtype=torch.float64))
    factor = target / stability_ratio(optimizer)
    for group in optimizer.param_groups:
        group["lr"] *= factor
        for p in group["params"]:
            if isinstance(optimizer, ASGD):  # keeps the rate in its state
                optimizer.state[p]["eta"].fill_(group["lr"])
    assert stability_ratio(optimizer) == pytest.approx(target, rel=1e-9), "the ratio is linear in the rate"
    return optimizer


def fate(optimizer: Optimizer, momentum: Sequence[str] = MOMENTUM) -> str:
    """What becomes of the parameters when only they and the momentum may move."""
    params, curvature = all_parameters(optimizer), hessian()
    sign = -1 if optimizer.param_groups[0].get("maximize") else 1
    moving = {p: [k for k, v in optimizer.state[p].items() if v is not None and k not in momentum] for p in params}
    held = [(p, k, optimizer.state[p][k].clone()) for p, names in moving.items() for k in names]
    start = flat(params).norm()
    for _ in range(1000):
        theta = flat(params)
        if theta.norm() > 1e5 * start:
            return "diverges"
        if theta.norm() < 1e-3 * start:
            return "trains"
        set_gradients(params, sign * curvature @ theta)
        optimizer.step()
        for p, name, value in held:
            optimizer.state[p][name].copy_(value)
    return "undecided"


def two_groups(cls: type[Optimizer], first: dict[str, Any], second: dict[str, Any]) -> Make:
    def make(params: list[Tensor]) -> Optimizer:
        return cls([{"params": params[:1], **first}, {"params": params[1:], **second}], lr=1.0)  # type: ignore[call-arg]

    return make


def label(value: object) -> str:
    if isinstance(value, partial):
        return value.func.__name__ + "".join(f",{k}={v}" for k, v in value.keywords.items() if k != "lr")
    return "groups" if callable(value) else str(value)
