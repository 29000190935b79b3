"""All runs of the benchmark, each measured once and kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

from benchmarks.edge_of_stability.controlled import CONTROLLED, TARGETS, controlled
from benchmarks.edge_of_stability.heatmap import KINDS, Heatmap, collect, warmed_up
from benchmarks.edge_of_stability.monitored import WIDTHS, bias, first_step, monitored
from benchmarks.edge_of_stability.problem import SETTINGS
from benchmarks.harness.results import Results, Row, console
from benchmarks.harness.runs import signature
from benchmarks.harness.source import library


@dataclass(frozen=True)
class Size:
    """How much is run."""

    seeds: int
    steps: int
    controlled_steps: int
    epochs: int  # of mini-batches for the bias
    most: int  # mini-batches of a size
    rates: tuple[float, ...]
    warmups: tuple[int, ...]
    map_steps: int
    map_seeds: int


FULL = Size(
    seeds=3, steps=4000, controlled_steps=4000, epochs=60, most=250, map_steps=300, map_seeds=2,
    rates=tuple(10 ** (-3 + i / 4) for i in range(11)), warmups=(0, 10, 30, 75, 150, 300),
)  # fmt: skip
SHORT = Size(
    seeds=1, steps=1500, controlled_steps=500, epochs=2, most=40, map_steps=100, map_seeds=1,
    rates=tuple(10 ** (-3 + i / 2) for i in range(5)), warmups=(0, 30, 100),
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """All rows: `runs` by setting, `first` by width, `pairs` by rule and target; lists are of seeds."""

    runs: dict[str, list[Row]]
    first: list[Row]
    bias: Row
    pairs: dict[str, dict[float, list[Row]]]
    heatmap: Heatmap


def measure(results: Results, size: Size) -> Measured:
    """Every run, or its row of an earlier, interrupted go with the same code."""
    seeds, ours, theirs = range(size.seeds), library(), signature("gpt-post")

    def row(key: str, code: str, make: Callable[..., Row], *args: Any) -> Row:
        known = len(results.rows)
        found = results.row(key, make, *args, code=code)
        if len(results.rows) > known:
            console.print(f"[dim]{key}[/dim]")
        return found

    def run(name: str, seed: int) -> Row:
        return row(f"{name}, seed {seed}", ours, monitored, SETTINGS[name], seed, size.steps)

    def held(name: str, target: float, seed: int) -> Row:
        key, rule = f"{name}, target {target:g}, seed {seed}", CONTROLLED[name]
        return row(key, ours, controlled, rule, target, seed, size.controlled_steps)

    def cell(rule: str, warmup: int, lr: float, seed: int) -> Row:
        key = f"{rule}, W={warmup}, lr={lr:.3g}, seed {seed}"
        return row(key, theirs, warmed_up, rule, lr, warmup, size.map_steps, seed)

    seeds_of_map = range(size.map_seeds)
    cells = {at: [cell(*at, seed) for seed in seeds_of_map] for at in product(KINDS, size.warmups, size.rates)}
    return Measured(
        {name: [run(name, seed) for seed in seeds] for name in SETTINGS},
        [row(f"first step, width {width}", ours, first_step, width, 5) for width in WIDTHS],
        row("bias", ours, bias, size.steps, size.epochs, size.most),
        {name: {target: [held(name, target, seed) for seed in seeds] for target in TARGETS} for name in CONTROLLED},
        collect(cells, size.rates, size.warmups),
    )
