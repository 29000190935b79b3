"""AdaptiveWarmup replaces the best hand-tuned warmup, at a known price: the experiment that could refute it.

    python -m benchmarks.replaces_tuned_warmup --quick           under two minutes
    python -m benchmarks.replaces_tuned_warmup                   the grid, 400 updates; goes on after a kill
    python -m benchmarks.replaces_tuned_warmup --long            2000 updates, three problems, around the best rate
    python -m benchmarks.replaces_tuned_warmup --report [--long] tables and figure from the rows there are

Each run trains one problem at one peak rate with one policy and one seed, under cosine decay to 10 %, and leaves
one line in benchmarks/results/replaces_tuned_warmup.jsonl. A line of older code is run again and replaced: of
warmctl's own code for the policy "warmctl", of the problem's for all. The *oracle* is the best of no warmup and
six linear ones, chosen afterwards for each peak rate by its mean over seeds; this choice favours the oracle.

Losses are final evaluation losses in nats, counted as chance level where a run diverged or ended above it. A run
has failed if it diverged or ended within 2 % of chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer

from benchmarks.harness.cells import Cell, best_cell, by_problem, gather, mean_ranks, per_update, price, span
from benchmarks.harness.policies import ADAM_ONLY, LINEAR, POLICIES, policies_for
from benchmarks.harness.problems import PROBLEMS, half_decades
from benchmarks.harness.results import RESULTS, Quick, Results, console, median, table
from benchmarks.harness.runs import Job, Row, load, run

NAME = "replaces_tuned_warmup"

QUICK_POLICIES = ("none", "linear-2%", "linear-10%", "linear-50%", "warmctl")
QUICK_PROBLEMS = ("cnn", "gpt-post", "mlp")
LONG_PROBLEMS = ("cnn", "gpt-post", "vit")
GRID = 6  # rates, from which on a problem's cells are a grid
SPLITS = ("development", "test")

# -- the cells ------------------------------------------------------------------------------------------


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


# -- targets ----------------------------------------------------------------------------------------------


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


# -- report -----------------------------------------------------------------------------------------------


def report(rows: Sequence[Row], steps: int, name: str, settings: Row) -> dict[str, Any]:
    """Print the tables, draw the figure, write the summary beside the rows."""
    cells, missing = gather(rows)
    if not cells:
        console.print("no cell has a run of every policy yet")
        return {}
    if missing:
        console.print(f"{missing} cells left out: not every policy has run there")
    ours = {row["code"].split("+")[-1] for row in rows if row["policy"] == "warmctl"}
    if len(ours) > 1:
        console.print(f"warmctl's rows come from {len(ours)} versions of its code; run again to renew them")
    summary: dict[str, Any] = {"cells": [cell_line(cell) for cell in cells], "steps": steps, "missing": missing}
    print_cells(cells, steps)
    summary["policies"], summary["targets"] = {}, {}
    splits = {split: [cell for cell in cells if cell.split == split] for split in SPLITS} | {"all": cells}
    for split, part in splits.items():
        if part:
            summary["policies"][split] = print_policies(part, split)
            summary["targets"][split] = print_targets(part, steps, split)
    draw(cells, steps, RESULTS / f"{name}.png")
    Results(name.removesuffix("-quick"), settings, fresh=True).finish(summary)
    console.print(f"rows, summary and figure: {RESULTS}/{name}.*")
    return summary


def cell_line(cell: Cell) -> Row:
    regret, interval = cell.regret()
    train, train_interval = cell.regret("train_loss")
    evaluations, seconds = price([cell])
    return {
        "problem": cell.problem,
        "split": cell.split,
        "lr": cell.lr,
        "best is": cell.oracle,
        "oracle": cell.mean("oracle"),
        "warmctl": cell.mean("warmctl"),
        "regret": regret,
        "regret ±": interval,
        "train": train,
        "train ±": train_interval,
        "failed": f"{cell.failures('warmctl')}/{len(cell.runs['warmctl'])}",
        "oracle failed": f"{cell.failures(cell.oracle)}/{len(cell.runs[cell.oracle])}",
        "evals": evaluations,
        "time": seconds,
    }


def print_cells(cells: Sequence[Cell], steps: int) -> None:
    form = {
        "lr": "{:g}", "best is": "{}", "oracle": "{:.3f}", "warmctl": "{:.3f}",
        "regret": "{:+.3f}", "regret ±": "{:.3f}", "train": "{:+.3f}", "train ±": "{:.3f}",
        "failed": "{}", "evals": "{:+.1%}", "time": "{:+.0%}",
    }  # fmt: skip
    for name, group in by_problem(cells).items():
        lines = [{k: v for k, v in cell_line(cell).items() if not is_nan(v)} for cell in group]
        spans = ", ".join(f"{policy} {span(group, policy):.1f}" for policy in ("oracle", "warmctl"))
        shown = {key: value for key, value in form.items() if any(key in line for line in lines)}
        title = f"{name} ({group[0].split}), {steps} updates; usable span in decades: {spans}"
        table(title, lines, shown)
    console.print("regret: log loss, warmctl − oracle, and half its 95 % interval over seeds; train: of the mean")
    console.print("training loss. evals, time: gradient evaluations and CPU seconds beyond training's.")


def is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


def print_policies(cells: Sequence[Cell], split: str) -> list[Row]:
    groups = by_problem(cells)
    everywhere = [p for p in POLICIES if all(cell.has(p) for cell in cells)]
    anywhere = [p for p in POLICIES if any(cell.has(p) for cell in cells)]
    common = mean_ranks(cells, everywhere)
    adam = mean_ranks(cells, anywhere) if anywhere != everywhere else {}
    lines = []
    for policy in (*anywhere, "oracle"):
        where = [cell for cell in cells if cell.has(policy)]
        parts = [group for group in groups.values() if group[0].has(policy)]
        name_of = [cell.oracle if policy == "oracle" else policy for cell in where]
        failed = sum(cell.failures(name) for cell, name in zip(where, name_of, strict=True))
        runs = sum(len(cell.runs[name]) for cell, name in zip(where, name_of, strict=True))
        gaps = [best_cell(g, policy).mean(policy) / best_cell(g, "oracle").mean("oracle") for g in parts]
        line = {
            "policy": policy,
            "n": len(parts),
            "mean rank": common.get(policy, math.nan),
            "Adam rank": adam.get(policy, math.nan),
            "best": math.exp(sum(map(math.log, gaps)) / len(gaps)),
            "span": sum(span(group, policy) for group in parts) / len(parts),
            "failed": f"{failed}/{runs}",
        }
        if policy != "oracle":
            line["evals"], line["time"] = price(where, policy)
            line["updates a second"] = median([1 / per_update(row) for cell in where for row in cell.runs[policy]])
        lines.append({key: value for key, value in line.items() if not is_nan(value)})
    form = {
        "policy": "{}", "n": "{}", "mean rank": "{:.2f}", "Adam rank": "{:.2f}", "best": "{:.3f}",
        "span": "{:.2f}", "failed": "{}", "evals": "{:+.1%}", "time": "{:+.1%}",
    }  # fmt: skip
    table(f"policies, {split} problems", lines, {k: v for k, v in form.items() if any(k in line for line in lines)})
    return lines


def print_targets(cells: Sequence[Cell], steps: int, split: str) -> Row:
    found = verdicts(cells, steps)
    words = {True: "met", False: "missed", None: "-"}
    lines = [{"target": key, "": words[v.met], "figure": v.figure} for key, v in found.items()]
    table(f"targets, {split} problems, {steps} updates", lines, {"target": "{}", "": "{}", "figure": "{}"})
    return {key: v._asdict() for key, v in found.items()}


def draw(cells: Sequence[Cell], steps: int, path: Path) -> None:
    """Final loss against peak rate, a panel a problem."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, NullLocator, ScalarFormatter

    groups = by_problem(cells)
    columns = min(len(groups), 5)
    lines = math.ceil(len(groups) / columns)
    figure = Figure(figsize=(3.1 * columns, 2.9 * lines + 0.9), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    shades = colormaps["viridis"]
    style = {p: {"color": shades(0.15 + 0.13 * i), "lw": 0.9, "alpha": 0.8} for i, p in enumerate(LINEAR)}
    style["none"] = {"color": "0.55", "lw": 1.1}
    style |= {p: {"color": c, "lw": 1.1, "ls": "--"} for p, c in zip(ADAM_ONLY, ("C1", "C4", "C5"), strict=True)}
    style["schedulefree"] = {"color": "C9", "lw": 1.1, "ls": "-."}
    style["oracle"] = {"color": "black", "lw": 1.8, "marker": "o", "ms": 3}
    style["warmctl"] = {"color": "C3", "lw": 2.2, "marker": "s", "ms": 3.5}
    handles = {}
    for ax, (name, group) in zip(axes, groups.items(), strict=False):
        rates = [cell.lr for cell in group]
        for policy, look in style.items():
            if all(cell.has(policy) for cell in group):
                (handles[policy],) = ax.plot(rates, [cell.mean(policy) for cell in group], label=policy, **look)
        low, high = ([pick(cell.values("warmctl")) for cell in group] for pick in (min, max))
        ax.fill_between(rates, low, high, color="C3", alpha=0.2, lw=0)
        ax.axhline(group[0].runs["warmctl"][0]["chance"], color="0.3", lw=0.7, ls=":")
        ax.set(xscale="log", yscale="log", title=f"{name} ({group[0].split})")
        ax.yaxis.set_major_formatter(ScalarFormatter())
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.set_xticks(rates, [f"{lr:g}" for lr in rates], fontsize=8)
        ax.xaxis.set_minor_locator(NullLocator())
        low, high = ax.get_ylim()
        ax.set_yticks([t for t in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 1.5, 2, 2.5, 3) if low <= t <= high])
    for ax in axes[len(groups) :]:
        ax.set_axis_off()
    for ax in axes[max(0, len(groups) - columns) : len(groups)]:
        ax.set_xlabel("peak learning rate")
    figure.supylabel(f"final loss, {steps} updates")
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=min(7, len(handles)), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


# -- command line -------------------------------------------------------------------------------------------


def best_rates(rows: Iterable[Row], problems: Iterable[str]) -> dict[str, float]:
    """The oracle's best rate on the grid; the problem's tuned one where the grid has no finished cell."""
    groups = by_problem(gather(rows)[0])
    return {
        name: best_cell(groups[name], "oracle").lr if name in groups else PROBLEMS[name].tuned_lr for name in problems
    }


def main(
    quick: Quick = False,
    long: Annotated[bool, typer.Option("--long", help="2000 updates at the best rate, 3 and 10 times it.")] = False,
    only_report: Annotated[bool, typer.Option("--report", help="Run nothing; report the rows there are.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes of one thread each.")] = 2,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    problem: Annotated[list[str] | None, typer.Option(help="Only this one; may be given again.")] = None,
) -> None:
    """Final loss against peak rate: no warmup, six linear ones, four peers, and AdaptiveWarmup."""
    torch.set_num_threads(1)
    path = RESULTS / f"{NAME}{'-quick' if quick else ''}.jsonl"
    names = problem or list(QUICK_PROBLEMS if quick else LONG_PROBLEMS if long else PROBLEMS)
    if unknown := set(names) - set(PROBLEMS):
        raise typer.BadParameter(f"{', '.join(unknown)}: choose from {', '.join(PROBLEMS)}")
    steps = 150 if quick else 2000 if long else 400
    name = path.stem + ("-long" if long and not quick else "")
    if quick:
        if not only_report:
            path.unlink(missing_ok=True)
        jobs = around({n: PROBLEMS[n].tuned_lr for n in names}, 1, steps, QUICK_POLICIES)
    elif long:
        on_grid = [row for row in load(path).values() if row["steps"] == 400]
        jobs = around(best_rates(on_grid, names), seeds, steps)
    else:
        jobs = grid(names, seeds, steps)
    if not only_report:
        rows = list(run(jobs, path, workers).values())
    else:
        saved = load(path)
        rows = [saved[job] for job in jobs if job in saved]
    report(rows, steps, name, {"quick": quick, "updates": steps, "seeds": 1 if quick else seeds, "problems": names})


if __name__ == "__main__":
    typer.run(main)
