"""Each published figure beside the measured one, and whether it is reproduced within its tolerance."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from itertools import pairwise

from benchmarks.edge_of_stability.controlled import TARGETS
from benchmarks.edge_of_stability.heatmap import Heatmap
from benchmarks.edge_of_stability.measured import Measured
from benchmarks.edge_of_stability.monitored import BIAS
from benchmarks.edge_of_stability.problem import SETTINGS
from benchmarks.harness.results import Row

HELD = 1.25
"""A target is held where the settled ratio is within this factor of it."""


def lines(found: Measured) -> Iterator[Row]:
    """The table of claims."""
    for name in SETTINGS:
        yield judge_edge(name, found.runs[name])
    for name, setting in SETTINGS.items():
        if setting.start is not None:
            yield from judge_start(name, found.runs[name])
    yield from judge_heatmap(found.heatmap)
    yield judge_bias(found.bias)
    for name, by_target in found.pairs.items():
        yield judge_targets(name, by_target[TARGETS[0]], by_target[TARGETS[1]])


def near(measured: float, expected: float, tolerance: float) -> bool:
    return abs(measured - expected) <= tolerance


def within_factor(measured: float, expected: float, factor: float) -> bool:
    return measured > 0 and max(measured / expected, expected / measured) <= factor


def spread(values: Sequence[float], form: str) -> str:
    """Median and range; nothing of nothing."""
    if not values:
        return ""
    middle = form.format(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} [{form.format(min(values))}, {form.format(max(values))}]"


def percent(values: Sequence[float | None]) -> str | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return f"{float(f'{100 * max(known):.1g}'):g} %" if known else None


def survivors(runs: Sequence[Row]) -> tuple[list[Row], str]:
    """The runs that did not diverge, and what is to be said of the others."""
    lost = [run["diverged"] for run in runs if run.get("diverged")]
    words = f"{len(lost)} of {len(runs)} diverged, at step {spread(lost, '{:.0f}')}" if lost else ""
    return [run for run in runs if not run.get("diverged")], words


def joined(*words: str) -> str:
    return "; ".join(word for word in words if word)


def judge_edge(name: str, runs: Sequence[Row]) -> Row:
    setting = SETTINGS[name]
    alive, lost = survivors(runs)
    settled, start = [run["settled"] for run in alive], [run["start"] for run in alive]
    adam, rises = setting.start is not None, setting.edge == 2.0
    met = not lost and all(near(r, setting.expected, 0.05) for r in settled) and (not rises or max(start) < 1)
    claim = "Adam: preconditioned sharpness at 38/η" if adam else f"{name.split(' ')[0].rstrip(',')}: "
    claim += "" if adam else "sharpness rises to 2/η and stays" if rises else "the edge is 1.357/η"
    return {
        "claim": claim,
        "source": "Cohen 2022" if adam else "Cohen 2021",
        "setting": name,
        "expected": f"median r {setting.expected:.3f}",
        "measured": joined(
            spread(settled, "{:.3f}") + (f", r at first {spread(start, '{:.2f}')}" if rises else ""), lost
        ),
        "tolerance": "±0.05" + (", first r < 1" if rises else ""),
        "oracle": percent([run["oracle error"] for run in alive]),
        "reproduced": met,
    }


def judge_start(name: str, runs: Sequence[Row]) -> list[Row]:
    setting = SETTINGS[name]
    assert setting.start is not None and setting.back is not None
    alive, lost = survivors(runs)
    start = [setting.edge * run["start"] for run in alive]
    steps = [run["back"] for run in alive if run["back"] is not None]
    words = "not over it at first" if all(run["start"] <= 1 for run in alive) else "not back"
    if steps:
        words = f"{len(steps)} of {len(runs)} back, at step {spread(steps, '{:.0f}')}"
    common = {"source": "Kalra 2024", "setting": name}
    return [
        common
        | {
            "claim": "Adam starts far over the edge",
            "expected": f"ηλ at step 1 {setting.start:g}",
            "measured": joined(spread(start, "{:.1f}"), lost),
            "tolerance": "a factor of 3",
            "oracle": percent([run["oracle error"] for run in alive]),
            "reproduced": not lost and all(within_factor(s, setting.start, 3) and s > setting.edge for s in start),
        },
        common
        | {
            "claim": "… and returns to it",
            "expected": f"at 38 by step {setting.back}",
            "measured": joined(words, lost),
            "tolerance": f"by step {2 * setting.back}",
            "reproduced": len(steps) == len(runs) and max(steps) <= 2 * setting.back,
        },
    ]


def judge_bias(found: Row) -> Row:
    means = {size: found["trained"][str(size)]["mean"] for size in BIAS}
    falling = all(a > b for a, b in pairwise(means.values()))
    close = all(within_factor(means[size], expected, 1.5) for size, expected in BIAS.items())
    largest_batch = max(BIAS)
    return {
        "claim": "mini-batches bias λ_max upward",
        "source": "prototype",
        "setting": "N=1000, B=" + ", ".join(map(str, BIAS)),
        "expected": " ".join(f"×{value:g}" for value in BIAS.values()),
        "measured": " ".join(f"×{value:.3g}" for value in means.values()),
        "tolerance": "falling; a factor of 1.5, 5 % at the last",
        "oracle": percent([found["oracle error"]]),
        "reproduced": falling and close and near(means[largest_batch] / BIAS[largest_batch], 1, 0.05),
    }


def judge_targets(name: str, below: Sequence[Row], on: Sequence[Row]) -> Row:
    _, lost = survivors([*below, *on])
    both = [(a, b) for a, b in zip(on, below, strict=True) if not survivors([a, b])[1]]
    ratios = [a["loss"] / b["loss"] for a, b in both]
    kept = [[b["ratio"] for _, b in both], [a["ratio"] for a, _ in both]]
    held = all(within_factor(r, target, HELD) for target, rs in zip(TARGETS, kept, strict=True) for r in rs)
    words = f"r held {' and '.join(f'{statistics.median(r):.2f}' for r in kept)}" if both else ""
    return {
        "claim": "on the edge beats below the edge",
        "source": "CDAT",
        "setting": f"{name}, target 1 against .5",
        "expected": "loss ratio < 1",
        "measured": joined(spread(ratios, "{:.2g}"), words, lost),
        "tolerance": f"every seed, targets held within {HELD - 1:.0%}",
        "oracle": percent([run.get("oracle error") for run in (*below, *on)]),
        "reproduced": not lost and held and all(ratio < 1 for ratio in ratios),
    }


def judge_heatmap(heatmap: Heatmap) -> list[Row]:
    half_decade = 10**0.5 * (1 - 1e-9)
    rows = []
    for rule, name in (("adam", "Adam"), ("seeded", "Adam, v seeded")):
        edge = heatmap.boundary(rule)
        step = heatmap.rates[1] / heatmap.rates[0] * (1 + 1e-9)  # noise may move the boundary by one cell
        rising = all(later * step >= earlier for earlier, later in pairwise(edge))
        rows.append(
            {
                "claim": "longer warmup → larger tolerable peak rate",
                "source": "Kalra 2024",
                "setting": f"{name}, W={', '.join(map(str, heatmap.warmups))}",
                "expected": "moves right with W",
                "measured": ", ".join(f"{lr:.2g}" for lr in edge),
                "tolerance": "last ≥ √10 × first; one cell back at most",
                "reproduced": rising and edge[-1] >= half_decade * edge[0] > 0,
            }
        )
    plain, seeded = heatmap.boundary("adam")[0], heatmap.boundary("seeded")[0]
    rows.append(
        {
            "claim": "seeding v stands in for warmup",
            "source": "Kalra 2024",
            "setting": "W=0, Adam with v seeded against Adam",
            "expected": "larger rate",
            "measured": f"{seeded:.2g} against {plain:.2g}",
            "tolerance": "a cell or more",
            "reproduced": seeded > plain,
        }
    )
    return rows
