"""The curves of one or several runs as a figure of plotly: zoomed and hovered over in a page of its own."""

from __future__ import annotations

import html
import math
from typing import Any

import numpy as np

from warmctl.record.curves import Floats, finite, smooth, thin
from warmctl.record.history import COLUMNS
from warmctl.record.panels import NamedRun, means
from warmctl.record.shown import shown
from warmctl.record.style import GRID, INK, MUTED
from warmctl.record.vital_panels import SHARES, VITALS, columns_of

POINTS, EVENTS, LONGEST = 3_000, 1_000, 300
"""Points of a curve; marks of a run, where there are more from both its ends; characters of a reason."""
MORE = 12
"""Panels for columns beside the wrapper's own."""
PANELS = {
    "loss": "loss",
    "stability_ratio": "stability ratio",
    "lr": "learning rate",
    "representation_change": "representation change",
    "end_slope": "end slope",
}
HEIGHT = 190
Trace = dict[str, Any]


def chart(runs: list[NamedRun]) -> dict[str, Any]:
    """`data`, `layout` and `config` of the figure, as JSON can hold it."""
    panels = _panels(runs)
    traces: list[Trace] = []
    for run in reversed(runs):  # the first lies over the others
        for index, column in enumerate(panels):
            axis = "y" if index == 0 else f"y{index + 1}"
            traces += [{**trace, "yaxis": axis, "legendgroup": run.name} for trace in _traces(run, column)]
        traces += [{**trace, "yaxis": "y", "legendgroup": run.name} for trace in _events(run)]
    config = {"displaylogo": False, "responsive": True, "scrollZoom": True}
    return {"data": traces, "layout": _layout(runs, panels), "config": config}


def text(words: object, longest: int = LONGEST) -> str:
    """For plotly, which takes some tags for markup."""
    short = str(words)
    return html.escape(shown(short if len(short) <= longest else short[:longest] + "…"))


def _panels(runs: list[NamedRun]) -> dict[str, str]:
    """Titles of the panels by column: what is known of at least one run."""
    vitals = {pattern: title for title, pattern in VITALS.items() if any(columns_of(run, pattern) for run in runs)}
    drawn = {*COLUMNS, "loss_mean", *(name for run in runs for p in vitals for name in columns_of(run, p))}
    others = {name: name for run in runs for name in run.history.columns if name not in drawn}
    numeric = {name: title for name, title in others.items() if any(_is_numeric(run, name) for run in runs)}
    more = dict(list(numeric.items())[:MORE])
    known = {
        name: title
        for name, title in PANELS.items()
        if name == "loss" or any(np.isfinite(run[name]).any() for run in runs)
    }
    return {**known, **vitals, **more}


def _is_numeric(run: NamedRun, name: str) -> bool:
    values = run.history[name] if name in run.history.columns else []
    known = [value for value in values if value is not None]
    return any(not isinstance(value, bool) for value in known) and all(isinstance(v, (int, float)) for v in known)


def _traces(run: NamedRun, column: str) -> list[Trace]:
    if column in VITALS.values():
        found = columns_of(run, column)
        looks = [{"color": run.colour, "width": 0.7 + 1.5 * i / len(found)} for i in range(len(found))]  # by depth
        return [
            _line(run, text(name, 80), *finite(run.steps, run[name]), look)
            for name, look in zip(found, looks, strict=True)
        ]
    if column not in COLUMNS and not _is_numeric(run, column):
        return []
    steps, values = finite(run.steps, run[column])
    look = {"color": run.colour}
    if column == "loss":
        smoothed = smooth(means(run)[np.isfinite(run[column])], bool(len(values)) and _is_log(values))
        raw = _line(run, "loss, each step", steps, values, {**look, "width": 1}, opacity=0.3)
        return [
            raw,
            _line(run, "loss", steps, smoothed, {**look, "width": 2}, showlegend=True, name=text(run.name, 80)),
        ]
    curve = _line(run, PANELS.get(column, text(column, 40)), steps, values, {**look, "width": 1.5})
    if column == "lr":
        scheduled = finite(run.steps, run["scheduled_lr"])
        dashes = {"color": run.colour, "width": 1, "dash": "dash"}
        return [curve, _line(run, "scheduled learning rate", *scheduled, dashes)]
    if column == "stability_ratio":
        return [curve, _probes(run)]
    return [curve]


def _line(run: NamedRun, what: str, steps: Floats, values: Floats, line: Trace, **more: Any) -> Trace:
    x, y = thin(steps, values, POINTS)
    hover = f"{text(run.name, 80)}<br>step %{{x}}<br>{what} %{{y:.4g}}<extra></extra>"
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [int(step) for step in x],
        "y": _numbers(y),
        "line": line,
        "hovertemplate": hover,
        "showlegend": False,
        **more,
    }


def _probes(run: NamedRun) -> Trace:
    """Dots where the ratio was measured."""
    at = np.flatnonzero((run["probed"] == 1) & np.isfinite(run["stability_ratio"]))
    at = at[:: max(1, math.ceil(len(at) / POINTS))]
    hover = f"{text(run.name, 80)}<br>probe at step %{{x}}<br>stability ratio %{{y:.4g}}"
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [int(step) for step in run.steps[at]],
        "y": _numbers(run["stability_ratio"][at]),
        "customdata": _numbers(run["sharpness"][at]),
        "marker": {"color": run.colour, "size": 5},
        "hovertemplate": f"{hover}<br>sharpness %{{customdata:.4g}}<extra></extra>",
        "showlegend": False,
    }


def _events(run: NamedRun) -> list[Trace]:
    """Marks on the loss with the reasons: what was decided, what failed, where warmup ended."""
    reasons = run.history["reason"]
    at = [index for index, reason in enumerate(reasons) if reason]
    if len(at) > 2 * EVENTS:
        at = at[:EVENTS] + at[-EVENTS:]
    if not at:
        return []
    loss = means(run)
    known = loss[np.isfinite(loss)]
    heights = np.where(np.isfinite(loss), loss, known.max() if len(known) else 0.0)[at]
    words = [text(reasons[index]) for index in at]
    ended = [index for index in at if run.end is not None and run.steps[index] == run.end.step]
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "x": [int(step) for step in run.steps[at]],
            "y": _numbers(heights),
            "text": words,
            "marker": {
                "color": run.colour,
                "size": [12 if index in ended else 8 for index in at],
                "symbol": ["star" if index in ended else "diamond" for index in at],
                "line": {"color": "white", "width": 1},
            },
            "hovertemplate": f"{text(run.name, 80)}<br>step %{{x}}: %{{text}}<extra></extra>",
            "hoverlabel": {"align": "left"},
            "showlegend": False,
        }
    ]


def _layout(runs: list[NamedRun], panels: dict[str, str]) -> dict[str, Any]:
    count, shapes, gap = len(panels), [], 0.05
    height = 1.3 + (count - 1)  # the loss is the highest
    layout: dict[str, Any] = {
        "height": round(HEIGHT * height) + 90,
        "margin": {"l": 70, "r": 20, "t": 40, "b": 50},
        "hovermode": "closest",
        "hoverdistance": 30,
        "legend": {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0, "traceorder": "reversed"},
        "showlegend": len(runs) > 1,
        "font": {"color": INK, "size": 12},
        "plot_bgcolor": "white",
        "paper_bgcolor": "white",
    }
    top = 1.0
    for index, (column, title) in enumerate(panels.items()):
        number = "" if index == 0 else str(index + 1)
        bottom = max(0.0, top - (1.3 if index == 0 else 1.0) / height)
        values = np.concatenate([_known(run, column) for run in runs])
        look = {"title": {"text": text(title, 40)}, "gridcolor": GRID, "zeroline": False, "automargin": True}
        scale = _log_scale(values) if _is_log(values, column) else {}
        layout[f"yaxis{number}"] = {**look, **scale, "domain": [bottom + (gap / height if index else 0), top]}
        if column == "stability_ratio":
            shapes += [{"yref": f"y{number}", "y0": 1, "y1": 1, "line": {"color": INK, "width": 1}}]
            targets = {float(t[-1]) for run in runs if len(t := finite(run.steps, run["target"])[1]) and t[-1] > 0}
            dots = {"color": MUTED, "width": 1, "dash": "dot"}
            shapes += [{"yref": f"y{number}", "y0": target, "y1": target, "line": dots} for target in sorted(targets)]
        top = bottom - gap / height / 2 if index < count - 1 else bottom
    across = {"type": "line", "xref": "paper", "x0": 0, "x1": 1}
    layout["shapes"] = [{**across, **shape} for shape in shapes]
    for run in runs:
        if run.end is not None:
            line = {"color": run.colour, "width": 1, "dash": "dashdot"}
            down = {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": run.end.step, "x1": run.end.step}
            layout["shapes"].append({**down, "line": line})
    bottom_axis = "y" if count == 1 else f"y{count}"
    layout["xaxis"] = {"title": {"text": "step"}, "gridcolor": GRID, "zeroline": False, "anchor": bottom_axis}
    return layout


def _known(run: NamedRun, column: str) -> Floats:
    if column in VITALS.values():
        return np.concatenate([np.zeros(0), *(finite(run.steps, run[name])[1] for name in columns_of(run, column))])
    if column not in COLUMNS and not _is_numeric(run, column):
        return np.zeros(0)
    values = run[column]
    return values[np.isfinite(values)]


def _is_log(values: Floats, column: str = "loss") -> bool:
    shares = [VITALS[title] for title in SHARES]
    if not len(values) or column not in {"loss", "stability_ratio", "lr", *VITALS.values()}.difference(shares):
        return False
    if column == "loss":
        return bool(values.min() > 0 and values.max() > 20 * values.min())
    return bool((values > 0).any())


def _log_scale(values: Floats) -> dict[str, Any]:
    """Five decades at most to begin with: a decay to zero need not be seen to its end."""
    top = np.log10(values.max())
    low = max(np.log10(values[values > 0].min()), top - 5)
    pad = 0.05 * (top - low) + 0.05
    return {"type": "log", "exponentformat": "power", "range": [float(low - pad), float(top + pad)]}


def _numbers(values: Floats) -> list[float | None]:
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values]
