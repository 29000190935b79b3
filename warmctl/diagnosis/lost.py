"""Whether a run was lost: not finite, dead at the loss of the start, fallen back to it, or silent."""

from __future__ import annotations

import itertools
import math

import numpy as np

from warmctl.diagnosis.diagnosis import Evidence
from warmctl.diagnosis.rules import limit
from warmctl.diagnosis.run import Run, head, middle, tail

STILL = 0.1
"""In nats, beside five deviations: a loss that came no higher than this above the start's did not rise."""
SLOW = 0.05
"""In nats: a loss that fell by this from the first quarter to the last was learning, however slowly."""


def lost(run: Run) -> Evidence | None:
    """The first of the four signs that is there; two of them need the start of the run."""
    if not run.warmup.seen:
        return _not_finite(run) or _fallen_back(run)
    return _not_finite(run) or _dead(run) or _fallen_back(run) or _silent(run)


def onset(run: Run) -> float:
    """The step at which a lost run began to go wrong: of its largest rise, or of its first loss that is not finite."""
    curve = run.curve
    raised = curve.level - np.minimum.accumulate(curve.level)
    top = int(np.argmax(raised))
    if curve.lost_from is not None and raised[top] < math.log(1 + limit("rise")):
        return curve.lost_from
    start = np.flatnonzero(raised[: top + 1] <= 0.1 * raised[top])
    return float(curve.steps[min(int(start[-1]) + 1 if len(start) else 0, len(raised) - 1)])


def advice(run: Run) -> str:
    if run.curve.lost_from is None and _undisturbed(run):
        return (
            "The loss hardly moved, and never rose: a record like this does not tell a rate that is too low from "
            "one that is far too high. Try `lr` at a third and at three times for some hundred steps, and check that "
            "gradients reach the parameters that the optimizer holds."
        )
    return lower(run)


def lower(run: Run) -> str:
    """A lower rate first, a longer warmup beside it: what helps, and how often, is in the docs."""
    peak, warmup = run.warmup.peak, run.warmup
    rate = (
        f"Lower `lr` from {peak:.3g} to {float(f'{peak / 3:.1g}'):g}"
        if math.isfinite(peak)
        else "Lower `lr` to a third"
    )
    if warmup.controlled:
        return f"{rate}, or give AdaptiveWarmup a smaller `target`."
    if not warmup.seen:
        return f"{rate}."
    if warmup.end is None:
        return f"{rate}, and try a longer warmup beside it."
    if run.warmup.share > limit("long") and run.curve.lost_from is None:
        return f"{rate}; the warmup is long enough."
    longer, was = f"`warmup_steps={suggested(run)}`", f" instead of {warmup.length}" if warmup.length else ""
    if run.log.unit == "row":  # of how many steps is not known
        longer = f"a warmup of {suggested(run) / warmup.total:.0%} of the run"
        was = f" instead of {warmup.share:.0%}" if warmup.length else ""
    return f"{rate}, and try {longer}{was} beside it."


def suggested(run: Run) -> int:
    """A longer warmup: three times what there was, a twentieth of the record at least."""
    return max(1, round(max(3.0 * run.warmup.length, (run.last - run.first + 1) / 20)))


def _not_finite(run: Run) -> Evidence | None:
    start = run.curve.lost_from
    logged = run.log["loss"]
    if start is None:
        return None
    value = logged.at(start)
    before = run.row(len(run.curve.steps) - 1)
    return Evidence(
        f"loss: {value} from {run.at(start)} on; the last finite one was {before}",
        logged.column,
        (int(start),),
        (value,),
    )


def _dead(run: Run) -> Evidence | None:
    curve = run.curve
    if curve.end <= math.log(1 - limit("dead")) or is_slow(run):
        return None
    return run.rows(f"loss: {run.row(0)} at the start, {curve.end_loss:.3g} at the end", 0, -1)


def _fallen_back(run: Run) -> Evidence | None:
    curve, share = run.curve, limit("fallen back")
    if curve.gained < 0.3 or curve.end + curve.gained < share * curve.gained:
        return None
    return run.rows(f"loss: down to {run.about(curve.lowest)}, and {curve.end_loss:.3g} at the end", curve.lowest, -1)


def _silent(run: Run) -> Evidence | None:
    norms = run.log["grad_norm"].finite
    if len(norms) < 20 or run.curve.end <= math.log(1 - 0.4):
        return None
    before, after = middle(head(norms, 0.1)), middle(tail(norms, 0.1))
    if not before > limit("silent") * after:
        return None
    says = (
        f"{norms.column}: from {before:.3g} in the first tenth to {after:.3g} in the last, while the loss went from "
        f"{run.row(0)} to {run.curve.end_loss:.3g}: the network has stopped to answer"
    )
    return Evidence(says, norms.column, (int(norms.steps[0]), int(norms.steps[-1])), (before, after))


def is_slow(run: Run) -> bool:
    """A loss that falls from quarter to quarter and never rose: little was learnt, and nothing went wrong."""
    quarters = [float(np.median(part)) for part in np.array_split(run.curve.smooth, 4)]
    falling = all(after < before for before, after in itertools.pairwise(quarters))
    return falling and quarters[0] - quarters[-1] > SLOW and _undisturbed(run)


def _undisturbed(run: Run) -> bool:
    """Neither did the loss rise above that of the start, nor did gradients die."""
    return float(run.curve.level.max()) < STILL + 5 * run.curve.noise and not _gradients_fell(run)


def _gradients_fell(run: Run) -> bool:
    norms = run.log["grad_norm"].finite
    return len(norms) > 0 and middle(head(norms, 0.1)) > limit("silent") * middle(tail(norms, 0.1))
