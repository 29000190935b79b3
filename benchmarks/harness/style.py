"""How the figures of the benchmarks look: as those of `warmctl.plot`, one legend below or names beside lines.

matplotlib is imported by the first call; pyplot is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from warmctl.record.style import COLOURS, GRID, INK, LARGE, MEDIUM, MUTED as MUTED, SMALL, dress

BLUE, VERMILION, GREEN, PINK, ORANGE, SKY, BLACK = COLOURS
PALE = GRID


def panels(rows: int, columns: int, size: tuple[float, float], **shared: Any) -> tuple[Any, Any]:
    """A figure of `size` inches and its axes [rows, columns], without frames, the grid behind the curves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size)
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
    return figure, dressed(figure.subplots(rows, columns, squeeze=False, **shared))


def dressed(axes: Any) -> Any:
    """An array of axes."""
    for ax in axes.flat:
        dress(ax)
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
        ax.title.set(fontsize=LARGE, color=INK)
        for label in (ax.xaxis.label, ax.yaxis.label):
            label.set(fontsize=MEDIUM, color=INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
