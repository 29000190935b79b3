"""A run in a few figures: where and why warmup ended, how near the edge it came, and what the probes cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

from warmctl.record.history import History, WarmupEnd, warmup_end


@dataclass(frozen=True)
class Summary:
    """A run in figures; None where the record does not say."""

    steps: int
    """Last step."""
    phase: str | None
    """Phase at the end."""
    warmup: WarmupEnd | None
    """Where and why warmup ended, if it did within the record."""
    scale: float | None
    """Scale at the end."""
    peak_ratio: float | None
    """Largest finite stability ratio."""
    over_edge: float | None
    """Share of the steps with a stability ratio at which it was above 1."""
    probes: int | None
    overhead: float | None
    """Gradient evaluations spent on probes over those of training."""
    loss: float | None
    """Last loss, NaN and infinity included."""


def summarise(history: History, over_edge: float | None = None) -> Summary:
    """The summary of a history of at least one row; `over_edge` of all rows, where some were left out."""
    ratios = [ratio for ratio in history["stability_ratio"] if ratio is not None and math.isfinite(ratio)]

    def last(column: str) -> float | None:
        return next((value for value in reversed(history[column]) if value is not None), None)

    probes = last("probes")
    if over_edge is None and ratios:
        over_edge = sum(ratio > 1 for ratio in ratios) / len(ratios)
    return Summary(
        steps=history["step"][-1],
        phase=history["phase"][-1],
        warmup=warmup_end(history),
        scale=last("scale"),
        peak_ratio=max(ratios, default=None),
        over_edge=over_edge,
        probes=None if probes is None or not math.isfinite(probes) else int(probes),
        overhead=last("overhead"),
        loss=last("loss"),
    )


def sentence(run: Summary) -> str:
    """The summary in words."""
    if run.warmup is not None:
        why = f": {run.warmup.reason}" if run.warmup.reason else ""
        parts = [f"Warmup ended at step {run.warmup.step} of {run.steps}{why}"]
    elif run.phase == "warmup":
        parts = [f"After {run.steps} steps warmup has not ended"]
    else:
        parts = [f"{run.steps} steps"]
    if run.scale is not None:
        parts.append(f"the rate is at {run.scale:.3g} of the schedule")
    if run.peak_ratio is not None and run.over_edge is not None:
        parts.append(
            f"the stability ratio peaked at {run.peak_ratio:.3g}, {run.over_edge:.1%} of the steps above the edge"
        )
    if run.probes is not None and run.overhead is not None:
        parts.append(f"{run.probes} probes cost {run.overhead:.1%} of training")
    if run.loss is not None:
        parts.append(f"the last loss is {run.loss:.4g}")
    return "; ".join(parts) + "."
