"""`warmctl watch`: a record that grows, in the terminal."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from warmctl.command.records import failure, unreadable
from warmctl.record.parsing import Row, parse_row
from warmctl.record.shown import shown

TAIL = 4 << 20
"""Bytes of a record that was there before; it is read from there on."""
KEPT, REASONS = 10_000, 6
BARS = "▁▂▃▄▅▆▇█"
GAUGES = ("stability_ratio", "representation_change", "end_slope", "overhead")


def watch(
    run: Annotated[Path, typer.Argument(metavar="RUN.jsonl", show_default=False)],
    every: Annotated[float, typer.Option(help="Seconds between looks.", min=0.05)] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Show what there is, and return.")] = False,
) -> None:
    """Follow a growing record: loss, rate, gauges, phase and the last reasons. Ctrl-C ends it."""
    seen, rows = Seen(), follow(run)
    console = Console()
    try:
        seen.take(next(rows))
        if once:
            console.print(seen.panel(run, console.width))
            return
        with Live(seen.panel(run, console.width), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(every)
                seen.take(next(rows))
                live.update(seen.panel(run, console.width), refresh=True)
    except KeyboardInterrupt:
        return
    except OSError as error:
        raise unreadable(run, error) from None
    except ValueError as error:
        raise failure(str(error)) from None


def follow(path: Path) -> Iterator[list[Row]]:
    """The rows that are new since the last look, without end; none while there is no file.

    A file that has become shorter was rewound or begun again: it is read from its tail once more. Of a long one the
    numbers of lines count from there.
    """
    offset, number, first = 0, 0, True
    while True:
        rows: list[Row] = []
        if path.exists():
            with open(path, "rb") as stream:
                size = stream.seek(0, 2)
                if first or size < offset:
                    offset, number, first = max(0, size - TAIL), 0, False
                    stream.seek(offset)
                    offset += len(stream.readline()) if offset else 0
                stream.seek(offset)
                for line in stream:
                    if not line.endswith(b"\n"):
                        break  # it is being written
                    offset, number = offset + len(line), number + 1
                    if line.strip():
                        rows.append(parse_row(line, path, number))
        yield rows


class Seen:
    """What is known of the run: its last row, the losses of late, the last reasons."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.last: Row = {}
        self.losses: deque[float] = deque(maxlen=KEPT)
        self.reasons: deque[tuple[object, str]] = deque(maxlen=REASONS)

    def take(self, rows: list[Row]) -> None:
        for row in rows:
            if row["step"] <= self.last.get("step", -math.inf):  # type: ignore[operator]
                self.clear()  # rewound: what is shown is of the present run
            self.last = row
            loss = row.get("loss")
            self.losses.append(math.nan if loss is None else float(loss))
            if row.get("reason"):
                self.reasons.append((row["step"], str(row["reason"])))

    def panel(self, path: Path, width: int) -> RenderableType:
        if not self.last:
            return Text(shown(f"{path}: waiting for its first row"))
        row = self.last
        figures = Table.grid(padding=(0, 3, 0, 0))
        figures.add_row("step", "phase", "loss", "lr", "scale", *(name.replace("_", " ") for name in GAUGES))
        names = ("loss", "lr", "scale", *GAUGES)
        figures.add_row(str(row["step"]), shown(row.get("phase") or "-"), *(_number(row.get(name)) for name in names))
        reasons = [Text(shown(f"{step}: {reason}"), overflow="ellipsis", no_wrap=True) for step, reason in self.reasons]
        line = Text(f"loss {sparkline(list(self.losses), min(width - 30, 80))} of {len(self.losses)} steps")
        return Group(Text(shown(path), style="bold"), figures, line, *reasons)


def sparkline(values: list[float], width: int) -> str:
    """The means of `width` stretches as bars; logarithmic where they span more than a decade. A cross: not finite."""
    if not values:
        return ""
    with np.errstate(over="ignore", invalid="ignore"):
        parts = np.array_split(np.array(values), max(1, min(width, len(values))))
        means = np.array([part.mean() for part in parts])
    finite = means[np.isfinite(means)]
    if not len(finite):
        return "×" * len(means)
    if finite.min() > 0 and finite.max() > 10 * finite.min():
        means, finite = np.log(means.clip(min=finite.min())), np.log(finite)
    low, span = finite.min() / 2, finite.max() / 2 - finite.min() / 2  # halves, or the span may overflow
    shares = [(value / 2 - low) / (span or 1.0) for value in means]
    return "".join(BARS[round(7 * min(s, 1.0))] if math.isfinite(s) else "×" for s in shares)


def _number(value: object) -> str:
    return format(float(value), ".4g") if isinstance(value, (int, float)) else "-"
