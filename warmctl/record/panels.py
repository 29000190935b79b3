"""The panels of a run: loss, the three gauges and learning rate, and the words beside them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from warmctl.record.curves import Floats, all_equal, finite, floats, smooth, thin
from warmctl.record.history import History, WarmupEnd
from warmctl.record.scales import limits, padded
from warmctl.record.shown import plain
from warmctl.record.style import (
    DASH_DOT,
    DASHES,
    DOTS,
    INK,
    MEDIUM,
    MUTED,
    SMALL,
    dress,
    legend_below,
    legend_beside,
    say,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DRAWN = 1e30


HEALTHY = 0.04, 0.15
"""Relative representation change of the steps of trainings that go well, whatever the network, optimizer or rate."""


@dataclass(frozen=True)
class NamedRun:
    """A run as it is drawn."""

    name: str
    colour: str
    history: History
    steps: Floats
    end: WarmupEnd | None
    zorder: float
    """Order of drawing: the first run lies over the later ones."""

    def __getitem__(self, column: str) -> Floats:
        """The column as it can be drawn: what is beyond 1e±30 lies there, or at zero."""
        values = floats(self.history[column])
        values = np.where(np.isfinite(values), values.clip(-DRAWN, DRAWN), values)
        return np.where(np.abs(values) < 1 / DRAWN, 0.0, values)


def frame(axes: Sequence[Axes], names: Sequence[str], runs: list[NamedRun], xscale: str) -> None:
    """Name the axes, and share the steps among them."""
    for axis in axes:
        dress(axis)
    first, last = min(run.steps[0] for run in runs), max(run.steps[-1] for run in runs)
    first, last = (max(first, 1.0), max(last, 2.0)) if xscale == "log" else (first, last)
    before, after = padded(first, last, 0.01, xscale == "log")
    axes[-1].set_xlabel("step", fontsize=MEDIUM, color=INK)
    for axis, name in zip(axes, names, strict=True):
        axis.set_xscale(xscale)
        axis.set_xlim(before, after)
        axis.set_ylabel(name, fontsize=MEDIUM, color=INK)


def draw_loss(axis: Axes, runs: list[NamedRun]) -> None:
    curves = [(run, *finite(run.steps, run["loss"])) for run in runs]
    curves = [(run, x, y) for run, x, y in curves if len(x)]
    if not curves:
        return say(axis, "no loss recorded")
    failed = [_diverged(run, y) for run, _, y in curves]
    low = min(y.min() for _, _, y in curves)
    top = max(1.5 * abs(y[0]) if bad else y.max() for bad, (_, _, y) in zip(failed, curves, strict=True))
    log = bool(low > 0 and top > 20 * low)
    for bad, (run, x, y) in zip(failed, curves, strict=True):
        mean = means(run)[np.isfinite(run["loss"])]
        smoothed = smooth(mean, log)
        if smoothed is not mean or "loss_mean" in run.history.columns:
            axis.plot(*thin(x, y), color=run.colour, linewidth=0.7, alpha=0.3, zorder=1.8, gid="raw")
        axis.plot(*thin(x, smoothed), color=run.colour, linewidth=1.5, zorder=run.zorder, gid="loss")
        if bad:  # where it left the panel for good, or else where it ended
            at = min(int(np.flatnonzero(y <= top)[-1]) + 1, len(y) - 1)
            cross: dict[str, Any] = {"ms": 7, "mec": "white", "mew": 0.7, "clip_on": False}
            axis.plot(x[at], min(y[at], top), "X", color=run.colour, zorder=4, gid="diverged", **cross)
    limits(axis, low, top, log)
    return None


def draw_ratio(axis: Axes, runs: list[NamedRun]) -> None:
    targets = sorted({float(t[-1]) for run in runs if len(t := finite(run.steps, run["target"])[1]) and t[-1] > 0})
    values, probes = [np.array([1.0, *targets])], 0
    for run in runs:
        ratio, probed = run["stability_ratio"], run["probed"] == 1
        values.append(ratio[np.isfinite(ratio) & (ratio > 0)])
        probes += int(probed.sum())
        size = 3.2 if probed.sum() <= 150 else 1.8
        look: dict[str, Any] = {"color": run.colour, "zorder": run.zorder}
        axis.plot(*thin(run.steps, ratio), linewidth=1.0, alpha=0.7, gid="ratio", **look)
        axis.plot(run.steps[probed], ratio[probed], "o", ms=size, mew=0, gid="probes", **look)
    found = np.concatenate(values)
    measured = len(found) > len(values[0])
    limits(axis, min(max(found.min(), 0.001), 0.3), max(found.max(), 1.8), True)
    axis.axhline(1.0, color=INK, linewidth=1.0, zorder=1.5, gid="edge")
    axis.axhspan(1.0, axis.get_ylim()[1], color="#000000", alpha=0.045, linewidth=0, zorder=0)
    for target in targets:
        axis.axhline(target, color=INK, linewidth=1.0, linestyle=DOTS, zorder=1.5, gid="target")
    _label_lines(axis, targets)
    if not measured:
        return say(axis, "no stability ratio recorded")
    if probes:
        low = axis.transAxes.inverted().transform(axis.transData.transform((0.0, min([1.0, *targets]))))[1] < 0.25
        legend_beside(axis, ("probe", {"marker": "o", "ms": 3.2, "linestyle": ""}), high=bool(low))
    return None


def draw_change(axis: Axes, runs: list[NamedRun]) -> None:
    """How far steps moved the representations: of the last one that was looked at, on a logarithmic axis."""
    found = _draw_carried(axis, runs, "representation_change")
    found = np.concatenate((HEALTHY, found[found > 0]))
    limits(axis, max(found.min(), 1e-3), found.max(), True)
    axis.axhspan(*HEALTHY, color="#000000", alpha=0.045, linewidth=0, zorder=0, gid="healthy")
    middle = float(np.sqrt(HEALTHY[0] * HEALTHY[1]))
    place: dict[str, Any] = {"transform": axis.get_yaxis_transform(), "va": "center_baseline"}
    axis.text(1.01, middle, "healthy", fontsize=SMALL, color=INK, **place)


def draw_slope(axis: Axes, runs: list[NamedRun]) -> None:
    """The slope at the end of the steps, as last read: above 0 the next batch would have them longer."""
    found = np.append(_draw_carried(axis, runs, "end_slope"), 0.0)
    limits(axis, found.min(), found.max(), False)
    axis.axhline(0.0, color=INK, linewidth=1.0, zorder=1.5, gid="zero")


def _draw_carried(axis: Axes, runs: list[NamedRun], column: str) -> Floats:
    """Draw what is read now and then in warmup and carried on between; return all finite values drawn."""
    values = []
    for run in runs:
        warm = np.array([phase in (None, "warmup") for phase in run.history["phase"]])
        curve = np.where(warm, run[column], np.nan)
        values.append(curve[np.isfinite(curve)])
        look: dict[str, Any] = {"drawstyle": "steps-post", "linewidth": 1.0, "alpha": 0.7, "gid": column}
        axis.plot(*thin(run.steps, curve), color=run.colour, zorder=run.zorder, **look)
    return np.concatenate(values)


def draw_rate(axis: Axes, runs: list[NamedRun]) -> None:
    schedules = [run["scheduled_lr"] for run in runs]
    known = [schedule for schedule in schedules if np.isfinite(schedule).any()]
    shared = all_equal(known)
    values = []
    for run, scheduled in zip(runs, schedules, strict=True):
        values += [run["lr"], scheduled]
        axis.plot(*thin(run.steps, run["lr"]), color=run.colour, linewidth=1.5, zorder=run.zorder, gid="applied")
        if np.isfinite(scheduled).any():
            colour = MUTED if shared else run.colour
            curve = thin(run.steps, scheduled)
            axis.plot(*curve, color=colour, linewidth=1, linestyle=DASHES, zorder=4, gid="scheduled")
    found = np.concatenate(values)
    found = found[np.isfinite(found) & (found > 0)]
    if not len(found):
        return say(axis, "no learning rate recorded")
    starts = [rates[rates > 0][0] for run in runs if ((rates := run["lr"]) > 0).any()]
    floor = min([found.max() * 1e-3, *starts])  # shows where warmup began, not where a decay to zero ends
    limits(axis, max(found.min(), floor), found.max(), True)
    if known:
        legend_beside(axis, ("applied", {"linewidth": 1.5}), ("scheduled", {"linewidth": 1.0, "linestyle": DASHES}))
    return None


def draw_ends(axes: Sequence[Axes], runs: list[NamedRun]) -> None:
    for run in runs:
        if run.end is not None:
            colour = INK if len(runs) == 1 else run.colour
            for axis in axes:
                axis.axvline(run.end.step, color=colour, linewidth=0.9, linestyle=DASH_DOT, gid="end")
    if len(runs) > 1:
        _name_runs(axes[-1], runs)
    elif runs[0].end is not None:
        _flag(axes[0], runs[0].end)


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
        fontsize=SMALL,
        color=INK,
    )


def _name_runs(axis: Axes, runs: list[NamedRun]) -> None:
    """Names of the runs, and where and why the warmup of each ended, under the figure."""
    from matplotlib.lines import Line2D

    inches = axis.get_window_extent().width / axis.figure.dpi
    titles = [plain(run.name) for run in runs]
    room = int(15 * inches) - max(map(len, titles)) - 10  # the lines of the keys, and gaps
    words = [textwrap.fill(_words(run.end), max(30, room)) if run.end else "" for run in runs]
    names = [title + "\n" * text.count("\n") for title, text in zip(titles, words, strict=True)]
    keys = [Line2D([], [], color=run.colour, linewidth=2) for run in runs]
    if any(words):
        names += words
        keys += [Line2D([], [], linestyle="") for _ in runs]
    legend_below(axis, keys, names, ncols=2 if any(words) else min(4, len(runs)))


def _words(end: WarmupEnd) -> str:
    return plain(f"warmup ended at step {end.step}" + (f": {end.reason}" if end.reason else ""))


def _label_lines(axis: Axes, targets: list[float]) -> None:
    """Name the edge and the targets in the right margin, apart from each other."""
    low, top = np.log(axis.get_ylim())
    near = bool(targets) and abs(np.log(targets[-1])) < 0.09 * (top - low)
    words = [(1.0, "edge", "bottom" if near else "center_baseline")]
    if targets:
        text = "target " + ", ".join(f"{target:.3g}" for target in targets)
        words.append((targets[0], text, "top" if near else "center_baseline"))
    for y, text, va in words:
        axis.text(1.01, y, text, transform=axis.get_yaxis_transform(), fontsize=SMALL, color=INK, va=va)


def means(run: NamedRun) -> Floats:
    """The loss; of a thinned record that over the stretch of each row, as its rows are the extremes."""
    if "loss_mean" not in run.history.columns:
        return run["loss"]
    return np.where(np.isfinite(run["loss_mean"]), run["loss_mean"], run["loss"])


def _diverged(run: NamedRun, losses: Floats) -> bool:
    """The loss is not finite at the end, or twenty times what it was at the start."""
    last = run.history[-1].get("loss")
    return bool((last is not None and not np.isfinite(float(last))) or losses[-1] > 20 * abs(losses[0]))
