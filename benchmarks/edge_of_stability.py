"""Published results on the edge of stability, each reproduced with warmctl measuring; or, said plainly, not reproduced.

    python -m benchmarks.edge_of_stability [--quick]

The training problem was chosen once, on these grounds, before anything was measured, and is the same for every claim
but the heatmap's: tanh MLP with two hidden layers as wide as its input, PyTorch's own initialisation (40-40-40-10, 3690
parameters for 256 × 10 targets: it can fit them all); 256 signals of mnist1d's
generator, one-hot targets; the square loss of Cohen et al. 2021, half the squared error summed over outputs, mean over
examples; full batch, constant rate, float32. Expected figures were measured elsewhere on a problem that is only partly
known: tolerances, fixed beforehand, are narrow where theory names the figure and wide where the problem decides it.

The oracle of a measurement is the same eigenvalue in float64 by plain autograd and ARPACK, scaled by hand; the tests
hold it against dense Hessians. The heatmap is of `gpt-post` (problems.py) at half the width and context, and needs no
measurement but the loss.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer

from benchmarks.edge_runs import (
    BIAS,
    CONTROLLED,
    EVERY,
    PRODUCTS,
    SETTINGS,
    TARGETS,
    TOLERABLE,
    WIDTHS,
    Heatmap,
    Row,
    bias,
    controlled,
    first_step,
    monitored,
    warmed_up,
)
from benchmarks.harness.results import Quick, Results, console, table
from benchmarks.harness.runs import FAILED, library, signature

NAME = "edge_of_stability"

HELD = 1.25
"""A target is held where the settled ratio is within this factor of it."""


# -- verdicts ---------------------------------------------------------------------------------------------


def near(measured: float, expected: float, tolerance: float) -> bool:
    return abs(measured - expected) <= tolerance


def within_factor(measured: float, expected: float, factor: float) -> bool:
    return measured > 0 and max(measured / expected, expected / measured) <= factor


def spread(values: Sequence[float], form: str) -> str:
    """Median and range."""
    middle = form.format(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} [{form.format(min(values))}, {form.format(max(values))}]"


def percent(values: Sequence[float | None]) -> str | None:
    known = [value for value in values if value is not None]
    return f"{100 * max(known):.1g} %" if known else None


def judge_edge(name: str, runs: Sequence[Row]) -> Row:
    setting = SETTINGS[name]
    settled, start = [run["settled"] for run in runs], [run["start"] for run in runs]
    adam, rises = setting.start is not None, setting.edge == 2.0
    met = all(near(r, setting.expected, 0.05) for r in settled) and (not rises or max(start) < 1)
    claim = "Adam: preconditioned sharpness at 38/η" if adam else f"{name.split(' ')[0].rstrip(',')}: "
    claim += "" if adam else "sharpness rises to 2/η and stays" if rises else "the edge is 1.357/η"
    return {
        "claim": claim,
        "source": "Cohen 2022" if adam else "Cohen 2021",
        "setting": name,
        "expected": f"median r {setting.expected:.3f}",
        "measured": spread(settled, "{:.3f}") + (f", r at first {spread(start, '{:.2f}')}" if rises else ""),
        "tolerance": "±0.05" + (", first r < 1" if rises else ""),
        "oracle": percent([run["oracle error"] for run in runs]),
        "reproduced": met,
    }


def judge_start(name: str, runs: Sequence[Row]) -> list[Row]:
    setting = SETTINGS[name]
    assert setting.start is not None and setting.back is not None
    start = [setting.edge * run["start"] for run in runs]
    steps = [run["back"] for run in runs if run["back"] is not None]
    words = "not over it at first" if all(run["start"] <= 1 for run in runs) else "not back"
    if steps:
        words = f"{len(steps)} of {len(runs)} back, at step {spread(steps, '{:.0f}')}"
    common = {"source": "Kalra 2024", "setting": name}
    return [
        common
        | {
            "claim": "Adam starts far over the edge",
            "expected": f"ηλ at step 1 {setting.start:g}",
            "measured": spread(start, "{:.1f}"),
            "tolerance": "a factor of 3",
            "oracle": percent([run["oracle error"] for run in runs]),
            "reproduced": all(within_factor(s, setting.start, 3) and s > setting.edge for s in start),
        },
        common
        | {
            "claim": "… and returns to it",
            "expected": f"at 38 by step {setting.back}",
            "measured": words,
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
    ratios = [a["loss"] / b["loss"] for a, b in zip(on, below, strict=True)]
    both = [[run["ratio"] for run in runs] for runs in (below, on)]
    held = all(within_factor(r, target, HELD) for target, rs in zip(TARGETS, both, strict=True) for r in rs)
    return {
        "claim": "on the edge beats below the edge",
        "source": "CDAT",
        "setting": f"{name}, target 1 against .5",
        "expected": "loss ratio < 1",
        "measured": f"{spread(ratios, '{:.2g}')}; r held {' and '.join(f'{statistics.median(r):.2f}' for r in both)}",
        "tolerance": f"every seed, targets held within {HELD - 1:.0%}",
        "oracle": percent([run["oracle error"] for run in (*below, *on)]),
        "reproduced": held and all(ratio < 1 for ratio in ratios),
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


# -- figures ----------------------------------------------------------------------------------------------


def draw(found: Measured, path: Path) -> None:
    """Ratios by step with the edge at 1, the bias by batch size, and controlled runs on and below the edge."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 7.4), layout="constrained")
    top, bottom = figure.subplots(2, 4)
    gd, nesterov, *adam = SETTINGS
    draw_ratios(top[0], [gd], found.runs, gd)
    draw_ratios(top[1], [nesterov], found.runs, nesterov)
    draw_ratios(top[2], adam, found.runs, "Adam, β₂=.99")
    draw_ratios(top[3], adam, found.runs, "Adam's opening")
    draw_opening(top[3], adam)
    draw_bias(bottom[0], found.bias)
    for ax, name in zip(bottom[1:], CONTROLLED, strict=False):
        draw_pair(ax, found.pairs[name], "losses", "")
        ax.set(title=f"{name}: on and below the edge", ylabel="training loss")
    for name, style in zip(CONTROLLED, ("-", ":"), strict=True):
        draw_pair(bottom[3], found.pairs[name], "rates", f"{name}, ", ls=style)
    bottom[3].set(title="The rate that was applied", ylabel="learning rate")
    bottom[3].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def draw_ratios(ax: Any, names: Sequence[str], runs: dict[str, list[Row]], title: str) -> None:
    for colour, name in zip(("C0", "C1"), names, strict=False):
        for index, run in enumerate(runs[name]):
            ax.plot(*run["series"], color=colour, lw=0.9, alpha=0.8, label=None if index else name)
    ax.axhline(1, color="black", lw=0.9, ls="--", label="edge")
    ax.set(xlabel="step", ylabel="stability ratio r", title=title)
    ax.set_ylim(bottom=0)
    ax.legend(fontsize=8, loc="lower right")


def draw_opening(ax: Any, names: Sequence[str]) -> None:
    """Both axes in log, and the expected figures beside the curves."""
    for colour, setting in zip(("C0", "C1"), (SETTINGS[name] for name in names), strict=True):
        first = f"expected at first: {setting.start / setting.edge:.0f}"
        ax.plot(1, setting.start / setting.edge, color=colour, marker="D", ls="", label=first)
        ax.plot(setting.back, 1, color=colour, marker="v", ms=8, ls="", label=f"expected back by {setting.back}")
    ax.set(xscale="log", yscale="log")
    ax.set_ylim(0.01, 60)
    ax.set_yticks([0.01, 0.1, 1, 10], ["0.01", "0.1", "1", "10"])
    ax.legend(fontsize=7, loc="upper right", ncols=2)


def draw_bias(ax: Any, found: Row) -> None:
    sizes = list(BIAS)
    for colour, at in (("C2", "initial"), ("C3", "trained")):
        rows = [found[at][str(size)] for size in sizes]
        errors = [row["standard error"] for row in rows]
        ax.errorbar(sizes, [row["mean"] for row in rows], errors, color=colour, marker="o", ms=4, capsize=3, label=at)
    ax.plot(sizes, list(BIAS.values()), color="black", marker="x", ls=":", label="expected")
    ax.axhline(1, color="black", lw=0.9, ls="--")
    ax.set(xscale="log", yscale="log", xlabel="batch size B", title="Bias of mini-batches, N=1000")
    ax.set_ylabel("mean λ_max of batches / λ_max of all")
    ax.set_xticks(sizes, [str(size) for size in sizes])
    ax.minorticks_off()
    ax.set_yticks([1, 2, 3, 5, 8], ["1", "2", "3", "5", "8"])
    ax.legend(fontsize=8)


def draw_pair(ax: Any, by_target: dict[float, list[Row]], field: str, name: str, ls: str = "-") -> None:
    for colour, (target, repeated) in zip(("C4", "C1"), by_target.items(), strict=True):
        for index, run in enumerate(repeated):
            label = None if index else f"{name}target {target:g}"
            ax.plot(*run[field], lw=0.9, ls=ls, alpha=0.8, color=colour, label=label)
    ax.set(yscale="log", xlabel="step")
    ax.legend(fontsize=8)


def draw_heatmap(heatmap: Heatmap, steps: int, path: Path) -> None:
    """Two maps on one scale of colour, with the boundary; × has learnt no more than frequencies, ∞ has diverged."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 4.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    rates, warmups = heatmap.rates, heatmap.warmups
    for ax, (rule, title) in zip(axes, (("adam", "Adam"), ("seeded", "Adam, v seeded with g₀²")), strict=True):
        rows = np.array(heatmap.losses[rule])
        image = ax.imshow(
            rows, origin="lower", aspect="auto", cmap="viridis_r", vmin=heatmap.best(), vmax=heatmap.chance
        )
        dark = (heatmap.best() + heatmap.chance) / 2
        for (row, column), loss in np.ndenumerate(rows):
            failed = "×" if loss > FAILED * heatmap.chance else f"{loss:.2f}"
            text = "∞" if heatmap.diverged[rule][row][column] else failed
            ax.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if loss > dark else "black")
        line = [sum(lr <= edge * (1 + 1e-9) for lr in rates) - 0.5 for edge in heatmap.boundary(rule)]
        ax.stairs(line, np.arange(len(line) + 1) - 0.5, orientation="horizontal", baseline=None, color="C3", lw=2.5)
        ax.set_xticks(range(len(rates)), [f"{lr:.2g}" for lr in rates], rotation=45)
        ax.set_yticks(range(len(warmups)), [str(w) for w in warmups])
        ax.set(title=title, xlabel="peak learning rate")
    axes[0].set_ylabel("linear warmup, steps")
    figure.colorbar(image, ax=axes, label=f"final loss in nats after {steps} steps (chance {heatmap.chance:.2f})")
    said = f"red: largest tolerated rate ({TOLERABLE:.0%} of the way from chance to the best cell)"
    figure.suptitle(f"{said};  ×: at chance;  ∞: diverged")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


# -- the command ------------------------------------------------------------------------------------------


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
        found = results.get(key)
        if found is None or found["code"] != code:
            found = results.add(key, make(*args) | {"code": code})
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

    kinds, seeds_of_map = ("adam", "seeded"), range(size.map_seeds)
    return Measured(
        {name: [run(name, seed) for seed in seeds] for name in SETTINGS},
        [row(f"first step, width {width}", ours, first_step, width, 5) for width in WIDTHS],
        row("bias", ours, bias, size.steps, size.epochs, size.most),
        {name: {target: [held(name, target, seed) for seed in seeds] for target in TARGETS} for name in CONTROLLED},
        collect(
            {at: [cell(*at, seed) for seed in seeds_of_map] for at in product(kinds, size.warmups, size.rates)}, size
        ),
    )


def collect(cells: dict[tuple[str, int, float], list[Row]], size: Size) -> Heatmap:
    def grid(value: Callable[[list[Row]], Any]) -> dict[str, list[list[Any]]]:
        return {
            rule: [[value(cells[rule, warmup, lr]) for lr in size.rates] for warmup in size.warmups]
            for rule in ("adam", "seeded")
        }

    (first, *_) = cells.values()
    losses = grid(lambda rows: statistics.fmean(row["loss"] for row in rows))
    return Heatmap(size.rates, size.warmups, losses, grid(lambda r: any(x["diverged"] for x in r)), first[0]["chance"])


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


COLUMNS = ("claim", "source", "setting", "expected", "measured", "tolerance", "oracle", "reproduced")


def main(quick: Quick = False) -> None:
    """Every published result with the figure that was expected beside the one that was measured."""
    torch.set_num_threads(1)
    size = SHORT if quick else FULL
    settings = {"quick": quick, **vars(size), "every": EVERY, "products": PRODUCTS}
    results = Results(NAME, settings, fresh=quick)
    found = measure(results, size)
    claims = list(lines(found))
    form = f"short form: {size.steps} steps, one seed" if quick else f"{size.steps} steps, {size.seeds} seeds"
    table(f"Published results ({form}; median and range over seeds)", claims, dict.fromkeys(COLUMNS, "{}"))
    print_runs(found)
    draw(found, results.path.with_suffix(".png"))
    heatmap = found.heatmap
    draw_heatmap(heatmap, size.map_steps, results.path.with_name(f"{results.path.stem}-heatmap.png"))
    results.finish({"claims": claims, "boundary": {rule: heatmap.boundary(rule) for rule in heatmap.losses}})
    console.print(f"written to {results.path}, figures beside it")


def print_runs(found: Measured) -> None:
    runs = [{"run": name, "seed": i} | run for name, all_ in found.runs.items() for i, run in enumerate(all_)]
    table("Monitored runs, r with the edge at 1", runs, MONITORED)
    widths = [{"width": row["width"], "ηλ at step 1": spread(row["values"], "{:.1f}")} for row in found.first]
    table("Adam at step 1, η=1e-3, five seeds", widths, {"width": "{}", "ηλ at step 1": "{}"})
    sizes = [
        {"weights": at, "B": size, "all": found.bias[at]["all"], **found.bias[at][str(size)]}
        for at in ("initial", "trained")
        for size in BIAS
    ]
    table("λ_max of mini-batches over that of all", sizes, BIASES)
    held = [
        {"run": name, "target": target, "seed": i} | run
        for name, by_target in found.pairs.items()
        for target, all_ in by_target.items()
        for i, run in enumerate(all_)
    ]
    table("Controlled runs", held, CONTROLLED_RUNS)


MONITORED = {
    "run": "{}", "seed": "{}", "start": "{:.2f}", "highest": "{:.2f}", "back": "{}", "5 %": "{:.3f}",
    "settled": "{:.3f}", "95 %": "{:.3f}", "forecast": "{:.3f}", "oracle error": "{:.1e}", "loss": "{:.2e}",
    "phase": "{}", "probes": "{}", "overhead": "{:.1f}",
}  # fmt: skip
BIASES = {
    "weights": "{}", "B": "{}", "mean": "{:.3f}", "standard error": "{:.3f}", "batches": "{}", "all": "{:.3g}",
}  # fmt: skip
CONTROLLED_RUNS = {
    "run": "{}", "target": "{:g}", "seed": "{}", "loss": "{:.3e}", "rate": "{:.3g}", "ratio": "{:.3f}",
    "warmup ended": "{}", "oracle error": "{:.1e}",
}  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
