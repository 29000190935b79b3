"""Five hundred faults in probes, none of which reaches training."""

from __future__ import annotations

import itertools

import pytest

from tests.faults.harness import FAULTS, MODELS, OPTIMIZERS, SOURCES, Case, check

EVALUATIONS = (1, 2)
CASES = [Case(*parts) for parts in itertools.product(FAULTS, MODELS, OPTIMIZERS, SOURCES, EVALUATIONS)]


def test_there_are_five_hundred() -> None:
    assert len(CASES) >= 500 and len(set(CASES)) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_fault_in_a_probe_does_not_reach_training(case: Case) -> None:
    check(case)
