"""Above, error between probes against evaluations a step, one batch; below, error against products from cold."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from benchmarks.harness import style
from benchmarks.harness.results import Row, median
from benchmarks.tracks_sharpness.cold import ERROR
from benchmarks.tracks_sharpness.libraries import CALLS
from benchmarks.tracks_sharpness.nets import TRACKED
from benchmarks.tracks_sharpness.warm import CADENCES, EXACT, PLAIN, PRODUCTS

ALLOWED = 0.02
"""Error while tracking; from cold it is ERROR."""


def draw(tracking: list[Row], cold: dict[str, list[Row]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8.2), layout="constrained")
    above, below = figure.subfigures(2, 1)
    axes = style.dressed(above.subplots(1, 3, sharey=True))
    shown = [model for model in TRACKED if any(row["model"] == model for row in tracking)]
    for ax, model in zip(axes, shown, strict=False):
        draw_tracked(ax, [row for row in tracking if row["model"] == model and row["data"] == "one batch"])
        ax.set(title=f"tracked: {model}", xlabel="gradient evaluations for probes, a training step")
    close(axes, len(shown), "median error over all steps", ALLOWED)
    style.legend_below(above, style.by_label(list(axes)), columns=6)
    axes = style.dressed(below.subplots(1, 3, sharey=True))
    for ax, (label, rows) in zip(axes, cold.items(), strict=False):
        draw_cold(ax, rows)
        ax.set(title=f"from cold: {label}", xlabel="products")
    close(axes, len(cold), "error, settings tried", ERROR)
    style.legend_below(below, style.by_label(list(axes)), columns=6)
    style.save(figure, path, dpi=120)


def close(axes: Any, used: int, error: str, limit: float) -> None:
    """Name what is common to a row of panels, and hide those without data."""
    axes[0].set_ylabel(error)
    if used:
        style.name_line(axes[used - 1], limit, f"{limit:.0%}")
    for ax in axes[used:]:
        ax.set_axis_off()


def draw_tracked(ax: Any, rows: list[Row]) -> None:
    for (hvp, dash), (colour, every) in itertools.product(
        ((PLAIN, "-"), (EXACT, ":")), zip(style.COLOURS, CADENCES, strict=False)
    ):
        points = curve([row for row in rows if (row["hvp"], row["every"]) == (hvp, every)])
        if points:
            label = f"every {every}, {hvp}"
            ax.loglog(*zip(*points, strict=True), dash, marker="o", ms=4, color=colour, label=label)
    ax.axhline(ALLOWED, color=style.MUTED, lw=1)


def draw_cold(ax: Any, rows: list[Row]) -> None:
    """A cross where products were finite differences."""
    for name, colour in zip(CALLS, (style.GREEN, style.VERMILION, style.BLUE, style.PINK, style.ORANGE), strict=True):
        for differences, marker in ((False, "o"), (True, "x")):
            tries = [row for row in rows if row["library"] == name]
            tries = [r for r in tries if (r["setting"].get("method") == "finite_difference") is differences]
            products = [p for row in tries for p in row["products"]]
            errors = [max(e, 1e-8) for row in tries for e in row["errors"]]
            ax.semilogy(products, errors, marker, ms=5, color=colour, label="" if differences else name)
    ax.plot([], [], "x", color=style.MUTED, label="products by finite differences")
    ax.axhline(ERROR, color=style.MUTED, lw=1)


def curve(rows: list[Row]) -> list[tuple[float, float]]:
    """Gradient evaluations a training step and the error between probes, one point for each number of products."""
    found = []
    for products in PRODUCTS:
        cell = [row for row in rows if row["products"] == products]
        if cell:
            spent = median([row["gradients a probe"] / row["every"] for row in cell])
            found.append((spent, median([row["held median"] for row in cell])))
    return found
