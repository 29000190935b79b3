"""Linear or logarithmic axes that show a range, with ticks that can be read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def limits(axis: Axes, low: float, top: float, log: bool) -> None:
    """A linear or logarithmic axis that shows low to top, ticks in plain numbers where short."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if log and top < 3 * low:
        middle = np.sqrt(low * top)  # at least half a decade, or there may be no tick to read
        low, top = middle / np.sqrt(3.0), middle * np.sqrt(3.0)
    low, top = padded(low, top, 0.06, log)
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


def padded(low: float, top: float, share: float, log: bool) -> tuple[float, float]:
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
