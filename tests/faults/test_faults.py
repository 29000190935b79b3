"""Five hundred faults in probes, none of which reaches training; and random ones."""

from __future__ import annotations

import itertools

import pytest

from tests.faults.faults import IN_FORWARD, INTERRUPTS, WORTHLESS, InForward
from tests.faults.harness import Case, check
from tests.faults.models import THIRD_PARTY
from tests.faults.random_cases import drawn

STEPS, FROM = 4, 1
"""Steps of a run, and the first whose probes go wrong."""
MODELS, OPTIMIZERS, SOURCES, EVALUATIONS = (
    ("mlp", "noisy"),
    ("sgd", "adamw", "rprop"),  # the last is measured along its updates
    ("closure", "observed", "captured"),
    (1, 2),
)
CASES = list(itertools.product(IN_FORWARD, MODELS, OPTIMIZERS, SOURCES, EVALUATIONS))
RANDOM = [case for case in map(drawn, range(60)) if case.optimizer not in THIRD_PARTY][:40]


def test_there_are_five_hundred() -> None:
    assert len(CASES) >= 500 and len(set(CASES)) == len(CASES)


@pytest.mark.parametrize(("fault", "model", "optimizer", "source", "evaluation"), CASES)
def test_a_fault_in_a_probe_does_not_reach_training(
    fault: str, model: str, optimizer: str, source: str, evaluation: int
) -> None:
    """And what makes a probe worthless is a failed probe."""
    faults = dict.fromkeys(range(FROM, STEPS), InForward(fault, evaluation))
    options, errors = {"hvp": "finite_difference"}, fault == "warning as error"
    _, opt = check(Case(model, optimizer, source, faults, options, STEPS, warnings_are_errors=errors))
    rows = list(opt.history)
    assert len(rows) == STEPS
    if fault in WORTHLESS and optimizer != "rprop":  # which knows of a probe one step later
        assert any("failed" in row["reason"] for row in rows[FROM:])
        assert not any("failed" in row["reason"] for row in rows[:FROM])


def test_random_faults_do_not_reach_training() -> None:
    """Forty cases; others by `python -m tests.faults.sweep`."""
    events = [event for case in RANDOM for event in check(case)[0]]
    assert sum(bool(event.fault) for event in events) > 0.5 * sum(len(case.faults) for case in RANDOM) > 50
    assert {event.interrupt for event in events} == {"", *INTERRUPTS}
