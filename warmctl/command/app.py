"""The commands of `warmctl`."""

from __future__ import annotations

from typing import Annotated

import typer

from warmctl import __version__
from warmctl.command.compare import compare
from warmctl.command.diagnose import diagnose
from warmctl.command.plan import plan
from warmctl.command.plot import plot
from warmctl.command.report import report
from warmctl.command.run import ANYTHING, run
from warmctl.command.summary import summary
from warmctl.command.watch import watch

app = typer.Typer(
    help="Run, watch and look at trainings with warmctl. Records are JSONL files of opt.history.to_jsonl(path).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"warmctl {__version__}")
        raise typer.Exit


VERSION = typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave.")


@app.callback()
def _options(version: Annotated[bool, VERSION] = False) -> None:
    pass


for command in (plan, plot, summary, compare, watch, diagnose, report):
    app.command()(command)
app.command(context_settings=ANYTHING)(run)
