"""What the benchmarks share: rows that survive a kill, tables, and the machine they were measured on.

A benchmark is a typer command with a `quick: Quick = False` argument. It keeps its rows in `Results`, which writes
benchmarks/results/NAME.json after each row and, started again with the same settings, goes on after the last one:

    results = Results("costs_what_it_says", settings={"quick": quick, "steps": 400})
    rows = [results.row(key, measure, key) for key in cells]
    results.finish({"target (a)": True})
    table("Title", rows, columns={"lr": "{:g}", "loss": "{:.3f}"})
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy
import scipy
import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import warmctl
from benchmarks.harness.rows import Row as Row

RESULTS = Path(__file__).parents[1] / "results"
Quick = Annotated[bool, typer.Option("--quick", help="Under two minutes: fewer, shorter runs.")]
Report = Annotated[bool, typer.Option("--report", help="Run nothing; report the rows there are.")]
console = Console(highlight=False)
if not console.is_terminal:
    console.width = 150  # a file has room for the tables


@lru_cache
def environment() -> dict[str, Any]:
    """Versions, machine and threads that the figures belong to."""
    return {
        "warmctl": getattr(warmctl, "__version__", None),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "scipy": scipy.__version__,
        "platform": platform.platform(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


class Results:
    """Rows by key, written to benchmarks/results/NAME.json after each of them.

    Args:
        name: of the claim; a quick run is kept apart if `settings["quick"]`.
        settings: what the rows depend on. Rows of a file with other settings are not taken over.
        fresh: start from nothing in any case, as timings do.
        only_report: measure nothing. Summary and figures are made again from the rows that are there, whatever code
            they are of; the file goes on saying which machine and versions they were measured on.
    """

    def __init__(self, name: str, settings: Mapping[str, Any], fresh: bool = False, only_report: bool = False) -> None:
        self.path = RESULTS / f"{name}{'-quick' if settings.get('quick') else ''}.json"
        self.settings: dict[str, Any] = json.loads(json.dumps(dict(settings)))
        self.only_report = only_report
        self.rows: dict[str, Row] = {}
        self.summary: Row = {}
        self.outdated: set[str] = set()
        """Keys of the rows that were reported although they are of other code."""
        self._environment: Row | None = None
        if self.path.exists():
            saved = json.loads(self.path.read_text())
            if saved["settings"] == self.settings:
                self.rows = {} if fresh else saved["rows"]
                self.summary = saved["summary"] if only_report else {}
            if only_report:
                self._environment = saved["environment"]

    def get(self, key: str) -> Row | None:
        """The row of an earlier, interrupted run."""
        return self.rows.get(key)

    def row(self, key: str, make: Callable[..., Mapping[str, Any]], *args: Any, code: str = "") -> Row:
        """The row of an earlier, interrupted run with the same code; `make(*args)` where there is none."""
        found = self.rows.get(key)
        current = found is not None and (not code or found["code"] == code)
        if self.only_report:
            if found is None:
                raise SystemExit(f"{self.path.name} has no row {key!r} yet: run without --report")
            if not current:
                self.outdated.add(key)
            return found
        if found is not None and current:
            return found
        return self.add(key, {**make(*args), "code": code} if code else make(*args))

    def add(self, key: str, row: Mapping[str, Any]) -> Row:
        """Keep a row and write the file."""
        self.rows[key] = dict(row)
        self._write()
        return self.rows[key]

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the figures that the rows come to, targets met or missed among them."""
        self.summary = dict(summary)
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "environment": self._environment or environment(),
            "settings": self.settings,
            "summary": self.summary,
            "rows": self.rows,
        }
        partial = self.path.with_suffix(".part")
        partial.write_text(json.dumps(_plain(content), indent=1, ensure_ascii=False) + "\n")
        partial.replace(self.path)  # a kill leaves the old file or the new one, never half of one


def table(title: str, rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    """Print rows; `columns` maps each key to its format, such as "{:.3f}". Missing values stay empty."""
    printed = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    rows = list(rows)
    for key in columns:
        number = all(isinstance(row.get(key, 0), (int, float)) for row in rows)
        printed.add_column(key, justify="right" if number else "left")
    for row in rows:
        printed.add_row(*(_cell(row.get(key), form) for key, form in columns.items()))
    console.print(printed)


def median(values: Sequence[float]) -> float:
    return float(numpy.median(list(values)))


def _cell(value: Any, form: str) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return "" if value is None else form.format(value) if not isinstance(value, str) else value


def _plain(value: Any) -> Any:
    """JSON has no nan and no infinity: they become null and "inf"."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def _commit() -> str | None:
    """Of the checkout, with + if files differ from it."""
    try:
        command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12"]
        found = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
