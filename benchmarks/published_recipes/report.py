"""Tables, the summary beside the rows, the figures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.harness import results
from benchmarks.harness.cells import student
from benchmarks.harness.results import Results, Row, console, table
from benchmarks.published_recipes.comparison import LIMITS, Comparison, comparisons
from benchmarks.published_recipes.figure import draw, draw_curves
from benchmarks.published_recipes.recipe import OURS

WORDS = {"loss": "validation loss in nats", "error": "test error"}


def report(rows: Iterable[Row], name: str, settings: Row, only_report: bool = False) -> dict[str, Any]:
    """Print the tables, draw the figures, write the summary beside them."""
    rows = list(rows)
    ours = {row["code"].split("+")[-1] for row in rows if row["policy"] == OURS}
    if len(ours) > 1:
        console.print(f"warmctl's rows come from {len(ours)} versions of its code; run again to renew them")
    groups = comparisons(rows)
    summary = {}
    for group in groups:
        print_scores(group)
        lines = list(gaps(group))
        if lines:
            print_gaps(group, lines)
        summary[f"{group.recipe}, {group.steps} updates"] = summarised(group, lines)
    stem = f"{name}{'-quick' if settings.get('quick') else ''}"
    over_rates = [group for group in groups if len(group.multiples) > 1]
    draw(over_rates or groups, results.RESULTS / f"{stem}.png")
    draw_curves(groups, results.RESULTS / f"{stem}-curves.png")
    Results(name, settings, fresh=True, only_report=only_report).finish(summary)
    console.print(f"summary and figures: {results.RESULTS}/{stem}.*, {stem}-curves.png")
    return summary


def print_scores(group: Comparison) -> None:
    lines = [score_line(group, policy) for policy in group.policies]
    columns = {"policy": "{}", **{times(multiple): "{}" for multiple in group.multiples}}
    columns |= {"failed": "{}", "evals": "{:+.1%}"}
    stated = "" if group.stated is None else f"; published: {group.stated:g}"
    seeds = f"{group.seeds} seed{'s' * (group.seeds > 1)}"
    table(f"{group.recipe}, {group.steps} updates: {WORDS[group.by]}, {seeds}{stated}", lines, columns)
    console.print("± half of the 95 % interval over seeds. evals: gradient evaluations beyond those of the updates.")


def score_line(group: Comparison, policy: str) -> Row:
    cells = [(policy, multiple) for multiple in group.multiples if (policy, multiple) in group.cells]
    failed, runs = group.failures(policy)
    return {
        "policy": policy + (" (published)" if policy == group.published and not policy.startswith("published") else ""),
        **{times(cell[1]): with_interval(*student(group.scores(cell))) for cell in cells},
        "failed": f"{failed}/{runs}",
        "evals": group.price(policy),
    }


def gaps(group: Comparison) -> Iterable[Row]:
    """A row a rate at which warmctl ran and has something to be held against."""
    for multiple in group.multiples:
        reference = group.reference(multiple)
        if (OURS, multiple) not in group.cells or reference is None:
            continue
        gap, interval = group.gap(multiple)
        line = {
            "rate": times(multiple), "against": f"{reference[0]} at {times(reference[1])}",
            "its score": group.mean(reference), "warmctl": group.mean((OURS, multiple)), "gap": gap, "±": interval,
        }  # fmt: skip
        if group.by in LIMITS:
            line["limit"] = LIMITS[group.by][multiple != 1]
            line["met"] = gap <= line["limit"]
        yield line


def print_gaps(group: Comparison, lines: Sequence[Row]) -> None:
    form = {
        "rate": "{}", "against": "{}", "its score": "{:.3f}", "warmctl": "{:.3f}", "gap": "{:+.3f}", "±": "{:.3f}",
        "limit": "{:.2f}", "met": "{}",
    }  # fmt: skip
    shown = [{key: value for key, value in line.items() if not is_nan(value)} for line in lines]
    columns = {key: value for key, value in form.items() if any(key in line for line in shown)}
    table(
        f"{group.recipe}, {group.steps} updates: warmctl against the published warmup, then best by hand",
        shown,
        columns,
    )


def summarised(group: Comparison, lines: Sequence[Row]) -> Row:
    best = group.best_by_hand()
    cells = [(policy, multiple) for policy in group.policies for multiple in group.multiples]
    return {
        "score": WORDS[group.by],
        "published score": group.stated,
        "seeds": group.seeds,
        "scores": {
            f"{policy} at {times(multiple)}": dict(
                zip(("mean", "±"), student(group.scores((policy, multiple))), strict=True)
            )
            for policy, multiple in cells
            if (policy, multiple) in group.cells
        },
        "best by hand": best and {"cell": f"{best[0]} at {times(best[1])}", "mean": group.mean(best)},
        "failed": {policy: "/".join(map(str, group.failures(policy))) for policy in group.policies},
        "price": {policy: group.price(policy) for policy in group.policies},
        "warmctl": list(lines),
    }


def times(multiple: float) -> str:
    return f"{multiple:g} ×"


def with_interval(mean: float, half: float) -> str:
    return f"{mean:.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}")


def is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)
