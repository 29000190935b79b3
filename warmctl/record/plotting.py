"""The figure of a run: loss, stability ratio, and applied against scheduled learning rate, over the steps.

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
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from warmctl.record.history import History, WarmupEnd, warmup_end

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Run: TypeAlias = "History | Iterable[Mapping[str, Any]] | str | os.PathLike[str]"
Floats: TypeAlias = NDArray[np.float64]

# Okabe and Ito's palette, safe for the colour-blind, without its yellow, too faint for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
INK, MUTED = "#222222", "#777777"
DASHES = (0, (4, 2))
LEGEND: dict[str, Any] = {
    "frameon": False,
    "fontsize": 8,
    "labelcolor": INK,
    "handlelength": 1.6,
    "borderaxespad": 0,
}


def plot(
    history: Run | Mapping[str, Run],
    *,
    axes: Sequence[Axes] | None = None,
    path: str | os.PathLike[str] | None = None,
    xscale: Literal["linear", "log"] = "linear",
) -> Figure:
    """Draw one run, or several by name, in three panels over a shared axis of steps.

    `history` is a History, a list of rows, the path of a JSONL file, or a mapping from names to any of these.
    Runs may lack columns: one logged by hand with "step", "loss" and "lr" only is a baseline. `axes`: three
    to draw on, from top to bottom. `path`: where to save the figure, its format by the suffix. `xscale`:
    "log" opens up the first steps, where warmup is short against the run.

    Top: loss, lightly smoothed over the raw values; a cross where a run diverged. Middle: the stability
    ratio, with its edge at 1 and the controller's target; dots where it was measured. Bottom: the applied
    learning rate, solid, and the scheduled one, dashed. A vertical line is the end of warmup.

    Raises ImportError without matplotlib, ValueError if there is nothing to draw.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plot() needs matplotlib: pip install "warmctl[plot]"') from error

    runs = _load(history)
    if axes is None:
        figure = Figure(figsize=(7.2, 6.4 + 0.17 * (len(runs) - 1)), dpi=110)
        figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.06)
        FigureCanvasAgg(figure)
        axes = list(figure.subplots(3, sharex=True, height_ratios=(1.2, 1, 1)))
        setattr(figure, "_repr_png_", partial(_png, figure))  # noqa: B010  for a notebook without pyplot
        if len(runs) == 1 and runs[0].name:
            figure.suptitle(runs[0].name, fontsize=10, fontweight="bold", color=INK)
    elif len(axes) == 3:
        owner = axes[0].figure
        figure = owner if isinstance(owner, Figure) else owner.figure
    else:
        raise ValueError(f"plot() draws on three axes, got {len(axes)}")
    loss, ratio, rate = axes
    _style(axes, runs, xscale)
    _draw_loss(loss, runs)
    _draw_ratio(ratio, runs)
    _draw_rate(rate, runs)
    _draw_ends(axes, runs)
    figure.align_ylabels(axes)
    if path is not None:
        figure.savefig(path, dpi=200)
    return figure


@dataclass(frozen=True)
class _Run:
    name: str
    colour: str
    history: History
    steps: Floats
    end: WarmupEnd | None
    layer: float
    """Order of drawing: the first run lies over the later ones."""

    def __getitem__(self, column: str) -> Floats:
        return np.array([np.nan if v is None else v for v in self.history[column]], dtype=np.float64)


def _load(history: Run | Mapping[str, Run]) -> list[_Run]:
    named = history if isinstance(history, Mapping) else {"": history}
    runs = []
    for i, (name, source) in enumerate(named.items()):
        rows = _rows(source)
        if not rows:
            raise ValueError(f"nothing to draw: {name or 'the history'} has no rows")
        colour = COLOURS[i] if len(named) <= len(COLOURS) else _shade(i / (len(named) - 1))
        steps = np.array(rows["step"], np.float64)
        runs.append(_Run(name, colour, rows, steps, warmup_end(rows), layer=3 - i / len(named)))
    if not runs:
        raise ValueError("nothing to draw: no runs given")
    return runs


def _rows(source: Run) -> History:
    if isinstance(source, History):
        return source
    if isinstance(source, (str, os.PathLike)):
        return History.from_jsonl(Path(source))
    return History(source)


def _shade(position: float) -> str:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return to_hex(colormaps["viridis"](0.95 * position))


# -- panels -------------------------------------------------------------------------------------------------


def _style(axes: Sequence[Axes], runs: list[_Run], xscale: str) -> None:
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(MUTED)
        axis.tick_params(which="both", labelsize=8, color=MUTED, labelcolor=INK)
        for offset in (axis.xaxis.get_offset_text(), axis.yaxis.get_offset_text()):
            offset.set(fontsize=8, color=INK)
        axis.grid(True, axis="y", color="#E8E8E8", linewidth=0.6)
        axis.set_axisbelow(True)
    first, last = min(run.steps[0] for run in runs), max(run.steps[-1] for run in runs)
    first = max(first, 1.0) if xscale == "log" else first
    before, after = _padded(first, last, 0.01, xscale == "log")
    axes[-1].set_xlabel("step", fontsize=9, color=INK)
    for axis, name in zip(axes, ("loss", "stability ratio", "learning rate"), strict=True):
        axis.set_xscale(xscale)
        axis.set_xlim(before, after)
        axis.set_ylabel(name, fontsize=9, color=INK)


def _draw_loss(axis: Axes, runs: list[_Run]) -> None:
    curves = [(run, *_finite(run.steps, run["loss"])) for run in runs]
    curves = [(run, x, y) for run, x, y in curves if len(x)]
    if not curves:
        return _say(axis, "no loss recorded")
    failed = [_diverged(run, y) for run, _, y in curves]
    low = min(y.min() for _, _, y in curves)
    top = max(1.5 * abs(y[0]) if bad else y.max() for bad, (_, _, y) in zip(failed, curves, strict=True))
    log = bool(low > 0 and top > 20 * low)
    for bad, (run, x, y) in zip(failed, curves, strict=True):
        smooth = _smooth(y, log)
        if smooth is not y:
            axis.plot(*_thin(x, y), color=run.colour, linewidth=0.7, alpha=0.3, zorder=1.8, gid="raw")
        axis.plot(*_thin(x, smooth), color=run.colour, linewidth=1.5, zorder=run.layer, gid="loss")
        if bad:  # where it left the panel for good, or else where it ended
            at = min(int(np.flatnonzero(y <= top)[-1]) + 1, len(y) - 1)
            cross: dict[str, Any] = {"ms": 7, "mec": "white", "mew": 0.7, "clip_on": False}
            axis.plot(x[at], min(y[at], top), "X", color=run.colour, zorder=4, gid="diverged", **cross)
    _limits(axis, low, top, log)
    return None


def _draw_ratio(axis: Axes, runs: list[_Run]) -> None:
    targets = sorted({float(t[-1]) for run in runs if len(t := _finite(run.steps, run["target"])[1])})
    values, probes = [np.array([1.0, *targets])], 0
    for run in runs:
        ratio, probed = run["stability_ratio"], run["probed"] == 1
        values.append(ratio[np.isfinite(ratio) & (ratio > 0)])
        probes += int(probed.sum())
        size = 3.2 if probed.sum() <= 150 else 1.8
        look: dict[str, Any] = {"color": run.colour, "zorder": run.layer}
        axis.plot(*_thin(run.steps, ratio), linewidth=1.0, alpha=0.7, gid="ratio", **look)
        axis.plot(run.steps[probed], ratio[probed], "o", ms=size, mew=0, gid="probes", **look)
    found = np.concatenate(values)
    measured = len(found) > len(values[0])
    _limits(axis, min(max(found.min(), 0.001), 0.3), max(found.max(), 1.8), True)
    axis.axhline(1.0, color=INK, linewidth=1.0, zorder=1.5, gid="edge")
    axis.axhspan(1.0, axis.get_ylim()[1], color="#000000", alpha=0.045, linewidth=0, zorder=0)
    for target in targets:
        axis.axhline(target, color=INK, linewidth=1.0, linestyle=(0, (1, 1.6)), zorder=1.5, gid="target")
    _label_lines(axis, targets)
    if not measured:
        return _say(axis, "no stability ratio recorded")
    if probes:
        _key(axis, ("probe", {"marker": "o", "ms": 3.2, "linestyle": ""}))
    return None


def _draw_rate(axis: Axes, runs: list[_Run]) -> None:
    schedules = [run["scheduled_lr"] for run in runs]
    known = [schedule for schedule in schedules if np.isfinite(schedule).any()]
    shared = _all_equal(known)
    values = []
    for run, scheduled in zip(runs, schedules, strict=True):
        values += [run["lr"], scheduled]
        axis.plot(*_thin(run.steps, run["lr"]), color=run.colour, linewidth=1.5, zorder=run.layer, gid="applied")
        if np.isfinite(scheduled).any():
            colour = MUTED if shared else run.colour
            curve = _thin(run.steps, scheduled)
            axis.plot(*curve, color=colour, linewidth=1, linestyle=DASHES, zorder=4, gid="scheduled")
    found = np.concatenate(values)
    found = found[np.isfinite(found) & (found > 0)]
    if not len(found):
        return _say(axis, "no learning rate recorded")
    starts = [rates[rates > 0][0] for run in runs if ((rates := run["lr"]) > 0).any()]
    floor = min([found.max() * 1e-3, *starts])  # shows where warmup began, not where a decay to zero ends
    _limits(axis, max(found.min(), floor), found.max(), True)
    if known:
        _key(axis, ("applied", {"linewidth": 1.5}), ("scheduled", {"linewidth": 1.0, "linestyle": DASHES}))
    return None


def _draw_ends(axes: Sequence[Axes], runs: list[_Run]) -> None:
    for run in runs:
        if run.end is not None:
            colour = INK if len(runs) == 1 else run.colour
            for axis in axes:
                axis.axvline(run.end.step, color=colour, linewidth=0.9, ls=(0, (6, 2, 1, 2)), gid="end")
    if len(runs) > 1:
        _legend(axes[0], runs)
    elif runs[0].end is not None:
        _flag(axes[0], runs[0].end)


# -- words --------------------------------------------------------------------------------------------------


def _flag(axis: Axes, end: WarmupEnd) -> None:
    """Say over the line where and why warmup ended, on the side with more room."""
    left = float(axis.transAxes.inverted().transform(axis.transData.transform((end.step, 1.0)))[0])
    right = left < 0.5
    axis.annotate(
        textwrap.fill(_words(end), int(100 * max(left, 1 - left)) + 8),
        (end.step, 1.0),
        (-3 if right else 3, 4),
        xycoords=axis.get_xaxis_transform(),
        textcoords="offset points",
        ha="left" if right else "right",
        va="bottom",
        fontsize=8,
        color=INK,
    )


def _legend(axis: Axes, runs: list[_Run]) -> None:
    """Names of the runs, and where and why the warmup of each ended, over the panel."""
    from matplotlib.lines import Line2D

    width = max(len(run.name) for run in runs)
    words = [textwrap.fill(_words(run.end), max(30, 102 - width)) if run.end else "" for run in runs]
    names = [run.name + "\n" * text.count("\n") for run, text in zip(runs, words, strict=True)]
    keys = [Line2D([], [], color=run.colour, linewidth=2) for run in runs]
    if any(words):
        names += words
        keys += [Line2D([], [], linestyle="") for _ in runs]
    look = {
        **LEGEND,
        "loc": "lower left",
        "bbox_to_anchor": (0, 1.02),
        "labelspacing": 0.35,
        "columnspacing": 0.6,
    }
    axis.legend(keys, names, ncols=2 if any(words) else min(4, len(runs)), **look)


def _words(end: WarmupEnd) -> str:
    return f"warmup ended at step {end.step}" + (f": {end.reason}" if end.reason else "")


def _key(axis: Axes, *entries: tuple[str, dict[str, Any]]) -> None:
    """A small legend over the panel's right end, where no curve can be under it."""
    from matplotlib.lines import Line2D

    keys = [Line2D([], [], color=MUTED, **look) for _, look in entries]
    look = {**LEGEND, "loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": len(entries)}
    look["handlelength"] = 0.8 if entries[0][1].get("marker") else LEGEND["handlelength"]
    axis.legend(keys, [name for name, _ in entries], **look)


def _label_lines(axis: Axes, targets: list[float]) -> None:
    """Name the edge and the targets in the right margin, apart from each other."""
    low, top = np.log(axis.get_ylim())
    near = bool(targets) and abs(np.log(targets[-1])) < 0.09 * (top - low)
    words = [(1.0, "edge", "bottom" if near else "center_baseline")]
    if targets:
        text = "target " + ", ".join(f"{target:.3g}" for target in targets)
        words.append((targets[0], text, "top" if near else "center_baseline"))
    for y, text, va in words:
        axis.text(1.01, y, text, transform=axis.get_yaxis_transform(), fontsize=8, color=INK, va=va)


def _say(axis: Axes, words: str) -> None:
    axis.text(0.5, 0.25, words, transform=axis.transAxes, ha="center", va="center", fontsize=8, color=MUTED)


# -- numbers ------------------------------------------------------------------------------------------------


def _limits(axis: Axes, low: float, top: float, log: bool) -> None:
    """A linear or logarithmic axis that shows low to top, ticks in plain numbers where short."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if log and top < 3 * low:
        middle = np.sqrt(low * top)  # at least half a decade, or there may be no tick to read
        low, top = middle / np.sqrt(3.0), middle * np.sqrt(3.0)
    low, top = _padded(low, top, 0.06, log)
    axis.set_autoscaley_on(False)  # or a curve without a positive value warns here
    axis.set_yscale("log" if log else "linear", **({"nonpositive": "mask"} if log else {}))
    axis.set_ylim(low, top)
    if not log:
        return
    decades = np.log10(top / low)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.2 else (1,), numticks=8))
    axis.yaxis.set_minor_formatter(NullFormatter())
    plain = low > 5e-4 and top < 2e4
    axis.yaxis.set_major_formatter(FuncFormatter(_plain_tick if plain else _power_tick))


def _padded(low: float, top: float, share: float, log: bool) -> tuple[float, float]:
    if log:
        pad = max((top / low) ** share, 1 + 2 * share)
        return low / pad, top * pad
    pad = share * (top - low) or share * abs(top) or 1.0
    return low - pad, top + pad


def _plain_tick(value: float, _position: int | None = None) -> str:
    return f"{value:g}"


def _power_tick(value: float, _position: int | None = None) -> str:
    exponent = int(np.floor(np.log10(value) + 1e-9))
    digits = f"{value / 10.0**exponent:g}"
    return f"$10^{{{exponent}}}$" if digits == "1" else rf"${digits}\times10^{{{exponent}}}$"


def _diverged(run: _Run, finite: Floats) -> bool:
    """The loss is not finite at the end, or twenty times what it was at the start."""
    last = run.history[-1].get("loss")
    return bool((last is not None and not np.isfinite(last)) or finite[-1] > 20 * abs(finite[0]))


def _smooth(y: Floats, log: bool) -> Floats:
    """A centred triangular mean over one part in 75 of the run; `y` itself if the run is short.

    The window grows from one value at the start, where the curve is steep, and is cut at the end.
    """
    half = len(y) // 300
    if half < 1:
        return y
    smooth, at = np.log(y) if log else y, np.arange(len(y))
    first, last = np.maximum(at - half, 0), np.minimum(at + np.minimum(half, at), len(y) - 1)
    for _ in range(2):
        total = np.concatenate(([0.0], np.cumsum(smooth)))
        smooth = (total[last + 1] - total[first]) / (last + 1 - first)
    return np.exp(smooth) if log else smooth


def _thin(x: Floats, y: Floats, points: int = 20_000) -> tuple[Floats, Floats]:
    """A curve that looks the same with about as many points: the lowest and the highest of each stretch."""
    if len(y) <= points:
        return x, y
    width = 4 * len(y) // points
    padded = np.pad(y, (0, -len(y) % width), constant_values=np.nan).reshape(-1, width)
    starts = np.arange(0, len(y), width)
    lowest = starts + np.where(np.isnan(padded), np.inf, padded).argmin(1)
    highest = starts + np.where(np.isnan(padded), -np.inf, padded).argmax(1)
    early = np.arange(points // 10)  # all of the first steps, for a logarithmic axis
    keep = np.unique(np.concatenate((early, lowest, highest, [len(y) - 1])))
    return x[keep], y[keep]


def _finite(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    keep = np.isfinite(y)
    return x[keep], y[keep]


def _all_equal(curves: list[Floats]) -> bool:
    longest = max(curves, key=len, default=np.zeros(0))
    return all(np.array_equal(curve, longest[: len(curve)], equal_nan=True) for curve in curves)


def _png(figure: Figure) -> bytes:
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()
