"""What rows come to: regret against hand-tuned linear warmup, by how far the peak rate is from the task's best.

Regret is log(loss + f) less that of an oracle, f being 2 % of the task's loss at the start, so that .002 against .004
is nothing. At and below the best rate the oracle has the same rate; above it, it has the best rate: set the rate too
high and get what tuning both would have given. The task's best rate is the one at which some linear warmup of up to a
fifth of the run ends lowest. A loss that is no number, or above the start, counts as the start. A cell is lost where
the oracle made half of the progress that the best rate makes, and the policy did not. The unit of statistics is the
task: intervals are a bootstrap over tasks.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from benchmarks.harness.results import console, table
from benchmarks.tasks.optimizers import GROUPS
from benchmarks.tasks.policies import LINEAR, ORACLES, PEERS
from benchmarks.tasks.runs import Row

SOFT = 0.02  # of the start loss, f in the regret
HALF = 0.5  # of the progress of the best rate: a cell with less is lost
RELATIVE = {-2: "1/10", -1: "1/3", 0: "1", 1: "3", 2: "10", 3: "30", 4: "100"}
"""Half decades above the best rate."""
RESAMPLES = 500


@dataclass
class TaskRows:
    """All runs of one task and run seed: losses by policy and rate."""

    seed: int
    family: str
    optimizer: str
    start: float
    losses: dict[str, dict[int, float]]
    rows: dict[tuple[str, int], Row]

    @property
    def group(self) -> str:
        return next(name for name, members in GROUPS.items() if self.optimizer in members)

    def score(self, policy: str, rate: int) -> float:
        return math.log(self.losses[policy][rate] + SOFT * self.start)

    def oracle(self, rate: int, among: Sequence[str] = ORACLES["0–20 %"]) -> str:
        """The schedule with the lowest loss at a rate."""
        return min((p for p in among if rate in self.losses.get(p, {})), key=lambda p: self.losses[p][rate])

    @property
    def best(self) -> int:
        """The rate at which the oracle of 0–20 % ends lowest."""
        rates = self.losses["linear-0%"]
        return min(rates, key=lambda rate: self.losses[self.oracle(rate)][rate])

    def reference(self, relative: int, among: Sequence[str]) -> float:
        """The oracle's score that a policy is held against at a relative rate; above the best one, its best."""
        rates = self.losses["linear-0%"]
        if relative <= 0:
            rate = self.best + relative
            return self.score(self.oracle(rate, among), rate)
        return min(self.score(self.oracle(rate, among), rate) for rate in rates)

    def regret(self, policy: str, relative: int, among: Sequence[str] = ORACLES["0–20 %"]) -> float | None:
        """None where there is no such run."""
        rate = self.best + relative
        if rate not in self.losses["linear-0%"] or rate not in self.losses.get(policy, {}):
            return None
        return self.score(policy, rate) - self.reference(relative, among)

    def lost(self, policy: str, relative: int) -> bool:
        """Less than half of the best rate's progress, where the oracle at this rate made it."""
        rate = self.best + relative
        lowest = min(self.losses[self.oracle(r)][r] for r in self.losses["linear-0%"])
        line = self.start - HALF * (self.start - lowest)
        return self.losses[policy][rate] > line

    def oracle_lost(self, relative: int) -> bool:
        rate = self.best + relative
        return self.lost(self.oracle(rate, tuple(LINEAR)), relative)


def gather(rows: Iterable[Row]) -> list[TaskRows]:
    """Tasks that have all linear schedules at all of their rates."""
    by_task: dict[tuple[int, int], list[Row]] = defaultdict(list)
    for row in rows:
        by_task[row["seed"], row["run"]].append(row)
    tasks = []
    for (seed, _), members in sorted(by_task.items()):
        first = members[0]
        losses: dict[str, dict[int, float]] = defaultdict(dict)
        for row in members:
            loss = row["start"] if row["loss"] is None else min(row["loss"], row["start"])
            losses[row["policy"]][row["rate"]] = loss
        grid = set(losses.get("linear-0%", {}))
        if grid and all(set(losses.get(policy, {})) == grid for policy in LINEAR):
            kept = {(row["policy"], row["rate"]): row for row in members}
            tasks.append(TaskRows(seed, first["family"], first["optimizer"], first["start"], dict(losses), kept))
    return tasks


# -- statistics -------------------------------------------------------------------------------------------


def regrets(
    tasks: Sequence[TaskRows], policy: str, relative: Iterable[int], oracle: str = "0–20 %"
) -> list[list[float]]:
    """By task, over the relative rates."""
    relative, among = list(relative), ORACLES[oracle]
    found = [[r for k in relative if (r := t.regret(policy, k, among)) is not None] for t in tasks]
    return [task for task in found if task]


def quantiles(by_task: Sequence[Sequence[float]], shares: Sequence[float]) -> list[tuple[float, float, float]]:
    """(value, low, high) of each quantile over all cells; the interval by drawing whole tasks, 95 %."""
    if not by_task:
        return [(math.nan, math.nan, math.nan)] * len(shares)
    arrays = [np.asarray(task) for task in by_task]
    value = np.quantile(np.concatenate(arrays), shares)
    drawn = np.random.default_rng(0).integers(0, len(arrays), (RESAMPLES, len(arrays)))
    again = np.array([np.quantile(np.concatenate([arrays[i] for i in some]), shares) for some in drawn])
    low, high = np.quantile(again, (0.025, 0.975), axis=0)
    return [(float(v), float(a), float(b)) for v, a, b in zip(value, low, high, strict=True)]


def fresh_regrets(rows: Iterable[Row], policy: str, relative: int) -> list[list[float]]:
    """By task, over the runs that picked nothing: against the rate and schedule that the first run picked.

    The least of many single runs owes a part to luck, which is in every regret against it. Here both sides train on
    weights and batches that had no say, as the runs of someone who has tuned do.
    """
    rows = list(rows)
    found = []
    for t in gather(row for row in rows if row["run"] == 0):
        runs: dict[int, dict[tuple[str, int], float]] = defaultdict(dict)
        for row in rows:
            if row["seed"] == t.seed and row["run"] > 0:
                loss = row["start"] if row["loss"] is None else min(row["loss"], row["start"])
                runs[row["run"]][row["policy"], row["rate"]] = math.log(loss + SOFT * row["start"])
        picked, tried = (t.oracle(t.best), t.best), (policy, t.best + relative)
        found.append([run[tried] - run[picked] for run in runs.values() if picked in run and tried in run])
    return [task for task in found if task]


def lost(tasks: Sequence[TaskRows], policy: str, relative: Iterable[int]) -> tuple[int, int, int]:
    """(cells lost where some schedule was not, cells lost by all, cells)"""
    ours = theirs = cells = 0
    for t in tasks:
        for k in relative:
            if t.regret(policy, k) is not None:
                cells += 1
                gone, all_gone = t.lost(policy, k), t.oracle_lost(k)
                ours, theirs = ours + (gone and not all_gone), theirs + (gone and all_gone)
    return ours, theirs, cells


def mean_ranks(
    tasks: Sequence[TaskRows], policies: Sequence[str], relative: Iterable[int]
) -> tuple[dict[str, float], int]:
    """Mean place by final loss, 1 the best, over the cells that have all of `policies`; ties share their places."""
    places = []
    for t in tasks:
        for k in relative:
            if all(t.regret(p, k) is not None for p in policies):
                places.append(stats.rankdata([t.losses[p][t.best + k] for p in policies]))
    if not places:
        return {}, 0
    return {p: float(np.mean([place[i] for place in places])) for i, p in enumerate(policies)}, len(places)


def price(tasks: Sequence[TaskRows], policy: str) -> tuple[float, float]:
    """(evaluations, seconds) beyond training's, as shares of it; seconds against the median linear schedule's."""
    evaluations, seconds = [], []
    for t in tasks:
        for rate in t.losses.get(policy, {}):
            row = t.rows[policy, rate]
            plain = np.median([t.rows[p, rate]["cpu_seconds"] / t.rows[p, rate]["updates"] for p in LINEAR])
            evaluations.append(row["overhead"] or 0.0)
            seconds.append(row["cpu_seconds"] / row["updates"] / float(plain) - 1)
    return (float(np.mean(evaluations)), float(np.median(seconds))) if seconds else (math.nan, math.nan)


# -- tables -----------------------------------------------------------------------------------------------

SUMMARY = {
    "tasks": "{}", "ordinary": "{:+.3f}", "its 95th": "{:+.2f}", "above": "{:+.3f}", "its 90th": "{:+.2f}",
    "lost": "{}", "by all": "{}", "cells": "{}",
}  # fmt: skip


def summary(tasks: Sequence[TaskRows], policy: str, oracle: str = "0–20 %") -> dict[str, float | int]:
    """Two questions in eight numbers: at a third of the best rate and at it; and above it."""
    at, above = regrets(tasks, policy, (-1, 0), oracle), regrets(tasks, policy, (1, 2, 3, 4), oracle)
    (middle, *_), (tail, *_) = quantiles(at, (0.5, 0.95))
    (high, *_), (high_tail, *_) = quantiles(above, (0.5, 0.9))
    ours, theirs, cells = lost(tasks, policy, range(-1, 5))
    return dict(zip(SUMMARY, (len(at), middle, tail, high, high_tail, ours, theirs, cells), strict=True))


def policies_of(tasks: Sequence[TaskRows]) -> list[str]:
    names = {p for t in tasks for p in t.losses}
    known = [p for p in (*LINEAR, *PEERS) if p in names]
    return known + sorted(names - set(known))


def show(rows: Iterable[Row], policy: str) -> None:
    """Print every table."""
    rows = list(rows)
    tasks = gather(row for row in rows if row["run"] == 0)
    policies = policies_of(tasks)
    console.print(f"{len(tasks)} tasks, best rate at {sorted(t.best for t in tasks)}")
    for oracle in ORACLES:
        lines = [{"policy": p, **summary(tasks, p, oracle)} for p in policies]
        table(f"Regret against the oracle of {oracle}", lines, {"policy": "{}", **SUMMARY})
    table(f"{policy} by relative rate", list(_by_rate(tasks, policy)), _RATE_COLUMNS)
    for title, key in (("optimizers", "group"), ("families", "family")):
        names = sorted({getattr(t, key) for t in tasks})
        lines = [{key: n, **summary([t for t in tasks if getattr(t, key) == n], policy)} for n in names]
        table(f"{policy} by {title}", lines, {key: "{}", **SUMMARY})
    table("Regret on fresh runs against the picked schedule", list(_fresh(rows, policies)), _FRESH_COLUMNS)
    _show_ranks(tasks, policies)
    lines = [{"policy": p, **dict(zip(("evaluations", "seconds"), price(tasks, p), strict=True))} for p in policies]
    table("Price, as a share of training's", lines, {"policy": "{}", "evaluations": "{:.4f}", "seconds": "{:+.2f}"})


_RATE_COLUMNS = {
    "oracle": "{}", "rate": "{}", "median": "{:+.3f}", "interval": "{}", "5th": "{:+.3f}", "95th": "{:+.3f}",
    "95th interval": "{}", "lost": "{}",
}  # fmt: skip


def _by_rate(tasks: Sequence[TaskRows], policy: str) -> Iterable[dict[str, object]]:
    for oracle in ORACLES:
        for k, name in RELATIVE.items():
            low, middle, high = quantiles(regrets(tasks, policy, (k,), oracle), (0.05, 0.5, 0.95))
            yield {
                "oracle": oracle, "rate": name, "median": middle[0], "interval": f"{middle[1]:+.3f} … {middle[2]:+.3f}",
                "5th": low[0], "95th": high[0], "95th interval": f"{high[1]:+.3f} … {high[2]:+.3f}",
                "lost": lost(tasks, policy, (k,))[0],
            }  # fmt: skip


_FRESH_COLUMNS = {
    "policy": "{}", "rate": "{}", "tasks": "{}", "runs": "{}", "median": "{:+.3f}", "interval": "{}", "90th": "{:+.2f}",
    "95th": "{:+.2f}",
}  # fmt: skip


def _fresh(rows: Sequence[Row], policies: Iterable[str]) -> Iterable[dict[str, object]]:
    for policy in policies:
        for k, name in RELATIVE.items():
            found = fresh_regrets(rows, policy, k)
            if found and policy not in LINEAR:
                middle, high, highest = quantiles(found, (0.5, 0.9, 0.95))
                yield {
                    "policy": policy, "rate": name, "tasks": len(found), "runs": sum(map(len, found)),
                    "median": middle[0], "interval": f"{middle[1]:+.3f} … {middle[2]:+.3f}", "90th": high[0],
                    "95th": highest[0],
                }  # fmt: skip


def _show_ranks(tasks: Sequence[TaskRows], policies: Sequence[str]) -> None:
    """Over all cells with the policies that go with every optimizer, and within each family of optimizers."""
    common = [p for p in policies if all(p in t.losses for t in tasks)]
    groups = {"all": (list(tasks), common)}
    for name in GROUPS:
        members = [t for t in tasks if t.group == name]
        groups[name] = (members, [p for p in policies if any(p in t.losses for t in members)])
    for name, (members, among) in groups.items():
        ranks, cells = mean_ranks(members, among, range(-1, 5))
        lines = [{"policy": p, "mean rank": rank} for p, rank in sorted(ranks.items(), key=lambda item: item[1])]
        table(f"Mean rank, {name}: {cells} cells", lines, {"policy": "{}", "mean rank": "{:.2f}"})
