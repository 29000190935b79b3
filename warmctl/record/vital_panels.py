"""The panels of vital signs: one a kind, a line a layer."""

from __future__ import annotations

from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from warmctl.record.curves import Floats, finite
from warmctl.record.panels import NamedRun
from warmctl.record.scales import limits
from warmctl.record.shown import plain
from warmctl.record.style import INK, MUTED, legend_beside, shades

if TYPE_CHECKING:
    from matplotlib.axes import Axes

VITALS = {
    "norms' input σ": "vitals/*/sigma",
    "saturated units": "vitals/*/saturated",
    "dead units": "vitals/*/dead",
    "gradient norm": "vitals/*/gradient",
    "relative update": "vitals/*/update",
    "float16 headroom": "vitals/float16_headroom",
}
"""Title of a panel → the columns that are drawn in it."""
SHARES = "saturated units", "dead units"
LONGEST = 16
"""Characters of a layer's name in a legend."""


def columns_of(run: NamedRun, pattern: str) -> list[str]:
    """The columns of a panel in which something was recorded, in the order of depth."""
    found = [name for name in run.history.columns if fnmatchcase(name, pattern)]
    return [name for name in found if np.isfinite(run[name]).any()]


def layer(column: str) -> str:
    """`vitals/LAYER/kind` → LAYER."""
    return column.removeprefix("vitals/").rpartition("/")[0]


def draw_vital(axis: Axes, runs: list[NamedRun], title: str) -> None:
    """A line a layer: of one run from dark to light by depth, of several in their own colours."""
    curves: list[tuple[str, str, Floats, Floats]] = []
    for run in runs:
        columns = columns_of(run, VITALS[title])
        colours = shades(len(columns)) if len(runs) == 1 < len(columns) else [run.colour] * len(columns)
        curves += [(name, c, *finite(run.steps, run[name])) for name, c in zip(columns, colours, strict=True)]
    for name, colour, x, y in curves:
        axis.plot(x, y, color=colour, linewidth=1.0, marker="o", ms=1.8, mew=0, alpha=0.8, gid=name)
    values = np.concatenate([y for *_, y in curves])
    if title in SHARES:
        limits(axis, 0.0, max(values.max(), 0.1), False)
    else:
        values = values[values > 0] if (values > 0).any() else np.ones(1)
        limits(axis, values.min(), values.max(), True)
    if title == "float16 headroom":
        axis.axhline(1.0, color=INK, linewidth=1.0, zorder=1.5, gid="overflow")
    entries = [_entry(name, colour) for name, colour, *_ in (curves[0], curves[-1])] if len(runs) == 1 else []
    entries = entries[: len(curves)] if VITALS[title].count("*") else []
    if title == "gradient norm" and _draw_clipped(axis, runs):
        entries.append(("clipped", {"marker": "|", "ms": 5, "linestyle": ""}))
    if entries:
        legend_beside(axis, *entries)


VITAL_PANELS = {title: partial(draw_vital, title=title) for title in VITALS}


def _draw_clipped(axis: Axes, runs: list[NamedRun]) -> bool:
    """Marks at the foot of the panel, at the samples whose gradient was shortened."""
    drawn = False
    for run in runs:
        if "vitals/clipped" in run.history.columns and len(at := run.steps[run["vitals/clipped"] == 1.0]):
            colour, place = MUTED if len(runs) == 1 else run.colour, axis.get_xaxis_transform()
            axis.plot(at, np.full(len(at), 0.04), "|", color=colour, ms=5, transform=place, gid="clipped")
            drawn = True
    return drawn


def _entry(column: str, colour: str) -> tuple[str, dict[str, Any]]:
    name = plain(layer(column))
    name = name if any(map(str.isalpha, name)) else f"layer {name}"  # of a Sequential, "0.2"
    return name if len(name) <= LONGEST else "…" + name[1 - LONGEST :], {"color": colour, "linewidth": 1.5}
