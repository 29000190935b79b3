"""`warmctl plan`: how far a landscape will let a run go, before it."""

from __future__ import annotations

from typing import Annotated

import typer

from warmctl.command.records import failure


def plan(
    target: Annotated[
        str, typer.Argument(metavar="FILE.py:FUNCTION", help="A function that returns what `warmctl.plan` takes.")
    ],
) -> None:
    """Measure a model before it is trained: the largest stable peak rate, and how long a warmup it needs."""
    from warmctl.planning.command import plan_command

    try:
        plan_command(target)
    except (OSError, ValueError, TypeError) as error:
        raise failure(f"{target}: {error}") from None
