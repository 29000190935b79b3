"""What warmctl costs: products, memory, training steps, and how all of it grows.

    python -m benchmarks.costs_what_it_says [--quick]

Times are ratios of calls that alternate in one process, in an order that rotates; medians are taken of the ratios, so
that a slow second of the machine meets all of them alike. Models have about 1e6 parameters where not said otherwise.
Memory is counted in storages alive, one by one, not in what the allocator holds.
"""

from __future__ import annotations

import gc
import itertools
import math
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.harness.problems import GPT, PROBLEMS, Batch, corpus, digits, mlp, place, resnet, text_batches
from benchmarks.harness.results import Quick, Results, console, median, seconds, table
from warmctl import AdaptiveWarmup
from warmctl.curvature.operators import HessianOperator

Batches = Callable[[int], Iterator[Batch]]  # batch size -> batches
Row = dict[str, Any]


# -- the three models -------------------------------------------------------------------------------------


def signals(batch: int) -> Iterator[Batch]:
    """Noise [B, 1, 40] and labels [B]: what it costs does not depend on what is learnt."""
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randn(batch, 1, 40, generator=generator), torch.randint(10, (batch,), generator=generator)


def images(batch: int) -> Iterator[Batch]:
    """Digits at random places, [B, 1, 12, 12]."""
    (x, y), _ = digits()
    generator = torch.Generator().manual_seed(0)
    while True:
        rows = torch.randint(len(y), (batch,), generator=generator)
        yield place(x[rows], generator, 12), y[rows]


def text(batch: int) -> Iterator[Batch]:
    return text_batches(corpus()[0], torch.Generator().manual_seed(0), batch, context=64)


Setup = tuple[Callable[[], nn.Module], Batches, int, Callable[..., Optimizer]]
MODELS: dict[str, Setup] = {
    "MLP": (partial(mlp, 640, 4), signals, 512, partial(SGD, lr=0.02, momentum=0.9)),
    "convolutional": (partial(resnet, 136, 3), images, 16, partial(SGD, lr=0.02, momentum=0.9)),
    "GPT": (partial(GPT, 144, 4), text, 8, partial(AdamW, lr=3e-4)),
}
TINY: dict[str, Setup] = {"tiny MLP": (partial(mlp, 52, 3), signals, 32, partial(SGD, lr=0.02, momentum=0.9))}


def build(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


def size_of(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


class Training:
    """A model, its optimizer, bare or wrapped, and the seconds of each step."""

    def __init__(self, make: Callable[[], nn.Module], rule: Callable[..., Optimizer], **options: Any) -> None:
        self.model = build(make)
        self.times: list[float] = []
        self.probed: list[bool] = []
        self.optimizer: Any = rule(self.model.parameters())
        if options:
            self.optimizer = AdaptiveWarmup(self.optimizer, self.model, **options)
        self.wrapped = bool(options)

    def step(self, batch: Batch) -> None:
        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = loss_of(self.model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        before = self.probes
        self.times.append(seconds(lambda: self.optimizer.step(closure)))
        self.probed.append(self.probes > before)

    @property
    def probes(self) -> int:
        return self.optimizer.metrics["probes"] if self.wrapped else 0


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round; the order rotates, the first round is thrown away."""
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds + 1):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            elapsed = seconds(calls[name])
            if index:
                times[name].append(elapsed)
    return times


def relative(times: dict[str, list[float]], name: str, base: str) -> float:
    """Median over rounds of the ratio within a round."""
    return median([a / b for a, b in zip(times[name], times[base], strict=True)])


# -- 1: products ------------------------------------------------------------------------------------------


def products(make: Callable[[], nn.Module], batch: Batch, rounds: int, methods: int = 4) -> Row:
    """Products by each method, in gradient evaluations by time."""
    model = build(make)
    params = list(model.parameters())

    def loss() -> Tensor:
        return loss_of(model, batch)

    def gradient() -> None:
        model.zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]

    gradient()
    present = [p.grad.clone() for p in params if p.grad is not None]
    vector = [torch.randn_like(p) for p in params]
    forward_difference = HessianOperator(loss, params, "finite_difference", gradient=present)
    kept = HessianOperator(loss, params, "double_backward")
    forward_over_reverse = HessianOperator(loss, params, "forward_over_reverse")

    def graph_and_product() -> None:
        with HessianOperator(loss, params, "double_backward") as operator:
            operator.matvec(vector)

    calls: dict[str, Callable[[], Any]] = {
        "gradient": gradient,
        "forward difference": lambda: forward_difference.matvec(vector),
        "double backward": lambda: kept.matvec(vector),
        "graph and product": graph_and_product,
        "forward over reverse": lambda: forward_over_reverse.matvec(vector),
    }
    times = interleaved(dict(list(calls.items())[: methods + 1]), rounds)
    row: Row = {"parameters": size_of(model), "gradient ms": 1e3 * median(times["gradient"])}
    row.update({name: relative(times, name, "gradient") for name in times if name != "gradient"})
    if "graph and product" in row:
        row["graph building"] = row.pop("graph and product") - row["double backward"]
    return row


# -- 2: memory --------------------------------------------------------------------------------------------


class Storages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of all storages that were made inside and are alive, now and at most."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: dict[int, tuple[weakref.ref[Any], int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in inputs:
                storage = tensor.untyped_storage()  # one Python object for each storage, as long as it lives
                self.made.setdefault(id(storage), (weakref.ref(storage), storage.nbytes()))
        self.peak = max(self.peak, self.alive())
        return out

    def alive(self) -> int:
        self.made = {key: (ref, size) for key, (ref, size) in self.made.items() if ref() is not None}
        return sum(size for _, size in self.made.values())


def memory(make: Callable[[], nn.Module], batches: Batches, rule: Callable[..., Optimizer], steps: int | None) -> Row:
    """Parameter-sized vectors at the peak of the second step and after it; a bare optimizer for `steps` None.

    The batch is two examples, that activations weigh nothing.
    """
    options = {} if steps is None else {"probe_steps": steps, "hvp": "finite_difference", "every": 1}
    training = Training(make, rule, **options)
    stream = batches(2)
    training.step(next(stream))
    training.optimizer.zero_grad()
    if training.wrapped:
        training.optimizer.meter.estimator.vector = [v.clone() for v in training.optimizer.meter.estimator.vector]
    held = 0 if steps is None else 1  # the eigenvector of the first probe was made outside
    gc.collect()
    batch = next(stream)
    with Storages() as storages:
        training.step(batch)
    gc.collect()
    vector = 4 * size_of(training.model)
    return {"peak": storages.peak / vector + held, "after": storages.alive() / vector}


# -- 3: training steps ------------------------------------------------------------------------------------

PHASES: dict[str, dict[str, Any]] = {
    "bare": {},
    "monitor": {"control": False},
    "warmup": {},
    "guard": {"max_warmup": 1, "after": "guard"},
    "done": {"max_warmup": 1, "after": "hold"},
}


def training_steps(
    make: Callable[[], nn.Module], stream: Iterator[Batch], rule: Callable[..., Optimizer], rounds: int
) -> dict[str, Row]:
    """One training a phase from the same weights, a step of each in turn on the same batch.

    A step without a probe is compared with the bare step of the same round. What probes add is the sum of their steps
    over what these steps would have taken without.
    """
    options = {"seed": 0, "hvp": "finite_difference"}  # `auto` compares the methods once, at the first probe
    runs = {name: Training(make, rule, **({} if name == "bare" else options | PHASES[name])) for name in PHASES}
    names = list(runs)
    for index in range(rounds + 1):  # the first round sets optimizers up and ends the warmup of two of them
        batch = next(stream)
        for name in names[index % len(names) :] + names[: index % len(names)]:
            runs[name].step(batch)
    bare = runs["bare"].times[1:]
    rows: dict[str, Row] = {"bare": {"ms": 1e3 * median(bare)}}
    for name, run in list(runs.items())[1:]:
        pairs = list(zip(run.times[1:], bare, run.probed[1:], strict=True))
        quiet = median([mine / other for mine, other, probed in pairs if not probed] or [math.nan])
        probes = [mine / median(bare) - 1 for mine, _, probed in pairs if probed]
        rows[name] = {
            "phase": run.optimizer.phase,
            "ms": 1e3 * median([mine for mine, _, probed in pairs if not probed] or [math.nan]),
            "without probe %": 100 * (quiet - 1),
            "probes": len(probes),
            "one probe": median(probes) if probes else None,
            "whole %": 100 * ((quiet - 1) + sum(probes) / len(pairs)),
            "metric %": 100 * run.optimizer.counts.cost / run.optimizer.counts.gradients,
        }
    return rows


def step_when_done(
    make: Callable[[], nn.Module], stream: Iterator[Batch], rule: Callable[..., Optimizer], rounds: int
) -> Row:
    """A step after the end with after="hold" against the bare step, two at a time."""
    bare, wrapped = Training(make, rule), Training(make, rule, max_warmup=1, after="hold", hvp="finite_difference")
    batch = next(stream)
    for training in (bare, wrapped):
        training.step(batch)
    times = interleaved({"bare": lambda: bare.step(batch), "done": lambda: wrapped.step(batch)}, rounds)
    extra = [done - step for done, step in zip(times["done"], times["bare"], strict=True)]
    row: Row = {"parameters": size_of(bare.model), "phase": wrapped.optimizer.phase}
    return row | {
        "bare ms": 1e3 * median(times["bare"]),
        "extra ms": 1e3 * median(extra),
        "extra %": 100 * (relative(times, "done", "bare") - 1),
    }


# -- 4 and 5: how the price grows, and the budget ---------------------------------------------------------


def probe_price(make: Callable[[], nn.Module], batch: Batch, steps: int, rounds: int) -> Row:
    """A warm probe with `steps` products beside a bare step, SGD with momentum."""
    rule = partial(SGD, lr=1e-3, momentum=0.9)
    bare = Training(make, rule)
    wrapped = Training(make, rule, every=1, probe_steps=steps, control=False, hvp="finite_difference")
    for training in (bare, wrapped):
        training.step(batch)
    times = interleaved({"bare": lambda: bare.step(batch), "wrapped": lambda: wrapped.step(batch)}, rounds)
    row = {
        "parameters": size_of(bare.model),
        "batch": len(batch[1]),
        "products": steps,
        "ms": 1e3 * median(times["bare"]),
    }
    row["probe in steps"] = relative(times, "wrapped", "bare") - 1
    row["per product"] = row["probe in steps"] / steps
    return row


def budget(problem_name: str, steps: int, factor: float) -> Row:
    """`every="auto"` on a real problem at `factor` times its tuned rate, beside the bare optimizer at the tuned one."""
    problem = PROBLEMS[problem_name]
    rule = partial(problem.rule, lr=factor * problem.tuned_lr)
    bare = Training(lambda: problem.build(0), partial(problem.rule, lr=problem.tuned_lr))
    wrapped = Training(lambda: problem.build(0), rule, seed=0)
    row: Row = {"problem": problem_name, "rate": factor * problem.tuned_lr}
    for index, batch in enumerate(itertools.islice(problem.batches(0), steps), start=1):
        for training in (bare, wrapped) if index % 2 else (wrapped, bare):
            training.step(batch)
        if index in (400, steps):
            row[f"metric % at {index}"] = 100 * wrapped.optimizer.metrics["overhead"]
            row[f"wall % at {index}"] = 100 * (sum(wrapped.times) / sum(bare.times) - 1)
    row["phase"] = wrapped.optimizer.phase
    return row


# -- the command ------------------------------------------------------------------------------------------

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(quick: Quick = False, threads: int = 1) -> None:
    """Measure everything, print it, write it to benchmarks/results."""
    torch.set_num_threads(threads)
    results = Results("costs_what_it_says", {"quick": quick, "threads": threads}, fresh=quick)
    measured: dict[str, list[Row]] = {}

    def row(part: str, names: Row, measure: Callable[..., Row], *args: Any) -> None:
        key = f"{part}: {' '.join(str(value) for value in names.values())}"
        found = results.get(key) or results.add(key, {**names, **measure(*args)})
        measured.setdefault(part, []).append(found)

    for name, (make, stream, size, _) in MODELS.items():
        row("products", {"model": name}, products, make, next(stream(size)), 9 if quick else 41)
    table("1. Products, in gradient evaluations by time", measured["products"], PRODUCTS)

    for name, (make, stream, _, _) in MODELS.items():
        for kind, steps in itertools.product(("SGD", "AdamW"), (2,) if quick else (1, 2, 3, 5, 10)):
            names = {"model": name, "optimizer": kind, "products": steps}
            row("memory", names, added_memory, make, stream, getattr(torch.optim, kind), steps)
    table("2. Parameter-sized vectors beyond training, counted in storages", measured["memory"], MEMORY)

    for name, (make, stream, size, rule) in MODELS.items():
        runs = results.get(f"steps: {name}")
        runs = runs or results.add(f"steps: {name}", training_steps(make, stream(size), rule, 12 if quick else 300))
        measured.setdefault("steps", []).extend({"model": name, "run": run, **values} for run, values in runs.items())
    table("3a. Training steps against the bare optimizer's, interleaved", measured["steps"], STEPS)

    for name, (make, stream, size, rule) in (MODELS | TINY).items():
        row("done", {"model": name}, step_when_done, make, stream(size), rule, 41 if quick else 401)
    table('3b. A step after the end, after="hold", against the bare one', measured["done"], DONE)

    widths = {1e4: 58, 1e5: 206, 1e6: 690, 1e7: 2220}
    for count in list(widths)[: 3 if quick else 4]:
        for size in (32, 512) if quick else (32, 128, 512, 2048):
            make, batch = partial(mlp, widths[count], 3), next(signals(size))
            row(
                "price",
                {"model": "MLP", "about": count, "batch": size},
                probe_price,
                make,
                batch,
                2,
                9 if quick else 41,
            )
    for steps in (1, 5) if quick else (1, 3, 5, 10):
        make, stream, size, _ = MODELS["GPT"]
        row("price", {"model": "GPT", "products": steps}, probe_price, make, next(stream(size)), steps, 9)
    table("4. A warm probe, in training steps by time", measured["price"], PRICE)

    problems = ("digits", "mlp-adam") if quick else ("digits", "mlp-adam", "resnet", "gpt", "lstm")
    for problem, factor in itertools.product(problems, (1.0,) if quick else (1.0, 10.0)):
        row("budget", {"problem": problem, "times tuned": factor}, budget, problem, 2000, factor)
    table('5. every="auto" holds its budget', measured["budget"], BUDGET)

    targets = judged(measured)
    table("Targets", [{"target": k, "met": met} for k, met in targets.items()], {"target": "{}", "met": "{}"})
    results.finish(targets)
    console.print(f"written to {results.path}")


PRODUCTS = {
    "model": "{}", "parameters": "{:,}", "gradient ms": "{:.1f}", "forward difference": "{:.2f}",
    "double backward": "{:.2f}", "graph building": "{:.2f}", "forward over reverse": "{:.2f}",
}  # fmt: skip
MEMORY = {"model": "{}", "optimizer": "{}", "products": "{}", "peak": "{:.2f}", "allowed": "{}", "after": "{:.2f}"}
STEPS = {
    "model": "{}", "run": "{}", "phase": "{}", "ms": "{:.2f}", "without probe %": "{:+.2f}", "probes": "{}",
    "one probe": "{:.2f}", "whole %": "{:+.1f}", "metric %": "{:.1f}",
}  # fmt: skip
DONE = {
    "model": "{}",
    "parameters": "{:,}",
    "phase": "{}",
    "bare ms": "{:.2f}",
    "extra ms": "{:+.3f}",
    "extra %": "{:+.2f}",
}
PRICE = {
    "model": "{}", "parameters": "{:,}", "batch": "{}", "products": "{}", "ms": "{:.2f}", "probe in steps": "{:.2f}",
    "per product": "{:.2f}",
}  # fmt: skip
BUDGET = {
    "problem": "{}", "rate": "{:g}", "metric % at 400": "{:.1f}", "wall % at 400": "{:+.1f}",
    "metric % at 2000": "{:.1f}", "wall % at 2000": "{:+.1f}", "phase": "{}",
}  # fmt: skip


def added_memory(make: Callable[[], nn.Module], stream: Batches, rule: Callable[..., Optimizer], steps: int) -> Row:
    """What the wrapper adds to the bare optimizer's peak, and what stays."""
    bare, wrapped = (memory(make, stream, partial(rule, lr=1e-3), probes) for probes in (None, steps))
    return {"allowed": steps + 3} | {key: wrapped[key] - bare[key] for key in ("peak", "after")}


def judged(measured: dict[str, list[Row]]) -> dict[str, bool]:
    """Each target, and whether every row meets it."""
    slack = 0.05  # activations of two examples
    budgets = measured["budget"]
    return {
        "forward difference at most 1.15": all(row["forward difference"] <= 1.15 for row in measured["products"]),
        "double backward on a kept graph at most 2.5": all(r["double backward"] <= 2.5 for r in measured["products"]),
        "memory at most products + 3": all(row["peak"] <= row["allowed"] + slack for row in measured["memory"]),
        "one vector left after a probe": all(row["after"] <= 1 + slack for row in measured["memory"]),
        "done: within 1 % of the bare step at 1e6 parameters": all(
            row["extra %"] <= 1.0 for row in measured["done"][:-1]
        ),
        "overhead at 400 at most 12 %": all(row["metric % at 400"] <= 12 for row in budgets),
        "overhead at 2000 at most 5 %": all(row["metric % at 2000"] <= 5 for row in budgets),
        "wall within 2 points of it at 2000": all(
            row["wall % at 2000"] - row["metric % at 2000"] <= 2 for row in budgets
        ),
    }


if __name__ == "__main__":
    app()
