"""The command: run what is missing, report what is there."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from benchmarks.defaults_are_measured.table import report
from benchmarks.defaults_are_measured.trials import run, trials
from benchmarks.defaults_are_measured.variants import DEFAULT, VARIANTS
from benchmarks.harness.results import Quick, Report, Results
from benchmarks.tasks.tasks import DEVELOPMENT

NAME = "defaults_are_measured"
QUICK_TASKS = 3


def main(
    quick: Quick = False,
    only_report: Report = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes of one thread each.")] = 2,
    tasks: Annotated[int, typer.Option(min=1, help="Development tasks, from seed 0 on.")] = 24,
    variant: Annotated[list[str] | None, typer.Option(help="Only this one and the default; may be repeated.")] = None,
) -> None:
    """Each default against the other choices there were, on development tasks."""
    torch.set_num_threads(1)
    steps = 150 if quick else 400
    if unknown := set(variant or ()) - set(VARIANTS):
        raise typer.BadParameter(f"{', '.join(unknown)}: choose from {', '.join(VARIANTS)}")
    wanted = trials(DEVELOPMENT[: QUICK_TASKS if quick else tasks], steps, quick)
    wanted = [trial for trial in wanted if not variant or trial.variant in (DEFAULT, *variant)]
    results = Results(
        NAME, {"quick": quick, "updates": steps}, fresh=quick and not only_report, only_report=only_report
    )
    if not only_report:
        run(wanted, results, workers)
    report(wanted, results)


if __name__ == "__main__":
    typer.run(main)
