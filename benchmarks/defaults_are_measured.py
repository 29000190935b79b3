"""The defaults are what this table says: each choice in the library against the others that were possible.

    python -m benchmarks.defaults_are_measured --quick     under two minutes
    python -m benchmarks.defaults_are_measured             400 updates; goes on after a kill
    python -m benchmarks.defaults_are_measured --report    table and figure from the rows there are

Every variant differs from the default in one choice. Each trains the *development* problems, the ones on which
defaults may be chosen, at the tuned peak rate, at three and at ten times it, under cosine decay. The figures are
log(final loss / the default's final loss), mean over problems: below 0 the variant is better. A run that diverged or
ended above chance counts as chance level, as in `replaces_tuned_warmup`.

What lost is no option of the library: it is written here, as a subclass of the part that it replaces. Two rows whose
target is 2 % off the default's show how much of a difference is noise.

Left out: the lag-1 correlation of gᵀv as the reading itself. With momentum its relation to the ratio has no closed
form, so it would need a calibration for each rule; it is here as a trigger of probes.
"""

from __future__ import annotations

import inspect
import math
import textwrap
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.harness import runs
from benchmarks.harness.policies import uses_adam
from benchmarks.harness.problems import PROBLEMS, half_decades
from benchmarks.harness.results import Quick, Results, console, table
from benchmarks.harness.runs import Job, Row
from warmctl import AdaptiveWarmup
from warmctl.control.cadence import Cadence
from warmctl.control.controller import Controller, Decision, Reading
from warmctl.curvature.eigen import EigenResult, lanczos, power_step
from warmctl.curvature.operators import HessianOperator
from warmctl.curvature.scaled import ScaledOperator
from warmctl.distributed import inner_product
from warmctl.stability.estimator import SharpnessEstimator
from warmctl.stability.measurement import Measurement
from warmctl.stability.meter import Meter
from warmctl.vectors import Vector

NAME = "defaults_are_measured"
DEFAULT = "default"
RATES = ("tuned", "3x", "10x")
QUICK_PROBLEMS = ("cnn", "gpt-post")
LEAST_QUOTIENT = 0.01
"""Of the Ritz value, where a quotient below it would enter a geometric mean: quotients may be negative."""
Cell = tuple[str, str, int]
"""Problem, one of RATES, seed."""

# -- the reading --------------------------------------------------------------------------------------------


class Krylov(SharpnessEstimator):
    """Lanczos from the tracked eigenvector on the batch's own Krylov space, which chooses its second direction."""

    def _solve(self, scaled: ScaledOperator, params: Sequence[Tensor], seed: int) -> tuple[EigenResult, float]:
        self.solve = partial(lanczos)  # not `lanczos` itself, for which two products mean Rayleigh–Ritz
        return super()._solve(scaled, params, seed)


class Fresh(SharpnessEstimator):
    """vᵀAv on a batch that had no part in v, free of selection bias; two power steps then turn v to this batch."""

    def _solve(self, scaled: ScaledOperator, params: Sequence[Tensor], seed: int) -> tuple[EigenResult, float]:
        if self.vector is None:
            return super()._solve(scaled, params, seed)
        found = power_step(scaled, self.vector)
        turned = power_step(scaled, found.eigenvector)
        return replace(found, eigenvector=turned.eigenvector, hvps=2), math.nan


class BatchSharpness(SharpnessEstimator):
    """gᵀDHDg / gᵀDg, numerator and denominator averaged over probes, half the weight on the last. One product.

    Source: Andreyev & Beneventano, arXiv 2412.20553.
    """

    above = below = 0.0

    def _solve(self, scaled: ScaledOperator, params: Sequence[Tensor], seed: int) -> tuple[EigenResult, float]:
        step = self._update(params, scaled.root)
        size, share = scaled.inner(step, step), self._momentum_share()  # D holds 1 / share: taken out of the averages
        found = power_step(scaled, step)
        weight = 0.5 if self.below else 1.0
        self.above += weight * (found.eigenvalue * size * share**2 - self.above)
        self.below += weight * (size * share - self.below)
        return replace(found, eigenvalue=self.above / self.below / share), math.nan


class RitzAndBatch(SharpnessEstimator):
    """√(Ritz value · quotient along D^½g), from the same two products; the first probe takes the Ritz value."""

    def _solve(self, scaled: ScaledOperator, params: Sequence[Tensor], seed: int) -> tuple[EigenResult, float]:
        found, along = super()._solve(scaled, params, seed)
        return replace(found, eigenvalue=geometric_mean(found.eigenvalue, along)), along


class RitzAndFresh(SharpnessEstimator):
    """√(Ritz value · vᵀAv), from the same two products: v lies in the plane of their directions."""

    def _solve(self, scaled: ScaledOperator, params: Sequence[Tensor], seed: int) -> tuple[EigenResult, float]:
        tracked = None if self.vector is None else [t.clone() for t in self.vector]
        seen = Recorded(scaled)
        found, along = super()._solve(seen, params, seed)
        if tracked is None:
            return found, along
        parts = [(scaled.inner(tracked, v), v, image) for v, image in seen.products]
        fresh = sum(a * b * scaled.inner(v, image) for a, v, _ in parts for b, _, image in parts)
        return replace(found, eigenvalue=geometric_mean(found.eigenvalue, fresh)), along


class Recorded(ScaledOperator):
    """Keeps copies of its directions and their images."""

    def __init__(self, scaled: ScaledOperator) -> None:
        super().__init__(scaled.operator, scaled.root, scaled.shift, scaled.sign)
        self.products: list[tuple[Vector, Vector]] = []

    def matvec(self, vector: Vector) -> Vector:
        copy = [t.clone() for t in vector]
        image = super().matvec(vector)
        self.products.append((copy, [t.clone() for t in image]))
        return image


def geometric_mean(ritz: float, quotient: float) -> float:
    """Of a Ritz value and a quotient that may be far below it; the Ritz value where there is no quotient."""
    if math.isnan(quotient) or not ritz > 0.0:
        return ritz
    return math.sqrt(ritz * max(quotient, LEAST_QUOTIENT * ritz))


class Realised(AdaptiveWarmup):
    """The library's own path for rules that it does not know: the ratio along the update made, read a step later.

    That path knows neither the relative update, so the ramp at the start is missing, nor that SGD undoes an overshoot.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module, **options: Any) -> None:
        super().__init__(optimizer, model, **options)
        self.meter.rule = None


class LagOneMeter(Meter):
    """Also probes where gᵀD^½v, v the tracked eigenvector, changes sign from step to step: a meter for free.

    Where its lag-1 correlation since the last probe is below −.3, over five pairs at least, and the budget allows.
    """

    value, pairs, products, squares = math.nan, 0, 0.0, 0.0
    cadence: Cadence

    def read(self, due: str, params: list[Tensor], rate: float, each_step: bool) -> Measurement | None:
        vector, before = self.estimator.vector, self.value
        if vector is not None:
            step = self.estimator._update(params, self.estimator.scaling(params)[0])
            self.value = inner_product(params)(step, vector)
        if math.isfinite(before * self.value):
            self.pairs, self.products = self.pairs + 1, self.products + before * self.value
            self.squares += (before**2 + self.value**2) / 2
        affordable = self.cadence.state.tokens >= self.expected_cost
        if not due and affordable and self.pairs >= 5 and self.products < -0.3 * self.squares:
            due = "lag-1 correlation"
        found = super().read(due, params, rate, each_step)
        if found is not None:
            self.value, self.pairs, self.products, self.squares = math.nan, 0, 0.0, 0.0
        return found


class LagOne(AdaptiveWarmup):
    """With a `LagOneMeter`."""

    def __init__(self, optimizer: Optimizer, model: nn.Module, **options: Any) -> None:
        super().__init__(optimizer, model, **options)
        self.meter.__class__ = LagOneMeter
        self.meter.cadence = self.cadence


# -- the coordinates ----------------------------------------------------------------------------------------


class Raw(SharpnessEstimator):
    """λ(H) with one number for Adam's P, its median over the weights that move, instead of a P for each weight.

    A threshold for λ(H) fixed at the first probe would be no fair rival: it would hold what Adam's first P demands,
    10² to 10⁶ times too much, for good. The ramp keeps the update that is really made.
    """

    def scaling(self, params: Sequence[Tensor]) -> tuple[Vector, list[float], float]:
        root, shift, sign = super().scaling(params)
        middle = torch.cat([r[r > 0].flatten() for r in root]).median()
        return [middle * (r > 0) for r in root], shift, sign

    def _relative_update(self, params: Sequence[Tensor], root: Vector) -> float:
        return super()._relative_update(params, super().scaling(params)[0])


# -- when to probe, what to allow, what to keep -----------------------------------------------------------------


class NoEvents(Cadence):
    """Probes by the clock alone, and no shorter steps."""

    @property
    def surprise(self) -> float:
        return 1.0

    def _event(self, loss: float, norm: float) -> str:
        super()._event(loss, norm)
        return ""


class LateProbes(Cadence):
    """An event calls for a probe at the next step, on a batch that did not stand out itself."""

    pending = ""

    def _event(self, loss: float, norm: float) -> str:
        event, self.pending = self.pending, super()._event(loss, norm)
        return event


class NoShortening(Cadence):
    """An event calls for a probe, but does not shorten the step."""

    @property
    def surprise(self) -> float:
        return 1.0


class BatchAware(SharpnessEstimator):
    """target · √(ρ/λ), ρ the quotient along D^½g, averaged over probes: noisy gradients, ρ far below λ, lower it.

    The edge of momentum falls with the batch (Andreyev et al., arXiv 2604.14108). The opposite of √(Ritz · batch).
    """

    aligned = 1.0

    def _solve(self, scaled: ScaledOperator, params: Sequence[Tensor], seed: int) -> tuple[EigenResult, float]:
        found, along = super()._solve(scaled, params, seed)
        if math.isfinite(along) and found.eigenvalue > 0.0:
            quotient = min(max(along / found.eigenvalue, LEAST_QUOTIENT), 1.0)
            self.aligned = math.sqrt(self.aligned * quotient)
        return found, along

    def measure_on(self, operator: HessianOperator, seed: int) -> Measurement:
        found = super().measure_on(operator, seed)
        return replace(found, share=found.share * math.sqrt(self.aligned))


class Cap(Controller):
    """After warmup the applied rate, not the scale, is held: min(schedule, the rate at the end). Guard cuts the cap."""

    cap = math.inf

    def update(
        self, rate: float, reading: Reading | None = None, losing: bool = False, surprise: float = 1.0
    ) -> Decision:
        warm = self.phase == "warmup"
        if not warm:
            self.state.scale = min(1.0, self.cap / rate)
        before = self.state.scale
        decision = super().update(rate, reading, losing, surprise)
        if self.phase != "warmup" and (warm or self.state.scale < before):
            self.cap = self.state.scale * rate
        return decision


class NoReturn(Controller):
    """Guard only cuts: nothing that was cut after warmup comes back."""

    def update(
        self, rate: float, reading: Reading | None = None, losing: bool = False, surprise: float = 1.0
    ) -> Decision:
        decision = super().update(rate, reading, losing, surprise)
        self.state.settled = min(self.state.settled, self.state.scale if self.phase != "warmup" else math.inf)
        return decision


# -- the list -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """One choice that differs from the default.

    Attributes:
        parts: attribute of the wrapper -> the subclass that takes its place.
        adam_only: with other rules it is the default, whose rows it takes.
        quick: part of the quick run.
    """

    group: str
    options: Row = field(default_factory=dict)
    parts: dict[str, type] = field(default_factory=dict)
    wrapper: type[AdaptiveWarmup] = AdaptiveWarmup
    adam_only: bool = False
    quick: bool = False

    def __call__(self, optimizer: Optimizer, model: nn.Module) -> AdaptiveWarmup:
        wrapped = self.wrapper(optimizer, model, **self.options)
        for name, part in self.parts.items():
            getattr(wrapped.meter if name == "estimator" else wrapped, name).__class__ = part
        return wrapped

    def code(self) -> str:
        """Of what differs: rows of an older version are measured again."""
        bases = {base for part in (self.wrapper, *self.parts.values()) for base in part.__mro__}
        own = sorted((base for base in bases if base.__module__ == __name__), key=lambda base: base.__name__)
        sources = [runs.bare(textwrap.dedent(inspect.getsource(base))) for base in own]
        return runs.digest(f"{sorted(self.options.items())} {sorted(self.parts)} {sources}")


def read(part: type, **options: Any) -> Variant:
    return Variant("estimator", parts={"estimator": part}, **options)


VARIANTS = {
    DEFAULT: Variant("", quick=True),
    "Krylov space of the batch, 2 products": read(Krylov, quick=True),
    "fresh quotient vᵀAv, 2 products": read(Fresh),
    "batch sharpness": read(BatchSharpness, quick=True),
    "√(Ritz · batch quotient)": read(RitzAndBatch),
    "√(Ritz · fresh quotient)": read(RitzAndFresh),
    "realised ratio (no ramp)": Variant("estimator", wrapper=Realised, quick=True),
    "default + lag-1 trigger": Variant("estimator", wrapper=LagOne, quick=True),
    "target .3": Variant("target", {"target": 0.3}),
    "target .49 (noise)": Variant("target", {"target": 0.49}),
    "target .51 (noise)": Variant("target", {"target": 0.51}),
    "target .7": Variant("target", {"target": 0.7}, quick=True),
    "target .9": Variant("target", {"target": 0.9}),
    "target 1.2": Variant("target", {"target": 1.2}, quick=True),
    "every 20": Variant("cadence", {"every": 20}, quick=True),
    "every 5": Variant("cadence", {"every": 5}),
    "every step": Variant("cadence", {"every": 1}),
    "no events": Variant("cadence", parts={"cadence": NoEvents}, quick=True),
    "events probe the next batch": Variant("cadence", parts={"cadence": LateProbes}),
    "events do not shorten": Variant("cadence", parts={"cadence": NoShortening}, quick=True),
    "double backward": Variant("products", {"hvp": "double_backward"}, quick=True),
    "1 product (fresh quotient)": Variant("products", {"probe_steps": 1}, quick=True),
    "3 products (Krylov)": Variant("products", {"probe_steps": 3}),
    "5 products (Krylov)": Variant("products", {"probe_steps": 5}),
    "raw: one P for all": Variant("coordinates", parts={"estimator": Raw}, adam_only=True, quick=True),
    "guard only cuts": Variant("after", parts={"controller": NoReturn}),
    "hold": Variant("after", {"after": "hold"}),
    "release": Variant("after", {"after": "release"}),
    "absolute cap": Variant("after", parts={"controller": Cap}, quick=True),
    "target · √(ρ/λ)": Variant("batch-aware", parts={"estimator": BatchAware}, quick=True),
}
NOISE = ("target .49 (noise)", "target .51 (noise)")

# -- rows -----------------------------------------------------------------------------------------------------


class Trial(NamedTuple):
    variant: str
    job: Job
    rate: str  # of RATES

    @property
    def key(self) -> str:
        return f"{self.variant}|{self.job.problem}|{self.job.lr:g}|{self.job.seed}"

    @property
    def cell(self) -> Cell:
        return self.job.problem, self.rate, self.job.seed

    @property
    def source(self) -> str:
        """The variant that this trial is in fact."""
        same = VARIANTS[self.variant].adam_only and not uses_adam(PROBLEMS[self.job.problem])
        return DEFAULT if same else self.variant


@lru_cache
def code(trial: Trial) -> str:
    return f"{runs.code(trial.job)}+{VARIANTS[trial.source].code()}"


def measure(trial: Trial) -> Row:
    row = runs.measure(trial.job, VARIANTS[trial.variant])
    return {**row, "variant": trial.variant, "rate": trial.rate, "key": trial.key, "code": code(trial)}


def trials(names: Iterable[str], seeds: int, steps: int, quick: bool) -> list[Trial]:
    """Seed by seed, variant by variant in the order of the list, so that an unfinished run has whole variants."""
    return [
        Trial(variant, Job(name, "warmctl", half_decades(PROBLEMS[name].tuned_lr)[i], seed, steps), rate)
        for seed in range(seeds)
        for variant, what in VARIANTS.items()
        if what.quick or not quick
        for name in names
        for i, rate in enumerate(RATES)
        if rate == RATES[-1] or not quick
    ]


def run(wanted: Sequence[Trial], results: Results, workers: int) -> None:
    """Do what the file does not have yet: the variants of the quick run first, the dearest last."""
    for trial in wanted:
        code(trial)  # now, while the files are those that were imported; makes the data too
    todo = [t for t in wanted if t.source == t.variant and (results.get(t.key) or {}).get("code") != code(t)]
    todo.sort(key=lambda t: (t.job.seed, not VARIANTS[t.variant].quick, VARIANTS[t.variant].options.get("every") == 1))
    start = time.perf_counter()
    for done, row in enumerate(runs.measured(todo, workers, measure), 1):
        results.add(row["key"], row)
        if done % 30 == 0 or done == len(todo):
            spent = (time.perf_counter() - start) / 60
            left = spent / done * (len(todo) - done)
            console.print(f"{done} of {len(todo)} runs, {spent:.1f} min, about {left:.0f} to go; now {row['variant']}")


# -- what they come to ------------------------------------------------------------------------------------------


def compare(wanted: Sequence[Trial], rows: dict[str, Row]) -> list[Row]:
    """One line a variant that has a row in every cell where the default has one."""
    found: dict[str, dict[Cell, Row]] = {}
    for trial in wanted:
        row = rows.get(trial._replace(variant=trial.source).key)
        if row is not None:
            found.setdefault(trial.variant, {})[trial.cell] = row
    default = found.get(DEFAULT, {})
    return [line(name, cells, default) for name, cells in found.items() if default and set(cells) >= set(default)]


def line(name: str, cells: dict[Cell, Row], default: dict[Cell, Row]) -> Row:
    logs = {cell: math.log(cells[cell]["loss"] / row["loss"]) for cell, row in default.items()}
    worst = max(logs, key=logs.__getitem__)
    by_rate = {rate: [log for cell, log in logs.items() if cell[1] == rate] for rate in RATES}
    return {
        "group": VARIANTS[name].group,
        "variant": name,
        **{rate: mean(values) for rate, values in by_rate.items() if values},
        "all": mean(logs.values()),
        "worst": f"{logs[worst]:+.2f} {worst[0]} {worst[1]}" if name != DEFAULT else "",
        "train": mean(math.log(cells[cell]["train_loss"] / row["train_loss"]) for cell, row in default.items()),
        "better": sum(log < 0 for log in logs.values()),
        "cells": len(logs),
        "failed": sum(cells[cell]["failed"] for cell in default),
        "evals": mean(cells[cell]["overhead"] for cell in default),
        "rms": math.sqrt(mean(log * log for log in logs.values())),
    }


def noise(lines: Sequence[Row]) -> float:
    """Two standard errors of a mean over all cells: of one cell, what a target 2 % off does. nan if not measured."""
    rms = [each["rms"] for each in lines if each["variant"] in NOISE]
    return 2 * math.sqrt(mean(value**2 for value in rms) / lines[0]["cells"]) if rms else math.nan


def mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def report(wanted: Sequence[Trial], results: Results) -> None:
    """Print the table, draw the figure, write the summary beside the rows."""
    lines = compare(wanted, results.rows)
    if not lines:
        console.print("the default has no row yet")
        return
    cells, steps = lines[0]["cells"], wanted[0].job.steps
    form = {"group": "{}", "variant": "{}", **dict.fromkeys((*RATES, "all"), "{:+.3f}"), "worst": "{}"}
    form |= {"train": "{:+.3f}", "better": "{}", "failed": "{}", "evals": "{:.1%}"}
    shown = {key: value for key, value in form.items() if key in lines[0]}
    table(f"log(loss / the default's), {cells} cells, {steps} updates; below 0 better", lines, shown)
    console.print(
        "all, worst: mean and worst cell; train: of the mean training loss; better: cells below 0; failed: of"
    )
    console.print(
        "runs; evals: gradient evaluations beyond training's. Identical rows: the choice had no effect there."
    )
    within, summary = noise(lines), {"lines": lines}
    if math.isfinite(within):
        of_rate = within * math.sqrt(len(RATES))
        safe = [each for each in lines if each["failed"] <= lines[0]["failed"]]
        better = [each["variant"] for each in safe if each["all"] < -within]
        console.print(
            f"noise, from the targets 2 % off: ±{within:.3f} on a mean of all cells, ±{of_rate:.3f} at one rate"
        )
        console.print(f"better than the default beyond noise, no more failures: {', '.join(better) or 'none'}")
        summary |= {"noise": within, "better beyond noise": better}
    missing = sorted({t.variant for t in wanted} - {each["variant"] for each in lines}, key=list(VARIANTS).index)
    if missing:
        console.print(f"not measured in every cell yet: {', '.join(missing)}")
    codes = {row["code"].split("+")[1] for row in results.rows.values()}
    if len(codes) > 1:
        console.print(f"the rows come from {len(codes)} versions of the library; run again to renew them")
    draw(lines, results.path.with_suffix(".png"), steps)
    results.finish(summary | {"missing": missing})
    console.print(f"rows, summary and figure: {results.path.with_suffix('')}.*")


def draw(lines: Sequence[Row], path: Path, steps: int) -> None:
    """One line a variant, a mark a rate and a bar for the mean; clipped where a variant is beyond compare."""
    from matplotlib.figure import Figure

    rows = [each for each in lines if each["variant"] != DEFAULT]
    if not rows:
        return
    figure = Figure(figsize=(8.5, 0.27 * len(rows) + 1.4), layout="constrained")
    ax = figure.subplots()
    heights = [-i for i in range(len(rows))]
    low, high = -0.5, 1.0
    ax.barh(heights, [min(max(each["all"], low), high) for each in rows], color="0.8", label="mean")
    for rate, colour, marker in zip(RATES, ("C0", "C1", "C3"), "osD", strict=True):
        if rate in rows[0]:
            values = [min(max(each[rate], low), high) for each in rows]
            ax.scatter(values, heights, c=colour, marker=marker, s=18, label=f"{rate} rate", zorder=3)
    ax.axvline(0.0, color="black", lw=0.8)
    ax.set_yticks(heights, [f"{each['group']}: {each['variant']}" for each in rows], fontsize=8)
    ax.set(xlabel=f"log(final loss / the default's), {steps} updates; left is better", ylim=(-len(rows) + 0.4, 0.6))
    ax.grid(axis="x", lw=0.3)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main(
    quick: Quick = False,
    only_report: Annotated[bool, typer.Option("--report", help="Run nothing; report the rows there are.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes of one thread each.")] = 2,
    seeds: Annotated[int, typer.Option(min=1)] = 1,
    variant: Annotated[list[str] | None, typer.Option(help="Only this one and the default; may be repeated.")] = None,
) -> None:
    """Each default against the other choices there were, on the development problems."""
    torch.set_num_threads(1)
    steps = 150 if quick else 400
    development = [name for name, problem in PROBLEMS.items() if problem.split == "development"]
    if unknown := set(variant or ()) - set(VARIANTS):
        raise typer.BadParameter(f"{', '.join(unknown)}: choose from {', '.join(VARIANTS)}")
    wanted = trials(QUICK_PROBLEMS if quick else development, seeds, steps, quick)
    wanted = [trial for trial in wanted if not variant or trial.variant in (DEFAULT, *variant)]
    results = Results(NAME, {"quick": quick, "updates": steps}, fresh=quick and not only_report)
    if not only_report:
        run(wanted, results, workers)
    report(wanted, results)


if __name__ == "__main__":
    typer.run(main)
