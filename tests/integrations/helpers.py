"""What the tests of every framework look at: failed probes, decisions."""

from __future__ import annotations

from typing import Any

Rows = list[dict[str, Any]]


def failures(rows: Rows) -> list[str]:
    return [row["reason"] for row in rows if "fail" in row["reason"]]


def decisions(rows: Rows) -> list[tuple[Any, ...]]:
    return [(row["step"], row["scale"], repr(row["stability_ratio"]), row["overhead"], row["lr"]) for row in rows]
