"""`warmctl diagnose`: what became of warmup in a run, and what to change."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from warmctl.command.records import failure, unreadable
from warmctl.record.shown import shown


def diagnose(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", show_default=False)],
) -> None:
    """Say what became of warmup in each run, why that is thought, and what to change next time.

    A run is a record, or any CSV or JSONL log with a column of losses.
    """
    from warmctl.diagnosis import diagnose_command

    for path in runs:
        try:
            words = diagnose_command(path)
        except OSError as error:
            raise unreadable(path, error) from None
        except ValueError as error:
            raise failure(str(error)) from None
        typer.echo("\n".join(map(shown, words.splitlines())))
