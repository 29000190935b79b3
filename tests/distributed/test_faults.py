"""A probe that goes wrong on one rank: real processes, every fault at every source, under DDP and FSDP2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed

from tests.distributed.faults import SOURCES, STEPS

WORKER = Path(__file__).with_name("faults.py")
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs gloo"
)


def run(processes: int, *words: str) -> dict[str, list[dict[str, Any]]]:
    """What every rank returned in all cases that have these words in their name."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [*command, str(WORKER), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULTS ")]
    assert done.returncode == 0 and lines, done.stdout[-2000:] + done.stderr[-4000:]
    found: dict[str, list[dict[str, Any]]] = json.loads(lines[-1].removeprefix("RESULTS "))
    return found


def check(results: dict[str, list[dict[str, Any]]], name: str) -> None:
    """All ranks took the same fallback at the step of the fault and measured again; the training is the bare one's."""
    place, source, error, when, _ = name.split()
    ranks = results[name]
    for found in ranks:
        assert "error" not in found, found["error"]
        assert found["decisions"] == ranks[0]["decisions"] and found["weights"] == ranks[0]["weights"]
        assert len(found["decisions"]) == STEPS
    bare = results[f"bare {place} {source}"][0]
    assert (ranks[0]["weights"], ranks[0]["buffers"]) == (bare["weights"], bare["buffers"])
    failed = [[step for step, reason in enumerate(found["reasons"]) if "failed" in reason] for found in ranks]
    steps = {"first": [0], "later": [2], "all": list(range(STEPS))}[when]
    assert failed[0] == failed[-1] and set(failed[0]) <= set(steps)
    if error != "nan" and when != "all":
        assert failed[0] == steps
        assert "rank" in ranks[0]["reasons"][steps[0]] and "no such thing" in ranks[-1]["reasons"][steps[0]]
    if when == "first":
        assert any(isinstance(row[3], bool) and row[3] for row in ranks[0]["decisions"][1:])


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def results(request: pytest.FixtureRequest) -> dict[str, list[dict[str, Any]]]:
    return run(2, request.param, "quick")


@pytest.mark.parametrize("source", SOURCES)
def test_every_rank_takes_the_same_fallback_and_training_goes_on(
    results: dict[str, list[dict[str, Any]]], source: str
) -> None:
    names = [name for name in results if name.split()[1] == source and not name.startswith("bare")]
    assert len(names) >= 6 or (source == "backward" and not any(name.startswith("ddp") for name in results))
    for name in names:
        check(results, name)


@pytest.mark.slow
def test_a_fault_on_one_of_four_ranks() -> None:
    """Four processes, each case a training of its own. All cases, and FSDP2's, take ten minutes."""
    results = run(4, "ddp", "quick")
    names = [name for name in results if not name.startswith("bare")]
    assert len(names) >= 18
    for name in names:
        check(results, name)
