"""What moved before the loss did: the columns that had left their usual range when a rise began."""

from __future__ import annotations

import numpy as np

from warmctl.diagnosis.columns import LAYERS
from warmctl.diagnosis.diagnosis import Evidence
from warmctl.diagnosis.log import Series
from warmctl.diagnosis.rules import limit
from warmctl.diagnosis.run import Run, middle

KINDS = ("grad_norm", "stability_ratio", "representation_change", "loss_scale")
USUAL, FEWEST = 0.25, 5
"""A column's usual range is that of this part of the record, at least so many rows, before it may have moved."""
BEFORE = 0.05
"""Part of the record before a rise in which a cause is looked for, at least `FEWEST` rows of the loss."""


def mover(run: Run, rise: float) -> Evidence | None:
    """The column that first left its usual range before, or with, a rise of the loss that began at a step."""
    moves = [move for series in _candidates(run) if (move := _move(run, series, rise)) is not None]
    return min(moves, key=lambda move: move.steps[0], default=None)


def _candidates(run: Run) -> list[Series]:
    layers = [series for kind in LAYERS for series in run.log.layers(kind).values()]
    return [series for series in (*layers, *(run.log[kind] for kind in KINDS)) if len(series) > FEWEST]


def _move(run: Run, series: Series, rise: float) -> Evidence | None:
    steps = run.curve.steps
    row = int(np.searchsorted(steps, rise))
    window = max(FEWEST, round(BEFORE * len(steps)))
    since = float(steps[max(0, row - window)])
    usual = series.finite.between(since - max(USUAL * (run.last - run.first), 1.0), np.nextafter(since, -np.inf))
    late = series.between(since, rise)
    if len(usual) < FEWEST or not len(late):
        return None
    level = middle(usual)
    spread = 1.4826 * float(np.median(np.abs(usual.values - level)))
    with np.errstate(divide="ignore", invalid="ignore"):
        twofold = np.abs(np.log(np.abs(late.values) / abs(level))) > np.log(2.0)
    moved = ~np.isfinite(late.values) | (twofold & (np.abs(late.values - level) > limit("moved") * max(spread, 1e-12)))
    if not moved.any():
        return None
    at = int(np.argmax(moved))
    value, step = float(late.values[at]), float(late.steps[at])
    unit = run.log.unit
    when = f"at the same {unit}" if step == rise else f"{rise - step:.15g} {unit}s before"
    says = f"{when}, {series.column} had gone from {level:.3g} to {value:.3g} ({run.at(step)})"
    return Evidence(says, series.column, (int(step),), (value,))
