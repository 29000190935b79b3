"""`warmctl diagnose`: what became of warmup in a run, and what to change."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from warmctl.command.records import failure, unreadable
from warmctl.record.shown import shown


def diagnose(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", show_default=False)],
    loss: Annotated[str | None, typer.Option(metavar="NAME", help="The column of losses.")] = None,
    lr: Annotated[str | None, typer.Option(metavar="NAME", help="The column of rates, as applied.")] = None,
    step: Annotated[str | None, typer.Option(metavar="NAME", help="The column of steps.")] = None,
) -> None:
    """Say what became of warmup in each run, why that is thought, and what to change next time.

    A run is a record, or any CSV or JSONL log with a column of losses; name its columns where they are not known.
    """
    from warmctl.diagnosis import diagnose_command

    for path in runs:
        try:
            words = diagnose_command(path, loss, lr, step)
        except OSError as error:
            raise unreadable(path, error) from None
        except ValueError as error:
            raise failure(str(error)) from None
        typer.echo("\n".join(map(shown, words.splitlines())))
