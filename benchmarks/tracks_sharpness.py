"""warmctl tracks sharpness at a known price: λ_max against dense Hessians, and from cold against other libraries.

    python -m benchmarks.tracks_sharpness [--quick]

1. Warm tracking. Three models of 532 to 1450 parameters train with SGD (H) and Adam (P^-½HP^-½), on one batch and on
   mini-batches. At each step the true λ_max is that of the dense Hessian of the step's batch, in float64 by double
   backward. `AdaptiveWarmup(control=False)` goes along; that the trajectory stays the same is checked.
2. Cold start. Three models of a million parameters, each library at its cheapest setting, of those tried, whose error
   is at most 1 % for every seed against float64 Lanczos to 1e-6. All look for the algebraically largest eigenvalue of
   the same float32 model in eval mode, on one batch, with attention by its twice differentiable kernel. Calls alternate
   in one process. Peak memory is that of a process of its own, which returns what it frees at once.

A library that is not installed is left out, and said so. curvlinops is no part of the `bench` extra, because a library
it depends on, without needing it here, asks for torchvision; it goes in by hand:

    pip install --no-deps curvlinops-for-pytorch==3.0.1 backpack-for-pytorch==1.7.1 einconv==0.1.0 einops==0.8.2 \
        linear_operator==0.6.1 unfoldNd==0.2.3 opt_einsum==3.4.0
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import SGD, Adam, Optimizer

from benchmarks.cold_start import (
    CALLS,
    COLD,
    ERROR,
    Row,
    built,
    compared,
    installed,
    loss_of,
    peak_memory,
    reference,
    relative_error,
    search,
)
from benchmarks.costs_what_it_says import size_of
from benchmarks.harness.problems import GPT, Batch, class_batches, corpus, digits, mlp, mnist1d, place, small_conv
from benchmarks.harness.results import Quick, Results, console, median, table
from warmctl import AdaptiveWarmup

CADENCES, PRODUCTS, SEEDS = (1, 5, 20), (1, 2, 3, 4, 5), (0, 1, 2)
PLAIN, EXACT = "auto", "double_backward"
"""Products as the wrapper takes them by default, and exact ones, which tell its differences' error from the rest."""


# -- 1: warm tracking -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tracked:
    """A model of at most 2000 parameters and its examples."""

    make: Callable[[], nn.Module]
    pool: Callable[[], Batch]
    sgd: float
    adam: float
    size: int  # rows of a batch

    def optimizer(self, kind: str, net: nn.Module) -> Optimizer:
        params = net.parameters()
        return SGD(params, self.sgd, momentum=0.9) if kind == "SGD" else Adam(params, self.adam, betas=(0.9, 0.99))

    def batches(self, kind: str) -> Iterator[Batch]:
        (x, y), size = self.pool(), self.size
        if kind == "one batch":
            yield from itertools.repeat((x[:size], y[:size].flatten()))
        for rows, targets in class_batches((x, y), torch.Generator().manual_seed(0), size):
            yield rows, targets.flatten()


def letters_gpt() -> nn.Module:
    """27 letters, 16 at a time: 532 parameters."""
    net = GPT(width=4, depth=1, context=16)
    net.tokens, net.head = nn.Embedding(27, 4), nn.Linear(4, 27, bias=False)
    nn.init.normal_(net.tokens.weight, std=0.02)
    return net


@lru_cache
def letters() -> Batch:
    """512 lines of 16 letters, and the letters that follow: the alphabet in either case, all else is 26."""
    text = corpus()[0][: 512 * 17]
    index = torch.full((256,), 26)
    for case in (b"abcdefghijklmnopqrstuvwxyz", b"ABCDEFGHIJKLMNOPQRSTUVWXYZ"):
        index[list(case)] = torch.arange(26)
    lines = index[text].view(512, 17)
    return lines[:, :-1], lines[:, 1:]


@lru_cache
def images() -> Batch:
    (x, y), _ = digits()
    return place(x[:512], torch.Generator().manual_seed(0), 12), y[:512]


@lru_cache
def signals() -> Batch:
    (x, y), _ = mnist1d(1000)
    return x[:512], y[:512]


def tanh_mlp() -> nn.Module:
    return nn.Sequential(*(nn.Tanh() if isinstance(layer, nn.ReLU) else layer for layer in mlp(20, 2)))


TRACKED = {
    "tanh MLP": Tracked(tanh_mlp, signals, sgd=0.1, adam=1e-2, size=64),
    "ReLU conv": Tracked(partial(small_conv, 3), images, sgd=0.1, adam=1e-2, size=32),
    "GELU GPT": Tracked(letters_gpt, letters, sgd=0.1, adam=1e-2, size=16),
}


def dense_hessian(net: nn.Module, batch: Batch, chunk: int = 256) -> Tensor:
    """[n, n] in float64, by double backward on a copy of the net, row by row."""
    twin = copy.deepcopy(net).double()
    params = list(twin.parameters())
    x, y = batch
    with sdpa_kernel(SDPBackend.MATH):
        loss = loss_of(twin, (x.double() if x.is_floating_point() else x, y))
        rows = []
        for gradient in torch.autograd.grad(loss, params, create_graph=True):
            units = torch.eye(gradient.numel(), dtype=torch.float64).view(-1, *gradient.shape)
            for unit in units.split(chunk):
                columns = torch.autograd.grad(
                    gradient, params, unit, retain_graph=True, is_grads_batched=True, materialize_grads=True
                )
                rows.append(torch.cat([column.flatten(1) for column in columns], 1))
    return torch.cat(rows)


def preconditioner(net: nn.Module, optimizer: Optimizer) -> Tensor:
    """P [n] of Adam's coming step, √v̂ + ε with the present gradient in v̂, in float64; 1 for SGD."""
    parts = []
    for p in net.parameters():
        assert p.grad is not None
        if not isinstance(optimizer, Adam):
            parts.append(torch.ones(p.numel(), dtype=torch.float64))
            continue
        group, state = optimizer.param_groups[0], optimizer.state[p]
        beta, g = group["betas"][1], p.grad.double()
        past = state["exp_avg_sq"].double() if state else torch.zeros_like(g)
        steps = float(state["step"]) if state else 0.0
        second = (beta * past + (1 - beta) * g**2) / (1 - beta ** (steps + 1))
        parts.append((second.sqrt() + group["eps"]).flatten())
    return torch.cat(parts)


def top_eigenvalue(matrix: Tensor) -> float:
    """The largest algebraic one of a symmetric matrix [n, n]."""
    start = torch.ones(len(matrix), dtype=torch.float64).numpy()
    return float(eigsh(matrix.numpy(), k=1, which="LA", tol=1e-10, v0=start, return_eigenvectors=False)[0])


def true_sharpness(net: nn.Module, optimizer: Optimizer, batch: Batch) -> float:
    """λ_max(P^-½HP^-½) at the coming step, its gradient in `.grad`."""
    root = preconditioner(net, optimizer).rsqrt()
    return top_eigenvalue(root[:, None] * dense_hessian(net, batch) * root)


def trajectory(model: Tracked, kind: str, batches: str, steps: int) -> Row:
    """The truth at each step of plain training, and a number that tells trajectories apart."""
    net = built(model.make)
    optimizer = model.optimizer(kind, net)
    truth, losses = [], []
    for batch in itertools.islice(model.batches(batches), steps):
        optimizer.zero_grad()
        loss = loss_of(net, batch)
        loss.backward()
        truth.append(true_sharpness(net, optimizer, batch))
        losses.append(float(loss.detach()))
        optimizer.step()
    return {"truth": truth, "losses": losses, "end": fingerprint(net)}


def fingerprint(net: nn.Module) -> float:
    return float(sum(p.detach().double().square().sum() for p in net.parameters()))


def tracked(model: Tracked, kind: str, batches: str, hvp: str, every: int, products: int, known: Row) -> Row:
    """Errors of the sharpness that the wrapper reports along the trajectory `known`; it watches and controls nothing.

    `probe` errors are those of steps with a probe but the first, `held` errors those of all steps after it, between
    probes against a truth that has moved on.
    """
    net = built(model.make)
    optimizer: Any = AdaptiveWarmup(
        model.optimizer(kind, net), net, control=False, hvp=hvp, every=every, probe_steps=products, seed=0
    )
    for batch in itertools.islice(model.batches(batches), len(known["truth"])):

        def closure(batch: Batch = batch) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(net, batch)
            loss.backward()
            return loss

        optimizer.step(closure)
    if fingerprint(net) != known["end"]:
        raise RuntimeError("the wrapper was to watch, but it has changed the trajectory")
    history = list(optimizer.history)
    errors = [relative_error(row["sharpness"], truth) for row, truth in zip(history, known["truth"], strict=True)]
    probed = [error for error, row in zip(errors, history, strict=True) if row["probed"]][1:]
    first, last = history[0], history[-1]
    spent = last["overhead"] * last["step"] - first["overhead"] * first["step"]
    return {
        "probes": len(probed),
        "gradients a probe": spent / max(len(probed), 1),
        "products a step": (last["hvps"] - first["hvps"]) / max(len(history) - 1, 1),
        "probe median": median(probed),
        "probe p95": percentile(probed, 95),
        "held median": median(errors[1:]),
        "held p95": percentile(errors[1:], 95),
    }


def percentile(values: Sequence[float], q: float) -> float:
    return float(np.percentile(list(values), q))


# -- the command ------------------------------------------------------------------------------------------


def measure_tracking(results: Results, quick: bool, steps: int) -> list[Row]:
    rows = []
    for model, kind, batches in itertools.product(TRACKED, ("SGD", "Adam"), ("one batch", "mini-batches")):
        if quick and (model == "GELU GPT" or (model, kind) == ("ReLU conv", "Adam") or batches == "mini-batches"):
            continue
        key = f"truth: {model} {kind} {batches}"
        known = results.get(key) or results.add(key, trajectory(TRACKED[model], kind, batches, steps))
        for hvp, every, products in itertools.product((PLAIN,) if quick else (PLAIN, EXACT), CADENCES, PRODUCTS):
            names: Row = {"model": model, "optimizer": kind, "data": batches, "hvp": hvp}
            names |= {"every": every, "products": products}
            key = f"track: {' '.join(str(value) for value in names.values())}"
            if results.get(key) is None:
                results.add(key, names | tracked(TRACKED[model], kind, batches, hvp, every, products, known))
            rows.append(results.rows[key])
    return rows


def summarised(rows: list[Row]) -> list[Row]:
    """Medians over models and optimizers."""
    found = []
    columns = ("gradients a probe", "products a step", "probe median", "probe p95", "held median", "held p95")
    keys = ("data", "hvp", "every", "products")
    for cell in dict.fromkeys(tuple(row[key] for key in keys) for row in rows):
        members = [row for row in rows if tuple(row[key] for key in keys) == cell]
        worst = max(members, key=lambda row: row["probe median"])
        found.append(
            dict(zip(keys, cell, strict=True))
            | {column: median([row[column] for row in members]) for column in columns}
            | {"worst median": worst["probe median"], "where": f"{worst['model']} {worst['optimizer']}"}
        )
    return found


def measure_cold(results: Results, quick: bool, names: list[str]) -> list[Row]:
    seeds, rounds = (SEEDS[:1], 1) if quick else (SEEDS, 4)
    rows = []
    for model, trained in itertools.product(["MLP"] if quick else list(COLD), (50,) if quick else (50, 0)):
        label = f"{model}, {f'after {trained} steps' if trained else 'at the start'}"
        net, batch = COLD[model].trained(trained)
        known = results.get(f"reference: {label}")
        if known is None:
            truth = {"parameters": size_of(net), "top": reference(net, batch)}
            known = results.add(f"reference: {label}", truth)
        for name in names:
            key = f"search: {label}: {name}"
            if results.get(key) is None:
                results.add(key, search(name, net, batch, known["top"], seeds))
        found = {name: results.rows[f"search: {label}: {name}"]["chosen"] for name in names}
        chosen = {name: row for name, row in found.items() if row is not None}
        key = f"compared: {label}"
        timed = results.get(key) or results.add(key, compared(net, batch, chosen, seeds, rounds))
        for name in names:
            row: Row = {"problem": label, "library": name, "top": known["top"]}
            if name in chosen:
                key = f"memory: {label}: {name}"
                peak = results.get(key) or results.add(
                    key, {"MiB": peak_memory(name, net, batch, chosen[name]["setting"])}
                )
                row |= timed[name] | {"peak MiB": peak["MiB"]}
            else:
                row |= {"setting": "1 % not reached"}
            rows.append(row)
        ours = rows[-len(names)]
        for row in rows[-len(names) :]:
            if "peak MiB" in row and "peak MiB" in ours:
                row["memory times ours"] = row["peak MiB"] / ours["peak MiB"]
    return rows


def judged(tracking: list[Row], cold: list[Row]) -> dict[str, Row]:
    """Each target, the figure, and whether it is met in every row that it is about; None where there is no row."""
    found: dict[str, Row] = {}
    for data, every in itertools.product(("one batch", "mini-batches"), CADENCES):
        rows = [r for r in tracking if (r["data"], r["every"], r["products"], r["hvp"]) == (data, every, 2, PLAIN)]
        if not rows:
            continue
        good = [row["probe median"] <= 0.02 and row["gradients a probe"] <= 2.01 for row in rows]
        middle, worst = (f([row["probe median"] for row in rows]) for f in (median, max))
        cost = max(row["gradients a probe"] for row in rows)
        found[f"warm, {data}, every {every}: median error within 2 % for 2 gradient evaluations a probe"] = {
            "figure": f"{sum(good)} of {len(rows)} rows; median {middle:.1%}, worst {worst:.1%}, at most {cost:.2f}",
            "met": all(good),
        }
    for column, factor, target in (
        ("times ours", 2.0, "cold: the next library takes at least 2 times our seconds"),
        ("memory times ours", 1.0, "cold: peak memory below every peer's"),
    ):
        nearest: dict[str, tuple[float, str]] = {}
        for row in cold:
            if row["library"] != "warmctl":
                near = (row.get(column) or float("inf"), row["library"])
                nearest[row["problem"]] = min(nearest.get(row["problem"], near), near)
        for row in cold:
            if row["library"] == "warmctl" and column not in row:
                nearest[row["problem"]] = (0.0, "we do not reach 1 %")
        met = [ratio >= factor if factor > 1 else ratio > factor for ratio, _ in nearest.values()]
        figure = "; ".join(f"{problem}: {ratio:.2f} ({name})" for problem, (ratio, name) in nearest.items())
        found[target] = {"figure": figure, "met": all(met) if met else None}
    return found


def figure(tracking: list[Row], cold: dict[str, list[Row]], path: Path) -> None:
    """Above, error between probes against evaluations a step, one batch; below, error against products from cold."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    canvas, axes = plt.subplots(2, 3, figsize=(13, 7.5), sharey="row")
    for axis, model in zip(axes[0], TRACKED, strict=True):
        rows = [row for row in tracking if row["model"] == model and row["data"] == "one batch"]
        for (hvp, dash), (index, every) in itertools.product(((PLAIN, "-"), (EXACT, ":")), enumerate(CADENCES)):
            points = curve([row for row in rows if (row["hvp"], row["every"]) == (hvp, every)])
            if points:
                label = f"every {every}, {hvp}"
                axis.loglog(*zip(*points, strict=True), dash, marker="o", ms=4, color=f"C{index}", label=label)
        axis.axhline(0.02, color="0.6", lw=1)
        axis.set(title=f"tracked: {model}", xlabel="gradient evaluations for probes, a training step")
    axes[0, 0].set_ylabel("median error over all steps")
    for axis, (label, rows) in zip(axes[1], cold.items(), strict=False):
        for index, name in enumerate(CALLS):
            for differences, marker in ((False, "o"), (True, "x")):  # x: finite differences
                tries = [row for row in rows if row["library"] == name]
                tries = [r for r in tries if (r["setting"].get("method") == "finite_difference") is differences]
                products = [p for row in tries for p in row["products"]]
                errors = [max(e, 1e-8) for row in tries for e in row["errors"]]
                label_once = None if differences else name
                axis.semilogy(products, errors, marker, ms=5, color=f"C{index}", label=label_once)
        axis.axhline(ERROR, color="0.6", lw=1)
        axis.set(title=f"cold: {label}", xlabel="products (x: by finite differences)")
    axes[1, 0].set_ylabel("error, settings tried")
    for axis in axes.flat:
        axis.set_visible(axis.has_data())
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[:, 0]:
        axis.legend(fontsize=7)
    canvas.tight_layout()
    canvas.savefig(path, dpi=110)
    plt.close(canvas)


def curve(rows: list[Row]) -> list[tuple[float, float]]:
    """Gradient evaluations a training step and the error between probes, one point for each number of products."""
    found = []
    for products in PRODUCTS:
        cell = [row for row in rows if row["products"] == products]
        if cell:
            spent = median([row["gradients a probe"] / row["every"] for row in cell])
            found.append((spent, median([row["held median"] for row in cell])))
    return found


TRACKING = {
    "model": "{}", "optimizer": "{}", "data": "{}", "hvp": "{}", "every": "{}", "gradients a probe": "{:.2f}",
    "probe median": "{:.2%}", "probe p95": "{:.2%}", "held median": "{:.2%}", "held p95": "{:.2%}",
}  # fmt: skip
SUMMARY = {
    "data": "{}", "hvp": "{}", "every": "{}", "products": "{}", "gradients a probe": "{:.2f}",
    "probe median": "{:.2%}", "probe p95": "{:.2%}", "held median": "{:.2%}", "held p95": "{:.2%}",
    "worst median": "{:.2%}", "where": "{}",
}  # fmt: skip
COLD_START = {
    "problem": "{}", "library": "{}", "setting": "{}", "error %": "{:.2f}", "products": "{:.1f}", "seconds": "{:.2f}",
    "gradients": "{:.1f}", "times ours": "{:.2f}", "peak MiB": "{:.0f}", "memory times ours": "{:.2f}",
}  # fmt: skip

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(quick: Quick = False, threads: int = 1) -> None:
    """Measure everything, print it, write it to benchmarks/results."""
    torch.set_num_threads(threads)
    steps = 21 if quick else 61
    results = Results("tracks_sharpness", {"quick": quick, "threads": threads, "steps": steps}, fresh=quick)
    tracking = measure_tracking(results, quick, steps)
    two = [row for row in tracking if row["products"] == 2]
    table("1a. Warm tracking with 2 products a probe, against dense Hessians", two, TRACKING)
    table("1b. Error against products spent: medians over the rows", summarised(tracking), SUMMARY)

    names, missing = installed()
    for name, why in missing.items():
        console.print(f"left out: {name} ({why}); how to install it: top of benchmarks/tracks_sharpness.py")
    cold = measure_cold(results, quick, names)
    table("2. From cold to 1 %", cold, COLD_START)

    targets = judged(tracking, cold)
    table(
        "Targets",
        [{"target": key, **value} for key, value in targets.items()],
        {"target": "{}", "figure": "{}", "met": "{}"},
    )
    searched: dict[str, list[Row]] = {}
    for label, name in itertools.product(dict.fromkeys(row["problem"] for row in cold), names):
        if label.endswith("steps"):
            tries = results.rows[f"search: {label}: {name}"]["tried"]
            searched.setdefault(label, []).extend({"library": name, **row} for row in tries)
    image = results.path.with_suffix(".png")
    figure(tracking, searched, image)
    results.finish({"targets": targets, "left out": missing})
    console.print(f"written to {results.path} and {image.name}")


if __name__ == "__main__":
    app()
