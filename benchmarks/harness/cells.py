"""What runs come to: the cells of a grid of peak rates, and the statistics of a policy over them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scipy import stats

from benchmarks.harness.policies import HAND_TUNED, POLICIES
from benchmarks.harness.problems import PROBLEMS
from benchmarks.harness.results import Row, median


@dataclass(frozen=True)
class Cell:
    """All policies at one peak rate of one problem, over the same seeds in the same order."""

    problem: str
    split: str
    lr: float
    runs: dict[str, list[Row]]  # policy -> one row a seed

    def values(self, policy: str, field: str = "loss") -> list[float]:
        return [row[field] for row in self.runs[policy]]

    def mean(self, policy: str, field: str = "loss") -> float:
        values = self.values(self.oracle if policy == "oracle" else policy, field)
        return sum(values) / len(values)

    def has(self, policy: str) -> bool:
        return policy == "oracle" or policy in self.runs

    @property
    def oracle(self) -> str:
        """The hand-tuned policy with the lowest loss, mean over seeds."""
        return min((p for p in HAND_TUNED if p in self.runs), key=self.mean)

    def regret(self, field: str = "loss") -> tuple[float, float]:
        """Mean over seeds of log warmctl − log oracle, and half of its 95 % interval by Student's t (nan at one seed).

        The oracle is the one of the final loss for every field.
        """
        pairs = zip(self.values("warmctl", field), self.values(self.oracle, field), strict=True)
        logs = [math.log(ours) - math.log(theirs) for ours, theirs in pairs]
        return student(logs)

    def failures(self, policy: str) -> int:
        return sum(row["failed"] for row in self.runs[policy])


def student(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval by Student's t; nan of one value."""
    mean, n = sum(values) / len(values), len(values)
    if n < 2:
        return mean, math.nan
    deviation = math.sqrt(sum((x - mean) ** 2 for x in values) / (n - 1))
    return mean, float(stats.t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)


def gather(rows: Iterable[Row]) -> tuple[list[Cell], int]:
    """Cells of every (problem, rate), and how many are left out because a policy has no run there yet."""
    expected: dict[str, set[str]] = defaultdict(set)
    found: dict[tuple[str, float], dict[str, dict[int, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        expected[row["problem"]].add(row["policy"])
        found[row["problem"], row["lr"]][row["policy"]][row["seed"]] = row
    cells = []
    for (problem, lr), by_policy in found.items():
        everywhere = [set(by_policy.get(policy, {})) for policy in expected[problem]]
        seeds = sorted(set.intersection(*everywhere))
        if seeds and "warmctl" in by_policy:
            runs = {p: [by_policy[p][seed] for seed in seeds] for p in POLICIES if p in by_policy}
            cells.append(Cell(problem, runs["warmctl"][0]["split"], lr, runs))
    return sorted(cells, key=lambda c: (list(PROBLEMS).index(c.problem), c.lr)), len(found) - len(cells)


def by_problem(cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.problem, []).append(cell)
    return groups


def best_cell(cells: Sequence[Cell], policy: str) -> Cell:
    return min(cells, key=lambda cell: cell.mean(policy))


def span(cells: Sequence[Cell], policy: str, slack: float = 0.1) -> float:
    """Decades of peak rates within 10 % of the best cell of any policy, on one problem: half a decade a cell."""
    best = min(cell.mean(p) for cell in cells for p in cell.runs)
    return 0.5 * sum(cell.mean(policy) <= (1 + slack) * best for cell in cells)


def mean_ranks(cells: Sequence[Cell], policies: Sequence[str]) -> dict[str, float]:
    """Mean place by final loss, 1 the best, over the cells that have all of `policies`; ties share their places."""
    cells = [cell for cell in cells if all(cell.has(p) for p in policies)]
    places = [stats.rankdata([cell.mean(p) for p in policies]) for cell in cells]
    return {p: float(sum(place[i] for place in places) / len(places)) for i, p in enumerate(policies) if places}


def price(cells: Sequence[Cell], policy: str = "warmctl") -> tuple[float, float]:
    """(gradient evaluations, seconds) beyond training's, as shares of training's.

    Seconds are CPU seconds of a one-threaded update, against the median of the fixed schedules in the same cell.
    """
    evaluations, seconds = [], []
    for cell in cells:
        fixed = [per_update(row) for p in HAND_TUNED if p in cell.runs for row in cell.runs[p]]
        evaluations += cell.values(policy, "overhead")
        seconds += [per_update(row) / median(fixed) - 1 for row in cell.runs[policy]]
    return sum(evaluations) / len(evaluations), median(seconds)


def per_update(row: Row) -> float:
    return row["cpu_seconds"] / row["updates"]
