"""What is told beside any verdict: late spikes, float16's overflows, clipping, layers that collapse or saturate."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from warmctl.diagnosis.diagnosis import Evidence
from warmctl.diagnosis.log import Series
from warmctl.diagnosis.movers import mover
from warmctl.diagnosis.rules import limit
from warmctl.diagnosis.run import Run, head, middle, tail

MOST_SPIKES = 3
FEWEST_OVERFLOWS = 5


class Finding(NamedTuple):
    evidence: list[Evidence]
    advice: str


def findings(run: Run) -> list[Finding]:
    found = (_spikes(run), _overflows(run), _clipping(run), _sigma(run), _units(run, "saturated"), _units(run, "dead"))
    return [finding for finding in found if finding is not None]


def _spikes(run: Run) -> Finding | None:
    """Rises of the loss after warmup and the time soon after it, the largest ones."""
    curve = run.curve
    height = curve.level - curve.smooth_before
    high = (curve.steps > run.early_until) & (height > max(math.log(limit("spike")), 8 * curve.noise))
    starts = [i for i in np.flatnonzero(high) if not high[i - 1]]
    spikes = [(i, i + int(np.argmin(np.append(high[i:], False)))) for i in starts]
    tops = sorted((max(range(a, b), key=lambda i: height[i]) for a, b in spikes), key=lambda i: -height[i])[
        :MOST_SPIKES
    ]
    if not tops:
        return None
    evidence: list[Evidence] = []
    for top in sorted(tops):
        before = max(int(a) for a, b in spikes if a <= top < b)
        cause = mover(run, float(curve.steps[before]))
        says = f"loss: a spike from {run.row(max(0, before - 1))} to {run.row(top)}"
        evidence += [run.rows(says, max(0, before - 1), top), *([cause] if cause else [])]
    lr = run.log["lr"].finite.at(float(curve.steps[tops[0]]))
    rate = f" (the rate was {lr:.3g} there)" if math.isfinite(lr) else ""
    more = "" if len(starts) <= MOST_SPIKES else f" There are {len(starts)} of them."
    return Finding(
        evidence,
        f"A spike so late is not for warmup to cure{rate}: clip gradients, or lower `lr`, or look at the batch of that "
        f"{run.log.unit}.{more}",
    )


def _overflows(run: Run) -> Finding | None:
    flags, scales = run.log["overflow"], run.log["loss_scale"]
    if len(flags):
        counts = np.diff(flags.values, prepend=0.0) if flags.values.max() > 1.0 else flags.values
        steps = flags.steps[counts > 0.0]
        column, rows = flags.column, len(flags)
    else:
        steps = scales.steps[1:][np.diff(scales.values) < 0.0] if len(scales) > 1 else scales.steps
        column, rows = scales.column, len(scales)
    late = steps[steps > run.first + 20]
    if len(late) < max(FEWEST_OVERFLOWS, limit("overflow") * rows):
        return None
    fell = f"; {scales.column} fell from {scales.values[0]:g} to {scales.values.min():g}" if len(scales) else ""
    says = (
        f"{column}: {len(late)} of {rows} {run.log.unit}s overflowed, from {run.at(late[0])} to {late[-1]:.15g}{fell}"
    )
    values = (float(scales.values[0]), float(scales.values.min())) if len(scales) else (float(len(late)),)
    return Finding(
        [Evidence(says, column, (int(late[0]), int(late[-1])), values)],
        "float16 cannot hold these gradients: each overflow skips a step. Train in bfloat16, or start the GradScaler "
        "with a smaller `init_scale`; if the loss scale falls and does not come back, gradients grow: lower `lr`.",
    )


def _clipping(run: Run) -> Finding | None:
    clipped, norms, most = run.log["clipped"], run.log["grad_norm"].finite, run.log["clip_norm"].finite
    if not len(clipped):
        if not len(norms) or not len(most):
            return None
        above = np.array([value > most.at(step) for step, value in zip(norms.steps, norms.values, strict=True)])
        clipped = Series(norms.column, norms.steps, above.astype(np.float64))
    after = clipped.between(run.warmup.length + run.first, run.last)
    if len(after) < FEWEST_OVERFLOWS or after.values.mean() <= limit("clipped"):
        return None
    norm = middle(norms.between(after.steps[0], run.last))
    says = f"{after.column}: {after.values.mean():.0%} of the {run.log.unit}s from {after.steps[0]:.15g} on are clipped"
    says += f"; the gradient norm is {norm:.3g} in the middle" if math.isfinite(norm) else ""
    says += f", the clip norm {middle(most):.3g}" if len(most) else ""
    raised = f"to about {float(np.quantile(norms.values, 0.9)):.2g}" if len(norms) else "above the usual gradient norm"
    return Finding(
        [Evidence(says, after.column, (int(after.steps[0]), int(after.steps[-1])), (float(after.values.mean()),))],
        f"The clip norm, not `lr`, sets the size of the steps: raise it {raised} so that it cuts what is unusual, and "
        "lower `lr` if the run needs steps as small as these. (Under Adam little changes.)",
    )


def _sigma(run: Run) -> Finding | None:
    falls: list[tuple[float, str, Series]] = []
    for layer, series in run.log.layers("sigma").items():
        values = series.finite
        if len(values) > 1 and values.values.min() < limit("sigma") * middle(head(values, 0.05)):
            falls.append((float(values.values.min()), layer, values))
    if not falls:
        return None
    least, layer, series = min(falls)
    at, before = float(series.steps[int(np.argmin(series.values))]), middle(head(series, 0.05))
    says = f"{series.column}: from {before:.3g} to {least:.3g} ({run.at(at)})"
    says += f"; {len(falls)} norms in all" if len(falls) > 1 else ""
    return Finding(
        [Evidence(says, series.column, (int(series.steps[0]), int(at)), (before, least))],
        f"The input of the norm `{layer}` has lost its spread, so gradients through it are multiplied by 1/σ, "
        f"{before / max(least, 1e-30):.2g} times what they were: lower `lr` or its weight decay, or raise its `eps`.",
    )


def _units(run: Run, kind: str) -> Finding | None:
    found = {layer: series.finite for layer, series in run.log.layers(kind).items() if len(series.finite)}
    bad = {layer: series for layer, series in found.items() if middle(tail(series, 0.1)) > limit(_RULE[kind])}
    if not bad:
        return None
    layer, series = max(bad.items(), key=lambda item: middle(tail(item[1], 0.1)))
    crossed = float(series.steps[int(np.argmax(series.values > limit(_RULE[kind])))])
    end = middle(tail(series, 0.1))
    says = f"{series.column}: {end:.0%} of the units are {kind} at the end, more than half since {run.at(crossed)}"
    says += f"; {len(bad)} layers in all" if len(bad) > 1 else ""
    cure = "a longer warmup or a lower `lr` keeps its inputs small; so do smaller initial weights or a norm before it"
    if kind == "dead":
        cure = "they get no gradient and stay so: a lower `lr` from the start, or an activation that leaks"
    return Finding(
        [Evidence(says, series.column, (int(crossed), int(series.steps[-1])), (end,))],
        f"The units of `{layer}` are {kind}: {cure}.",
    )


_RULE = {"saturated": "saturated", "dead": "dead units"}
