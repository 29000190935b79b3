"""The commands of `warmctl`."""

from __future__ import annotations

import typer

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
for command in (plan, plot, summary, compare, watch, diagnose, report):
    app.command()(command)
app.command(context_settings=ANYTHING)(run)
