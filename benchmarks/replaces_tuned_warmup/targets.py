"""The targets of the claim, each with its figure and whether it is met."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks.harness.cells import Cell, best_cell, by_problem, mean_ranks, price, span
from benchmarks.harness.policies import ADAM_ONLY, POLICIES
from benchmarks.harness.problems import half_decades
from benchmarks.harness.results import median

GRID = 6  # rates, from which on a problem's cells are a grid


class Verdict(NamedTuple):
    figure: str
    met: bool | None  # None: these cells cannot tell


def verdicts(cells: Sequence[Cell], steps: int) -> dict[str, Verdict]:
    """The targets, each with its figure. The best rate is the oracle's, the span that of `span`."""
    groups, limit = by_problem(cells), 0.05 if steps >= 2000 else 0.12
    best = {name: best_cell(group, "oracle") for name, group in groups.items()}
    below = [cell for cell in cells if cell.lr <= best[cell.problem].lr]
    above = [cell for cell in cells if cell.lr > best[cell.problem].lr]
    return {
        "(a) to the best rate: regret ≤ .01 in median, ≤ .05 all": regret_below(below),
        "(b) above it: regret ≤ 0 in 90 % of cells; no failure": regret_above(above, cells),
        "(c) best over rates ≤ 1.01 × the oracle's, all problems": best_over_rates(groups, best),
        "(d) span a decade wider than the oracle's, all problems": wider_span(groups),
        "(e) at 10 × its best rate ≤ 1.1 × its best, all but one": ten_times(groups, best),
        f"(f) evaluations ≤ {limit:.0%}, seconds within 2 points": affordable(groups, limit),
        "(g) first in mean rank": first_in_rank(cells),
    }


def regret_below(cells: Sequence[Cell]) -> Verdict:
    regrets = [cell.regret()[0] for cell in cells]
    worst = max(cells, key=lambda cell: cell.regret()[0])
    figure = f"median {median(regrets):+.3f}, worst {max(regrets):+.3f} ({worst.problem} {worst.lr:g})"
    return Verdict(figure, median(regrets) <= 0.01 and max(regrets) <= 0.05)


def regret_above(above: Sequence[Cell], cells: Sequence[Cell]) -> Verdict:
    failures, runs = sum(c.failures("warmctl") for c in cells), sum(len(c.runs["warmctl"]) for c in cells)
    if not above:
        return Verdict(f"no cells above; {failures} of {runs} runs failed", None)
    good = sum(cell.regret()[0] <= 0 for cell in above)
    figure = f"{good} of {len(above)} cells; {failures} of {runs} runs failed"
    return Verdict(figure, good >= 0.9 * len(above) and failures == 0)


def best_over_rates(groups: dict[str, list[Cell]], best: dict[str, Cell]) -> Verdict:
    ratios = {n: best_cell(g, "warmctl").mean("warmctl") / best[n].mean("oracle") for n, g in groups.items()}
    return worst_of(ratios, max, "×{:.3f}", lambda ratio: ratio <= 1.01)


def wider_span(groups: dict[str, list[Cell]]) -> Verdict:
    if min(len(group) for group in groups.values()) < GRID:
        return Verdict("needs the grid", None)
    gains = {name: span(group, "warmctl") - span(group, "oracle") for name, group in groups.items()}
    return worst_of(gains, min, "{:+.1f} decades", lambda gain: gain >= 1)


def ten_times(groups: dict[str, list[Cell]], best: dict[str, Cell]) -> Verdict:
    """A rate beyond the grid counts as a miss; three rates alone cannot tell."""
    ratios = {}
    for name, group in groups.items():
        at = [cell for cell in group if cell.lr == half_decades(best[name].lr)[2]]
        if at or len(group) >= GRID:
            ratios[name] = at[0].mean("warmctl") / best[name].mean("oracle") if at else math.inf
    if not ratios:
        return Verdict("ten times the best rate was not run", None)
    good, beyond = sum(ratio <= 1.1 for ratio in ratios.values()), sum(map(math.isinf, ratios.values()))
    worst = max(ratios, key=ratios.__getitem__)
    figure = f"{good} of {len(ratios)} problems, worst ×{ratios[worst]:.2f} ({worst})"
    return Verdict(figure + f", {beyond} beyond the grid" * bool(beyond), good >= max(1, len(ratios) - 1))


def affordable(groups: dict[str, list[Cell]], limit: float) -> Verdict:
    """Met if every problem is; the figures are those of the dearest."""
    prices = {name: price(group) for name, group in groups.items()}
    worst, dearest = max(prices, key=lambda n: prices[n][0]), max(prices, key=lambda n: prices[n][1] - prices[n][0])
    figure = f"evaluations {prices[worst][0]:.1%} ({worst}), "
    figure += f"seconds {prices[dearest][1]:.1%} for {prices[dearest][0]:.1%} ({dearest})"
    return Verdict(figure, all(g <= limit and s <= g + 0.02 for g, s in prices.values()))


def first_in_rank(cells: Sequence[Cell]) -> Verdict:
    """Among the policies for every optimizer, and among all where all apply."""
    everywhere = [p for p in POLICIES if all(cell.has(p) for cell in cells)]
    sets = [everywhere] if len(everywhere) > 1 else []
    if any(cell.has(p) for cell in cells for p in ADAM_ONLY if p not in everywhere):
        sets.append([p for p in POLICIES if any(cell.has(p) for cell in cells)])
    figures, met = [], True
    for policies in sets:
        ranks = mean_ranks(cells, policies)
        rival = min((p for p in ranks if p != "warmctl"), key=ranks.__getitem__)
        met &= ranks["warmctl"] < ranks[rival]
        figures.append(f"{ranks['warmctl']:.2f} of {len(ranks)} (next best {rival} {ranks[rival]:.2f})")
    return Verdict("; Adam: ".join(figures), met)


def worst_of(values: dict[str, float], worst: Callable, form: str, good: Callable[[float], bool]) -> Verdict:
    name = worst(values, key=values.__getitem__)
    count = sum(map(good, values.values()))
    return Verdict(
        f"{count} of {len(values)} problems; worst {form.format(values[name])} ({name})", count == len(values)
    )
