"""Runs held on the edge and below it by the exact ratio: at each step the rate is target / (ratio at rate 1).

Nothing of warmctl's is in them: what they show is the claim's doing, not the controller's.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks.edge_of_stability.controlled import EDGES
from benchmarks.edge_of_stability.problem import closure_for, oracle_ratio, signals, square_loss, tanh_mlp
from benchmarks.edge_of_stability.series import SETTLED, diverged, thinned
from benchmarks.harness.data import Batch
from benchmarks.harness.results import Row

Law = Callable[[nn.Module, Batch, Optimizer], float]


def by_sharpness(model: nn.Module, batch: Batch, optimizer: Optimizer) -> float:
    """The oracle's."""
    return oracle_ratio(model, batch, optimizer, EDGES[type(optimizer)])


def by_update(model: nn.Module, batch: Batch, optimizer: Optimizer) -> float:
    """−½ ΔᵀHΔ / gᵀΔ along the coming step Δ, with the edge at 1: CDAT's σ = 2, and its σ = 1 at half of it."""
    twin, rule = copy.deepcopy((model, optimizer))
    rule.step(closure_for(rule, twin, batch))
    params = list(model.parameters())
    update = [(after - before).detach() for after, before in zip(twin.parameters(), params, strict=True)]
    gradient = torch.autograd.grad(square_loss(model, batch), params, create_graph=True)
    slope = sum((g * d).sum() for g, d in zip(gradient, update, strict=True))
    bent = torch.autograd.grad(slope, params)
    curvature = sum((h * d).sum() for h, d in zip(bent, update, strict=True))
    return float(-0.5 * curvature / slope.detach())


LAWS: dict[str, Law] = {"λ_max": by_sharpness, "the update's curvature": by_update}


def held(rule: partial[Optimizer], law: Law, target: float, seed: int, steps: int) -> Row:
    """Train at the rate that has the ratio of `law` on `target`; where there is no such rate the last one stays."""
    batch, model = signals(256), tanh_mlp(seed)
    optimizer = rule(model.parameters())
    closure = closure_for(optimizer, model, batch)
    (group,) = optimizer.param_groups
    losses, rates, ratios = {}, {}, {}
    rate = 0.0
    for step in range(1, steps + 1):
        group["lr"] = 1.0
        ratio = law(model, batch, optimizer)
        rate = target / ratio if ratio > 0 else rate
        group["lr"] = rate
        losses[step] = optimizer.step(closure).item()
        rates[step], ratios[step] = rate, rate * ratio
        if not math.isfinite(losses[step]):
            break
    curves = {"losses": thinned(losses), "rates": thinned(rates)}
    if lost := diverged(losses, steps):
        return {"diverged": lost, **curves}
    return {
        "loss": statistics.median(list(losses.values())[-max(steps // 50, 1) :]),
        "rate": rate,
        "ratio": statistics.median(list(ratios.values())[-int(SETTLED * steps) :]),
        **curves,
    }
