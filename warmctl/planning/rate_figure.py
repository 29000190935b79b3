"""The figure of a range test: the loss over the learning rate, and the rates that it suggests."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from warmctl.record.history import History
from warmctl.record.scales import limits
from warmctl.record.style import COLOURS, DASHES, DOTS, INK, LEGEND, MEDIUM, MUTED, dress

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Sweep(Protocol):
    """What is drawn."""

    @property
    def history(self) -> History: ...
    @property
    def suggestion(self) -> float | None: ...
    @property
    def suggestion_by_curvature(self) -> float | None: ...


def draw_range(sweep: Sweep, path: str | os.PathLike[str] | None, axis: Axes | None) -> Figure:
    """Raw and smoothed loss, cut off above the first ones; a vertical line for each suggestion."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plot() needs matplotlib: pip install "warmctl[plot]"') from error
    if axis is None:
        figure = Figure(figsize=(6.4, 3.6), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        axis = figure.subplots()
    else:
        owner = axis.figure
        figure = owner if isinstance(owner, Figure) else owner.figure
    dress(axis)
    rates, raw, smoothed = (np.array(sweep.history[name], dtype=np.float64) for name in ("lr", "loss", "smoothed_loss"))
    axis.set_xscale("log")
    axis.plot(rates, raw, color=COLOURS[0], linewidth=0.7, alpha=0.4, gid="raw")
    axis.plot(rates, smoothed, color=COLOURS[0], linewidth=1.5, label="loss, smoothed", gid="loss")
    marks: tuple[tuple[str, float | None, Any], ...] = (
        ("steepest descent", sweep.suggestion, DASHES),
        ("edge of stability", sweep.suggestion_by_curvature, DOTS),
    )
    for name, rate, dashes in marks:
        if rate is not None:
            axis.axvline(rate, color=INK, linewidth=1, linestyle=dashes, label=f"{name}: {rate:.2g}")
    seen = raw[np.isfinite(raw)]
    if len(seen):
        start = float(seen[: max(len(seen) // 10, 1)].max())
        limits(axis, float(seen.min()), start + 0.5 * abs(start - float(seen.min())), log=False)
    axis.set_xlabel("learning rate", fontsize=MEDIUM, color=INK)
    axis.set_ylabel("loss", fontsize=MEDIUM, color=INK)
    axis.legend(**LEGEND | {"labelcolor": MUTED}, loc="lower left")
    if path is not None:
        figure.savefig(path, dpi=200)
    return figure
