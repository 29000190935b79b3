"""`warmctl report`: runs as a page to send to a colleague."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from warmctl.command.records import Runs, failure, read, unreadable
from warmctl.diagnosis import diagnose
from warmctl.record.about import read_about
from warmctl.record.look import Look
from warmctl.record.page import Reported, page
from warmctl.record.shown import shown


def report(
    runs: Runs,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where to.", show_default="RUN.html; runs.html for several")
    ] = None,
) -> None:
    """Write one page that needs nothing else: verdict, curves to zoom and hover over, reasons, configuration."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise failure('report needs plotly: pip install "warmctl[report]"') from None
    target = out or (runs[0].with_suffix(".html") if len(runs) == 1 else Path("runs.html"))
    found = read(runs)
    reported = [
        Reported(name, seen, read_about(path), diagnosis(seen))
        for (name, seen), path in zip(found.items(), runs, strict=True)
    ]
    try:
        target.write_text(page(reported, get_plotlyjs()), encoding="utf-8")
    except OSError as error:
        raise unreadable(target, error) from None
    typer.echo(f"wrote {shown(target)}")


def diagnosis(seen: Look) -> list[str]:
    """Verdict, evidence and advice, a paragraph each; nothing where there are too few losses for one."""
    try:
        found = diagnose(seen.history)
    except ValueError:
        return []
    return [found.verdict, *map(str, found.evidence), f"What to do: {found.advice}"]
