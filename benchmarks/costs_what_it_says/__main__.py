"""The command: the five parts, each measured, kept and printed, and the targets over all of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import typer

from benchmarks.costs_what_it_says.growth import budget, probe_price
from benchmarks.costs_what_it_says.memory import added_memory
from benchmarks.costs_what_it_says.products import products
from benchmarks.costs_what_it_says.steps import step_when_done, training_steps
from benchmarks.costs_what_it_says.training import MODELS, TINY, signals
from benchmarks.harness.models import mlp
from benchmarks.harness.results import Quick, Report, Results, Row, console, table

WIDTHS = {1e4: 58, 1e5: 206, 1e6: 690, 1e7: 2220}
"""Of an MLP of three hidden layers, by its number of parameters."""


@dataclass
class Measured:
    """The rows of each part, taken from the file or measured."""

    results: Results
    quick: bool
    parts: dict[str, list[Row]] = field(default_factory=dict)

    def row(self, part: str, names: Row, measure: Callable[..., Row], *args: Any) -> None:
        key = f"{part}: {' '.join(str(value) for value in names.values())}"
        found = self.results.row(key, lambda: {**names, **measure(*args)})
        self.parts.setdefault(part, []).append(found)


def measure_products(measured: Measured) -> None:
    for name, (make, stream, size, _) in MODELS.items():
        measured.row("products", {"model": name}, products, make, next(stream(size)), 9 if measured.quick else 41)
    table("1. Products, in gradient evaluations by time", measured.parts["products"], PRODUCTS)


def measure_memory(measured: Measured) -> None:
    for name, (make, stream, _, _) in MODELS.items():
        for kind, steps in itertools.product(("SGD", "AdamW"), (2,) if measured.quick else (1, 2, 3, 5, 10)):
            names = {"model": name, "optimizer": kind, "products": steps}
            measured.row("memory", names, added_memory, make, stream, getattr(torch.optim, kind), steps)
    table("2. Parameter-sized vectors beyond training, counted in storages", measured.parts["memory"], MEMORY)


def measure_steps(measured: Measured) -> None:
    rounds, pairs = (12, 41) if measured.quick else (300, 401)
    steps = measured.parts.setdefault("steps", [])
    for name, (make, stream, size, rule) in MODELS.items():
        runs = measured.results.row(f"steps: {name}", training_steps, make, stream(size), rule, rounds)
        steps += [{"model": name, "run": run, **values} for run, values in runs.items()]
    table("3a. Training steps against the bare optimizer's, interleaved", steps, STEPS)
    for name, (make, stream, size, rule) in (MODELS | TINY).items():
        measured.row("done", {"model": name}, step_when_done, make, stream(size), rule, pairs)
    table('3b. A step after the end, after="hold", against the bare one', measured.parts["done"], DONE)


def measure_growth(measured: Measured) -> None:
    quick, rounds = measured.quick, 9 if measured.quick else 41
    for count, size in itertools.product(
        list(WIDTHS)[: 3 if quick else 4], (32, 512) if quick else (32, 128, 512, 2048)
    ):
        names, make = {"model": "MLP", "about": count, "batch": size}, partial(mlp, WIDTHS[count], 3)
        measured.row("price", names, probe_price, make, next(signals(size)), 2, rounds)
    make, stream, size, _ = MODELS["GPT"]
    for steps in (1, 5) if quick else (1, 3, 5, 10):
        names = {"model": "GPT", "products": steps}
        measured.row("price", names, probe_price, make, next(stream(size)), steps, 9)
    table("4. A warm probe, in training steps by time", measured.parts["price"], PRICE)


def measure_budget(measured: Measured) -> None:
    problems = ("digits", "mlp-adam") if measured.quick else ("digits", "mlp-adam", "resnet", "gpt", "lstm")
    for problem, factor in itertools.product(problems, (1.0,) if measured.quick else (1.0, 10.0)):
        measured.row("budget", {"problem": problem, "times tuned": factor}, budget, problem, 2000, factor)
    table('5. every="auto" holds its budget', measured.parts["budget"], BUDGET)


PRODUCTS = {
    "model": "{}", "parameters": "{:,}", "gradient ms": "{:.1f}", "forward difference": "{:.2f}",
    "double backward": "{:.2f}", "graph building": "{:.2f}", "forward over reverse": "{:.2f}",
}  # fmt: skip
MEMORY = {"model": "{}", "optimizer": "{}", "products": "{}", "peak": "{:.2f}", "allowed": "{}", "after": "{:.2f}"}
STEPS = {
    "model": "{}", "run": "{}", "phase": "{}", "ms": "{:.2f}", "without probe %": "{:+.2f}", "probes": "{}",
    "one probe": "{:.2f}", "whole %": "{:+.1f}", "metric %": "{:.1f}",
}  # fmt: skip
DONE = {
    "model": "{}", "parameters": "{:,}", "phase": "{}", "bare ms": "{:.2f}", "extra ms": "{:+.3f}",
    "extra %": "{:+.2f}",
}  # fmt: skip
PRICE = {
    "model": "{}", "parameters": "{:,}", "batch": "{}", "products": "{}", "ms": "{:.2f}", "probe in steps": "{:.2f}",
    "per product": "{:.2f}",
}  # fmt: skip
BUDGET = {
    "problem": "{}", "rate": "{:g}", "metric % at 400": "{:.1f}", "wall % at 400": "{:+.1f}",
    "metric % at 2000": "{:.1f}", "wall % at 2000": "{:+.1f}", "phase": "{}",
}  # fmt: skip


def judged(measured: dict[str, list[Row]]) -> dict[str, bool]:
    """Each target, and whether every row meets it."""
    slack = 0.05  # activations of two examples
    budgets = measured["budget"]
    return {
        "forward difference at most 1.15": all(row["forward difference"] <= 1.15 for row in measured["products"]),
        "double backward on a kept graph at most 2.5": all(r["double backward"] <= 2.5 for r in measured["products"]),
        "memory at most products + 3": all(row["peak"] <= row["allowed"] + slack for row in measured["memory"]),
        "one vector left after a probe": all(row["after"] <= 1 + slack for row in measured["memory"]),
        "done: within 1 % of the bare step at 1e6 parameters": all(
            row["extra %"] <= 1.0 for row in measured["done"][:-1]
        ),
        "overhead at 400 at most 12 %": all(row["metric % at 400"] <= 12 for row in budgets),
        "overhead at 2000 at most 5 %": all(row["metric % at 2000"] <= 5 for row in budgets),
        "wall within 2 points of it at 2000": all(
            row["wall % at 2000"] - row["metric % at 2000"] <= 2 for row in budgets
        ),
    }


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(quick: Quick = False, threads: int = 1, only_report: Report = False) -> None:
    """Measure everything, print it, write it to benchmarks/results."""
    torch.set_num_threads(threads)
    settings = {"quick": quick, "threads": threads}
    results = Results("costs_what_it_says", settings, fresh=quick and not only_report, only_report=only_report)
    measured = Measured(results, quick)
    for part in (measure_products, measure_memory, measure_steps, measure_growth, measure_budget):
        part(measured)
    targets = judged(measured.parts)
    table("Targets", [{"target": k, "met": met} for k, met in targets.items()], {"target": "{}", "met": "{}"})
    results.finish(targets)
    console.print(f"written to {results.path}")


if __name__ == "__main__":
    app()
