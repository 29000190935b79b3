"""The command: measure what is missing, print the claims and the runs, draw the figures."""

from __future__ import annotations

import torch
import typer

from benchmarks.edge_of_stability.again import asked_again
from benchmarks.edge_of_stability.figures import draw, draw_heatmap
from benchmarks.edge_of_stability.measured import FULL, SHORT, Measured, measure
from benchmarks.edge_of_stability.monitored import BIAS, EVERY, PRODUCTS
from benchmarks.edge_of_stability.verdicts import lines, spread
from benchmarks.edge_of_stability.wide import WIDTH
from benchmarks.harness.results import Quick, Report, Results, console, table

NAME = "edge_of_stability"
COLUMNS = ("claim", "source", "setting", "expected", "measured", "tolerance", "oracle", "reproduced")
AGAIN = ("claim", "setting", "changed", "expected", "measured", "oracle", "reproduced", "cause")


def main(quick: Quick = False, only_report: Report = False) -> None:
    """Every published result with the figure that was expected beside the one that was measured."""
    torch.set_num_threads(1)
    size = SHORT if quick else FULL
    settings = {"quick": quick, **vars(size), "every": EVERY, "products": PRODUCTS}
    results = Results(NAME, settings, fresh=quick and not only_report, only_report=only_report)
    found = measure(results, size)
    claims = list(lines(found))
    form = f"short form: {size.steps} steps, one seed" if quick else f"{size.steps} steps, {size.seeds} seeds"
    table(f"Published results ({form}; median and range over seeds)", claims, dict.fromkeys(COLUMNS, "{}"))
    again = list(asked_again(found))
    shorter = f"held runs of {size.held_steps} steps, wide ones of {size.wide_steps}"
    table(f"Asked again, with one thing changed ({shorter})", again, dict.fromkeys(AGAIN, "{}"))
    print_runs(found)
    draw(found, results.path.with_suffix(".png"))
    heatmap = found.heatmap
    draw_heatmap(heatmap, size.map_steps, results.path.with_name(f"{results.path.stem}-heatmap.png"))
    boundary = {rule: heatmap.boundary(rule) for rule in heatmap.losses}
    results.finish({"claims": claims, "asked again": again, "boundary": boundary})
    if results.outdated:
        console.print(f"{len(results.outdated)} of {len(results.rows)} rows are of other code; run again to renew them")
    console.print(f"written to {results.path}, figures beside it")


def print_runs(found: Measured) -> None:
    wide = {f"{name}, width {WIDTH}": runs for name, runs in found.again.wide.items()}
    runs = [{"run": name, "seed": i} | run for name, all_ in (found.runs | wide).items() for i, run in enumerate(all_)]
    table("Monitored runs, r with the edge at 1", runs, MONITORED)
    widths = [{"width": row["width"], "ηλ at step 1": spread(row["values"], "{:.1f}")} for row in found.first]
    table("Adam at step 1, η=1e-3, five seeds", widths, {"width": "{}", "ηλ at step 1": "{}"})
    sizes = [
        {"loss": loss, "weights": at, "B": size, "all": bias[at]["all"], **bias[at][str(size)]}
        for loss, bias in {"square": found.bias, "cross-entropy": found.again.bias}.items()
        for at in ("initial", "trained")
        for size in BIAS
    ]
    table("λ_max of mini-batches over that of all", sizes, BIASES)
    by_law = {f"{name} by {law}": by for law, pairs in found.again.held.items() for name, by in pairs.items()}
    held = [
        {"run": name, "target": target, "seed": i} | run
        for name, by_target in (found.pairs | by_law).items()
        for target, all_ in by_target.items()
        for i, run in enumerate(all_)
    ]
    table("Controlled runs", held, CONTROLLED_RUNS)


MONITORED = {
    "run": "{}", "seed": "{}", "start": "{:.2f}", "highest": "{:.2f}", "back": "{}", "5 %": "{:.3f}",
    "settled": "{:.3f}", "95 %": "{:.3f}", "forecast": "{:.3f}", "oracle error": "{:.1e}", "loss": "{:.2e}",
    "phase": "{}", "probes": "{}", "overhead": "{:.1f}", "diverged": "{}",
}  # fmt: skip
BIASES = {
    "loss": "{}", "weights": "{}", "B": "{}", "mean": "{:.3f}", "standard error": "{:.3f}", "batches": "{}",
    "all": "{:.3g}",
}  # fmt: skip
CONTROLLED_RUNS = {
    "run": "{}", "target": "{:g}", "seed": "{}", "loss": "{:.3e}", "rate": "{:.3g}", "ratio": "{:.3f}",
    "warmup ended": "{}", "oracle error": "{:.1e}", "diverged": "{}",
}  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
