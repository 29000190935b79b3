"""The command: track, start from cold, judge, draw."""

from __future__ import annotations

import itertools

import torch
import typer

from benchmarks.harness.results import Quick, Report, Results, Row, console, table
from benchmarks.tracks_sharpness.cold import measure_cold
from benchmarks.tracks_sharpness.figure import draw
from benchmarks.tracks_sharpness.libraries import CALLS, installed
from benchmarks.tracks_sharpness.targets import judged
from benchmarks.tracks_sharpness.warm import measure_tracking, summarised

HOW_TO_INSTALL = "benchmarks/tracks_sharpness/__init__.py"
TRACKING = {
    "model": "{}", "optimizer": "{}", "data": "{}", "hvp": "{}", "every": "{}", "gradients a probe": "{:.2f}",
    "probe median": "{:.2%}", "probe p95": "{:.2%}", "held median": "{:.2%}", "held p95": "{:.2%}",
}  # fmt: skip
SUMMARY = {
    "data": "{}", "hvp": "{}", "every": "{}", "products": "{}", "gradients a probe": "{:.2f}",
    "probe median": "{:.2%}", "probe p95": "{:.2%}", "held median": "{:.2%}", "held p95": "{:.2%}",
    "worst median": "{:.2%}", "where": "{}",
}  # fmt: skip
COLD_START = {
    "problem": "{}", "library": "{}", "setting": "{}", "error %": "{:.2f}", "products": "{:.1f}", "seconds": "{:.2f}",
    "gradients": "{:.1f}", "times ours": "{:.2f}", "peak MiB": "{:.0f}", "memory times ours": "{:.2f}",
}  # fmt: skip


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(quick: Quick = False, threads: int = 1, only_report: Report = False) -> None:
    """Measure everything, print it, write it to benchmarks/results."""
    torch.set_num_threads(threads)
    steps = 21 if quick else 61
    settings = {"quick": quick, "threads": threads, "steps": steps}
    results = Results("tracks_sharpness", settings, fresh=quick and not only_report, only_report=only_report)
    tracking = measure_tracking(results, quick, steps)
    two = [row for row in tracking if row["products"] == 2]
    table("1a. Warm tracking with 2 products a probe, against dense Hessians", two, TRACKING)
    table("1b. Error against products spent: medians over the rows", summarised(tracking), SUMMARY)

    names, missing = libraries(results)
    for name, why in missing.items():
        console.print(f"left out: {name} ({why}); how to install it: top of {HOW_TO_INSTALL}")
    cold = measure_cold(results, quick, names)
    table("2. From cold to 1 %", cold, COLD_START)

    targets = judged(tracking, cold)
    lines = [{"target": key, **value} for key, value in targets.items()]
    table("Targets", lines, {"target": "{}", "figure": "{}", "met": "{}"})
    image = results.path.with_suffix(".png")
    draw(tracking, searched(results, cold, names), image)
    results.finish({"targets": targets, "left out": missing})
    console.print(f"written to {results.path} and {image.name}")


def libraries(results: Results) -> tuple[list[str], dict[str, str]]:
    """Those that can be called, or that the rows there are were measured with; and why others are left out."""
    if not results.only_report:
        return installed()
    searches = [key for key in results.rows if key.startswith("search: ")]
    names = [name for name in CALLS if any(key.endswith(f": {name}") for key in searches)]
    return names, results.summary.get("left out", {})


def searched(results: Results, cold: list[Row], names: list[str]) -> dict[str, list[Row]]:
    """All settings tried on the trained models."""
    found: dict[str, list[Row]] = {}
    for label, name in itertools.product(dict.fromkeys(row["problem"] for row in cold), names):
        if label.endswith("steps"):
            tries = results.rows[f"search: {label}: {name}"]["tried"]
            found.setdefault(label, []).extend({"library": name, **row} for row in tries)
    return found


if __name__ == "__main__":
    app()
