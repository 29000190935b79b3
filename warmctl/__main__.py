"""The command line, `warmctl` or `python -m warmctl`: `plot RUN.jsonl...` and `summary RUN.jsonl...`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
except ImportError as error:
    sys.exit(f'the command line of warmctl needs typer and rich ({error}): pip install "warmctl[cli]"')

from warmctl.record.history import History
from warmctl.record.plotting import plot as draw
from warmctl.record.summary import Summary, summarise

app = typer.Typer(
    help="Look at runs recorded by warmctl: JSONL files of opt.history.to_jsonl(path).",
    no_args_is_help=True,
    add_completion=False,
)
COLUMNS = (
    *("steps", "warmup\nended", "final\nscale", "peak\nratio"),
    *("over\nedge", "probes", "over-\nhead", "final\nloss"),
)
Runs = Annotated[list[Path], typer.Argument(metavar="RUN.jsonl...", show_default=False)]


@app.command()
def plot(
    runs: Runs,
    out: Annotated[
        Path | None,
        typer.Option(help="Where to: .png, .pdf or .svg.", show_default="RUN.png; runs.png for several"),
    ] = None,
    log_steps: Annotated[bool, typer.Option("--log-steps", help="Show steps on a logarithmic axis.")] = False,
) -> None:
    """Draw loss, stability ratio and learning rate of one or several runs."""
    histories = _read(runs)
    target = out or (runs[0].with_suffix(".png") if len(runs) == 1 else Path("runs.png"))
    try:
        draw(histories, path=target, xscale="log" if log_steps else "linear")
    except ImportError as error:
        raise _failure(str(error)) from None
    except (OSError, ValueError) as error:
        raise _failure(f"{target}: {error}") from None
    typer.echo(f"wrote {target}")


@app.command()
def summary(runs: Runs) -> None:
    """Tabulate where and why warmup ended, how near the edge each run came, and what the probes cost."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("run", overflow="fold")
    for header in COLUMNS:
        table.add_column(header, justify="right", no_wrap=True)
    reasons = Table.grid(padding=(0, 2, 0, 0))
    for name, history in _read(runs).items():
        run = summarise(history)
        table.add_row(escape(name), *_cells(run))
        if run.warmup is not None and run.warmup.reason:
            reasons.add_row(escape(name), f"warmup ended: {escape(run.warmup.reason)}")
    console = Console()
    console.print(table)
    if reasons.row_count:
        console.print()
        console.print(reasons)


def _cells(run: Summary) -> list[str]:
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


def _read(paths: list[Path]) -> dict[str, History]:
    """Histories by name; a message and exit 1 for a file that cannot be read or has no rows."""
    histories = {}
    for name, path in zip(_names(paths), paths, strict=True):
        try:
            histories[name] = History.from_jsonl(path)
        except OSError as error:
            raise _failure(f"{path}: {(error.strerror or str(error)).lower()}") from None
        except ValueError as error:
            raise _failure(str(error)) from None
        if not histories[name]:
            raise _failure(f"{path}: the file has no rows")
    return histories


def _names(paths: list[Path]) -> list[str]:
    """The shortest of stem, folder and stem, or whole path that tells the runs apart."""
    candidates = (
        [path.stem for path in paths],
        [str(Path(path.parent.name, path.stem)) for path in paths],
        [str(path) for path in paths],
    )
    return next((names for names in candidates if len(set(names)) == len(names)), candidates[-1])


def _failure(message: str) -> typer.Exit:
    typer.secho(message, fg="red", err=True)
    return typer.Exit(1)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
