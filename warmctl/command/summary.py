"""`warmctl summary`: runs in a table."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from warmctl.command.records import Runs, cell, read
from warmctl.record.summary import Summary, summarise

COLUMNS = (
    *("steps", "warmup\nended", "final\nscale", "peak\nratio"),
    *("over\nedge", "probes", "over-\nhead", "final\nloss"),
)


def summary(runs: Runs) -> None:
    """Tabulate where and why warmup ended, how near the edge each run came, and what the probes cost."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("run", overflow="fold")
    for header in COLUMNS:
        table.add_column(header, justify="right", no_wrap=True)
    reasons = Table.grid(padding=(0, 2, 0, 0))
    for name, found in read(runs).items():
        run = summarise(found.history, found.over_edge)
        table.add_row(cell(name), *cells(run))
        if run.warmup is not None and run.warmup.reason:
            reasons.add_row(cell(name), f"warmup ended: {cell(run.warmup.reason)}")
    console = Console()
    console.print(table)
    if reasons.row_count:
        console.print()
        console.print(reasons)


def cells(run: Summary) -> list[str]:
    """Those of `COLUMNS`."""

    def show(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    not_yet = "not yet" if run.phase == "warmup" else "-"
    return [
        str(run.steps),
        str(run.warmup.step) if run.warmup is not None else not_yet,
        show(run.scale, ".3g"),
        show(run.peak_ratio, ".3g"),
        show(run.over_edge, ".1%"),
        show(run.probes, "d"),
        show(run.overhead, ".1%"),
        show(run.loss, ".4g"),
    ]
