"""A line of a file as a row, or an error that names the file, the line and the field."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from warmctl.record.shown import shown

Value: TypeAlias = "bool | int | float | str | None"
Row: TypeAlias = "dict[str, Value]"

TEXT = ("phase", "reason")
NUMBERS = frozenset(
    (
        *("step", "scale", "lr", "scheduled_lr", "loss", "sharpness", "threshold", "stability_ratio"),
        *("representation_change", "end_slope", "target", "residual", "hvps", "probes", "overhead", "probed"),
    )
)
LAST_STEP = 2**53
"""A column holds its numbers as doubles."""
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def parse_row(line: bytes, path: Path, number: int) -> Row:
    """The row in line `number` of `path`. Raises ValueError in one line that can be printed."""

    def wrong(what: str) -> ValueError:
        return ValueError(f"{shown(path)}, line {number}: {what}")

    row = read_json(line, wrong)
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        raise wrong("not a row of a history (an object with an integer 'step')")
    if abs(row["step"]) > LAST_STEP:
        raise wrong("'step' is beyond 2**53")
    for name, value in row.items():
        if type(value) is str:
            row[name] = value if name in TEXT else _NON_FINITE.get(value, value)
        if what := _not_plain(name, row[name]):
            raise wrong(f"{shown(name[:40])!r} is {what}")
    return row


def read_json(line: bytes, wrong: Any) -> Any:
    """What the line holds. Raises `wrong(why)` if it is no JSON, or deeper than Python can go."""
    try:
        return json.loads(line)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both
        why = shown(error)
    except RecursionError:
        why = "nested too deeply"
    hint = "" if line.lstrip().startswith(b"{") else "; records are read as JSONL, as written by history.to_jsonl(path)"
    raise wrong(f"not a row of a history ({why}){hint}")


def as_json(row: Mapping[str, Value]) -> bytes:
    """The row as one line."""
    text = json.dumps({k: _to_json(v) for k, v in row.items()}, allow_nan=False, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"


def _not_plain(name: str, value: Any) -> str:
    """What is wrong with a value, in words; "" if nothing is."""
    if isinstance(value, (dict, list)):
        return "not a plain value"
    if type(value) is int and abs(value) > LAST_STEP and _too_large(value):
        return "an integer too large for a number"
    if name in NUMBERS and isinstance(value, str):
        return f"text, not a number: {shown(value[:40])!r}"
    if name in TEXT and not isinstance(value, (str, type(None))):
        return "a number, not text"
    return ""


def _too_large(value: int) -> bool:
    try:
        float(value)
    except OverflowError:
        return True
    return False


def _to_json(value: Value) -> Value:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"
    return value
