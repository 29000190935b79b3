"""Whether warmup was too short, too long, right, or ended below the schedule."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np

from warmctl.diagnosis.diagnosis import Evidence
from warmctl.diagnosis.log import Series
from warmctl.diagnosis.lost import is_slow
from warmctl.diagnosis.rules import limit
from warmctl.diagnosis.run import Run, middle, tail

ONLY = "which does not say that this `lr` is the best"
STABILITY = "the stability ratio"
"""In the reason of an end, where that gauge held the rate."""


def under_warmed(run: Run) -> Evidence | None:
    """A loss that rises above the start's, or gives back most of what is learnt, in warmup or soon after."""
    if not run.warmup.seen:
        return None
    curve = run.curve
    early = int(np.searchsorted(curve.steps, run.early_until, side="right"))
    top = int(np.argmax(curve.smooth[:early]))
    if curve.smooth[top] > max(math.log(1 + limit("rise")), 4 * curve.noise):
        peak = int(np.argmax(curve.level[:early]))
        return run.rows(f"loss: from {run.row(0)} up to {run.row(peak)}, {_back(run, top, 0.0)}", 0, peak)
    top = int(np.argmax(curve.setback[:early]))
    if curve.setback[top] > max(limit("setback") * curve.gained, 0.3, 4 * curve.noise):
        low = int(np.argmin(curve.smooth[: top + 1]))
        back = _back(run, top, float(curve.smooth[low]))
        return run.rows(f"loss: down to {run.about(low)}, then up to {run.about(top)}, {back}", low, top)
    return None


def capped(run: Run) -> Evidence | None:
    """An applied rate that ends below the schedule's."""
    scale = _scales(run)
    end = tail(scale, 0.1)
    if not len(end) or end.values.max() >= limit("capped"):
        return None
    why = [f" ({reason})" for reason in _ended(run)]
    says = f"{scale.column}: {middle(end):.3g} of the scheduled rate at the end, and no more than "
    says += f"{end.values.max():.3g} from {run.at(end.steps[0])} on{why[-1] if why else ''}"
    return Evidence(says, scale.column, (int(end.steps[0]), int(end.steps[-1])), (middle(end), float(end.values.max())))


def advice_for_capped(run: Run) -> str:
    share, peak = middle(tail(_scales(run), 0.1)), run.warmup.peak
    rate = f"`lr={share * peak:.2g}` (now {peak:.3g})" if math.isfinite(peak) else f"`lr` at {share:.2g} of what it is"
    same = f"{rate} is nearly the same run"
    why = _ended(run)[-1:] or [_usual_reason(run)]
    if why[0] and STABILITY not in why[0]:
        return f"Nothing is broken, and a larger `target` changes nothing: it was not the stability ratio. {same}."
    return (
        f"Nothing is broken: the landscape carries no more at this `target`. {same}; "
        "a larger `target` lets the rate nearer to the edge."
    )


def unseen(run: Run) -> Evidence | None:
    """A record without the start of the run, where warmup was."""
    if run.warmup.seen:
        return None
    begins = "begins again at" if run.log.restarts else "begins at"
    return run.rows(
        f"loss: the log {begins} {run.at(run.first)}, at {run.curve.loss[0]:.3g}: how it began is not in it", 0
    )


def advice_for_unseen(run: Run) -> str:
    if run.log.restarts:
        return "To have a warmup judged, give a log of one run alone, from its first step on."
    return "To have a warmup judged, give a log from the first step on."


def over_warmed(run: Run) -> Evidence | None:
    """A warmup that takes more of the record than any that is known to pay."""
    warmup = run.warmup
    if warmup.end is None or warmup.share <= limit("long"):
        return None
    rising = " and the rate was still rising" if warmup.share == 1.0 else ""
    index = min(int(np.searchsorted(run.curve.steps, warmup.end)), len(run.curve.steps) - 1)
    says = (
        f"{warmup.column}: warmup {run.took}{rising}; "
        f"the loss went from {run.row(0)} to {run.about(index)} in it, without a rise"
    )
    return run.rows(says, 0, index)


def advice_for_over(run: Run) -> str:
    if run.warmup.controlled:
        reasons = [reason for step, reason in run.log.words("reason").items() if step <= run.warmup.length]
        faster = " A larger `target` lets it rise faster." if any(STABILITY in reason for reason in reasons) else ""
        return f"Nothing is broken: the rate rose as fast as its gauges allowed.{faster}"
    third = run.warmup.length / 3
    shorter = f"`warmup_steps={max(1, round(third))}`"
    if run.log.unit == "row":  # of how many steps is not known
        shorter = f"A warmup of {third / run.warmup.total:.0%} of the run"
    return f"{shorter}: nothing in the record asks for more."


def well_warmed(run: Run) -> Evidence:
    """What there is to say where no sign of another verdict is there."""
    warmup = run.warmup
    took = {None: "the record has no rate", 0: "there was none"}.get(
        warmup.end if warmup.end is None else warmup.length, f"it {run.took}"
    )
    return run.rows(f"loss: {run.row(0)} to {run.curve.end_loss:.3g}, without a rise in warmup ({took})", 0, -1)


def advice_for_well(run: Run, troubled: bool) -> str:
    """`troubled`: whether something is told beside the verdict."""
    if run.curve.end > math.log(1 - limit("dead")) and is_slow(run):
        return "Warmup did no harm, but the loss falls slowly and without a rise: try three times the `lr`."
    if troubled:
        return f"No trouble came of the warmup, {ONLY}. See to what is beside it:"
    if run.warmup.controlled:
        return f"Keep this warmup, {ONLY}; `history.schedule(path)` replays it in other seeds for nothing."
    needless = run.warmup.end is not None and not run.warmup.length
    return f"Nothing here asks for a warmup, {ONLY}." if needless else f"Keep this warmup, {ONLY}."


def _ended(run: Run) -> list[str]:
    """Why AdaptiveWarmup says that warmup ended, each time."""
    return [reason for reason in run.log.words("reason").values() if "warmup ended" in reason]


def _usual_reason(run: Run) -> str:
    """The commonest in the last tenth of the record, "" if there are none."""
    reasons = list(run.log.words("reason").values())
    last = Counter(reasons[-max(1, len(reasons) // 10) :]).most_common(1)
    return last[0][0] if last else ""


def _scales(run: Run) -> Series:
    """Applied rate over scheduled rate."""
    scale = run.log["scale"].finite
    if len(scale):
        return scale
    lr, scheduled = run.log["lr"].finite, run.log["scheduled_lr"].finite
    if not len(scheduled):
        return scale
    positive = scheduled.values > 0.0
    steps = scheduled.steps[positive]
    shares = np.array([lr.at(step) for step in steps]) / scheduled.values[positive]
    return Series("lr / scheduled_lr", steps, shares).finite


def _back(run: Run, top: int, level: float) -> str:
    back = run.curve.back_at(top, level)
    if back is None:
        return "and not below that again"
    return f"and below that again at {run.at(back)}"
