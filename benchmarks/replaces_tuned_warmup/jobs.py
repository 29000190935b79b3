"""Which runs: the whole grid, or three rates round the best one of each problem."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.harness.cells import best_cell, by_problem, gather
from benchmarks.harness.policies import POLICIES, policies_for
from benchmarks.harness.problems import PROBLEMS, half_decades
from benchmarks.harness.results import Row
from benchmarks.harness.runs import Job


def grid(problems: Iterable[str], seeds: int, steps: int = 400) -> list[Job]:
    """All cells of the first seed before the second's, so that an unfinished grid can be read."""
    return [
        Job(name, policy, lr, seed, steps)
        for seed in range(seeds)
        for name in problems
        for lr in PROBLEMS[name].lrs
        for policy in policies_for(PROBLEMS[name])
    ]


def around(
    best: dict[str, float], seeds: int, steps: int, policies: Sequence[str] = POLICIES, at: Sequence[int] = (0, 1, 2)
) -> list[Job]:
    """Cells at a rate for each problem, three times it and ten times it."""
    return [
        Job(name, policy, half_decades(lr)[i], seed, steps)
        for seed in range(seeds)
        for name, lr in best.items()
        for i in at
        for policy in policies_for(PROBLEMS[name], policies)
    ]


def best_rates(rows: Iterable[Row], problems: Iterable[str]) -> dict[str, float]:
    """The oracle's best rate on the grid; the problem's tuned one where the grid has no finished cell."""
    groups = by_problem(gather(rows)[0])
    return {
        name: best_cell(groups[name], "oracle").lr if name in groups else PROBLEMS[name].tuned_lr for name in problems
    }
