"""Histories of full rows, and the files they are written to."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from warmctl.record.history import History

TORN = '{"step": 4, "phase": "warm'


def row(step: int, **values: Any) -> dict[str, Any]:
    """A full row as the wrapper writes it."""
    full = {
        "step": step,
        "phase": "warmup" if step < 5 else "guard",
        "scale": 0.1 * step,
        "lr": 0.003 * step,
        "scheduled_lr": 0.03,
        "loss": 2.0 / step,
        "sharpness": None,
        "threshold": 3.8,
        "stability_ratio": 1 / 3,
        "representation_change": None,
        "end_slope": 0.2 - 0.1 * step,
        "target": 0.5,
        "residual": 0.01,
        "hvps": 2 * step,
        "probes": step,
        "overhead": 0.7,
        "probed": step % 2 == 0,
        "reason": "warmup ended: full rate, as scheduled" if step == 5 else "",
    }
    return {**full, **values}


def history(first: int = 1, last: int = 3, **values: Any) -> History:
    return History(row(step, **values) for step in range(first, last + 1))


def steps(path: Path) -> list[int]:
    if path.suffix == ".csv":
        with open(path, newline="") as stream:
            return [int(cells["step"]) for cells in csv.DictReader(stream)]
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def attach(record: History, path: Path) -> None:
    record.to_csv(path) if path.suffix == ".csv" else record.to_jsonl(path)
