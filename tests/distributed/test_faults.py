"""A probe that goes wrong on one rank: real processes, every fault at every source, under DDP and FSDP2."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tests.distributed.faults import BACKWARD, COLLECTIVE, FAILING, IN_BACKWARD, IN_COLLECTIVE, SOURCES, STEPS
from tests.distributed.launch import launch, needs_gloo

Results = dict[str, list[dict[str, Any]]]
LOOKS = ("look", "after")
pytestmark = [needs_gloo, pytest.mark.xdist_group("faults")]  # its fixture is made once


def check(results: Results, name: str) -> None:
    """All ranks took the same fallback at the steps of a fault, measured at others, and trained as unwrapped."""
    place, source, error, when = name.split()
    ranks = results[name]
    for found in ranks:
        assert "error" not in found, found["error"]
        assert found["decisions"] == ranks[0]["decisions"] and found["weights"] == ranks[0]["weights"]
        assert len(found["decisions"]) == STEPS
    bare = results[f"bare {place} {source}"][0]
    assert (ranks[0]["weights"], ranks[0]["buffers"]) == (bare["weights"], bare["buffers"])
    failed = [[step for step, reason in enumerate(found["reasons"]) if "failed" in reason] for found in ranks]
    steps = [] if when in LOOKS else list(FAILING[when])
    assert all(steps_of_rank == failed[0] for steps_of_rank in failed) and set(failed[0]) <= set(steps)
    if when in LOOKS and not error.endswith("nan"):
        assert all(found["looks"] == ["nan"] * STEPS for found in ranks)
    if not error.endswith("nan") and when != "always" and when not in LOOKS:
        assert failed[0] == steps
        for step, found in itertools.product(steps, ranks):
            assert ("rank" in found["reasons"][step]) != found["fails"]
    if when != "always":
        assert any(isinstance(row[3], bool) and row[3] for row in ranks[0]["decisions"][1:])


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def results(request: pytest.FixtureRequest) -> Results:
    """All cases take three times as long: `python -m tests.distributed.sweep`."""
    found: Results = launch("tests.distributed.faults", 2, request.param, "-always", "-KeyError", "-after")
    return found


def inside(name: str) -> bool:
    """Whether the fault is in a backward pass or a collective."""
    return ":" in name


@pytest.mark.parametrize("source", SOURCES)
def test_every_rank_takes_the_same_fallback_and_training_goes_on(results: Results, source: str) -> None:
    names = [n for n in results if n.split()[1] == source and not n.startswith("bare") and not inside(n)]
    assert len(names) >= 3 or (source == "backward" and not any(name.startswith("ddp") for name in results))
    for name in names:
        check(results, name)


def test_a_fault_in_the_backward_pass_of_one_rank(results: Results) -> None:
    """Between two units: others would be in the collective of the next."""
    names = [name for name in results if BACKWARD in name]
    assert len(names) == len(IN_BACKWARD)
    for name in names:
        check(results, name)


def test_memory_that_runs_out_in_a_collective_of_one_rank(results: Results) -> None:
    """FSDP2 asks for it when the others may be waiting already."""
    names = [name for name in results if name.split()[2].startswith(tuple(COLLECTIVE))]
    assert len(names) in (0, len(COLLECTIVE) * len(IN_COLLECTIVE))
    for name in names:
        check(results, name)


@pytest.mark.slow
def test_a_fault_on_one_of_four_ranks() -> None:
    """Four processes, each case a training of its own; `python -m tests.distributed.sweep` has all cases."""
    results = launch("tests.distributed.faults", 4, "ddp", "fsdp", "hsdp", "+closure", "+OutOfMemoryError", "+2,1")
    results |= launch("tests.distributed.faults", 4, "fsdp", "hsdp", "+closure", "+reduce:OutOfMemoryError")
    names = [name for name in results if not name.startswith("bare")]
    assert len(names) == 5
    for name in names:
        check(results, name)
