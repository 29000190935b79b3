"""Runs that are measured and not controlled: the ratio along training, Adam's first step, the bias of mini-batches."""

from __future__ import annotations

import math
import statistics
from itertools import islice

import numpy as np
import torch
from torch import nn
from torch.optim import SGD

from benchmarks.edge_of_stability.problem import (
    SETTINGS,
    Loss,
    Setting,
    closure_for,
    oracle_ratio,
    signals,
    square_loss,
    tanh_mlp,
)
from benchmarks.edge_of_stability.series import SETTLED, thinned
from benchmarks.harness.data import Batch
from benchmarks.harness.results import Row
from warmctl import AdaptiveWarmup, sharpness

EVERY, PRODUCTS = 10, 5
"""Steps between the monitor's probes and Hessian-vector products a probe, by double backward."""
BACK = 1.05, 10
"""A run is back at the edge where a probe, and the median of so many from it on, are no higher than this."""
WIDTHS = (20, 40, 80, 160, 320)  # only to see what Adam's first step depends on; no verdict rests on them
BIAS = {8: 7.7, 32: 2.7, 128: 1.3, 512: 1.02}  # batch size -> expected λ_max over that of all 1000 examples


def monitored(setting: Setting, seed: int, steps: int, width: int = 40) -> Row:
    """Train with a monitor; its ratios η λ / τ at the probes, and the oracle's at five of them.

    The ratio is made from the probe's own `sharpness`: `stability_ratio` is the controller's forecast, which falls
    slowly on purpose. A run that diverges has no more than the step of that and the ratios until then.
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
        if not math.isfinite(optimizer.step(closure).item()):
            break
    probes = [row for row in optimizer.history if row["probed"] and math.isfinite(row["sharpness"])]
    ratios = {row["step"]: row["sharpness"] * row["lr"] / row["threshold"] for row in probes}
    if not math.isfinite(optimizer.history[-1]["loss"]):
        return {"diverged": step, "series": thinned(ratios)}
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


def bias(steps: int, epochs: int, most: int, loss_fn: Loss = square_loss) -> Row:
    """Mean over mini-batches of λ_max over that of all 1000 examples, at initialisation and after training by GD.

    Batches of an epoch do not overlap: so many epochs, at most `most` batches of each size.
    """
    everything, model = signals(1000), tanh_mlp(0)
    optimizer = SGD(model.parameters(), lr=0.3)
    found: Row = {"initial": batch_sharpness(model, everything, epochs, most, loss_fn)}
    closure = closure_for(optimizer, model, everything, loss_fn)
    for _ in range(steps):
        optimizer.step(closure)
    found["trained"] = batch_sharpness(model, everything, epochs, most, loss_fn)
    exact = oracle_ratio(model, everything, SGD(model.parameters(), lr=1.0), 1.0, loss_fn)
    return found | {"oracle": exact, "oracle error": abs(found["trained"]["all"] / exact - 1)}


def batch_sharpness(model: nn.Module, everything: Batch, epochs: int, most: int, loss_fn: Loss = square_loss) -> Row:
    (x, y), generator = everything, torch.Generator().manual_seed(0)
    whole = sharpness(model, loss_fn, everything).eigenvalue
    found: Row = {"all": whole}
    for size in BIAS:
        orders = (torch.randperm(len(x), generator=generator) for _ in range(epochs))
        batches = islice((rows for order in orders for rows in order[: len(x) // size * size].split(size)), most)
        values = [sharpness(model, loss_fn, (x[rows], y[rows])).eigenvalue / whole for rows in batches]
        found[str(size)] = {
            "mean": statistics.fmean(values),
            "standard error": statistics.stdev(values) / math.sqrt(len(values)),
            "batches": len(values),
        }
    return found
