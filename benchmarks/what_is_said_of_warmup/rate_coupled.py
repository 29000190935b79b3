"""Claims 11 to 15: what is out of step with a low rate, and what the first steps may break."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from benchmarks.harness.data import class_batches
from benchmarks.harness.problems import cross_entropy
from benchmarks.tasks.data import seeded
from benchmarks.what_is_said_of_warmup.claim import Claim
from benchmarks.what_is_said_of_warmup.problems import PROBLEMS, RHO, few_labels
from benchmarks.what_is_said_of_warmup.training import LOG_LOSS, MARGIN, Ascent, Half, difference, gain, train
from warmctl import sharpness

LONG = 0.5
"""Share of the steps, of a long warmup."""

# 11. Noise


@lru_cache
def batch_sizes(seed: int, quick: bool) -> dict[str, float]:
    problem = PROBLEMS["noisy labels"]
    linear = problem.linear(quick, LONG)
    data = few_labels(seed)[0]
    return {
        f"batch {size}": train(problem, seed, quick, linear, stream=class_batches(data, seeded(seed), size)).log_loss
        for size in (25, 400)
    }


@lru_cache
def settled(seed: int, quick: bool) -> dict[str, float]:
    """Log λ_max of the training loss after a long warmup and after none."""
    problem = PROBLEMS["noisy labels, full batch"]
    found = {}
    for name, share in (("with", LONG), ("without", 0.0)):
        run = train(problem, seed, quick, problem.linear(quick, share))
        found[name] = math.log(max(sharpness(run.model, cross_entropy, few_labels(seed)[0], tol=0.03).eigenvalue, 1e-6))
    return found


PERIOD, AMPLITUDE = 8, 0.5


def dithered(seed: int, quick: bool) -> dict[str, float]:
    """η_t (1 + a sin 2πt/P) / (1 + a) in warmup: its crest is the rate that is held without."""
    problem = PROBLEMS["noisy labels, full batch"]
    linear = problem.linear(quick, LONG)
    end = round(LONG * problem.length(quick))

    def swinging(t: int) -> float:
        swing = (1 + AMPLITUDE * math.sin(2 * math.pi * t / PERIOD)) / (1 + AMPLITUDE)
        return linear(t) * (swing if t < end else 1.0)

    return {
        "without": train(problem, seed, quick, linear).log_loss,
        "with": train(problem, seed, quick, swinging).log_loss,
    }


# 12. Weight decay


@lru_cache
def shrinkage(seed: int, quick: bool) -> dict[str, float]:
    """Log norm of the matrices and log held-out loss: no warmup, a long one, and one with decay w/s."""
    problem = PROBLEMS["noisy labels, AdamW"]

    def compensate(t: int, model: nn.Module, optimizer: Any) -> None:
        for group in optimizer.param_groups:
            group["weight_decay"] = group["initial_decay"] / min(1.0, linear(t) if t < end else 1.0)

    def remember(model: nn.Module, optimizer: Any) -> Any:
        for group in optimizer.param_groups:
            group["initial_decay"] = group["weight_decay"]
        return optimizer

    linear, end = problem.linear(quick, LONG), round(LONG * problem.length(quick))
    runs = {
        "none": train(problem, seed, quick, problem.linear(quick, 0.0)),
        "warmup": train(problem, seed, quick, linear),
        "compensated": train(problem, seed, quick, linear, prepare=remember, before=compensate),
    }
    norms = {f"norm, {name}": math.log(norm(run.model)) for name, run in runs.items()}
    return norms | {f"loss, {name}": run.log_loss for name, run in runs.items()}


def norm(model: nn.Module) -> float:
    return math.sqrt(sum(float(p.detach().square().sum()) for p in model.parameters() if p.ndim > 1))


# 13. The radius of sharpness-aware minimisation


@lru_cache
def radius(seed: int, quick: bool) -> dict[str, float]:
    """A fixed radius, and one in proportion to the rate while that rises; in a long warmup."""
    problem = PROBLEMS["noisy labels, SAM"]
    linear, end = problem.linear(quick, LONG), round(LONG * problem.length(quick))
    found = {}
    for name in ("without", "with"):
        ascent = Ascent(RHO)

        def follow(t: int, model: nn.Module, optimizer: Any, ascent: Ascent = ascent) -> None:
            ascent.rho = RHO * (linear(t) if t < end else 1.0)

        run = train(problem, seed, quick, linear, step=ascent, before=follow if name == "with" else None)
        last = run.losses[round(0.8 * end) : end]
        found[name] = run.log_loss
        found[f"{name}, warmup's end"] = math.log(sum(last) / len(last))
    return found


# 14. float16


def overflows(seed: int, quick: bool) -> dict[str, float]:
    """Steps of a hundred that are left out, over the time that warmup takes."""
    problem = PROBLEMS["noisy labels, float16"]
    found = {}
    for name, share in (("with", problem.warmup), ("without", 0.0)):
        half = Half()
        train(problem, seed, quick, problem.linear(quick, share), step=half)
        first = half.overflows[: round(problem.warmup * problem.length(quick))]
        found[name] = 100 * sum(first) / len(first)
    return found


def bounded(seed: int, quick: bool) -> dict[str, float]:
    """Share of the first 40 steps of gradient descent that end within ‖g‖(1 + ηλ_max), and the largest excess."""
    problem = PROBLEMS["noisy labels, full batch"]
    batch, linear = few_labels(seed)[0], problem.linear(quick)
    growth: list[float] = []
    ahead = before = math.nan

    def look(t: int, model: nn.Module, optimizer: Any) -> None:
        nonlocal ahead, before
        if t > (10 if quick else 40):
            return
        gradients = torch.autograd.grad(cross_entropy(model, batch), list(model.parameters()))
        now = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        if t:
            growth.append(now / before / ahead)
        top = max(sharpness(model, cross_entropy, batch, tol=0.03).eigenvalue, 0.0)
        ahead, before = 1 + optimizer.param_groups[0]["lr"] * top, now

    def without_momentum(model: nn.Module, optimizer: Any) -> SGD:
        return SGD(model.parameters(), lr=problem.lr)

    train(problem, seed, quick, linear, prepare=without_momentum, before=look)
    return {"within": sum(x <= 1.0 for x in growth) / len(growth), "largest": max(growth)}


# 15. LSTM

FIRST = 20


@lru_cache
def first_updates(seed: int, quick: bool) -> dict[str, float]:
    """After twenty updates: share of saturated gates; over them: the largest gradient. Log held-out loss at the end."""
    problem = PROBLEMS["text, LSTM"]
    probe = problem.held(seed)[0][:32]
    found = {}
    for name, share in (("with", problem.warmup), ("without", 0.0)):
        saturated, norms = [], []

        def look(t: int, model: nn.Module, optimizer: Any, saturated: Any = saturated, norms: Any = norms) -> None:
            if t == FIRST:
                saturated.append(saturated_gates(model, probe))
            if 1 <= t <= FIRST:
                norms.append(math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters())))

        run = train(problem, seed, quick, problem.linear(quick, share), before=look)
        found[name] = run.log_loss
        found[f"saturated, {name}"] = saturated[0]
        found[f"gradient, {name}"] = math.log(max(norms))
    return found


@torch.no_grad()
def saturated_gates(model: Any, symbols: Tensor) -> float:
    """Share of the sigmoid gates of an LSTM that are outside of [.03, .97] on these texts."""
    lstm, inputs = model.lstm, model.tokens(symbols)
    h = c = inputs.new_zeros(len(symbols), lstm.hidden_size)
    seen = []
    for t in range(symbols.shape[1]):
        before = inputs[:, t] @ lstm.weight_ih_l0.T + lstm.bias_ih_l0 + h @ lstm.weight_hh_l0.T + lstm.bias_hh_l0
        i, f, g, o = before.chunk(4, dim=1)
        i, f, o = i.sigmoid(), f.sigmoid(), o.sigmoid()
        c = f * c + i * g.tanh()
        h = o * c.tanh()
        seen.append(torch.stack([i, f, o]))
    gates = torch.stack(seen)
    return float(((gates - 0.5).abs() > 0.47).float().mean())


NOISY = "MLP 64-96-96-10 on 400 digits, a fifth of the labels wrong"
FULL = f"{NOISY}; full batch, SGD .9, warmup over half of 200 steps"
CLAIMS: tuple[Claim, ...] = (
    Claim(
        11, "In a long warmup a large batch starves of noise and generalises worse than a small one",
        "Keskar et al. 2017", f"{NOISY}; SGD .9, batch 400 and 25 at one rate, warmup over half of 200 steps",
        batch_sizes, difference("batch 400", "batch 25"), "log held-out loss, batch 400 − 25", MARGIN,
    ),
    Claim(
        11, "Quiet steps at low rates settle in a sharper place: a long warmup ends sharper than none",
        "Lewkowycz et al. 2020", FULL, settled, difference("with", "without"),
        "log λ_max at the end, with − without", 0.1,
    ),
    Claim(
        11, "A dither of the rate in warmup makes up for the missing noise", "common advice",
        f"{FULL}; rate swings by half, period 8, the crest at the rate without", dithered, gain, LOG_LOSS, MARGIN,
    ),
    Claim(
        12, "Decoupled decay shrinks less under a low rate: after a warmup the weights are larger",
        "common advice", f"{NOISY}; AdamW, decay .1, warmup over half of 200 steps", shrinkage,
        difference("norm, warmup", "norm, none"), "log norm of the matrices, with − without", 0.02,
    ),
    Claim(
        12, "Decay w/s in warmup, for what was not shrunk, generalises better", "common advice",
        f"{NOISY}; AdamW, decay .1, warmup over half of 200 steps", shrinkage,
        difference("loss, warmup", "loss, compensated"), LOG_LOSS, MARGIN,
    ),
    Claim(
        13, "The radius of SAM must follow the rate in warmup", "common advice",
        f"{NOISY}; SAM on SGD .9, batch 50, warmup over half of 200 steps", radius, gain,
        "log held-out loss, fixed − following", MARGIN,
    ),
    Claim(
        13, "A full radius at a low rate holds up the start", "common advice",
        f"{NOISY}; SAM on SGD .9, batch 50, warmup over half of 200 steps", radius,
        difference("without, warmup's end", "with, warmup's end"),
        "log training loss at the end of warmup, fixed − following", MARGIN,
    ),
    Claim(
        14, "Warmup keeps gradients within float16's range", "Micikevicius et al. 2018",
        "MLP of five layers on noisy labels, float16, SGD .9; loss scale an eighth of the first that overflows",
        overflows, gain, "overflows of a hundred steps while warmup lasts, without − with", 1.0,
    ),
    Claim(
        14, "‖g‖(1 + ηλ_max) bounds the next gradient", "common advice",
        f"{NOISY}; full batch, gradient descent without momentum, 40 steps of linear warmup", bounded,
        lambda figures: figures["within"] - 0.95, "share of steps within the bound, − .95", 0.0,
    ),
    Claim(
        15, "Without warmup an LSTM's first updates saturate its gates", "common advice",
        "LSTM of 64 on program text, RMSprop, 200 steps", first_updates,
        difference("saturated, without", "saturated, with"), "share of saturated gates after 20, without − with", 0.05,
    ),
    Claim(
        15, "Without warmup an LSTM's first gradients explode", "Pascanu et al. 2013",
        "LSTM of 64 on program text, RMSprop, 200 steps", first_updates,
        difference("gradient, without", "gradient, with"), "log of the largest of 20 gradients, without − with", 0.1,
    ),
    Claim(
        15, "An LSTM ends better with warmup", "common advice",
        "LSTM of 64 on program text, RMSprop, 200 steps", first_updates, gain, LOG_LOSS, MARGIN,
    ),
)  # fmt: skip
