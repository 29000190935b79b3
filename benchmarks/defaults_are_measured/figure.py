"""One line a variant: a mark a rate and a bar for their mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.defaults_are_measured.trials import RATES
from benchmarks.defaults_are_measured.variants import DEFAULT
from benchmarks.harness import style
from benchmarks.harness.results import Row

SHOWN = -0.5, 1.0
"""Where a variant beyond compare is clipped."""
MARKS = dict(zip(RATES, ((style.BLUE, "o"), (style.VERMILION, "D")), strict=True))


def draw(lines: Sequence[Row], noise: float, path: Path, steps: int) -> None:
    variants = [each for each in lines if each["variant"] != DEFAULT]
    if not variants:
        return
    labels: list[tuple[str, Row | None]] = []  # a heading has no row
    for group, members in groupby(variants, key=lambda each: each["group"]):
        labels += [(group, None), *((each["variant"], each) for each in members)]
    figure, ((ax,),) = style.panels(1, 1, (8.5, 0.23 * len(labels) + 1.2))
    if math.isfinite(noise):
        ax.axvspan(-noise, noise, color=style.BLACK, alpha=0.06, lw=0, label="noise of a mean")
    for height, (_, row) in enumerate(labels):
        if row is not None:
            one(ax, height, row)
    ax.axvline(0.0, color=style.INK, lw=0.8)
    ax.set_yticks(range(len(labels)), [words for words, _ in labels])
    for (_, row), words in zip(labels, ax.get_yticklabels(), strict=True):
        words.set_fontweight("bold" if row is None else "normal")
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")
    ax.grid(True, axis="x", color=style.PALE, linewidth=0.6)
    ax.set_xlabel(f"log(final loss / the default's), {steps} updates; left is better")
    style.legend_below(figure, style.by_label([ax]), columns=5)
    style.save(figure, path, dpi=130)


def one(ax: Any, height: float, row: Row) -> None:
    """Marks a little apart in height, so that none hides another."""
    ax.barh(height, clipped(row["all"]), color="0.8", height=0.75, label="mean of the rates")
    for offset, (rate, (colour, marker)) in zip((-0.18, 0.18), MARKS.items(), strict=True):
        if rate in row:
            name = f"{rate.removesuffix('x')} times the searched rate"
            ax.scatter(clipped(row[rate]), height + offset, c=colour, marker=marker, s=16, label=name, zorder=3)


def clipped(value: float) -> float:
    return min(max(value, SHOWN[0]), SHOWN[1])
