"""How near a rate is to the edge of stability, by curvature; and the rate at which the loss would rise, by trying."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import scipy.optimize
import torch
from torch import Tensor
from torch.optim import Optimizer

from warmctl.curvature.eigen import EigenResult, SymmetricOperator, lanczos
from warmctl.curvature.operators import HessianOperator
from warmctl.curvature.scaled import ScaledOperator
from warmctl.loss.replay import Replay
from warmctl.plan.double import first_rate, put_back, take_step
from warmctl.rates import learning_rate
from warmctl.stability.estimator import SharpnessEstimator
from warmctl.stability.update_rules import UpdateRule
from warmctl.vectors import Vector, add_, dot, locals_of

PRECISION = 1e-3
"""Relative, of a critical rate found by forward passes."""
FARTHEST = 1e12
"""How far from the update made a critical rate is looked for, as a factor either way."""


@dataclass(frozen=True)
class Edge:
    """An optimizer's coming step against the edge of stability, at the rates that its groups have.

    Attributes:
        sharpness: λ_max(H); nan if it was not asked for.
        ratio: r₁ = λ_max(D^½ H D^½), the edge in the long run at 1.
        share: the edge of this very step over its long-run value: 1 − β₁ at Adam's first.
        threshold: τ of the first group with a rate.
        residual: relative, the largest of the eigenvalues found.
        converged: whether all met the tolerance.
        products: Hessian-vector products spent.
    """

    sharpness: float
    ratio: float
    share: float
    threshold: float
    residual: float
    converged: bool
    products: int


def measure_edge(
    replay: Replay, gradient: Vector, double: Optimizer, rule: UpdateRule, *, tol: float, steps: int, raw: bool
) -> Edge:
    """The edge of the coming step of `double`, a step with `gradient`, which is in the parameters' `.grad`."""
    root, shift, sign = SharpnessEstimator(double, rule, "auto", "lanczos", 2).scaling(replay.params)
    with HessianOperator(replay, replay.params, central=raw) as operator:
        found = []
        if raw:
            found.append(_top(operator, gradient, tol, steps))
        scaled = ScaledOperator(operator, root, shift, sign)
        found.append(_top(scaled, list(torch._foreach_mul(gradient, root)), tol, steps))
        threshold = next(rule.threshold(g) for g in double.param_groups if learning_rate(g) > 0)
        return Edge(
            sharpness=found[0].eigenvalue if raw else math.nan,
            ratio=found[-1].eigenvalue * (share := _share(double, rule)),
            share=share,
            threshold=threshold,
            residual=max(result.residual / max(abs(result.eigenvalue), 1e-30) for result in found),
            converged=all(result.converged for result in found),
            products=operator.hvps,
        )


def sharpness_of(replay: Replay, gradient: Vector, tol: float, steps: int) -> EigenResult:
    """λ_max(H) alone, for an optimizer without a rule."""
    with HessianOperator(replay, replay.params, central=True) as operator:
        return _top(operator, gradient, tol, steps)


def _top(operator: SymmetricOperator, start: Vector, tol: float, steps: int) -> EigenResult:
    return lanczos(operator, start=start, noise=1.0, tol=tol, steps=steps)


def _share(double: Optimizer, rule: UpdateRule) -> float:
    """The least momentum share of the parameters that move."""
    shares = [1.0]
    for group in double.param_groups:
        states = [double.state.get(p, {}) for p in group["params"] if p.grad is not None]
        if rule.momentum_share is not None:
            shares += [float(q) for q in rule.momentum_share(states, group)]
    return min(shares)


def loss_rises_from(replay: Replay, gradient: Vector, loss: float, double: Optimizer) -> tuple[float, str]:
    """The largest first-group rate at which the loss does not rise along the update of `double`; or nan, and why.

    The update is made once, at the rates that are set, and is taken to be proportional to them. Where the loss falls
    at first, the first rate at which it is above its present value is looked for by steps of a growing factor.

    Cost: a step of the optimizer and some 5 to 20 forward passes.
    Source: critical sharpness, λ_c = 2/η_c, of arXiv 2601.16979.
    """
    with put_back(replay.params) as before:
        take_step(double, lambda: _backward(replay))
        update = add_([t.clone() for t in locals_of(replay.params)], before, -1.0)
    slope = dot(gradient, update)
    if not slope < 0.0:
        return math.nan, "the update does not descend the gradient of this batch"

    def change_per_length(factor: float) -> float:
        """(L(θ + factor·Δ) − L(θ)) / factor: `slope` at 0, straight for a quadratic, 0 where the loss is back."""
        with put_back(replay.params) as rest, torch.no_grad():
            shards = locals_of(replay.params)
            for shard, start, moved in zip(shards, rest, update, strict=True):
                torch.add(start, moved, alpha=factor, out=shard)
            change = (replay.value() - loss) / factor
        return change if math.isfinite(change) else -10.0 * slope

    factor = _root(change_per_length, slope)
    return factor * first_rate([learning_rate(group) for group in double.param_groups]), ""


def _root(f: Callable[[float], float], slope: float) -> float:
    """The first t > 0 with f(t) = 0, where f(0) = `slope` < 0; inf or 0 if it is out of reach."""
    low, high, t = 0.0, math.inf, 1.0
    while low == 0.0 or high == math.inf:
        value = f(t)
        crossing = t * slope / (slope - value) if value > slope else math.inf  # of the line through f(0) and f(t)
        if value > 0.0:
            high, t = t, max(min(0.9 * crossing, t / 2), t / 64)
        else:
            low, t = t, min(max(1.1 * crossing, 1.5 * t), 8 * t)
        if t > FARTHEST:
            return math.inf
        if t < 1 / FARTHEST:
            return 0.0
    return float(scipy.optimize.brentq(f, low, high, xtol=PRECISION * low, rtol=PRECISION, maxiter=50))


def _backward(replay: Replay) -> Tensor:
    """The closure of a training step: the gradient at the present parameters, into `.grad`."""
    loss, gradient = replay.gradient()
    for p, g in zip(replay.params, gradient, strict=True):
        p.grad = g
    return torch.tensor(loss)
