"""What the rows come to: log losses against the default's, cell by cell, and how much of a difference is noise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from benchmarks.defaults_are_measured.figure import draw
from benchmarks.defaults_are_measured.trials import RATES, Cell, Trial
from benchmarks.defaults_are_measured.variants import DEFAULT, NOISE, VARIANTS
from benchmarks.harness.results import Results, Row, console, table
from benchmarks.tasks.report import SOFT


def compare(wanted: Sequence[Trial], rows: dict[str, Row]) -> list[Row]:
    """One line a variant that has a row in every cell where the default has one."""
    found: dict[str, dict[Cell, Row]] = {}
    for trial in wanted:
        row = rows.get(trial.key)
        if row is not None:
            found.setdefault(trial.variant, {})[trial.cell] = row
    default = found.get(DEFAULT, {})
    return [line(name, cells, default) for name, cells in found.items() if default and set(cells) >= set(default)]


def line(name: str, cells: dict[Cell, Row], default: dict[Cell, Row]) -> Row:
    logs = {cell: score(cells[cell]) - score(row) for cell, row in default.items()}
    worst = max(logs, key=logs.__getitem__)
    by_rate = {rate: [log for cell, log in logs.items() if cell[1] == rate] for rate in RATES}
    return {
        "group": VARIANTS[name].group,
        "variant": name,
        **{rate: mean(values) for rate, values in by_rate.items() if values},
        "all": mean(logs.values()),
        "error": math.sqrt(variance(logs.values()) / len(logs)),
        "worst": f"{logs[worst]:+.2f} task {worst[0]} {worst[1]}" if name != DEFAULT else "",
        "better": sum(log < 0 for log in logs.values()),
        "cells": len(logs),
        "failed": sum(failed(cells[cell]) for cell in default),
        "evals": mean(cells[cell]["overhead"] for cell in default),
        "rms": math.sqrt(mean(log * log for log in logs.values())),
    }


def score(row: Row) -> float:
    """log(loss + f), f as in `benchmarks.tasks`; a run that ended above its start counts as the start."""
    return math.log((row["start"] if failed(row) else row["loss"]) + SOFT * row["start"])


def failed(row: Row) -> bool:
    return row["loss"] is None or row["loss"] > row["start"]


def variance(values: Iterable[float]) -> float:
    listed = list(values)
    return mean((value - mean(listed)) ** 2 for value in listed)


def noise(lines: Sequence[Row]) -> float:
    """Two standard errors of a mean over all cells: of one cell, what a target 2 % off does. nan if not measured."""
    rms = [each["rms"] for each in lines if each["variant"] in NOISE]
    return 2 * math.sqrt(mean(value**2 for value in rms) / lines[0]["cells"]) if rms else math.nan


def mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def report(wanted: Sequence[Trial], results: Results) -> None:
    """Print the table, draw the figure, write the summary beside the rows."""
    lines = compare(wanted, results.rows)
    if not lines:
        console.print("the default has no row yet")
        return
    cells, steps = lines[0]["cells"], wanted[0].steps
    form = {"group": "{}", "variant": "{}", **dict.fromkeys((*RATES, "all", "error"), "{:+.3f}"), "worst": "{}"}
    form |= {"better": "{}", "failed": "{}", "evals": "{:.1%}"}
    shown = {key: value for key, value in form.items() if key in lines[0]}
    table(f"log(loss / the default's), {cells} cells, {steps} updates; below 0 better", lines, shown)
    console.print(
        "all, error: mean over cells and its standard error; worst: cell; better: cells below 0; failed: of runs;"
    )
    console.print("evals: gradient evaluations beyond training's. Identical rows: the choice had no effect there.")
    summary = {"lines": lines} | print_noise(lines)
    missing = sorted({t.variant for t in wanted} - {each["variant"] for each in lines}, key=list(VARIANTS).index)
    if missing:
        console.print(f"not measured in every cell yet: {', '.join(missing)}")
    codes = {row["code"].split("+")[1] for row in results.rows.values()}
    if len(codes) > 1:
        console.print(f"the rows come from {len(codes)} versions of the library; run again to renew them")
    draw(lines, noise(lines), results.path.with_suffix(".png"), steps)
    results.finish(summary | {"missing": missing})
    console.print(f"rows, summary and figure: {results.path.with_suffix('')}.*")


def print_noise(lines: Sequence[Row]) -> Row:
    """What noise comes to and which variants are better beyond it; nothing where it was not measured."""
    within = noise(lines)
    if not math.isfinite(within):
        return {}
    of_rate = within * math.sqrt(len(RATES))
    safe = [each for each in lines if each["failed"] <= lines[0]["failed"]]
    better = [each["variant"] for each in safe if each["all"] < -within]
    console.print(f"noise, from the targets 2 % off: ±{within:.3f} on a mean of all cells, ±{of_rate:.3f} at one rate")
    console.print(f"better than the default beyond noise, no more failures: {', '.join(better) or 'none'}")
    return {"noise": within, "better beyond noise": better}
