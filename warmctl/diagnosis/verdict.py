"""From a record to a verdict: the first sign that is there, what moved before it, and what to change."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from warmctl.diagnosis import lost, warmed
from warmctl.diagnosis.diagnosis import Diagnosis, Evidence
from warmctl.diagnosis.files import log_of
from warmctl.diagnosis.findings import findings
from warmctl.diagnosis.movers import mover
from warmctl.diagnosis.rules import CAPPED, LOST, OVER, UNDER, UNSEEN, WELL
from warmctl.diagnosis.run import Run


def diagnose(
    history: str | os.PathLike[str] | Sequence[Mapping[str, Any]],
    *,
    loss: str | None = None,
    lr: str | None = None,
    step: str | None = None,
) -> Diagnosis:
    """What became of warmup in a run, and what to change next time. Costs nothing: it only reads.

    >>> found = diagnose("metrics.csv")
    >>> found.verdict, found.evidence[0].steps
    ('over-warmed', (1, 40))

    Args:
        history: a `History`; a list of rows, such as the Trainer's `state.log_history`; or the path of a CSV or JSONL
            file with a column of losses and, if there are, of steps, rates, gradient norms and more: the names that
            Hugging Face, Lightning and others give them are known. The run need not have used AdaptiveWarmup.
        loss, lr, step: the name of that column, if it is another.

    Raises: OSError for a file that cannot be read, ValueError, naming file and line, for what is no row or has too few
    losses or no column of a given name, TypeError for another source.
    """
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):  # logs hold any number
        run = Run.of(log_of(history, {"loss": loss, "lr": lr, "step": step}))
        beside = findings(run)
        verdict, sign, advice = _verdict(run, bool(beside))
        evidence = [sign, *_before(run, verdict, sign), *(item for finding in beside for item in finding.evidence)]
        evidence += [Evidence(f"{column}: {note}", column, (), ()) for column, note in run.log.notes.items()]
    return Diagnosis(verdict, tuple(evidence), " ".join([advice, *(finding.advice for finding in beside)]))


def diagnose_command(
    path: str | os.PathLike[str], loss: str | None = None, lr: str | None = None, step: str | None = None
) -> str:
    """What `warmctl diagnose PATH` prints. Raises as `diagnose`."""
    return f"{os.fspath(path)}: {diagnose(path, loss=loss, lr=lr, step=step)}"


def _verdict(run: Run, troubled: bool) -> tuple[str, Evidence, str]:
    if sign := lost.lost(run):
        return LOST, sign, lost.advice(run)
    if sign := warmed.under_warmed(run):
        return UNDER, sign, lost.lower(run)
    if sign := warmed.capped(run):
        return CAPPED, sign, warmed.advice_for_capped(run)
    if sign := warmed.unseen(run):
        return UNSEEN, sign, warmed.advice_for_unseen(run)
    if sign := warmed.over_warmed(run):
        return OVER, sign, warmed.advice_for_over(run)
    return WELL, warmed.well_warmed(run), warmed.advice_for_well(run, troubled)


def _before(run: Run, verdict: str, sign: Evidence) -> list[Evidence]:
    """What moved before it went wrong, and the rate at which it did."""
    if verdict not in (LOST, UNDER):
        return []
    start = lost.onset(run)
    rate, cause = run.log["lr"].finite, mover(run, start)
    found = [cause] if cause is not None else []
    if len(rate):
        value, at = rate.at(start), run.warmup
        where = "in" if at.end is not None and start < at.end else "after" if at.length else "without"
        when = f"{run.at(start)}, {where} warmup" if at.seen else run.at(start)
        says = f"{rate.column}: {value:.3g} when it began ({when}); the peak is {at.peak:.3g}"
        found.insert(0, Evidence(says, rate.column, (int(start),), (value,)))
    return found
