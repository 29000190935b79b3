"""Whether a run was lost: not finite, dead at the loss of the start, fallen back to it, or silent."""

from __future__ import annotations

import math

import numpy as np

from warmctl.diagnose.diagnosis import Evidence
from warmctl.diagnose.rules import limit
from warmctl.diagnose.run import Run, head, middle, tail

NEVER_MOVED = 0.1
"""In nats: a loss that stayed within this of the start's, without a rise, has not been trained."""


def lost(run: Run) -> Evidence | None:
    """The first of the four signs that is there."""
    return _not_finite(run) or _dead(run) or _fallen_back(run) or _silent(run)


def onset(run: Run) -> float:
    """The step at which a lost run began to go wrong: of its largest rise, or of its first loss that is not finite."""
    curve = run.curve
    if curve.lost_from is not None:
        return curve.lost_from
    raised = curve.level - np.minimum.accumulate(curve.level)
    top = int(np.argmax(raised))
    start = np.flatnonzero(raised[: top + 1] <= 0.1 * raised[top])
    return float(curve.steps[min(int(start[-1]) + 1 if len(start) else 0, len(raised) - 1)])


def advice(run: Run) -> str:
    peak, warmup, curve = run.warmup.peak, run.warmup, run.curve
    if curve.lost_from is None and _never_moved(run):
        return (
            "The loss never moved, neither down nor up: raise `lr`, and check that the optimizer holds the parameters "
            "of this model and that gradients reach them."
        )
    lower = f"Lower `lr` from {peak:.3g} to {peak / 3:.1g}" if math.isfinite(peak) else "Lower `lr` to a third"
    if warmup.controlled:
        return f"{lower}, or give AdaptiveWarmup a smaller `target`."
    more = f"`warmup_steps={suggested(run)}`" if warmup.end is not None else "a longer warmup"
    return f"{lower} first; {more} beside it costs little. AdaptiveWarmup finds both by measuring."


def suggested(run: Run) -> int:
    """A longer warmup: three times what there was, at least a twentieth and at most a third of the record."""
    steps = run.last - run.first + 1
    return max(1, round(min(steps / 3, max(3.0 * run.warmup.length, steps / 20))))


def _not_finite(run: Run) -> Evidence | None:
    start = run.curve.lost_from
    logged = run.log["loss"]
    if start is None:
        return None
    value = logged.at(start)
    before = run.row(len(run.curve.steps) - 1)
    return Evidence(
        f"loss: {value} from step {start:g} on; the last finite one was {before}", logged.column, (int(start),), (value,)
    )


def _dead(run: Run) -> Evidence | None:
    curve = run.curve
    if curve.end <= math.log(1 - limit("dead")):
        return None
    return run.rows(f"loss: {run.row(0)} at the start, {curve.end_loss:.3g} at the end: nothing learnt", 0, -1)


def _fallen_back(run: Run) -> Evidence | None:
    curve, share = run.curve, limit("fallen back")
    if curve.gained < 0.3 or curve.end + curve.gained < share * curve.gained:
        return None
    return run.rows(f"loss: down to {run.row(curve.lowest)}, and {curve.end_loss:.3g} at the end", curve.lowest, -1)


def _silent(run: Run) -> Evidence | None:
    norms = run.log["grad_norm"].finite
    if len(norms) < 20 or run.curve.end <= math.log(1 - 0.4):
        return None
    before, after = middle(head(norms, 0.1)), middle(tail(norms, 0.1))
    if not before > limit("silent") * after:
        return None
    says = (
        f"{norms.column}: from {before:.3g} in the first tenth to {after:.3g} in the last, while the loss only went from "
        f"{run.row(0)} to {run.curve.end_loss:.3g}: the network has stopped to answer"
    )
    return Evidence(says, norms.column, (int(norms.steps[0]), int(norms.steps[-1])), (before, after))


def _never_moved(run: Run) -> bool:
    return bool(np.abs(run.curve.smooth).max() < NEVER_MOVED + 3 * run.curve.noise) and not _gradients_fell(run)


def _gradients_fell(run: Run) -> bool:
    norms = run.log["grad_norm"].finite
    return len(norms) > 0 and middle(head(norms, 0.1)) > limit("silent") * middle(tail(norms, 0.1))
