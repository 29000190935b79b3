"""How near a rate is to the edge of stability, by curvature; and the rate at which the loss would rise, by trying."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import scipy.optimize
import torch
from torch import Tensor
from torch.optim import Optimizer

from warmctl.curvature.eigen import EigenResult, SymmetricOperator, lanczos
from warmctl.curvature.operators import HessianOperator
from warmctl.curvature.scaled import ScaledOperator
from warmctl.loss.replay import Replay
from warmctl.planning.double import double_of, first_rate, put_back, set_rates, take_step
from warmctl.stability.step_scale import StepScale
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


def measure_edge(replay: Replay, gradient: Vector, double: Optimizer, *, tol: float, steps: int, raw: bool) -> Edge:
    """The edge of the coming step of `double`, a step with `gradient`, which is in the parameters' `.grad`."""
    step = StepScale(double)
    root, shift, sign = step.scaling(replay.params)
    with HessianOperator(replay, replay.params, central=raw) as operator:
        found = []
        if raw:
            found.append(_top(operator, gradient, tol, steps))
        scaled = ScaledOperator(operator, root, shift, sign)
        found.append(_top(scaled, list(torch._foreach_mul(gradient, root)), tol, steps))
        return Edge(
            sharpness=found[0].eigenvalue if raw else math.nan,
            ratio=found[-1].eigenvalue * (share := step.momentum_share()),
            share=share,
            threshold=step.reference()[1],
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


def loss_rises_from(
    replay: Replay, gradient: Vector, loss: float, optimizer: Optimizer, rates: Sequence[float]
) -> tuple[float, str]:
    """The largest first-group rate at which the coming step of `optimizer` does not raise the loss; or nan, and why.

    Every trial is a step that is really made, by a double and taken back, at a multiple of `rates`. The multiple is
    looked for from 1 on, by factors of at most 8.

    Cost: some 5 to 20 forward passes, a step and a copy of the optimizer's state with each.
    Source: critical sharpness, λ_c = 2/η_c, of arXiv 2601.16979.
    """

    def trial(multiple: float) -> tuple[float, float]:
        """Change of the loss, and gᵀΔ, of a step at this multiple."""
        double = double_of(optimizer)
        set_rates(double, [rate * multiple for rate in rates])
        for p, g in zip(replay.params, gradient, strict=True):
            p.grad = g.clone()
        with put_back(replay.params) as before:
            take_step(double, lambda: _backward(replay))
            slope = dot(gradient, add_([t.clone() for t in locals_of(replay.params)], before, -1.0))
            return replay.value() - loss, slope

    first, slope = trial(1.0)
    if not slope < 0.0:
        return math.nan, "the update does not descend the gradient of this batch"

    def change_per_length(multiple: float) -> float:
        """ΔL(multiple) / multiple: `slope` at 0, a straight line for a quadratic, 0 where the loss is back."""
        change = (first if multiple == 1.0 else trial(multiple)[0]) / multiple
        return change if math.isfinite(change) else -10.0 * slope

    return _root(change_per_length, slope) * first_rate(rates), ""


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
