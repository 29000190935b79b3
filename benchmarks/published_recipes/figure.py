"""Two pictures: the final score against the peak rate, and the training loss on the way there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import style
from benchmarks.harness.cells import student
from benchmarks.harness.results import Row
from benchmarks.published_recipes.comparison import Comparison
from benchmarks.published_recipes.recipe import NONE, OURS, SHARES
from benchmarks.published_recipes.runs import PARTS

PUBLISHED = "warmup as published"
AXES = {"loss": "validation loss, nats", "error": "test error"}


def look(group: Comparison, policy: str) -> dict[str, Any]:
    """Of a policy's line, its name with it; colours as in the other figures."""
    from matplotlib import colormaps

    if policy == OURS:
        return {"label": "warmctl in place of a warmup", "color": style.GREEN, "lw": 2.4, "marker": "s", "ms": 4}
    if policy == group.published:
        return {"label": PUBLISHED, "color": style.BLACK, "lw": 1.8, "marker": "o", "ms": 3.5}
    if policy == NONE:
        return {"label": "no warmup", "color": style.BLUE, "lw": 1.3}
    shade = colormaps["Oranges"](0.4 + 0.2 * list(SHARES).index(policy))
    return {"label": f"linear warmup, {SHARES[policy]:.0%} of the run", "color": shade, "lw": 1.2}


def draw(groups: Sequence[Comparison], path: Path) -> None:
    """A panel a recipe and length: mean over seeds, band of its 95 % interval."""
    figure, axes = style.panels(1, len(groups), (max(3.6 * len(groups), 6.5), 3.9))
    for ax, group in zip(axes.flat, groups, strict=True):
        panel(ax, group)
    found = style.by_label(list(axes.flat))
    columns = int(figure.get_figwidth() / 2.8)
    style.legend_below(figure, dict(sorted(found.items(), key=lambda item: order(item[0]))), columns)
    style.save(figure, path, dpi=130)


def order(label: str) -> tuple[bool, bool, bool]:
    """Of the legend: ours and the published first, the level lines last."""
    return label.startswith(("best", "chance")), not label.startswith("warmctl"), label != PUBLISHED


def panel(ax: Any, group: Comparison) -> None:
    places = {multiple: i for i, multiple in enumerate(group.multiples)}
    for policy in group.policies:
        had = [multiple for multiple in group.multiples if (policy, multiple) in group.cells]
        at = [places[multiple] for multiple in had]
        points = [student(group.scores((policy, multiple))) for multiple in had]
        line = look(group, policy)
        ax.plot(at, [mean for mean, _ in points], **line, zorder=3 if policy == OURS else 2)
        if group.seeds > 1:
            low, high = ([mean + sign * half for mean, half in points] for sign in (-1, 1))
            ax.fill_between(at, low, high, color=line["color"], alpha=0.15, lw=0)
    best = group.best_by_hand()
    if best is not None:
        ax.axhline(group.mean(best), color=style.INK, lw=0.9, ls=(0, (4, 2)), label="best by hand, any rate and warmup")
    chance = next(iter(group.cells.values()))[0]["chance"]
    scores = [score for cell in group.cells for score in group.scores(cell)]
    if max(scores) > 0.9 * chance:
        ax.axhline(chance, color=style.INK, lw=0.8, ls=(0, (1, 1.6)), label="chance: nothing learnt")
    rates = {multiple: group.cells[cell][0]["lr"] for cell in group.cells for multiple in (cell[1],)}
    ax.set_xticks(list(places.values()), [f"{multiple:g} ×\n{rates[multiple]:g}" for multiple in places])
    ax.set_xlabel("peak rate: times the published one, and its value")
    ax.set_ylabel(AXES[group.by])
    low, high = min(scores), max(scores)
    ax.set_ylim(low - 0.08 * (high - low), high + 0.08 * (high - low))  # intervals of two seeds would go beyond chance
    ax.set_title(f"{group.recipe}, {group.steps} updates")


def draw_curves(groups: Sequence[Comparison], path: Path) -> None:
    """Training loss of the published warmup, none and warmctl: a row a recipe and length, a column a rate."""
    columns = max(len(group.multiples) for group in groups)
    size = (max(2.6 * columns, 6.5), 2.2 * len(groups) + 1.2)
    figure, axes = style.panels(len(groups), columns, size, sharey="row")
    for line, group in zip(axes, groups, strict=True):
        for ax, multiple in zip(line, group.multiples, strict=False):
            curves(ax, group, multiple)
            ax.set_title(f"{group.recipe}, {multiple:g} ×" if multiple == group.multiples[0] else f"{multiple:g} ×")
        for ax in line[len(group.multiples) :]:
            ax.set_axis_off()
        line[0].set_ylabel("training loss, nats")
    for ax in axes[-1]:
        ax.set_xlabel("update")
    style.legend_below(figure, style.by_label(list(axes.flat)), 3)
    style.save(figure, path, dpi=130)


def curves(ax: Any, group: Comparison, multiple: float) -> None:
    for policy in group.policies:
        if (policy, multiple) in group.cells and policy in (NONE, group.published, OURS):
            means = mean_curve(group.cells[policy, multiple])
            at = [(i + 0.5) * group.steps / PARTS for i in range(len(means))]
            ax.plot(at, means, **look(group, policy) | {"marker": None})
    if group.by == "error":  # trained far below what it generalises to
        ax.set_yscale("log")


def mean_curve(rows: Sequence[Row]) -> list[float]:
    """Over seeds, as far as all of them went."""
    return [sum(part) / len(part) for part in zip(*(row["train"] for row in rows), strict=False)]
