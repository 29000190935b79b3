"""One picture: how much is lost by a rate that is too low or too high, under each policy."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from benchmarks.tasks.policies import LINEAR, OURS
from benchmarks.tasks.report import RELATIVE, gather, policies_of, quantiles, regrets
from benchmarks.tasks.runs import Row


def draw(rows: Iterable[Row], path: Path) -> None:
    """Median regret over tasks against the relative peak rate, and the band of the 10th to the 90th percentile."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = gather(rows)
    shown = [p for p in policies_of(tasks) if p not in LINEAR or p in ("linear-0%", "linear-5%", "linear-50%")]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for i, policy in enumerate(shown):
        points = {k: quantiles(regrets(tasks, policy, (k,)), (0.1, 0.5, 0.9)) for k in RELATIVE}
        ks = [k for k in RELATIVE if points[k][1][0] == points[k][1][0]]
        ours = policy.startswith(OURS)
        colour = "C3" if policy == OURS else f"C{(i % 9) + (i % 9 >= 3)}"
        style = "--" if policy in LINEAR else "-"
        axes.plot(ks, [points[k][1][0] for k in ks], style, color=colour, label=policy, lw=2.5 if ours else 1.2)
        if policy in (OURS, "linear-5%"):
            low, high = ([points[k][j][0] for k in ks] for j in (0, 2))
            axes.fill_between(ks, low, high, color=colour, alpha=0.15, lw=0)
    axes.axhline(0, color="black", lw=0.5)
    axes.set_xticks(list(RELATIVE), [f"{name} ×" for name in RELATIVE.values()])
    axes.set_xlabel("peak rate, relative to the task's best")
    axes.set_ylabel("regret, log(loss + f), against the best\nlinear warmup (above 1 ×: at the best rate)")
    axes.set_title(f"{len(tasks)} tasks: median, and the middle 80 % of tasks", loc="left", fontsize=10)
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
