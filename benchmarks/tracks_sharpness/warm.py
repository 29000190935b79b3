"""Part 1: the sharpness that the wrapper reports along a trajectory, against the truth of the trajectory itself."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from benchmarks.harness.data import Batch
from benchmarks.harness.results import Results, Row, median
from benchmarks.tracks_sharpness.nets import TRACKED, Tracked, built, loss_of
from benchmarks.tracks_sharpness.truth import relative_error, true_sharpness
from warmctl import AdaptiveWarmup

CADENCES, PRODUCTS = (1, 5, 20), (1, 2, 3, 4, 5)
PLAIN, EXACT = "auto", "double_backward"
"""Products as the wrapper takes them by default, and exact ones, which tell its differences' error from the rest."""


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
        model.optimizer(kind, net), net, control=False, hvp=hvp, every=every, probe_steps=products, max_warmup=1
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


def measure_tracking(results: Results, quick: bool, steps: int) -> list[Row]:
    rows = []
    for model, kind, batches in itertools.product(TRACKED, ("SGD", "Adam"), ("one batch", "mini-batches")):
        if quick and (model == "GELU GPT" or (model, kind) == ("ReLU conv", "Adam") or batches == "mini-batches"):
            continue
        key = f"truth: {model} {kind} {batches}"
        known = results.row(key, trajectory, TRACKED[model], kind, batches, steps)
        for hvp, every, products in itertools.product((PLAIN,) if quick else (PLAIN, EXACT), CADENCES, PRODUCTS):
            names: Row = {"model": model, "optimizer": kind, "data": batches, "hvp": hvp}
            names |= {"every": every, "products": products}
            key = f"track: {' '.join(str(value) for value in names.values())}"
            choices = (TRACKED[model], kind, batches, hvp, every, products, known)
            rows.append(results.row(key, lambda names, *which: names | tracked(*which), names, *choices))
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
