"""`warmctl compare`: several runs on shared axes, and what differs between them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from warmctl.command.plot import figure
from warmctl.command.records import Runs, cell, failure, read
from warmctl.record.curves import Floats, floats
from warmctl.record.look import Look
from warmctl.record.summary import summarise

FORMS = {
    "loss": ".4g",
    "lowest\nloss": ".4g",
    "warmup\nended": ".0f",
    "final\nscale": ".3g",
    "largest\nrate": ".3g",
    "peak\nratio": ".3g",
    "over\nedge": ".1%",
    "over-\nhead": ".1%",
}


def compare(
    runs: Runs,
    out: Annotated[Path, typer.Option(help="Figure: .png, .pdf or .svg.")] = Path("runs.png"),
    log_steps: Annotated[bool, typer.Option("--log-steps", help="Show steps on a logarithmic axis.")] = False,
) -> None:
    """Draw several runs on shared axes and tabulate how they differ from the first.

    The loss is the mean of the last hundredth of the steps that all of them have made.
    """
    if len(runs) < 2:
        raise failure("compare needs two runs or more: warmctl compare A.jsonl B.jsonl")
    found = read(runs)
    step = min(run.history["step"][-1] for run in found.values())
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("run", overflow="fold")
    for name in FORMS:
        table.add_column(f"{name}\nat {step}" if name == "loss" else name, justify="right", no_wrap=True)
    first: list[float] | None = None
    for name, run in found.items():
        values = _values(run, step)
        table.add_row(cell(name), *map(_shown, values, first or values, FORMS.values()))
        first = first or values
    Console().print(table)
    figure(runs, out, log_steps)


def _values(run: Look, last: int) -> list[float]:
    """Those of `FORMS`; NaN where the record does not say."""
    history, figures = run.history, summarise(run.history, run.over_edge)
    losses, rates = _column(run, "loss"), _column(run, "lr")
    steps = np.array(history["step"], np.float64)
    means = _column(run, "loss_mean") if "loss_mean" in history.columns else losses
    late = means[(steps <= last) & (steps > last - max(1.0, last / 100))]
    known = [figures.warmup.step if figures.warmup else None, figures.scale]
    ended, scale = (math.nan if value is None else float(value) for value in known)
    rest = (figures.peak_ratio, figures.over_edge, figures.overhead)
    with np.errstate(over="ignore", invalid="ignore"):
        loss = float(late.mean()) if len(late) else math.nan
    return [loss, _extreme(losses, -1), ended, scale, _extreme(rates, 1), *(math.nan if v is None else v for v in rest)]


def _column(run: Look, name: str) -> Floats:
    return floats(run.history[name])


def _extreme(values: Floats, sign: int) -> float:
    finite = values[np.isfinite(values)]
    return float(sign * (sign * finite).max()) if len(finite) else math.nan


def _shown(value: float, first: float, form: str) -> str:
    """The value and, under it, how far it is from the first run's."""
    if math.isnan(value):
        return "-"
    difference = value - first
    text = format(value, form)
    return text if difference == 0 or not math.isfinite(difference) else f"{text}\n{format(difference, '+' + form)}"
