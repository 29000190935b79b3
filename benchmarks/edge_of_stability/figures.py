"""The figures: ratios by step with the edge at 1, bias by batch size, controlled runs; and the map as an image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.edge_of_stability.controlled import CONTROLLED
from benchmarks.edge_of_stability.heatmap import TOLERABLE, Heatmap
from benchmarks.edge_of_stability.measured import Measured
from benchmarks.edge_of_stability.monitored import BIAS
from benchmarks.edge_of_stability.problem import SETTINGS
from benchmarks.edge_of_stability.wide import WIDTH, by_oracle
from benchmarks.harness import style
from benchmarks.harness.results import Row
from benchmarks.harness.runs import FAILED

COLOURS = style.BLUE, style.VERMILION
"""Of the first and the second setting in a panel."""
AIMS = style.GREEN, style.PINK
"""Of the lower and the higher target."""
THIN = {"lw": 0.9, "alpha": 0.85}


def draw(found: Measured, path: Path) -> None:
    """Ratios by step with the edge at 1, the bias by batch size, and controlled runs on and below the edge."""
    figure, (top, bottom) = style.panels(2, 4, (14, 6.8))
    gd, nesterov, *adam = SETTINGS
    draw_ratios(top[0], [gd], found.runs, gd)
    draw_ratios(top[1], [nesterov], found.runs, nesterov)
    draw_ratios(top[2], adam, found.runs, "Adam, β₂=.99")
    draw_ratios(top[3], adam, found.runs, "Adam's first steps")
    draw_opening(top[3], adam, found.again.wide)
    draw_bias(bottom[0], found.bias, found.again.bias)
    for ax, name in zip(bottom[1:], CONTROLLED, strict=False):
        draw_pair(ax, found.pairs[name], "losses")
        ax.set(title=f"{name}: on and below the edge", ylabel="training loss")
    for name, dashes in zip(CONTROLLED, ("-", ":"), strict=True):
        draw_pair(bottom[3], found.pairs[name], "rates", ls=dashes)
        ends = [run["rates"][1][-1] for repeated in found.pairs[name].values() for run in repeated]
        style.name_line(
            bottom[3], float(np.exp(np.mean(np.log(ends)))), f"{name}\n({'dotted' if dashes == ':' else 'solid'})"
        )
    bottom[3].set(title="The rate that was applied", ylabel="learning rate")
    style.legend_below(figure, style.by_label([top[2], top[3], bottom[0], bottom[1]]), columns=6)
    style.save(figure, path, dpi=130)


def draw_ratios(ax: Any, names: Sequence[str], runs: dict[str, list[Row]], title: str) -> None:
    for colour, name in zip(COLOURS, names, strict=False):
        for run in runs[name]:
            ax.plot(*run["series"], color=colour, label=name, **THIN)
    ax.axhline(1, color=style.INK, lw=0.9, ls="--")
    ax.set(xlabel="step", ylabel="stability ratio r", title=title)
    ax.set_ylim(bottom=0)
    style.name_line(ax, 1, "edge")


def draw_opening(ax: Any, names: Sequence[str], wide: dict[str, list[Row]]) -> None:
    """Both axes in log, the wider networks, and the expected figures beside the curves."""
    for colour, name in zip(COLOURS, names, strict=True):
        for run in map(by_oracle, wide[name]):
            ax.plot(*run["series"], color=colour, ls=":", label=f"{name}, width {WIDTH}", **THIN)
    for colour, setting in zip(COLOURS, (SETTINGS[name] for name in names), strict=True):
        for x, y, marker, words in (
            (1, setting.start / setting.edge, "D", "expected at step 1"),
            (setting.back, 1, "v", "expected to be back by then"),
        ):
            ax.plot(x, y, color=colour, marker=marker, ls="", mec="white", ms=8, label=words, clip_on=False, zorder=4)
    ax.set(xscale="log", yscale="log")
    ax.set_ylim(0.01, 60)
    ax.set_yticks([0.01, 0.1, 1, 10], ["0.01", "0.1", "1", "10"])


def draw_bias(ax: Any, found: Row, by_entropy: Row) -> None:
    sizes = list(BIAS)
    for colour, by_size, words in (
        (style.SKY, found["initial"], "initial weights"),
        (style.ORANGE, found["trained"], "trained weights"),
        (style.BLUE, by_entropy["trained"], "trained by cross-entropy"),
    ):
        rows = [by_size[str(size)] for size in sizes]
        errors = [row["standard error"] for row in rows]
        look = {"color": colour, "marker": "o", "ms": 4, "capsize": 3, "label": f"bias, {words}"}
        ax.errorbar(sizes, [row["mean"] for row in rows], errors, **look)
    ax.plot(sizes, list(BIAS.values()), color=style.INK, marker="x", ls=":", label="bias, expected")
    ax.axhline(1, color=style.INK, lw=0.9, ls="--")
    style.name_line(ax, 1, "no bias")
    ax.set(xscale="log", yscale="log", xlabel="batch size B", title="Bias of mini-batches, N=1000")
    ax.set_ylabel("λ_max of batches / of all")
    ax.set_xticks(sizes, [str(size) for size in sizes])
    ax.minorticks_off()
    ax.set_yticks([1, 2, 3, 5, 8], ["1", "2", "3", "5", "8"])


def draw_pair(ax: Any, by_target: dict[float, list[Row]], field: str, ls: str = "-") -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    for colour, (target, repeated) in zip(AIMS, by_target.items(), strict=True):
        for run in repeated:
            ax.plot(*run[field], ls=ls, color=colour, label=f"target {target:g}", **THIN)
    ax.set(yscale="log", xlabel="step")
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,), numticks=8))
    if high < 100 * low:
        ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())


def draw_heatmap(heatmap: Heatmap, steps: int, path: Path) -> None:
    """Two maps on one scale of colour, with the boundary; × has learnt no more than frequencies, ∞ has diverged."""
    figure, (axes,) = style.panels(1, 2, (12.5, 4.6), sharey=True)
    for ax, kind, title in zip(axes, heatmap.losses, ("Adam", "Adam, v seeded with g₀²"), strict=True):
        image = draw_map(ax, heatmap, kind)
        ax.set(title=title, xlabel="peak learning rate")
    axes[0].set_ylabel("linear warmup, steps")
    label = f"final loss in nats after {steps} steps (chance {heatmap.chance:.2f})"
    bar = figure.colorbar(image, ax=axes, label=label, fraction=0.05, pad=0.02)
    bar.ax.tick_params(labelsize=style.SMALL)
    said = f"red: largest tolerated rate ({TOLERABLE:.0%} of the way from chance to the best cell)"
    figure.supxlabel(f"{said};  ×: at chance;  ∞: diverged", fontsize=9, color=style.INK)
    style.save(figure, path, dpi=120)


def draw_map(ax: Any, heatmap: Heatmap, kind: str) -> Any:
    best, chance, rows = heatmap.best(), heatmap.chance, np.array(heatmap.losses[kind])
    image = ax.imshow(rows, origin="lower", aspect="auto", cmap="viridis_r", vmin=best, vmax=chance)
    for (row, column), loss in np.ndenumerate(rows):
        failed = "×" if loss > FAILED * chance else f"{loss:.2f}"
        text = "∞" if heatmap.diverged[kind][row][column] else failed
        colour = "white" if loss > (best + chance) / 2 else "black"
        ax.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    line = [sum(lr <= edge * (1 + 1e-9) for lr in heatmap.rates) - 0.5 for edge in heatmap.boundary(kind)]
    look = {"orientation": "horizontal", "baseline": None, "color": "red", "lw": 2.5}
    ax.stairs(line, np.arange(len(line) + 1) - 0.5, **look)
    ax.set_xticks(range(len(heatmap.rates)), [f"{lr:.2g}" for lr in heatmap.rates], rotation=45)
    ax.set_yticks(range(len(heatmap.warmups)), [str(w) for w in heatmap.warmups])
    ax.grid(False)
    return image
