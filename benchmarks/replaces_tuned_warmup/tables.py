"""The tables of the claim: each problem's cells, the policies over all of them, the targets."""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmarks.harness.cells import Cell, best_cell, by_problem, mean_ranks, per_update, price, span
from benchmarks.harness.policies import POLICIES
from benchmarks.harness.results import Row, console, median, table
from benchmarks.replaces_tuned_warmup.targets import verdicts


def cell_line(cell: Cell) -> Row:
    regret, interval = cell.regret()
    train, train_interval = cell.regret("train_loss")
    evaluations, seconds = price([cell])
    return {
        "problem": cell.problem,
        "split": cell.split,
        "lr": cell.lr,
        "best is": cell.oracle,
        "oracle": cell.mean("oracle"),
        "warmctl": cell.mean("warmctl"),
        "regret": regret,
        "regret ±": interval,
        "train": train,
        "train ±": train_interval,
        "failed": f"{cell.failures('warmctl')}/{len(cell.runs['warmctl'])}",
        "oracle failed": f"{cell.failures(cell.oracle)}/{len(cell.runs[cell.oracle])}",
        "evals": evaluations,
        "time": seconds,
    }


def print_cells(cells: Sequence[Cell], steps: int) -> None:
    form = {
        "lr": "{:g}", "best is": "{}", "oracle": "{:.3f}", "warmctl": "{:.3f}",
        "regret": "{:+.3f}", "regret ±": "{:.3f}", "train": "{:+.3f}", "train ±": "{:.3f}",
        "failed": "{}", "evals": "{:+.1%}", "time": "{:+.0%}",
    }  # fmt: skip
    for name, group in by_problem(cells).items():
        lines = [{k: v for k, v in cell_line(cell).items() if not is_nan(v)} for cell in group]
        spans = ", ".join(f"{policy} {span(group, policy):.1f}" for policy in ("oracle", "warmctl"))
        shown = {key: value for key, value in form.items() if any(key in line for line in lines)}
        title = f"{name} ({group[0].split}), {steps} updates; usable span in decades: {spans}"
        table(title, lines, shown)
    console.print("regret: log loss, warmctl − oracle, and half its 95 % interval over seeds; train: of the mean")
    console.print("training loss. evals, time: gradient evaluations and CPU seconds beyond training's.")


def is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


def print_policies(cells: Sequence[Cell], split: str) -> list[Row]:
    everywhere = [p for p in POLICIES if all(cell.has(p) for cell in cells)]
    anywhere = [p for p in POLICIES if any(cell.has(p) for cell in cells)]
    common = mean_ranks(cells, everywhere)
    adam = mean_ranks(cells, anywhere) if anywhere != everywhere else {}
    ranks = {p: {"mean rank": common.get(p, math.nan), "Adam rank": adam.get(p, math.nan)} for p in anywhere}
    lines = [policy_line(cells, policy, ranks.get(policy, {})) for policy in (*anywhere, "oracle")]
    form = {
        "policy": "{}", "n": "{}", "mean rank": "{:.2f}", "Adam rank": "{:.2f}", "best": "{:.3f}",
        "span": "{:.2f}", "failed": "{}", "evals": "{:+.1%}", "time": "{:+.1%}",
    }  # fmt: skip
    table(f"policies, {split} problems", lines, {k: v for k, v in form.items() if any(k in line for line in lines)})
    return lines


def policy_line(cells: Sequence[Cell], policy: str, ranks: Row) -> Row:
    """What one policy comes to over the cells that have it; `best` against the oracle's, a geometric mean."""
    where = [cell for cell in cells if cell.has(policy)]
    groups = list(by_problem(where).values())
    names = [cell.oracle if policy == "oracle" else policy for cell in where]
    failed = sum(cell.failures(name) for cell, name in zip(where, names, strict=True))
    runs = sum(len(cell.runs[name]) for cell, name in zip(where, names, strict=True))
    gaps = [best_cell(g, policy).mean(policy) / best_cell(g, "oracle").mean("oracle") for g in groups]
    line: Row = {
        "policy": policy,
        "n": len(groups),
        **ranks,
        "best": math.exp(sum(map(math.log, gaps)) / len(gaps)),
        "span": sum(span(group, policy) for group in groups) / len(groups),
        "failed": f"{failed}/{runs}",
    }
    if policy != "oracle":
        line["evals"], line["time"] = price(where, policy)
        line["updates a second"] = median([1 / per_update(row) for cell in where for row in cell.runs[policy]])
    return {key: value for key, value in line.items() if not is_nan(value)}


def print_targets(cells: Sequence[Cell], steps: int, split: str) -> Row:
    found = verdicts(cells, steps)
    words = {True: "met", False: "missed", None: "-"}
    lines = [{"target": key, "": words[v.met], "figure": v.figure} for key, v in found.items()]
    table(f"targets, {split} problems, {steps} updates", lines, {"target": "{}", "": "{}", "figure": "{}"})
    return {key: v._asdict() for key, v in found.items()}
