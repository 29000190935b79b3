"""How the figures of the benchmarks look: the colours of `warmctl.plot`, one legend below or names beside lines.

matplotlib is imported by the first call; pyplot is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Okabe and Ito's palette, safe for the colour-blind, without its yellow, too faint for lines on white.
COLOURS = BLUE, VERMILION, GREEN, PINK, ORANGE, SKY, BLACK = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000",
)  # fmt: skip
INK, MUTED, PALE = "#222222", "#777777", "#E8E8E8"
SMALL = 8
"""Points of all words but titles and the names of axes."""


def panels(rows: int, columns: int, size: tuple[float, float], **shared: Any) -> tuple[Any, Any]:
    """A figure of `size` inches and its axes [rows, columns], without frames, the grid behind the curves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size)
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
    return figure, dressed(figure.subplots(rows, columns, squeeze=False, **shared))


def dressed(axes: Any) -> Any:
    """An array of axes."""
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(MUTED)
        ax.tick_params(which="both", labelsize=SMALL, color=MUTED, labelcolor=INK)
        ax.grid(True, axis="y", color=PALE, linewidth=0.6)
        ax.set_axisbelow(True)
    return axes


def name_line(ax: Any, y: float, words: str, **look: Any) -> None:
    """Words in the right margin at a height in data; for lines that end there."""
    look = {"va": "center", "fontsize": SMALL, "color": INK, **look}
    ax.text(1.01, y, words, transform=ax.get_yaxis_transform(), **look)


def legend_below(figure: Any, handles: Mapping[str, Any], columns: int, free: Sequence[Any] = ()) -> None:
    """One legend for all panels, below them; or in their place from the first of the `free` axes on, two or more."""
    look = {"frameon": False, "fontsize": SMALL, "labelcolor": INK, "ncols": min(columns, len(handles))}
    if len(free) < 2:
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", **look)
        return
    look |= {"ncols": 2, "fontsize": SMALL + 1, "borderaxespad": 0}
    legend = free[0].legend(list(handles.values()), list(handles), loc="center left", **look)
    legend.set_in_layout(False)  # or the layout would squeeze all columns to make room for it in one


def by_label(axes: Sequence[Any]) -> dict[str, Any]:
    """What the axes' own legends would show, each name once."""
    found: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return found


def save(figure: Any, path: Path, dpi: int = 150) -> None:
    """Words in one size and ink, then the file."""
    for ax in figure.axes:
        ax.title.set(fontsize=9.5, color=INK)
        for label in (ax.xaxis.label, ax.yaxis.label):
            label.set(fontsize=9, color=INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
