"""Final loss against peak rate, a panel a problem."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import style
from benchmarks.harness.cells import Cell, by_problem
from benchmarks.harness.policies import LINEAR, POLICIES

NAMES = {
    "none": "no warmup",
    **{policy: f"linear warmup, {share:.0%} of the run" for policy, share in LINEAR.items()},
    "untuned": "untuned linear (Adam)",
    "radam": "RAdam",
    "seeded": "Adam, v seeded with g₀²",
    "schedulefree": "schedule-free, 5% warmup",
    "oracle": "oracle: best of none and linear",
    "warmctl": "warmctl, and its range over seeds",
}
LOSSES = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 1.5, 2, 2.5, 3)
"""Where a tick may be."""


def looks() -> dict[str, dict[str, Any]]:
    """Of the curve of each policy, in the order of drawing; colours as in the demo's figure."""
    from matplotlib import colormaps

    shades = colormaps["Oranges"]
    found: dict[str, dict[str, Any]] = {p: {"color": shades(0.3 + 0.11 * i), "lw": 1.0} for i, p in enumerate(LINEAR)}
    found["none"] = {"color": style.BLUE, "lw": 1.1}
    found["untuned"] = {"color": style.PINK, "lw": 1.1, "ls": "--"}
    found["radam"] = {"color": style.PINK, "lw": 1.3, "ls": ":"}
    found["seeded"] = {"color": style.SKY, "lw": 1.1, "ls": "--"}
    found["schedulefree"] = {"color": style.SKY, "lw": 1.2, "ls": "-."}
    found["oracle"] = {"color": style.BLACK, "lw": 1.6, "marker": "o", "ms": 2.8}
    found["warmctl"] = {"color": style.GREEN, "lw": 2.2, "marker": "s", "ms": 3.5}
    return found


def draw(cells: Sequence[Cell], steps: int, path: Path) -> None:
    groups = by_problem(cells)
    columns = min(len(groups), 4)
    lines = math.ceil(len(groups) / columns)
    figure, axes = style.panels(lines, columns, (max(3.1 * columns, 8.0), 2.5 * lines + 1.6 * (lines == 1)))
    for ax, (name, group) in zip(axes.flat, groups.items(), strict=False):
        panel(ax, group)
        ax.set_title(f"{name} ({group[0].split})")
    for ax in axes.flat[len(groups) :]:
        ax.set_axis_off()
    for ax in axes.flat[max(0, len(groups) - columns) : len(groups)]:
        ax.set_xlabel("peak learning rate")
    for ax in axes[:, 0]:
        ax.set_ylabel(f"final loss, {steps} updates")
    found = style.by_label(list(axes.flat))
    order = [NAMES[policy] for policy in (*POLICIES, "oracle") if NAMES[policy] in found]
    style.legend_below(figure, {name: found[name] for name in (*order, "chance")}, 4, axes.flat[len(groups) :])
    style.save(figure, path, dpi=130)


def panel(ax: Any, group: Sequence[Cell]) -> None:
    from matplotlib.ticker import NullFormatter, NullLocator, ScalarFormatter

    rates = [cell.lr for cell in group]
    for policy, look in looks().items():
        if all(cell.has(policy) for cell in group):
            ax.plot(rates, [cell.mean(policy) for cell in group], label=NAMES[policy], **look)
    low, high = ([pick(cell.values("warmctl")) for cell in group] for pick in (min, max))
    ax.fill_between(rates, low, high, color=style.GREEN, alpha=0.18, lw=0)
    ax.axhline(group[0].runs["warmctl"][0]["chance"], color=style.INK, lw=0.8, ls=(0, (1, 1.6)), label="chance")
    ax.set(xscale="log", yscale="log")
    ax.yaxis.set_major_formatter(ScalarFormatter())
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_xticks(rates, [short(lr) for lr in rates])
    ax.xaxis.set_minor_locator(NullLocator())
    low, high = ax.get_ylim()
    ax.set_yticks([loss for loss in LOSSES if low <= loss <= high])


def short(rate: float) -> str:
    """At most four characters: 3e-4, 0.03, 10."""
    digit, exponent = f"{rate:.0e}".split("e")
    return f"{digit}e{int(exponent)}" if rate < 0.01 else f"{rate:g}"
