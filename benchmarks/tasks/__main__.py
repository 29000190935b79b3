"""Tasks drawn by seed, trained under every warmup policy.

    python -m benchmarks.tasks run --tasks 40                     development seeds; goes on after a kill
    python -m benchmarks.tasks run --tasks 40 --policy warmctl    only some policies
    python -m benchmarks.tasks fresh --tasks 40                   both sides again on runs that picked nothing
    python -m benchmarks.tasks report                             tables and figure from the rows there are

`--split test` and `--split other` are for a law that is finished; each look is written to looks.txt beside the rows.
"""

from __future__ import annotations

import datetime
import sys
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.harness.results import RESULTS, console
from benchmarks.tasks import report as reports, runs
from benchmarks.tasks.policies import LINEAR, OURS, POLICIES, applies
from benchmarks.tasks.tasks import RATES, SPLITS, task

app = typer.Typer(add_completion=False, help=__doc__.splitlines()[0] if __doc__ else None)
Rows = Annotated[Path, typer.Option(help="Folder of the row files.")]
Split = Annotated[str, typer.Option(help="development, test or other")]
FOLDER = RESULTS / "tasks"


def rows_file(folder: Path, split: str) -> Path:
    if split not in SPLITS:
        raise typer.BadParameter(f"--split is one of {', '.join(SPLITS)}, not {split}")
    if split != "development":
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "looks.txt").open("a") as file:
            file.write(f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} {' '.join(sys.argv[1:])}\n")
    return folder / f"{split}.jsonl"


def jobs(seeds: range, policies: list[str], steps: int, run_seeds: int) -> list[runs.Job]:
    """A task at a time, all of its rates and policies, so that an interrupted run has whole tasks."""
    made = []
    for seed in seeds:
        drawn = task(seed)
        optimizer = type(drawn.optimizer(drawn.build(0), 1.0))
        for policy in policies:
            if applies(policy, optimizer):
                made += [runs.Job(seed, rate, policy, steps, s) for s in range(run_seeds) for rate in range(RATES)]
    return made


@app.command()
def run(
    tasks: int = 100,
    first: int = 0,
    policy: Annotated[list[str] | None, typer.Option(help="Default: all. 'linear': the six schedules.")] = None,
    steps: int = 400,
    run_seeds: int = 1,
    workers: int = 1,
    split: Split = "development",
    rows: Rows = FOLDER,
) -> None:
    """Train, and keep a row a run."""
    path = rows_file(rows, split)
    chosen = [p for name in policy or POLICIES for p in (LINEAR if name == "linear" else (name,))]
    seeds = SPLITS[split][first : first + tasks]
    runs.run(jobs(seeds, chosen, steps, run_seeds), path, workers)


@app.command()
def fresh(
    tasks: int = 100,
    first: int = 0,
    policy: str = OURS,
    relative: Annotated[list[int], typer.Option(help="Half decades above the best rate.")] = [0, 2],  # noqa: B006
    steps: int = 400,
    runs_each: int = 2,
    workers: int = 1,
    split: Split = "development",
    rows: Rows = FOLDER,
) -> None:
    """Train what the first runs have picked, and a policy beside it, on weights and batches of their own."""
    path = rows_file(rows, split)
    seeds = SPLITS[split][first : first + tasks]
    made = []
    for t in reports.gather(r for r in runs.load(path).values() if r["steps"] == steps and r["run"] == 0):
        cells = [(t.oracle(t.best), t.best), *((policy, t.best + k) for k in relative)]
        if t.seed in seeds:
            made += [
                runs.Job(t.seed, rate, name, steps, run)
                for run in range(1, runs_each + 1) for name, rate in cells if 0 <= rate < RATES
            ]  # fmt: skip
    runs.run(made, path, workers)


@app.command()
def report(
    steps: int = 400,
    split: Split = "development",
    rows: Rows = FOLDER,
    policy: Annotated[str, typer.Option(help="Whose regret by optimizer, family and relative rate.")] = OURS,
    figure: Annotated[Path | None, typer.Option(help="Where to write the figure.")] = None,
) -> None:
    """Print what the rows come to."""
    found = [row for row in runs.load(rows_file(rows, split)).values() if row["steps"] == steps]
    if not found:
        console.print("no rows there")
        raise typer.Exit(1)
    reports.show(found, policy)
    if figure is not None:
        from benchmarks.tasks.figure import draw

        draw(found, figure)


if __name__ == "__main__":
    app()
