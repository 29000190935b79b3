"""`warmctl plot`: the figure of one or several runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from warmctl.command.records import Runs, failure, read
from warmctl.record.plotting import plot as draw
from warmctl.record.shown import shown


def plot(
    runs: Runs,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Where to: .png, .pdf or .svg.", show_default="RUN.png; runs.png for several"),
    ] = None,
    log_steps: Annotated[bool, typer.Option("--log-steps", help="Show steps on a logarithmic axis.")] = False,
) -> None:
    """Draw loss, stability ratio and learning rate of one or several runs."""
    target = out or (runs[0].with_suffix(".png") if len(runs) == 1 else Path("runs.png"))
    figure(runs, target, log_steps)


def figure(runs: list[Path], target: Path, log_steps: bool) -> None:
    """Draw the runs to `target`; a message and exit 1 where that fails."""
    histories = {name: found.history for name, found in read(runs).items()}
    try:
        draw(histories, path=target, xscale="log" if log_steps else "linear")
    except ImportError as error:
        raise failure(str(error)) from None
    except (OSError, ValueError) as error:
        raise failure(f"{target}: {error}") from None
    typer.echo(f"wrote {shown(target)}")
