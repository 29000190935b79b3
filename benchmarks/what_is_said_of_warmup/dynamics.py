"""Claims 1 to 3: what linear systems say, by simulation with the real optimizers and in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

from benchmarks.tasks.data import seeded
from benchmarks.what_is_said_of_warmup.claim import Claim, Figures
from warmctl.planning.warmup import smallest_linear_warmup

STEEP, STEEP_STEPS, STEPS, PEAK, MODES = 50.0, 20, 800, 1.0, 30


def descended(spectrum: Tensor, start: Tensor, rate: float, warmup: int) -> tuple[float, float]:
    """Decades from the start's loss ½ Σ λ x², both with the gentle λ: to the largest on the way, and to the last."""
    x, losses = start.clone(), [float((spectrum * start.square()).sum())]
    for step in range(STEPS):
        curvature = spectrum * (STEEP if step < STEEP_STEPS else 1.0)
        x -= rate * min(1.0, (step + 1) / max(1, warmup)) * curvature * x
        losses.append(float((spectrum * x.square()).sum()))
    return math.log10(max(losses) / losses[0]), math.log10(max(losses[-1] / losses[0], 1e-300))


def steep_then_gentle(seed: int, quick: bool) -> Figures:
    """With the smallest linear warmup that is stable throughout, with half of it, and with none."""
    generator = seeded(seed)
    spectrum = 10 ** (-2 * torch.rand(MODES, generator=generator, dtype=torch.float64))
    spectrum /= spectrum.max()  # the edge is at a rate of 2 at last, and of 2 / STEEP at first
    start = torch.randn(MODES, generator=generator, dtype=torch.float64)
    warmup = smallest_linear_warmup([PEAK / 2 * (STEEP if step < STEEP_STEPS else 1.0) for step in range(STEPS)])
    figures = {"warmup steps": float(warmup)}
    for name, length in (("with", warmup), ("with half", warmup // 2), ("without", 0)):
        figures[f"largest, {name}"], figures[f"last, {name}"] = descended(spectrum, start, PEAK, length)
    return figures


RULES: dict[str, tuple[Callable[[float], dict[str, float | bool]], Callable[[float], float]]] = {
    "momentum": (lambda b: {}, lambda b: 2 * (1 + b)),
    "Nesterov": (lambda b: {"nesterov": True}, lambda b: 2 * (1 + b) / (1 + 2 * b)),
    "dampened": (lambda b: {"dampening": b}, lambda b: 2 * (1 + b) / (1 - b)),
}
"""Options of SGD, and the edge of ηλ, by β."""


def last_points(options: dict[str, float | bool], beta: float, rate: float, curvature: float, steps: int) -> Tensor:
    """The last points of minimising ½ λ x² from 1, float64."""
    x = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer: Optimizer = SGD([x], rate, momentum=beta, **options)
    points = []
    for _ in range(steps):
        x.grad = curvature * x.detach()
        optimizer.step()
        points.append(x.item())
    return torch.tensor(points[-40:], dtype=torch.float64)


def leaves_at_minus_one(seed: int, quick: bool) -> Figures:
    """The edge by bisection, and the factor from point to point there, of SGD's three kinds of momentum."""
    generator = np.random.default_rng(seed)
    steps, figures = 4000, {}
    for name, (options, edge) in RULES.items():
        beta, curvature = float(generator.uniform(0.5, 0.95)), float(10 ** generator.uniform(-1, 2))
        low, high = 0.3 * edge(beta) / curvature, 5 * edge(beta) / curvature
        for _ in range(16):
            middle = math.sqrt(low * high)
            points = last_points(options(beta), beta, middle, curvature, steps // 5)
            grows = not points.isfinite().all() or points.abs().max() > 1.0
            low, high = (low, middle) if grows else (middle, high)
        points = last_points(options(beta), beta, high, curvature, steps)
        factors = points[1:] / points[:-1]
        figures[f"edge, {name}"] = high * curvature / edge(beta) - 1
        figures[f"root + 1, {name}"] = float((factors + 1).abs().max())
    return figures


def digits_of(figures: Figures) -> float:
    """Decimal digits in which the worst figure agrees with its closed form."""
    return -math.log10(max(1e-12, *(abs(value) for value in figures.values())))


BETA2, COORDINATES = 0.99, 20_000


def bias_of_v(seed: int, quick: bool) -> Figures:
    """(v_t / E g²) / (1 − β₂^t) − 1 at its worst, for rates a factor of a thousand apart and with warmup.

    Gradients are those of a flat quadratic under unit noise, ½ · 0.01 x² + n·x, the same noise at every rate.
    """
    figures = {}
    for name, rate, warmup in (("1e-4", 1e-4, 0), ("1e-2", 1e-2, 0), ("1e-1", 1e-1, 0), ("1e-1 warmed", 1e-1, 50)):
        generator = seeded(seed)
        x = torch.nn.Parameter(torch.zeros(COORDINATES // (4 if quick else 1)))
        adam, worst = Adam([x], rate, betas=(0.9, BETA2)), 0.0
        for step in range(1, 101):
            adam.param_groups[0]["lr"] = rate * min(1.0, step / max(1, warmup))
            x.grad = 0.01 * x.detach() + torch.randn(x.shape, generator=generator)
            adam.step()
            share = float(adam.state[x]["exp_avg_sq"].mean()) / (1 - BETA2**step)
            worst = max(worst, abs(share - 1))
        figures[name] = worst
    return figures


QUADRATIC = (
    f"quadratic of {MODES} modes, λ {STEEP:g} times as large in the first {STEEP_STEPS} of {STEPS} steps; gradient "
    "descent at half the gentle edge; the smallest linear warmup that is stable throughout"
)

CLAIMS = (
    Claim(
        1,
        "Where curvature is steep for some steps, then gentle, warmup keeps the loss from growing",
        "common advice",
        QUADRATIC,
        steep_then_gentle,
        lambda figures: figures["largest, without"] - figures["largest, with"],
        "decades of the largest loss on the way, without − with",
        margin=1.0,
    ),
    Claim(
        1,
        "… and half of that warmup does not",
        "common advice",
        QUADRATIC,
        steep_then_gentle,
        lambda figures: figures["largest, with half"] - figures["largest, with"],
        "decades of the largest loss on the way, with half − with",
        margin=0.1,
    ),
    Claim(
        1,
        "… and the loss ends lower for it",
        "common advice",
        QUADRATIC,
        steep_then_gentle,
        lambda figures: figures["last, without"] - figures["last, with"],
        "decades of the last loss, without − with",
        margin=1.0,
    ),
    Claim(
        2,
        "Momentum leaves stability at z = −1, at its own edge: 2(1+β), Nesterov's 2(1+β)/(1+2β), dampened 2(1+β)/(1−d)",
        "Cohen et al. 2021",
        "½λx² with β and λ drawn by seed; SGD with momentum, with Nesterov's, dampened; edge by bisection",
        leaves_at_minus_one,
        digits_of,
        "digits in which edge and root agree with the closed form",
        margin=2.0,
    ),
    Claim(
        3,
        "Adam's v is too small by 1 − β₂ᵗ early on, whatever the rate: warmup does not mend it, it only waits",
        "Kingma & Ba 2015",
        f"{COORDINATES} coordinates under unit noise, a nearly flat quadratic; Adam, β₂ {BETA2}; "
        "rates 1e-4, 1e-2, 1e-1, and 1e-1 warmed over 50 of 100 steps",
        bias_of_v,
        digits_of,
        "digits in which v/E g² agrees with 1 − β₂ᵗ",
        margin=1.3,
    ),
)
