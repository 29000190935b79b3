"""A peak learning rate that is far too high, three ways: no warmup, linear warmup, AdaptiveWarmup.

    python -m benchmarks.demo [--problem gpt-post] [--lr RATE] [--steps 400] [--seeds 5] [--out demo-out]

The three runs begin with the same weights and advance in lockstep on the same batches, all under cosine decay
to 10 %. Each leaves a JSONL record of its steps; together they leave a table and a figure. The default rate
is ten times the one that linear warmup does best with.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.harness import style
from benchmarks.harness.data import Batch
from benchmarks.harness.policies import schedule
from benchmarks.harness.problems import PROBLEMS, Problem
from warmctl import AdaptiveWarmup, History, plot
from warmctl.record.history import warmup_end

LINEAR_WARMUP = 0.1  # of all steps
POLICIES = {"none": "no warmup", "linear": "linear warmup", "adaptive": "AdaptiveWarmup"}
ProblemName = Enum("ProblemName", {name: name for name in PROBLEMS}, type=str)  # type: ignore[misc]

console = Console(highlight=False)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Run:
    """One policy's training, advanced a step at a time and stopped for good by a loss that is not finite."""

    def __init__(self, policy: str, problem: Problem, seed: int, lr: float, steps: int, record: Path) -> None:
        self.policy, self.problem = policy, problem
        self.model = problem.build(seed)
        optimizer = problem.optimizer(self.model.parameters(), lr)
        self.adaptive = AdaptiveWarmup(optimizer, self.model) if policy == "adaptive" else None
        self.optimizer = self.adaptive or optimizer
        self.warmup = round(LINEAR_WARMUP * steps) if policy == "linear" else 0
        self.scheduler = LambdaLR(self.optimizer, lambda step: schedule(step, steps, self.warmup))
        self.history = self.adaptive.history if self.adaptive else History()
        record.unlink(missing_ok=True)
        self.history.to_jsonl(record)
        self.done, self.seconds, self.loss = 0, 0.0, math.nan
        self.diverged = False

    def step(self, batch: Batch) -> None:
        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = self.problem.loss(self.model, batch)
            loss.backward()
            return loss

        start = time.perf_counter()
        self.loss = self.optimizer.step(closure).item()
        self.seconds += time.perf_counter() - start
        self.done += 1
        self.diverged = not math.isfinite(self.loss)
        if self.adaptive is None:
            lr = self.optimizer.param_groups[0]["lr"]
            self.history.append({"step": self.done, "loss": self.loss, "lr": lr, "scheduled_lr": lr})
        self.scheduler.step()

    @property
    def fields(self) -> dict[str, str]:
        """What the progress display says."""
        row = self.history[-1]
        ratio, phase = row.get("stability_ratio"), str(row.get("phase") or "")
        if self.policy == "linear":
            phase = "warmup" if self.done < self.warmup else "decay"
        return {
            "loss": _number(self.loss, ".4g"),
            "lr": _number(row["lr"], ".2g"),
            "ratio": _number(ratio, ".2f"),
            "phase": "diverged" if self.diverged else phase,
        }


class Result:
    """What a finished run came to."""

    def __init__(self, run: Run) -> None:
        losses = run.history["loss"]
        self.eval_loss = math.nan if run.diverged else run.problem.evaluate(run.model)
        self.train_loss = math.nan if run.diverged else sum(losses) / len(losses)
        self.peak_lr, self.seconds = max(run.history["lr"]), run.seconds
        self.cost = run.adaptive.metrics["overhead"] if run.adaptive else 0.0
        share = self.eval_loss / run.problem.chance()
        self.trained = share < 0.9
        if run.diverged:
            self.outcome = f"diverged at {run.done}"
        else:
            self.outcome = "trained" if self.trained else "hardly learnt" if share < 0.98 else "learnt nothing"
        self.warmup_end, self.reason = run.warmup if run.done > run.warmup else 0, ""
        if run.adaptive and (end := warmup_end(run.history)):
            self.warmup_end, self.reason = end


# -- one seed -----------------------------------------------------------------------------------------------


def race(problem: Problem, seed: int, lr: float, steps: int, out: Path) -> dict[str, Result]:
    """Train all policies side by side; write their records and the figure into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    runs = [Run(policy, problem, seed, lr, steps, out / f"{policy}.jsonl") for policy in POLICIES]
    batches = problem.batches(seed)
    with display(runs, steps) as show:
        for _ in range(steps):
            batch = next(batches)
            for run in runs:
                if not run.diverged:
                    run.step(batch)
                    show(run)
    results = {run.policy: Result(run) for run in runs}
    draw(runs, problem.chance(), out / "demo.png")
    for run in runs:
        run.history.close()
    return results


def draw(runs: list[Run], chance: float, path: Path) -> None:
    """The library's own figure; the loss on a log axis, with the level of who has learnt nothing."""
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = plot({POLICIES[run.policy]: run.history for run in runs})
    loss = figure.axes[0]
    loss.set_yscale("log")
    loss.set_ylim(bottom=0.95 * min(value for run in runs for value in run.history["loss"] if math.isfinite(value)))
    loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    loss.yaxis.set_major_formatter("{x:g}")
    loss.yaxis.set_minor_formatter(NullFormatter())
    loss.axhline(chance, color=style.INK, linewidth=1, linestyle=(0, (1, 1.6)), zorder=1.5)
    style.name_line(loss, chance, "chance")
    figure.savefig(path, dpi=200)


@contextmanager
def display(runs: list[Run], steps: int) -> Iterator:
    """A live row a run: yields the function that updates one."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=10),
        TaskProgressColumn(),
        TextColumn("loss {task.fields[loss]:>5} lr {task.fields[lr]:>7} ratio {task.fields[ratio]:>4}"),
        TextColumn("{task.fields[phase]:8}"),
    )
    blank = dict.fromkeys(("loss", "lr", "ratio", "phase"), "")
    with Progress(*columns, console=console) as progress:
        tasks = {run.policy: progress.add_task(POLICIES[run.policy], total=steps, **blank) for run in runs}
        yield lambda run: progress.update(tasks[run.policy], completed=run.done, **run.fields)


# -- report -------------------------------------------------------------------------------------------------


def report(results: dict[int, dict[str, Result]]) -> None:
    """A table of all runs, where and why warmup ended, and means over seeds."""
    table = Table("seed", "policy", box=SIMPLE_HEAD, padding=0)
    for header in ("eval\nloss", "mean\ntrain", "outcome", "peak\nlr", "warmup\nended", "probes", "time"):
        table.add_column(header, justify="left" if header == "outcome" else "right", no_wrap=True)
    for seed, by_policy in results.items():
        for policy, result in by_policy.items():
            table.add_row(
                str(seed),
                POLICIES[policy],
                _number(result.eval_loss),
                _number(result.train_loss),
                f"[{'green' if result.trained else 'red'}]{result.outcome}",
                _number(result.peak_lr, ".2g"),
                str(result.warmup_end or ""),
                f"+{result.cost:.0%}" if result.cost else "",
                f"{result.seconds:.1f}s",
            )
        table.add_section()
    console.print(table)
    console.print("peak lr: highest applied. probes: gradient evaluations beside training's.")
    console.print("hardly learnt, learnt nothing: within 10 %, 2 % of the best constant prediction, or worse.")
    for seed, by_policy in results.items():
        end = by_policy["adaptive"]
        words = f"ended at step {end.warmup_end}: {end.reason}" if end.warmup_end else "had not ended"
        console.print(f"seed {seed}: AdaptiveWarmup's warmup {words}")
    if len(results) > 1:
        for policy, name in POLICIES.items():
            report_seeds(name, [by_policy[policy] for by_policy in results.values()])


def report_seeds(name: str, results: list[Result]) -> None:
    losses = [result.eval_loss for result in results if result.trained]
    mean = f", to a mean eval loss of {sum(losses) / len(losses):.3f}" if losses else ""
    console.print(f"{name}: {len(losses)} of {len(results)} seeds trained{mean}")


def _number(value: object, form: str = ".3f") -> str:
    return format(value, form) if isinstance(value, float) and math.isfinite(value) else "-"


@app.command()
def main(
    problem: Annotated[ProblemName, typer.Option(help="What to train.")] = ProblemName("gpt-post"),  # noqa: B008
    lr: Annotated[
        float | None, typer.Option(min=0.0, help="Peak rate.", show_default="ten times the tuned one")
    ] = None,
    steps: Annotated[int, typer.Option(min=10)] = 400,
    seed: Annotated[int, typer.Option(help="Of the weights and the order of the data.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, from --seed on.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for records and figures.")] = Path("demo-out"),
) -> None:
    """Train one problem at a peak rate that is far too high: no warmup, linear warmup, AdaptiveWarmup."""
    torch.set_num_threads(1)  # enough for these models, and the same run on any number of cores
    chosen = PROBLEMS[problem.value]
    rate = chosen.demo_lr if lr is None else lr
    console.print(f"{chosen.name} at peak lr {rate:g} (linear warmup does best with {chosen.tuned_lr:g})")
    results = {}
    for one in range(seed, seed + seeds):
        folder = out if seeds == 1 else out / f"seed{one}"
        results[one] = race(chosen, one, rate, steps, folder)
    report(results)
    console.print(f"records and figure: {out}/")


if __name__ == "__main__":
    app()
