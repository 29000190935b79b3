"""All runs of the benchmark, each measured once and kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

from benchmarks.edge_of_stability.controlled import CONTROLLED, TARGETS, controlled
from benchmarks.edge_of_stability.heatmap import KINDS, LAYERS, Heatmap, collect, warmed_up
from benchmarks.edge_of_stability.held import LAWS, held
from benchmarks.edge_of_stability.monitored import WIDTHS, bias, first_step, monitored
from benchmarks.edge_of_stability.problem import SETTINGS, cross_entropy
from benchmarks.edge_of_stability.wide import WIDTH, wide
from benchmarks.harness.results import Results, Row, console
from benchmarks.harness.runs import signature
from benchmarks.harness.source import library

DEEP = 2 * LAYERS
Pairs = dict[str, dict[float, list[Row]]]
"""Rows, one a seed, by rule and target."""


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
    wide_steps: int
    held_steps: int


FULL = Size(
    seeds=3, steps=4000, controlled_steps=4000, epochs=60, most=250, map_steps=300, map_seeds=2,
    rates=tuple(10 ** (-3 + i / 4) for i in range(11)), warmups=(0, 10, 30, 75, 150, 300),
    wide_steps=301, held_steps=1500,
)  # fmt: skip
SHORT = Size(
    seeds=1, steps=1500, controlled_steps=500, epochs=2, most=40, map_steps=100, map_seeds=1,
    rates=tuple(10 ** (-3 + i / 2) for i in range(5)), warmups=(0, 30, 100), wide_steps=101, held_steps=150,
)  # fmt: skip


@dataclass(frozen=True)
class Again:
    """What was asked again with one thing changed: width, loss, depth, law; `wide` by setting, `held` by law."""

    wide: dict[str, list[Row]]
    bias: Row
    heatmap: Heatmap
    held: dict[str, Pairs]


@dataclass(frozen=True)
class Measured:
    """All rows: `runs` by setting, `first` by width; lists are of seeds."""

    runs: dict[str, list[Row]]
    first: list[Row]
    bias: Row
    pairs: Pairs
    heatmap: Heatmap
    again: Again


def measure(results: Results, size: Size) -> Measured:
    """Every run, or its row of an earlier, interrupted go with the same code."""
    seeds, ours = range(size.seeds), library()
    row = partial(kept, results)

    def run(name: str, seed: int) -> Row:
        return row(f"{name}, seed {seed}", ours, monitored, SETTINGS[name], seed, size.steps)

    def brought(name: str, target: float, seed: int) -> Row:
        key, rule = f"{name}, target {target:g}, seed {seed}", CONTROLLED[name]
        return row(key, ours, controlled, rule, target, seed, size.controlled_steps)

    return Measured(
        {name: [run(name, seed) for seed in seeds] for name in SETTINGS},
        [row(f"first step, width {width}", ours, first_step, width, 5) for width in WIDTHS],
        row("bias", ours, bias, size.steps, size.epochs, size.most),
        pairs(brought, size.seeds),
        mapped(results, size, LAYERS, size.warmups),
        measure_again(results, size),
    )


def measure_again(results: Results, size: Size) -> Again:
    seeds, ours = range(size.seeds), library()
    row = partial(kept, results)

    def wider(name: str, seed: int) -> Row:
        return row(f"{name}, width {WIDTH}, seed {seed}", ours, wide, name, seed, size.wide_steps)

    def by(law: str) -> Pairs:
        def run(name: str, target: float, seed: int) -> Row:
            key = f"{name} by {law}, target {target:g}, seed {seed}"  # of no code but PyTorch's
            return row(key, "", held, CONTROLLED[name], LAWS[law], target, seed, size.held_steps)

        return pairs(run, size.seeds)

    return Again(
        {name: [wider(name, seed) for seed in seeds] for name, setting in SETTINGS.items() if setting.start},
        row("bias, cross-entropy", ours, bias, size.steps, size.epochs, size.most, cross_entropy),
        mapped(results, size, DEEP, (size.warmups[0], size.warmups[-1])),
        {law: by(law) for law in LAWS},
    )


def kept(results: Results, key: str, code: str, make: Callable[..., Row], *args: Any) -> Row:
    """The row of that key, whose arrival is said."""
    known = len(results.rows)
    found = results.row(key, make, *args, code=code)
    if len(results.rows) > known:
        console.print(f"[dim]{key}[/dim]")
    return found


def pairs(run: Callable[[str, float, int], Row], seeds: int) -> Pairs:
    return {
        name: {target: [run(name, target, seed) for seed in range(seeds)] for target in TARGETS} for name in CONTROLLED
    }


def mapped(results: Results, size: Size, layers: int, warmups: tuple[int, ...]) -> Heatmap:
    theirs = signature("gpt-post")

    def cell(rule: str, warmup: int, lr: float, seed: int) -> Row:
        key = f"{rule}, W={warmup}, lr={lr:.3g}, seed {seed}" + (f", {layers} layers" if layers != LAYERS else "")
        return kept(results, key, theirs, warmed_up, rule, lr, warmup, size.map_steps, seed, layers)

    seeds = range(size.map_seeds)
    cells = {at: [cell(*at, seed) for seed in seeds] for at in product(KINDS, warmups, size.rates)}
    return collect(cells, size.rates, warmups)
