"""The figure of a run: loss, the gauges, and applied against scheduled learning rate, over the steps.

    plot(opt.history)                                                  # a figure; notebooks show it
    plot(opt.history, path="run.png")                                  # saved as well
    plot({"warmctl": opt.history, "linear, 100 steps": "base.jsonl"})  # several runs on shared axes
    plot(opt.history, axes=plt.subplots(3, sharex=True)[1])            # on axes of one's own, in a window

matplotlib is imported by the first call. pyplot is not: no backend is chosen or changed, and no figure is
kept alive behind the caller's back.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from warmctl.record.history import History, warmup_end
from warmctl.record.panels import (
    NamedRun,
    draw_change,
    draw_ends,
    draw_loss,
    draw_rate,
    draw_ratio,
    draw_slope,
    frame,
)
from warmctl.record.shown import plain
from warmctl.record.style import INK, LARGE, colours
from warmctl.record.vital_panels import VITAL_PANELS, VITALS, columns_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RATIO, RATE = "stability ratio", "learning rate"
PANELS: dict[str, Callable[[Axes, list[NamedRun]], None]] = {
    "loss": draw_loss,
    RATIO: draw_ratio,
    "representation change": draw_change,
    "end slope": draw_slope,
    RATE: draw_rate,
    **VITAL_PANELS,
}
"""From top to bottom. The column of a gauge has the name of its panel."""
ALWAYS = "loss", RATIO, RATE
"""The others are there where a run has values."""

Run: TypeAlias = "History | Iterable[Mapping[str, Any]] | str | os.PathLike[str]"


def plot(
    history: Run | Mapping[str, Run],
    *,
    axes: Sequence[Axes] | None = None,
    path: str | os.PathLike[str] | None = None,
    xscale: Literal["linear", "log"] = "linear",
) -> Figure:
    """Draw one run, or several by name, in three panels or more over a shared axis of steps.

    `history` is a History or the wrapper that has it, a list of rows, the path of a JSONL file, or a mapping from names
    to any of these.
    Runs may lack columns: one logged by hand with "step", "loss" and "lr" only is a baseline. `axes`: three
    to draw on, from top to bottom, without gauges and vital signs. `path`: where to save the figure, its format
    by the suffix. `xscale`: "log" opens up the first steps, where warmup is short against the run.

    Top: loss, lightly smoothed over the raw values; a cross where a run diverged. Then the stability ratio,
    with its edge at 1 and the controller's target; dots where it was measured. Where warmup has recorded them,
    how far a step moves the representations, over the band of healthy trainings, and the slope at the end of
    the steps. Then the applied learning rate, solid, and the scheduled one, dashed. Below it, where `Vitals` has
    looked, a panel of each kind of its readings, a line a layer, from dark to light by depth; of several runs in
    the colour of the run. A vertical line is the end of warmup.

    Raises ImportError without matplotlib, ValueError if there is nothing to draw.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plot() needs matplotlib: pip install "warmctl[plot]"') from error

    runs = _load(history)
    names = list(ALWAYS)
    if axes is None:
        names = [name for name in PANELS if name in ALWAYS or _recorded(name, runs)]
        gauges = len(names) - len(ALWAYS)
        figure = Figure(figsize=(7.2, 6.4 + 1.7 * gauges + 0.17 * (len(runs) - 1)), dpi=110)
        figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.06)
        FigureCanvasAgg(figure)
        heights = [{"loss": 1.2}.get(name, 1.0) for name in names]
        axes = list(figure.subplots(len(names), sharex=True, height_ratios=heights))
        setattr(figure, "_repr_png_", partial(_png, figure))  # noqa: B010  for a notebook without pyplot
        if len(runs) == 1 and runs[0].name:
            figure.suptitle(plain(runs[0].name), fontsize=LARGE, fontweight="bold", color=INK)
    elif len(axes) == len(names):
        owner = axes[0].figure
        figure = owner if isinstance(owner, Figure) else owner.figure
    else:
        raise ValueError(f"plot() draws on three axes, got {len(axes)}")
    frame(axes, names, runs, xscale)
    for axis, name in zip(axes, names, strict=True):
        PANELS[name](axis, runs)
    draw_ends(axes, runs)
    figure.align_ylabels(axes)
    if path is not None:
        figure.savefig(path, dpi=200)
    return figure


def _recorded(panel: str, runs: list[NamedRun]) -> bool:
    if panel in VITALS:
        return any(columns_of(run, VITALS[panel]) for run in runs)
    return any(np.isfinite(run[panel.replace(" ", "_")]).any() for run in runs)


def _load(history: Run | Mapping[str, Run]) -> list[NamedRun]:
    named = history if isinstance(history, Mapping) else {"": history}
    runs = []
    palette = colours(len(named))
    for i, (name, source) in enumerate(named.items()):
        rows = _rows(source)
        if not rows:
            raise ValueError(f"nothing to draw: {name or 'the history'} has no rows")
        steps = np.array(rows["step"], np.float64)
        runs.append(NamedRun(name, palette[i], rows, steps, warmup_end(rows), zorder=3 - i / len(named)))
    if not runs:
        raise ValueError("nothing to draw: no runs given")
    return runs


def _rows(source: Run) -> History:
    source = getattr(source, "history", source)  # of the wrapper itself
    if isinstance(source, History):
        return source
    if isinstance(source, (str, os.PathLike)):
        return History.from_jsonl(Path(source))
    return History(source)


def _png(figure: Figure) -> bytes:
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()
