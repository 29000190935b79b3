"""The targets of the claim, each with its figure and whether it is met."""

from __future__ import annotations

import itertools

from benchmarks.harness.results import Row, median
from benchmarks.tracks_sharpness.warm import CADENCES, PLAIN


def judged(tracking: list[Row], cold: list[Row]) -> dict[str, Row]:
    """Each target, the figure, and whether it is met in every row that it is about; None where there is no row."""
    found: dict[str, Row] = {}
    for data, every in itertools.product(("one batch", "mini-batches"), CADENCES):
        rows = [r for r in tracking if (r["data"], r["every"], r["products"], r["hvp"]) == (data, every, 2, PLAIN)]
        if not rows:
            continue
        good = [row["probe median"] <= 0.02 and row["gradients a probe"] <= 2.01 for row in rows]
        middle, worst = (f([row["probe median"] for row in rows]) for f in (median, max))
        cost = max(row["gradients a probe"] for row in rows)
        found[f"warm, {data}, every {every}: median error within 2 % for 2 gradient evaluations a probe"] = {
            "figure": f"{sum(good)} of {len(rows)} rows; median {middle:.1%}, worst {worst:.1%}, at most {cost:.2f}",
            "met": all(good),
        }
    for column, factor, target in (
        ("times ours", 2.0, "cold: the next library takes at least 2 times our seconds"),
        ("memory times ours", 1.0, "cold: peak memory below every peer's"),
    ):
        nearest: dict[str, tuple[float, str]] = {}
        for row in cold:
            if row["library"] != "warmctl":
                near = (row.get(column) or float("inf"), row["library"])
                nearest[row["problem"]] = min(nearest.get(row["problem"], near), near)
        for row in cold:
            if row["library"] == "warmctl" and column not in row:
                nearest[row["problem"]] = (0.0, "we do not reach 1 %")
        met = [ratio >= factor if factor > 1 else ratio > factor for ratio, _ in nearest.values()]
        figure = "; ".join(f"{problem}: {ratio:.2f} ({name})" for problem, (ratio, name) in nearest.items())
        found[target] = {"figure": figure, "met": all(met) if met else None}
    return found
