"""What the benchmarks share: rows that survive a kill, tables, and the machine they were measured on.

A benchmark is a typer command with a `quick: Quick = False` argument. It keeps its rows in `Results`, which writes
benchmarks/results/NAME.json after each row and, started again with the same settings, goes on after the last one:

    results = Results("replaces_tuned_warmup", settings={"quick": quick, "steps": 400})
    for key in cells:
        row = results.get(key) or results.add(key, {"loss": measure(key)})
    results.finish({"target (a)": True})
    table("Title", rows, columns={"lr": "{:g}", "loss": "{:.3f}"})
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import time
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

RESULTS = Path(__file__).parents[1] / "results"
Quick = Annotated[bool, typer.Option("--quick", help="Under two minutes: fewer, shorter runs.")]
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
    """

    def __init__(self, name: str, settings: Mapping[str, Any], fresh: bool = False) -> None:
        self.path = RESULTS / f"{name}{'-quick' if settings.get('quick') else ''}.json"
        self.settings: dict[str, Any] = json.loads(json.dumps(dict(settings)))
        self.rows: dict[str, dict[str, Any]] = {}
        self.summary: dict[str, Any] = {}
        if self.path.exists() and not fresh:
            saved = json.loads(self.path.read_text())
            if saved["settings"] == self.settings:
                self.rows = saved["rows"]

    def get(self, key: str) -> dict[str, Any] | None:
        """The row of an earlier, interrupted run."""
        return self.rows.get(key)

    def add(self, key: str, row: Mapping[str, Any]) -> dict[str, Any]:
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
            "environment": environment(),
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


def seconds(call: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


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
