"""The runs behind `edge_of_stability`: one training problem, measured or controlled, and the rate × warmup map."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import islice
from typing import Any

import numpy as np
import scipy.sparse.linalg
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.harness.policies import seed_second_moment
from benchmarks.harness.problems import GPT, PROBLEMS, Batch, Problem, mnist1d, text_batches
from warmctl import AdaptiveWarmup, sharpness

Row = dict[str, Any]
Rule = Callable[..., Optimizer]

EVERY, PRODUCTS = 10, 5
"""Steps between the monitor's probes and Hessian-vector products a probe, by double backward."""
SETTLED = 0.25
"""Last part of a run, whose median counts."""
BACK = 1.05, 10
"""A run is back at the edge where a probe, and the median of so many from it on, are no higher than this."""
TARGETS = 0.5, 1.0
TOLERABLE = 0.5
"""A rate is tolerated if the run learns this part of the way from chance to the best cell of its map."""


# -- the training problem ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """An optimizer at a constant rate, its edge in η·λ, and the figures to be reproduced."""

    rule: Rule
    edge: float
    expected: float  # settled ratio
    start: float | None = None  # η·λ_P at the first step
    back: int | None = None  # step at which it is at the edge again


SETTINGS = {
    "GD, η=0.3": Setting(partial(SGD, lr=0.3), 2.0, 1.0),
    "Nesterov .9, η=0.2": Setting(partial(SGD, lr=0.2, momentum=0.9, nesterov=True), 3.8 / 2.8, 0.995),
    "Adam, η=1e-3": Setting(partial(Adam, lr=1e-3, betas=(0.9, 0.99)), 38.0, 1.012, 190, 500),
    "Adam, η=3e-3": Setting(partial(Adam, lr=3e-3, betas=(0.9, 0.99)), 38.0, 1.013, 609, 300),
}
WIDTHS = (20, 40, 80, 160, 320)  # only to see what Adam's first step depends on; no verdict rests on them
EDGES = {SGD: 2.0, Adam: 38.0}
CONTROLLED = {"GD": partial(SGD, lr=3.0), "Adam": partial(Adam, lr=0.03, betas=(0.9, 0.99))}
"""Ten times the rates above."""
BIAS = {8: 7.7, 32: 2.7, 128: 1.3, 512: 1.02}  # batch size -> expected λ_max over that of all 1000 examples


@lru_cache
def signals(count: int) -> Batch:
    """The first `count` of 1000 signals [N, 40] and their one-hot targets [N, 10]."""
    (x, y), _ = mnist1d(1250)
    return x[:count].flatten(1), F.one_hot(y[:count], 10).float()


def tanh_mlp(seed: int, width: int = 40) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(40, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10)
        )  # fmt: skip


def square_loss(model: nn.Module, batch: Batch) -> Tensor:
    x, y = batch
    return 0.5 * (model(x) - y).square().sum(1).mean()


def closure_for(optimizer: Optimizer, model: nn.Module, batch: Batch) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = square_loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    return closure


# -- the oracle -------------------------------------------------------------------------------------------


def oracle_ratio(model: nn.Module, batch: Batch, optimizer: Optimizer, edge: float) -> float:
    """η λ_max(P^-½ H P^-½) / edge of the coming step, in float64 by plain autograd and ARPACK, by definition."""
    twin = copy.deepcopy(model).double()
    params = list(twin.parameters())
    loss = square_loss(twin, (batch[0].double(), batch[1].double()))
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, params, create_graph=True)])
    (group,) = optimizer.param_groups
    root = adam_preconditioner(gradient.detach(), optimizer).rsqrt() if "betas" in group else torch.ones(len(gradient))

    def scaled_product(vector: np.ndarray) -> np.ndarray:
        rows = torch.autograd.grad(gradient, params, root * torch.from_numpy(vector.ravel()), retain_graph=True)
        return (root * torch.cat([r.flatten() for r in rows])).numpy()

    shape = (len(gradient), len(gradient))
    operator = scipy.sparse.linalg.LinearOperator(shape, matvec=scaled_product, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(len(gradient))
    (value,) = scipy.sparse.linalg.eigsh(operator, k=1, which="LA", return_eigenvectors=False, v0=start, tol=1e-8)
    return float(group["lr"] * value / edge)


def adam_preconditioner(gradient: Tensor, optimizer: Optimizer) -> Tensor:
    """√v̂ + ε of Adam's coming step, [P] in float64."""
    (group,) = optimizer.param_groups
    states = [optimizer.state.get(p, {}) for p in group["params"]]
    pairs = zip(states, group["params"], strict=True)
    old = torch.cat([state.get("exp_avg_sq", torch.zeros_like(p)).double().flatten() for state, p in pairs])
    step, beta2 = float(states[0].get("step", 0)) + 1, group["betas"][1]
    return ((beta2 * old + (1 - beta2) * gradient**2) / (1 - beta2**step)).sqrt() + group["eps"]


# -- measured, not controlled -----------------------------------------------------------------------------


def monitored(setting: Setting, seed: int, steps: int, width: int = 40) -> Row:
    """Train with a monitor; its ratios η λ / τ at the probes, and the oracle's at five of them.

    The ratio is made from the probe's own `sharpness`: `stability_ratio` is the controller's forecast, which falls
    slowly on purpose.
    """
    batch, model = signals(256), tanh_mlp(seed, width)
    base = setting.rule(model.parameters())
    optimizer = AdaptiveWarmup(
        base, model, control=False, every=EVERY, probe_steps=PRODUCTS, hvp="double_backward", after="guard"
    )
    closure = closure_for(optimizer, model, batch)
    checks = {1 + i * (steps - 1) // 4 // EVERY * EVERY for i in range(5)}
    oracle: dict[int, float] = {}
    for step in range(1, steps + 1):
        if step in checks:
            oracle[step] = oracle_ratio(model, batch, base, setting.edge)
        optimizer.step(closure)
    probes = [row for row in optimizer.history if row["probed"]]
    ratios = {row["step"]: row["sharpness"] * row["lr"] / row["threshold"] for row in probes}
    return summary_of(ratios, steps) | {
        "forecast": statistics.median(r["stability_ratio"] for r in probes[-len(probes) // 4 :]),
        "loss": optimizer.history[-1]["loss"],
        "phase": optimizer.phase,
        "probes": len(probes),
        "overhead": optimizer.metrics["overhead"],
        "oracle": {str(step): value for step, value in oracle.items()},
        "oracle error": max(abs(ratios[step] / value - 1) for step, value in oracle.items()),
        "series": thinned(ratios),
    }


def first_step(width: int, seeds: int) -> Row:
    """η λ_P at Adam's first step, η=1e-3, for a wider or narrower network."""
    batch, values = signals(256), []
    for seed in range(seeds):
        model = tanh_mlp(seed, width)
        base = SETTINGS["Adam, η=1e-3"].rule(model.parameters())
        optimizer = AdaptiveWarmup(base, model, control=False, probe_steps=20, hvp="double_backward")
        optimizer.step(closure_for(optimizer, model, batch))
        values.append(1e-3 * optimizer.metrics["sharpness"])
    return {"width": width, "values": values}


def summary_of(ratios: dict[int, float], steps: int) -> Row:
    """Of the ratios by step: the first, the step of the return to the edge, and the settled part."""
    settled = [r for step, r in ratios.items() if step > (1 - SETTLED) * steps]
    low, middle, high = np.percentile(settled, [5, 50, 95]).tolist()
    first, highest = next(iter(ratios.values())), max(ratios.values())
    back = None if first <= 1 else back_at(ratios)
    return {"start": first, "highest": highest, "back": back, "settled": middle, "5 %": low, "95 %": high}


def back_at(ratios: dict[int, float]) -> int | None:
    """The first step that is at the edge or below and stays, in the median of its probes; None if there is none."""
    limit, window = BACK
    steps, values = list(ratios), list(ratios.values())
    for i in range(len(values) - window + 1):
        if max(values[i], statistics.median(values[i : i + window])) <= limit:
            return steps[i]
    return None


def thinned(values: dict[int, float], count: int = 120) -> list[list[float]]:
    """[steps, values] at about `count` steps evenly and as many evenly in log."""
    steps, last = list(values), len(values) - 1
    even, log = np.linspace(0, last, count), np.geomspace(1, last + 1, count) - 1
    chosen = sorted({int(i) for i in (*even, *log)})
    return [[steps[i] for i in chosen], [float(f"{values[steps[i]]:.4g}") for i in chosen]]


def bias(steps: int, epochs: int, most: int) -> Row:
    """Mean over mini-batches of λ_max over that of all 1000 examples, at initialisation and after training by GD.

    Batches of an epoch do not overlap: so many epochs, at most `most` batches of each size.
    """
    everything, model = signals(1000), tanh_mlp(0)
    optimizer = SGD(model.parameters(), lr=0.3)
    found: Row = {"initial": batch_sharpness(model, everything, epochs, most)}
    closure = closure_for(optimizer, model, everything)
    for _ in range(steps):
        optimizer.step(closure)
    found["trained"] = batch_sharpness(model, everything, epochs, most)
    exact = oracle_ratio(model, everything, SGD(model.parameters(), lr=1.0), 1.0)
    return found | {"oracle": exact, "oracle error": abs(found["trained"]["all"] / exact - 1)}


def batch_sharpness(model: nn.Module, everything: Batch, epochs: int, most: int) -> Row:
    (x, y), generator = everything, torch.Generator().manual_seed(0)
    whole = sharpness(model, square_loss, everything).eigenvalue
    found: Row = {"all": whole}
    for size in BIAS:
        orders = (torch.randperm(len(x), generator=generator) for _ in range(epochs))
        batches = islice((rows for order in orders for rows in order[: len(x) // size * size].split(size)), most)
        values = [sharpness(model, square_loss, (x[rows], y[rows])).eigenvalue / whole for rows in batches]
        found[str(size)] = {
            "mean": statistics.fmean(values),
            "standard error": statistics.stdev(values) / math.sqrt(len(values)),
            "batches": len(values),
        }
    return found


# -- controlled: on the edge and below it -----------------------------------------------------------------


def controlled(rule: partial[Optimizer], target: float, seed: int, steps: int) -> Row:
    """Train at a rate far too high that warmctl brings down to `target`, probing at every step as CDAT does."""
    batch, model = signals(256), tanh_mlp(seed)
    optimizer = AdaptiveWarmup(rule(model.parameters()), model, target=target, every=1)
    closure = closure_for(optimizer, model, batch)
    for _ in range(steps - 1):
        optimizer.step(closure)
    exact = oracle_ratio(model, batch, optimizer.base, EDGES[rule.func])
    optimizer.step(closure)
    history = optimizer.history
    last = history[-1]
    probe = last["sharpness"] * last["lr"] / last["threshold"]
    ended = next((row["step"] for row in history if row["phase"] != "warmup"), None)
    rates = {row["step"]: row["lr"] for row in history}
    return {
        "loss": statistics.median(row["loss"] for row in history[-steps // 50 :]),
        "rate": history[-1]["lr"],
        "ratio": statistics.median(row["stability_ratio"] for row in history[-int(SETTLED * steps) :]),
        "warmup ended": ended,
        "oracle error": abs(probe / (last["scale"] * exact) - 1),
        "losses": thinned({row["step"]: row["loss"] for row in history}),
        "rates": thinned(rates),
    }


# -- rate × warmup ----------------------------------------------------------------------------------------


@lru_cache
def small_gpt() -> Problem:
    """`gpt-post` at half the width and context."""
    stream = partial(text_batches, context=32)
    return replace(PROBLEMS["gpt-post"], model=partial(GPT, 32, 3, 32, post_norm=True), stream=stream, eval_count=4)


def warmed_up(rule: str, lr: float, warmup: int, steps: int, seed: int) -> Row:
    """Train with linear warmup and a constant rate after it, by Adam or by Adam with v = g₀² at first."""
    problem = small_gpt()
    model = problem.build(seed)
    optimizer = problem.optimizer(model.parameters(), lr)
    if rule == "seeded":
        optimizer.register_step_pre_hook(seed_second_moment)
    scheduler = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(warmup, 1)))
    chance, loss = problem.chance(), torch.tensor(0.0)
    for batch in islice(problem.batches(seed), steps):
        optimizer.zero_grad()
        loss = problem.loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        if not math.isfinite(loss.item()):
            break
        optimizer.step()
        scheduler.step()
    final = problem.evaluate(model) if math.isfinite(loss.item()) else math.inf
    diverged = not math.isfinite(final)
    return {"loss": chance if diverged else min(final, chance), "diverged": diverged, "chance": chance}


@dataclass(frozen=True)
class Heatmap:
    """Final losses of "adam" and "seeded", means over seeds, [warmup][rate], counted as chance where they are above."""

    rates: tuple[float, ...]
    warmups: tuple[int, ...]
    losses: dict[str, list[list[float]]]
    diverged: dict[str, list[list[bool]]]
    chance: float

    def best(self) -> float:
        return min(loss for rows in self.losses.values() for row in rows for loss in row)

    def learnt(self, loss: float) -> float:
        return (self.chance - loss) / max(self.chance - self.best(), 1e-12)

    def boundary(self, rule: str) -> list[float]:
        """The largest tolerated rate at each warmup length; 0 if there is none."""
        rows = self.losses[rule]
        return [
            max((lr for lr, loss in zip(self.rates, row, strict=True) if self.learnt(loss) >= TOLERABLE), default=0.0)
            for row in rows
        ]
