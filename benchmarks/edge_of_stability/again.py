"""The claims that were not reproduced, asked again with one thing changed: which of them was at fault?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from benchmarks.edge_of_stability.controlled import TARGETS
from benchmarks.edge_of_stability.measured import DEEP, Measured
from benchmarks.edge_of_stability.problem import SETTINGS
from benchmarks.edge_of_stability.verdicts import judge_bias, judge_heatmap, judge_start, judge_targets, spread
from benchmarks.edge_of_stability.wide import WIDTH, by_oracle
from benchmarks.harness.results import Row

CLAIM = "claim"


class Try(NamedTuple):
    cause: str  # what is at fault if it is reproduced so
    changed: str
    row: Row


def asked_again(found: Measured) -> Iterator[Row]:
    """The table: for each claim that was not reproduced, the same verdict on other runs, and the cause."""
    for name, runs in found.again.wide.items():
        yield from starts(name, found.runs[name], runs)
    deep = judge_heatmap(found.again.heatmap)
    for first, row in zip(judge_heatmap(found.heatmap)[:2], deep[:2], strict=True):
        yield from judged(first, [Try("depth", f"{DEEP} layers", row)])
    yield deep[2] | {"changed": f"{DEEP} layers"}
    yield from judged(judge_bias(found.bias), [Try("loss", "cross-entropy", judge_bias(found.again.bias))])
    for name, by_target in found.pairs.items():
        tries = [
            Try("law", f"rate = target / {law}", judge_targets(name, *(by[name][target] for target in TARGETS)))
            for law, by in found.again.held.items()
        ]
        yield from judged(judge_targets(name, *(by_target[target] for target in TARGETS)), tries)


def judged(first: Row, tries: Sequence[Try]) -> Iterator[Row]:
    """The tries; beside the first that reproduces the claim what was changed, beside the last "claim" if none does.

    There is no cause to find where it was reproduced at `first`.
    """
    at = next((i for i, (_, _, row) in enumerate(tries) if row["reproduced"]), len(tries) - 1)
    for i, (cause, changed, row) in enumerate(tries):
        fault = cause if row["reproduced"] else CLAIM
        yield row | {"changed": changed, "cause": fault if i == at and not first["reproduced"] else None}


def starts(name: str, narrow: Sequence[Row], runs: Sequence[Row]) -> Iterator[Row]:
    """Adam's start and return at another width: with its first ratio by the meter, and by the oracle."""
    first, by_meter, exact = (judge_start(name, of) for of in (narrow, runs, [by_oracle(run) for run in runs]))
    without = spread([SETTINGS[name].edge * run["without"] for run in runs], "{:.1f}")
    left = spread([run["left out"] for run in runs], "{:.0f}")
    exact[0]["measured"] += f"; {without} without {left} of {runs[0]['weights']} weights"
    for before, *rows in zip(first, by_meter, exact, strict=True):
        words = f"width {WIDTH}", f"width {WIDTH}, first step by oracle"
        yield from judged(before, [Try(*of) for of in zip(("size", "size and meter"), words, rows, strict=True)])
