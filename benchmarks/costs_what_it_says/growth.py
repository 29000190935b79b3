"""Parts 4 and 5: how the price of a probe grows with model, batch and products, and the budget of `every="auto"`."""

from __future__ import annotations

import itertools
from functools import partial

from torch.optim import SGD

from benchmarks.costs_what_it_says.training import Make, Training
from benchmarks.harness.data import Batch
from benchmarks.harness.models import size_of
from benchmarks.harness.problems import PROBLEMS
from benchmarks.harness.results import Row, median
from benchmarks.harness.timing import interleaved, relative


def probe_price(make: Make, batch: Batch, steps: int, rounds: int) -> Row:
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
