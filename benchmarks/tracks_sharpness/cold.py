"""Part 2: λ_max from cold by each library at the cheapest setting that reaches one percent, in time and products."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness.data import Batch
from benchmarks.harness.models import size_of
from benchmarks.harness.results import Results, Row, median
from benchmarks.harness.timing import interleaved, relative
from benchmarks.tracks_sharpness.libraries import LADDERS, LIMIT, Setting, call
from benchmarks.tracks_sharpness.memory import peak_memory
from benchmarks.tracks_sharpness.nets import COLD, loss_of
from benchmarks.tracks_sharpness.truth import reference, relative_error

ERROR, SEEDS = 0.01, (0, 1, 2)


def tried(name: str, net: nn.Module, batch: Batch, truth: float, setting: Setting, seeds: Sequence[int]) -> Row:
    """Errors, products and seconds of one setting, seed by seed until one is off by more than ERROR."""
    row: Row = {"setting": dict(setting), "errors": [], "products": [], "seconds": []}
    for seed in seeds:
        start = time.perf_counter()
        eigenvalue, products = call(name, net, batch, seed, setting)
        row["seconds"].append(time.perf_counter() - start)
        row["errors"].append(relative_error(eigenvalue, truth))
        row["products"].append(products)
        if row["errors"][-1] > ERROR:
            break
    row["reached"] = max(row["errors"]) <= ERROR
    return row


def search(name: str, net: nn.Module, batch: Batch, truth: float, seeds: Sequence[int]) -> Row:
    """Climb each ladder to the first setting that reaches ERROR for all seeds, and keep the fastest of these.

    A ladder is left where a setting has taken LIMIT products.
    """
    rows, best = [], None
    for ladder in LADDERS[name]:
        for setting in ladder:
            rows.append(tried(name, net, batch, truth, setting, seeds))
            if rows[-1]["reached"]:
                if best is None or sum(rows[-1]["seconds"]) < sum(best["seconds"]):
                    best = rows[-1]
                break
            if max(rows[-1]["products"]) >= LIMIT:
                break
    return {"tried": rows, "chosen": best}


def compared(net: nn.Module, batch: Batch, chosen: dict[str, Row], seeds: Sequence[int], rounds: int) -> dict[str, Row]:
    """Seconds of each library at its setting and of a gradient, in turn; each round another seed."""

    def gradient() -> None:
        with sdpa_kernel(SDPBackend.MATH):
            torch.autograd.grad(loss_of(net, batch), list(net.parameters()))

    calls: dict[str, Callable[[], Any]] = {"gradient": gradient}
    for name, row in chosen.items():
        turn = itertools.cycle(seeds)
        calls[name] = lambda name=name, row=row, turn=turn: call(name, net, batch, next(turn), row["setting"])
    times = interleaved(calls, rounds)
    return {
        name: {
            "setting": " ".join(f"{key}={value}" for key, value in row["setting"].items()),
            "error %": 100 * max(row["errors"]),
            "products": float(np.mean(row["products"])),
            "seconds": median(times[name]),
            "gradients": relative(times, name, "gradient"),
            "times ours": relative(times, name, "warmctl"),
        }
        for name, row in chosen.items()
    }


def measure_cold(results: Results, quick: bool, names: list[str]) -> list[Row]:
    rows = []
    for model, trained in itertools.product(["MLP"] if quick else list(COLD), (50,) if quick else (50, 0)):
        label = f"{model}, {f'after {trained} steps' if trained else 'at the start'}"
        net, batch = COLD[model].trained(0 if results.only_report else trained)  # a report measures nothing on it
        rows += measure_problem(results, quick, names, label, net, batch)
    return rows


def measure_problem(
    results: Results, quick: bool, names: list[str], label: str, net: nn.Module, batch: Batch
) -> list[Row]:
    """A row for each library, warmctl's first."""
    seeds, rounds = (SEEDS[:1], 1) if quick else (SEEDS, 4)
    known = results.row(f"reference: {label}", truth_of, net, batch)
    found = {n: results.row(f"search: {label}: {n}", search, n, net, batch, known["top"], seeds) for n in names}
    chosen = {name: row["chosen"] for name, row in found.items() if row["chosen"] is not None}
    timed = results.row(f"compared: {label}", compared, net, batch, chosen, seeds, rounds)
    rows: list[Row] = []
    for name in names:
        row: Row = {"problem": label, "library": name, "top": known["top"]}
        if name in chosen:
            key = f"memory: {label}: {name}"
            row |= timed[name] | {"peak MiB": results.row(key, memory_of, name, net, batch, chosen[name])["MiB"]}
        else:
            row |= {"setting": "1 % not reached"}
        rows.append(row)
    ours = rows[0]
    for row in rows:
        if "peak MiB" in row and "peak MiB" in ours:
            row["memory times ours"] = row["peak MiB"] / ours["peak MiB"]
    return rows


def truth_of(net: nn.Module, batch: Batch) -> Row:
    return {"parameters": size_of(net), "top": reference(net, batch)}


def memory_of(name: str, net: nn.Module, batch: Batch, chosen: Row) -> Row:
    return {"MiB": peak_memory(name, net, batch, chosen["setting"])}
