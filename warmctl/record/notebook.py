"""A history as a notebook shows it: three small curves, the last row, the last reasons."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from warmctl.record.curves import Floats, finite, floats, thin
from warmctl.record.shown import shown

WIDTH, HEIGHT, POINTS, REASONS = 640, 70, 1_500, 8
CURVES = {"loss": "loss", "stability_ratio": "stability ratio", "lr": "learning rate"}


class Rows(Protocol):
    """What is asked of a history."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: Any, /) -> Any: ...


def as_html(rows: Rows) -> str:
    """Self-contained; whatever the rows hold is text in it."""
    if not len(rows):
        return "<p>History, no rows</p>"
    steps = np.array(rows["step"], np.float64)
    last = {name: value for name, value in rows[-1].items() if value not in (None, "")}
    cells = "".join(f"<th>{_text(name)}</th>" for name in last), "".join(f"<td>{_value(v)}</td>" for v in last.values())
    curves = "".join(_curve(title, steps, rows[column]) for column, title in CURVES.items())
    reasons = [(int(step), reason) for step, reason in zip(steps, rows["reason"], strict=True) if reason]
    items = "".join(f"<li>{step}: {_text(reason)}</li>" for step, reason in reasons[-REASONS:])
    more = f"<p>{len(reasons) - REASONS} reasons before these</p>" if len(reasons) > REASONS else ""
    return (
        f"<p>History, {len(rows)} rows, steps {int(steps[0])} to {int(steps[-1])}</p>{curves}"
        f"<table><tr>{cells[0]}</tr><tr>{cells[1]}</tr></table>{more}<ul>{items}</ul>"
    )


def _curve(title: str, steps: Floats, column: Sequence[Any]) -> str:
    """A line with its lowest and highest value; nothing where nothing is known."""
    x, y = finite(steps, floats(column))
    if not len(y):
        return ""
    x, y = thin(x, y, POINTS)
    low, top = y.min(), y.max()
    log = bool(low > 0 and top / 20 > low)
    heights = np.log(y) if log else y / 2  # halves, or a difference may overflow
    span = heights.max() - heights.min() or 1.0
    across = (x - steps[0]) / ((steps[-1] - steps[0]) or 1.0) * WIDTH
    down = HEIGHT * (1 - (heights - heights.min()) / span)
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(across, down, strict=True))
    name = f"{title}, {low:.3g} to {top:.3g}" + (", logarithmic" if log else "")
    return (
        f'<div><small>{name}</small><br><svg width="{WIDTH}" height="{HEIGHT + 2}" viewBox="0 -1 {WIDTH} {HEIGHT + 2}">'
        f'<polyline points="{points}" fill="none" stroke="#0072B2" stroke-width="1.2"/></svg></div>'
    )


def _value(value: Any) -> str:
    short = isinstance(value, float) and math.isfinite(value)
    return f"{value:.4g}" if short else _text(value)


def _text(words: object) -> str:
    return html.escape(shown(str(words)[:300]))
