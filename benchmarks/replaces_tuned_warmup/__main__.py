"""The command: run what is missing, report what is there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
import typer

from benchmarks.harness.cells import gather
from benchmarks.harness.problems import PROBLEMS
from benchmarks.harness.results import RESULTS, Quick, Report, Results, Row, console
from benchmarks.harness.runs import load, run
from benchmarks.replaces_tuned_warmup.figure import draw
from benchmarks.replaces_tuned_warmup.jobs import around, best_rates, grid
from benchmarks.replaces_tuned_warmup.tables import cell_line, print_cells, print_policies, print_targets

NAME = "replaces_tuned_warmup"
QUICK_POLICIES = ("none", "linear-2%", "linear-10%", "linear-50%", "warmctl")
QUICK_PROBLEMS = ("cnn", "gpt-post", "mlp")
LONG_PROBLEMS = ("cnn", "gpt-post", "vit")
SPLITS = ("development", "test")


def report(rows: Sequence[Row], steps: int, name: str, settings: Row, only_report: bool = False) -> dict[str, Any]:
    """Print the tables, draw the figure, write the summary beside the rows."""
    cells, missing = gather(rows)
    if not cells:
        console.print("no cell has a run of every policy yet")
        return {}
    if missing:
        console.print(f"{missing} cells left out: not every policy has run there")
    ours = {row["code"].split("+")[-1] for row in rows if row["policy"] == "warmctl"}
    if len(ours) > 1:
        console.print(f"warmctl's rows come from {len(ours)} versions of its code; run again to renew them")
    summary: dict[str, Any] = {"cells": [cell_line(cell) for cell in cells], "steps": steps, "missing": missing}
    print_cells(cells, steps)
    summary["policies"], summary["targets"] = {}, {}
    splits = {split: [cell for cell in cells if cell.split == split] for split in SPLITS} | {"all": cells}
    for split, part in splits.items():
        if part:
            summary["policies"][split] = print_policies(part, split)
            summary["targets"][split] = print_targets(part, steps, split)
    draw(cells, steps, RESULTS / f"{name}.png")
    Results(name.removesuffix("-quick"), settings, fresh=True, only_report=only_report).finish(summary)
    console.print(f"rows, summary and figure: {RESULTS}/{name}.*")
    return summary


def main(
    quick: Quick = False,
    long: Annotated[bool, typer.Option("--long", help="2000 updates at the best rate, 3 and 10 times it.")] = False,
    only_report: Report = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes of one thread each.")] = 2,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    problem: Annotated[list[str] | None, typer.Option(help="Only this one; may be given again.")] = None,
) -> None:
    """Final loss against peak rate: no warmup, six linear ones, four peers, and AdaptiveWarmup."""
    torch.set_num_threads(1)
    path = RESULTS / f"{NAME}{'-quick' if quick else ''}.jsonl"
    names = problem or list(QUICK_PROBLEMS if quick else LONG_PROBLEMS if long else PROBLEMS)
    if unknown := set(names) - set(PROBLEMS):
        raise typer.BadParameter(f"{', '.join(unknown)}: choose from {', '.join(PROBLEMS)}")
    steps = 150 if quick else 2000 if long else 400
    name = path.stem + ("-long" if long and not quick else "")
    if quick:
        if not only_report:
            path.unlink(missing_ok=True)
        jobs = around({n: PROBLEMS[n].tuned_lr for n in names}, 1, steps, QUICK_POLICIES)
    elif long:
        on_grid = [row for row in load(path).values() if row["steps"] == 400]
        jobs = around(best_rates(on_grid, names), seeds, steps)
    else:
        jobs = grid(names, seeds, steps)
    if not only_report:
        rows = list(run(jobs, path, workers).values())
    else:
        saved = load(path)
        rows = [saved[job] for job in jobs if job in saved]
    settings = {"quick": quick, "updates": steps, "seeds": 1 if quick else seeds, "problems": names}
    report(rows, steps, name, settings, only_report)


if __name__ == "__main__":
    typer.run(main)
