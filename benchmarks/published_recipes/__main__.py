"""The command: run what is missing, report what is there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.harness.results import RESULTS, Quick, Report, console
from benchmarks.published_recipes import runs
from benchmarks.published_recipes.nanogpt import nanogpt
from benchmarks.published_recipes.recipe import MULTIPLES, OURS, Recipe
from benchmarks.published_recipes.report import report
from benchmarks.published_recipes.runs import RECIPES, Job, grid

NAME = "published_recipes"
HAND = "by-hand"
QUICK_STEPS = {"nanogpt": 150, "mnist1d": 600}


def jobs(
    recipe: Recipe, steps: int, seeds: int, policies: Sequence[str], multiples: Sequence[float] = MULTIPLES
) -> list[Job]:
    """`policies` by name, `HAND` for all that are set by hand; those that the recipe has."""
    by_hand = tuple(recipe.warmups(steps))
    wanted = {each for name in policies for each in (by_hand if name == HAND else (name,))}
    return grid(recipe, steps, seeds, [each for each in (*by_hand, OURS) if each in wanted], multiples)


def main(
    quick: Quick = False,
    only_report: Report = False,
    text: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="Of nanoGPT, UTF-8.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Updates of nanoGPT: 300, or 2000 as published.")] = 300,
    seeds: Annotated[int, typer.Option(min=1)] = 5,
    workers: Annotated[int, typer.Option(min=1, help="Processes of one thread each.")] = 1,
    recipe: Annotated[list[str] | None, typer.Option(help="nanogpt or mnist1d; default: both.")] = None,
    policy: Annotated[list[str] | None, typer.Option(help=f"Default: all; {HAND}: every schedule.")] = None,
    multiple: Annotated[list[float] | None, typer.Option(help="Of the published rate; default: 1, 3, 10, 30.")] = None,
) -> None:
    """nanoGPT's CPU recipe and mnist1d's: as published, with other warmups, and with AdaptiveWarmup."""
    torch.set_num_threads(1)
    chosen = nanogpt(text)
    RECIPES[chosen.name] = chosen
    available = {"nanogpt": chosen, "mnist1d": RECIPES["mnist1d"]}
    names = recipe or list(available)
    if unknown := set(names) - set(available):
        raise typer.BadParameter(f"--recipe {', '.join(unknown)}: choose from {', '.join(available)}")
    path = RESULTS / NAME / f"{'quick' if quick else 'rows'}.jsonl"
    if not only_report:
        todo: list[Job] = []
        for name in names:
            its = available[name]
            if quick:
                todo += jobs(its, QUICK_STEPS[name], 1, policy or (its.published, "none", OURS), multiple or (1, 10))
            else:
                length = steps if name == "nanogpt" else its.steps
                todo += jobs(its, length, seeds, policy or (HAND, OURS), multiple or MULTIPLES)
        if quick:
            path.unlink(missing_ok=True)
        todo.sort(key=lambda job: job.seed)  # all recipes of the first seed before the second's
        runs.run(todo, path, workers)
    found = list(runs.load(path).values())
    if not found:
        console.print(f"{path} has no rows yet")
        raise typer.Exit(1)
    report(found, NAME, {"quick": quick}, only_report)


if __name__ == "__main__":
    typer.run(main)
