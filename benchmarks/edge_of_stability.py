"""Published results on the edge of stability, each reproduced with warmctl measuring; or, said plainly, not reproduced.

    python -m benchmarks.edge_of_stability [--quick]

The training problem was chosen once, on these grounds, before anything was measured, and is the same for every claim
but the heatmap's: tanh MLP with two hidden layers as wide as its input, PyTorch's own initialisation (40-40-40-10, 3690
parameters for 256 × 10 targets: it can fit them all); 256 signals of mnist1d's
generator, one-hot targets; the square loss of Cohen et al. 2021, half the squared error summed over outputs, mean over
examples; full batch, constant rate, float32. Expected figures were measured elsewhere on a problem that is only partly
known: tolerances, fixed beforehand, are narrow where theory names the figure and wide where the problem decides it.

The oracle of a measurement is the same eigenvalue in float64 by plain autograd and ARPACK, scaled by hand; the tests
hold it against dense Hessians. The heatmap is of `gpt-post` (problems.py) at half the width and context, and needs no
measurement but the loss.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import islice, pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse.linalg
import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.harness import Quick, Results, console, table
from benchmarks.policies import seed_second_moment
from benchmarks.problems import GPT, PROBLEMS, Batch, Problem, mnist1d, text_batches
from benchmarks.runs import FAILED, library, signature
from warmctl import AdaptiveWarmup, sharpness

Row = dict[str, Any]
Rule = Callable[..., Optimizer]
NAME = "edge_of_stability"

EVERY, PRODUCTS = 10, 5
"""Steps between the monitor's probes and Hessian-vector products a probe, by double backward."""
SETTLED = 0.25
"""Last part of a run, whose median counts."""
BACK = 1.05, 10
"""A run is back at the edge where a probe, and the median of so many from it on, are no higher than this."""
HELD = 1.25
"""A target is held where the settled ratio is within this factor of it; the controller itself tolerates 1.2 of SGD."""
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


# -- verdicts ---------------------------------------------------------------------------------------------


def near(measured: float, expected: float, tolerance: float) -> bool:
    return abs(measured - expected) <= tolerance


def within_factor(measured: float, expected: float, factor: float) -> bool:
    return measured > 0 and max(measured / expected, expected / measured) <= factor


def spread(values: Sequence[float], form: str) -> str:
    """Median and range."""
    middle = form.format(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} [{form.format(min(values))}, {form.format(max(values))}]"


def percent(values: Sequence[float | None]) -> str | None:
    known = [value for value in values if value is not None]
    return f"{100 * max(known):.1g} %" if known else None


def judge_edge(name: str, runs: Sequence[Row]) -> Row:
    setting = SETTINGS[name]
    settled, start = [run["settled"] for run in runs], [run["start"] for run in runs]
    adam, rises = setting.start is not None, setting.edge == 2.0
    met = all(near(r, setting.expected, 0.05) for r in settled) and (not rises or max(start) < 1)
    claim = "Adam: preconditioned sharpness at 38/η" if adam else f"{name.split(' ')[0].rstrip(',')}: "
    claim += "" if adam else "sharpness rises to 2/η and stays" if rises else "the edge is 1.357/η"
    return {
        "claim": claim,
        "source": "Cohen 2022" if adam else "Cohen 2021",
        "setting": name,
        "expected": f"median r {setting.expected:.3f}",
        "measured": spread(settled, "{:.3f}") + (f", r at first {spread(start, '{:.2f}')}" if rises else ""),
        "tolerance": "±0.05" + (", first r < 1" if rises else ""),
        "oracle": percent([run["oracle error"] for run in runs]),
        "reproduced": met,
    }


def judge_start(name: str, runs: Sequence[Row]) -> list[Row]:
    setting = SETTINGS[name]
    assert setting.start is not None and setting.back is not None
    start = [setting.edge * run["start"] for run in runs]
    steps = [run["back"] for run in runs if run["back"] is not None]
    words = "not over it at first" if all(run["start"] <= 1 for run in runs) else "not back"
    if steps:
        words = f"{len(steps)} of {len(runs)} back, at step {spread(steps, '{:.0f}')}"
    common = {"source": "Kalra 2024", "setting": name}
    return [
        common
        | {
            "claim": "Adam starts far over the edge",
            "expected": f"ηλ at step 1 {setting.start:g}",
            "measured": spread(start, "{:.1f}"),
            "tolerance": "a factor of 3",
            "oracle": percent([run["oracle error"] for run in runs]),
            "reproduced": all(within_factor(s, setting.start, 3) and s > setting.edge for s in start),
        },
        common
        | {
            "claim": "… and returns to it",
            "expected": f"at 38 by step {setting.back}",
            "measured": words,
            "tolerance": f"by step {2 * setting.back}",
            "reproduced": len(steps) == len(runs) and max(steps) <= 2 * setting.back,
        },
    ]


def judge_bias(found: Row) -> Row:
    means = {size: found["trained"][str(size)]["mean"] for size in BIAS}
    falling = all(a > b for a, b in pairwise(means.values()))
    close = all(within_factor(means[size], expected, 1.5) for size, expected in BIAS.items())
    largest_batch = max(BIAS)
    return {
        "claim": "mini-batches bias λ_max upward",
        "source": "prototype",
        "setting": "N=1000, B=" + ", ".join(map(str, BIAS)),
        "expected": " ".join(f"×{value:g}" for value in BIAS.values()),
        "measured": " ".join(f"×{value:.3g}" for value in means.values()),
        "tolerance": "falling; a factor of 1.5, 5 % at the last",
        "oracle": percent([found["oracle error"]]),
        "reproduced": falling and close and near(means[largest_batch] / BIAS[largest_batch], 1, 0.05),
    }


def judge_targets(name: str, below: Sequence[Row], on: Sequence[Row]) -> Row:
    ratios = [a["loss"] / b["loss"] for a, b in zip(on, below, strict=True)]
    both = [[run["ratio"] for run in runs] for runs in (below, on)]
    held = all(within_factor(r, target, HELD) for target, rs in zip(TARGETS, both, strict=True) for r in rs)
    return {
        "claim": "on the edge beats below the edge",
        "source": "CDAT",
        "setting": f"{name}, target 1 against .5",
        "expected": "loss ratio < 1",
        "measured": f"{spread(ratios, '{:.2g}')}; r held {' and '.join(f'{statistics.median(r):.2f}' for r in both)}",
        "tolerance": f"every seed, targets held within {HELD - 1:.0%}",
        "oracle": percent([run["oracle error"] for run in (*below, *on)]),
        "reproduced": held and all(ratio < 1 for ratio in ratios),
    }


def judge_heatmap(heatmap: Heatmap) -> list[Row]:
    half_decade = 10**0.5 * (1 - 1e-9)
    rows = []
    for rule, name in (("adam", "Adam"), ("seeded", "Adam, v seeded")):
        edge = heatmap.boundary(rule)
        step = heatmap.rates[1] / heatmap.rates[0] * (1 + 1e-9)  # noise may move the boundary by one cell
        rising = all(later * step >= earlier for earlier, later in pairwise(edge))
        rows.append(
            {
                "claim": "longer warmup → larger tolerable peak rate",
                "source": "Kalra 2024",
                "setting": f"{name}, W={', '.join(map(str, heatmap.warmups))}",
                "expected": "moves right with W",
                "measured": ", ".join(f"{lr:.2g}" for lr in edge),
                "tolerance": "last ≥ √10 × first; one cell back at most",
                "reproduced": rising and edge[-1] >= half_decade * edge[0] > 0,
            }
        )
    plain, seeded = heatmap.boundary("adam")[0], heatmap.boundary("seeded")[0]
    rows.append(
        {
            "claim": "seeding v stands in for warmup",
            "source": "Kalra 2024",
            "setting": "W=0, Adam with v seeded against Adam",
            "expected": "larger rate",
            "measured": f"{seeded:.2g} against {plain:.2g}",
            "tolerance": "a cell or more",
            "reproduced": seeded > plain,
        }
    )
    return rows


# -- figures ----------------------------------------------------------------------------------------------


def draw(found: Measured, path: Path) -> None:
    """Ratios by step with the edge at 1, the bias by batch size, and controlled runs on and below the edge."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 7.4), layout="constrained")
    top, bottom = figure.subplots(2, 4)
    gd, nesterov, *adam = SETTINGS
    draw_ratios(top[0], [gd], found.runs, gd)
    draw_ratios(top[1], [nesterov], found.runs, nesterov)
    draw_ratios(top[2], adam, found.runs, "Adam, β₂=.99")
    draw_ratios(top[3], adam, found.runs, "Adam's opening")
    draw_opening(top[3], adam)
    draw_bias(bottom[0], found.bias)
    for ax, name in zip(bottom[1:], CONTROLLED, strict=False):
        draw_pair(ax, found.pairs[name], "losses", "")
        ax.set(title=f"{name}: on and below the edge", ylabel="training loss")
    for name, style in zip(CONTROLLED, ("-", ":"), strict=True):
        draw_pair(bottom[3], found.pairs[name], "rates", f"{name}, ", ls=style)
    bottom[3].set(title="The rate that was applied", ylabel="learning rate")
    bottom[3].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def draw_ratios(ax: Any, names: Sequence[str], runs: dict[str, list[Row]], title: str) -> None:
    for colour, name in zip(("C0", "C1"), names, strict=False):
        for index, run in enumerate(runs[name]):
            ax.plot(*run["series"], color=colour, lw=0.9, alpha=0.8, label=None if index else name)
    ax.axhline(1, color="black", lw=0.9, ls="--", label="edge")
    ax.set(xlabel="step", ylabel="stability ratio r", title=title)
    ax.set_ylim(bottom=0)
    ax.legend(fontsize=8, loc="lower right")


def draw_opening(ax: Any, names: Sequence[str]) -> None:
    """Both axes in log, and the expected figures beside the curves."""
    for colour, setting in zip(("C0", "C1"), (SETTINGS[name] for name in names), strict=True):
        first = f"expected at first: {setting.start / setting.edge:.0f}"
        ax.plot(1, setting.start / setting.edge, color=colour, marker="D", ls="", label=first)
        ax.plot(setting.back, 1, color=colour, marker="v", ms=8, ls="", label=f"expected back by {setting.back}")
    ax.set(xscale="log", yscale="log")
    ax.set_ylim(0.01, 60)
    ax.set_yticks([0.01, 0.1, 1, 10], ["0.01", "0.1", "1", "10"])
    ax.legend(fontsize=7, loc="upper right", ncols=2)


def draw_bias(ax: Any, found: Row) -> None:
    sizes = list(BIAS)
    for colour, at in (("C2", "initial"), ("C3", "trained")):
        rows = [found[at][str(size)] for size in sizes]
        errors = [row["standard error"] for row in rows]
        ax.errorbar(sizes, [row["mean"] for row in rows], errors, color=colour, marker="o", ms=4, capsize=3, label=at)
    ax.plot(sizes, list(BIAS.values()), color="black", marker="x", ls=":", label="expected")
    ax.axhline(1, color="black", lw=0.9, ls="--")
    ax.set(xscale="log", yscale="log", xlabel="batch size B", title="Bias of mini-batches, N=1000")
    ax.set_ylabel("mean λ_max of batches / λ_max of all")
    ax.set_xticks(sizes, [str(size) for size in sizes])
    ax.minorticks_off()
    ax.set_yticks([1, 2, 3, 5, 8], ["1", "2", "3", "5", "8"])
    ax.legend(fontsize=8)


def draw_pair(ax: Any, by_target: dict[float, list[Row]], field: str, name: str, ls: str = "-") -> None:
    for colour, (target, repeated) in zip(("C4", "C1"), by_target.items(), strict=True):
        for index, run in enumerate(repeated):
            label = None if index else f"{name}target {target:g}"
            ax.plot(*run[field], lw=0.9, ls=ls, alpha=0.8, color=colour, label=label)
    ax.set(yscale="log", xlabel="step")
    ax.legend(fontsize=8)


def draw_heatmap(heatmap: Heatmap, steps: int, path: Path) -> None:
    """Two maps on one scale of colour, with the boundary; × has learnt no more than frequencies, ∞ has diverged."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 4.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    rates, warmups = heatmap.rates, heatmap.warmups
    for ax, (rule, title) in zip(axes, (("adam", "Adam"), ("seeded", "Adam, v seeded with g₀²")), strict=True):
        rows = np.array(heatmap.losses[rule])
        image = ax.imshow(
            rows, origin="lower", aspect="auto", cmap="viridis_r", vmin=heatmap.best(), vmax=heatmap.chance
        )
        dark = (heatmap.best() + heatmap.chance) / 2
        for (row, column), loss in np.ndenumerate(rows):
            failed = "×" if loss > FAILED * heatmap.chance else f"{loss:.2f}"
            text = "∞" if heatmap.diverged[rule][row][column] else failed
            ax.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if loss > dark else "black")
        line = [sum(lr <= edge * (1 + 1e-9) for lr in rates) - 0.5 for edge in heatmap.boundary(rule)]
        ax.stairs(line, np.arange(len(line) + 1) - 0.5, orientation="horizontal", baseline=None, color="C3", lw=2.5)
        ax.set_xticks(range(len(rates)), [f"{lr:.2g}" for lr in rates], rotation=45)
        ax.set_yticks(range(len(warmups)), [str(w) for w in warmups])
        ax.set(title=title, xlabel="peak learning rate")
    axes[0].set_ylabel("linear warmup, steps")
    figure.colorbar(image, ax=axes, label=f"final loss in nats after {steps} steps (chance {heatmap.chance:.2f})")
    said = f"red: largest tolerated rate ({TOLERABLE:.0%} of the way from chance to the best cell)"
    figure.suptitle(f"{said};  ×: at chance;  ∞: diverged")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


# -- the command ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """How much is run."""

    seeds: int
    steps: int
    controlled_steps: int
    epochs: int  # of mini-batches for the bias
    most: int  # mini-batches of a size
    rates: tuple[float, ...]
    warmups: tuple[int, ...]
    map_steps: int
    map_seeds: int


FULL = Size(
    seeds=3, steps=4000, controlled_steps=4000, epochs=60, most=250, map_steps=300, map_seeds=2,
    rates=tuple(10 ** (-3 + i / 4) for i in range(11)), warmups=(0, 10, 30, 75, 150, 300),
)  # fmt: skip
SHORT = Size(
    seeds=1, steps=1500, controlled_steps=500, epochs=2, most=40, map_steps=100, map_seeds=1,
    rates=tuple(10 ** (-3 + i / 2) for i in range(5)), warmups=(0, 30, 100),
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """All rows: `runs` by setting, `first` by width, `pairs` by rule and target; lists are of seeds."""

    runs: dict[str, list[Row]]
    first: list[Row]
    bias: Row
    pairs: dict[str, dict[float, list[Row]]]
    heatmap: Heatmap


def measure(results: Results, size: Size) -> Measured:
    """Every run, or its row of an earlier, interrupted go with the same code."""
    seeds, ours, theirs = range(size.seeds), library(), signature("gpt-post")

    def row(key: str, code: str, make: Callable[..., Row], *args: Any) -> Row:
        found = results.get(key)
        if found is None or found["code"] != code:
            found = results.add(key, make(*args) | {"code": code})
            console.print(f"[dim]{key}[/dim]")
        return found

    def run(name: str, seed: int) -> Row:
        return row(f"{name}, seed {seed}", ours, monitored, SETTINGS[name], seed, size.steps)

    def held(name: str, target: float, seed: int) -> Row:
        key, rule = f"{name}, target {target:g}, seed {seed}", CONTROLLED[name]
        return row(key, ours, controlled, rule, target, seed, size.controlled_steps)

    def cell(rule: str, warmup: int, lr: float, seed: int) -> Row:
        key = f"{rule}, W={warmup}, lr={lr:.3g}, seed {seed}"
        return row(key, theirs, warmed_up, rule, lr, warmup, size.map_steps, seed)

    kinds, seeds_of_map = ("adam", "seeded"), range(size.map_seeds)
    return Measured(
        {name: [run(name, seed) for seed in seeds] for name in SETTINGS},
        [row(f"first step, width {width}", ours, first_step, width, 5) for width in WIDTHS],
        row("bias", ours, bias, size.steps, size.epochs, size.most),
        {name: {target: [held(name, target, seed) for seed in seeds] for target in TARGETS} for name in CONTROLLED},
        collect(
            {at: [cell(*at, seed) for seed in seeds_of_map] for at in product(kinds, size.warmups, size.rates)}, size
        ),
    )


def collect(cells: dict[tuple[str, int, float], list[Row]], size: Size) -> Heatmap:
    def grid(value: Callable[[list[Row]], Any]) -> dict[str, list[list[Any]]]:
        return {
            rule: [[value(cells[rule, warmup, lr]) for lr in size.rates] for warmup in size.warmups]
            for rule in ("adam", "seeded")
        }

    (first, *_) = cells.values()
    losses = grid(lambda rows: statistics.fmean(row["loss"] for row in rows))
    return Heatmap(size.rates, size.warmups, losses, grid(lambda r: any(x["diverged"] for x in r)), first[0]["chance"])


def lines(found: Measured) -> Iterator[Row]:
    """The table of claims."""
    for name in SETTINGS:
        yield judge_edge(name, found.runs[name])
    for name, setting in SETTINGS.items():
        if setting.start is not None:
            yield from judge_start(name, found.runs[name])
    yield from judge_heatmap(found.heatmap)
    yield judge_bias(found.bias)
    for name, by_target in found.pairs.items():
        yield judge_targets(name, by_target[TARGETS[0]], by_target[TARGETS[1]])


COLUMNS = ("claim", "source", "setting", "expected", "measured", "tolerance", "oracle", "reproduced")


def main(quick: Quick = False) -> None:
    """Every published result with the figure that was expected beside the one that was measured."""
    torch.set_num_threads(1)
    if not console.is_terminal:
        console.width = 170
    size = SHORT if quick else FULL
    settings = {"quick": quick, **vars(size), "every": EVERY, "products": PRODUCTS}
    results = Results(NAME, settings, fresh=quick)
    found = measure(results, size)
    claims = list(lines(found))
    form = f"short form: {size.steps} steps, one seed" if quick else f"{size.steps} steps, {size.seeds} seeds"
    table(f"Published results ({form}; median and range over seeds)", claims, dict.fromkeys(COLUMNS, "{}"))
    print_runs(found)
    draw(found, results.path.with_suffix(".png"))
    heatmap = found.heatmap
    draw_heatmap(heatmap, size.map_steps, results.path.with_name(f"{results.path.stem}-heatmap.png"))
    results.finish({"claims": claims, "boundary": {rule: heatmap.boundary(rule) for rule in heatmap.losses}})
    console.print(f"written to {results.path}, figures beside it")


def print_runs(found: Measured) -> None:
    runs = [{"run": name, "seed": i} | run for name, all_ in found.runs.items() for i, run in enumerate(all_)]
    table("Monitored runs, r with the edge at 1", runs, MONITORED)
    widths = [{"width": row["width"], "ηλ at step 1": spread(row["values"], "{:.1f}")} for row in found.first]
    table("Adam at step 1, η=1e-3, five seeds", widths, {"width": "{}", "ηλ at step 1": "{}"})
    sizes = [
        {"weights": at, "B": size, "all": found.bias[at]["all"], **found.bias[at][str(size)]}
        for at in ("initial", "trained")
        for size in BIAS
    ]
    table("λ_max of mini-batches over that of all", sizes, BIASES)
    held = [
        {"run": name, "target": target, "seed": i} | run
        for name, by_target in found.pairs.items()
        for target, all_ in by_target.items()
        for i, run in enumerate(all_)
    ]
    table("Controlled runs", held, CONTROLLED_RUNS)


MONITORED = {
    "run": "{}", "seed": "{}", "start": "{:.2f}", "highest": "{:.2f}", "back": "{}", "5 %": "{:.3f}",
    "settled": "{:.3f}", "95 %": "{:.3f}", "forecast": "{:.3f}", "oracle error": "{:.1e}", "loss": "{:.2e}",
    "phase": "{}", "probes": "{}", "overhead": "{:.1f}",
}  # fmt: skip
BIASES = {
    "weights": "{}", "B": "{}", "mean": "{:.3f}", "standard error": "{:.3f}", "batches": "{}", "all": "{:.3g}",
}  # fmt: skip
CONTROLLED_RUNS = {
    "run": "{}", "target": "{:g}", "seed": "{}", "loss": "{:.3e}", "rate": "{:.3g}", "ratio": "{:.3f}",
    "warmup ended": "{}", "oracle error": "{:.1e}",
}  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
