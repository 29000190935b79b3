"""The look of every figure: colours, sizes, and where a legend may stand: beside its lines or below, never over them.

matplotlib is imported where it is used, so that a record can be kept without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

# Okabe and Ito's palette, safe for the colour-blind, without its yellow, too faint for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
INK, MUTED, GRID = "#222222", "#777777", "#E8E8E8"
SMALL, MEDIUM, LARGE = 8, 9, 10
"""Sizes of type: ticks and legends, names of axes, titles."""
DASHES, DOTS, DASH_DOT = (0, (4, 2)), (0, (1, 1.6)), (0, (6, 2, 1, 2))
LEGEND: dict[str, Any] = {
    "frameon": False,
    "fontsize": SMALL,
    "labelcolor": INK,
    "handlelength": 1.6,
    "borderaxespad": 0,
}


def colours(count: int) -> list[str]:
    """As many colours that can be told apart: the palette, or shades in order where it does not reach."""
    return list(COLOURS[:count]) if count <= len(COLOURS) else shades(count)


def shades(count: int) -> list[str]:
    """From dark to light: colours of what has an order."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["viridis"](0.9 * i / max(count - 1, 1))) for i in range(count)]


def dress(axis: Axes) -> None:
    """Two spines, small ticks, a faint grid behind the lines."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(MUTED)
    axis.tick_params(which="both", labelsize=SMALL, color=MUTED, labelcolor=INK)
    for offset in (axis.xaxis.get_offset_text(), axis.yaxis.get_offset_text()):
        offset.set(fontsize=SMALL, color=INK)
    axis.grid(True, axis="y", color=GRID, linewidth=0.6)
    axis.set_axisbelow(True)


def legend_beside(axis: Axes, *entries: tuple[str, dict[str, Any]], high: bool = False) -> None:
    """What the looks of lines mean, in the right margin of their panel, at its foot or at its head."""
    from matplotlib.lines import Line2D

    keys = [Line2D([], [], **{"color": MUTED, **look}) for _, look in entries]
    place = {"loc": "upper left" if high else "lower left", "bbox_to_anchor": (1.01, 1 if high else 0)}
    axis.legend(keys, [name for name, _ in entries], **{**LEGEND, **place})


def legend_below(axis: Axes, keys: Sequence[Artist], names: Sequence[str], ncols: int) -> None:
    """A legend under the axis and the name of its steps, however high the panel is."""
    from matplotlib.legend import Legend
    from matplotlib.transforms import ScaledTranslation

    under = axis.transAxes + ScaledTranslation(0, -34 / 72, axis.figure.dpi_scale_trans)
    look = {**LEGEND, "labelspacing": 0.35, "columnspacing": 0.6}
    legend = Legend(
        axis, keys, names, loc="upper left", bbox_to_anchor=(0, 0), bbox_transform=under, ncols=ncols, **look
    )
    axis.add_artist(legend).set_clip_on(False)  # or the layout leaves no room for it


def say(axis: Axes, words: str) -> None:
    """Words in the place of a curve that there is not."""
    axis.text(0.5, 0.25, words, transform=axis.transAxes, ha="center", va="center", fontsize=SMALL, color=MUTED)
