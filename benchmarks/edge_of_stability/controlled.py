"""Runs that warmctl holds on the edge and below it."""

from __future__ import annotations

import statistics
from functools import partial

from torch.optim import SGD, Adam, Optimizer

from benchmarks.edge_of_stability.problem import closure_for, oracle_ratio, signals, tanh_mlp
from benchmarks.edge_of_stability.series import SETTLED, diverged, thinned
from benchmarks.harness.results import Row
from warmctl import AdaptiveWarmup

TARGETS = 0.5, 1.0
EDGES = {SGD: 2.0, Adam: 38.0}
CONTROLLED = {"GD": partial(SGD, lr=3.0), "Adam": partial(Adam, lr=0.03, betas=(0.9, 0.99))}
"""Ten times the rates above."""


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
    losses = {row["step"]: row["loss"] for row in history}
    curves = {"losses": thinned(losses), "rates": thinned({row["step"]: row["lr"] for row in history})}
    if lost := diverged(losses, steps // 50):
        return {"diverged": lost, **curves}
    last = history[-1]
    probe = last["sharpness"] * last["lr"] / last["threshold"]
    ended = next((row["step"] for row in history if row["phase"] != "warmup"), None)
    return {
        "loss": statistics.median(row["loss"] for row in history[-steps // 50 :]),
        "rate": history[-1]["lr"],
        "ratio": statistics.median(row["stability_ratio"] for row in history[-int(SETTLED * steps) :]),
        "warmup ended": ended,
        "oracle error": abs(probe / (last["scale"] * exact) - 1),
        **curves,
    }
