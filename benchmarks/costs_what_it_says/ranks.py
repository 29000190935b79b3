"""On two processes, DDP and FSDP2: what a probe takes in steps of the bare optimizer, and what it holds in memory.

    python -m benchmarks.costs_what_it_says.ranks [--quick]

AdamW over gloo; an MLP of 2e6 parameters for times, of 2e7 for memory. Times are ratios of steps that alternate in one
process. Memory is the growth of the most that rank 0 ever had resident, from before the first step, in runs apart;
the batch is small, that activations weigh little. Both ranks share one machine here, so communication costs next to
nothing of what it does between machines: what holds elsewhere are the counts, of evaluations and of vectors.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import typer
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.costs_what_it_says.training import signals
from benchmarks.harness.data import Batch
from benchmarks.harness.models import mlp, size_of
from benchmarks.harness.problems import cross_entropy
from benchmarks.harness.results import Quick, Report, Results, Row, console, median, table
from benchmarks.harness.timing import interleaved, relative
from warmctl import AdaptiveWarmup

PARALLEL = "DDP", "FSDP2"
RANKS, WIDTH, WIDE = 2, 970, 3000
COLUMNS = {
    "parallel": "{}", "parameters": "{:,}", "bare ms": "{:.0f}", "probe in evaluations": "{:.1f}",
    "probe in steps": "{:.2f}", "step without probe %": "{:+.1f}", "bare vectors": "{:.1f}",
    "added in a probe": "{:.2f}",
}  # fmt: skip


class Training:
    """One rank's model, sharded or replicated, and its optimizer; wrapped where there are options."""

    def __init__(self, parallel: str, width: int = WIDTH, **options: Any) -> None:
        torch.manual_seed(0)
        model = mlp(width, 3)
        self.model: nn.Module
        if parallel == "DDP":
            self.model = DistributedDataParallel(model)
        else:
            for layer in model:
                if list(layer.parameters()):
                    fully_shard(layer)
            self.model = fully_shard(model)
        self.optimizer: Any = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        if options:
            self.optimizer = AdaptiveWarmup(self.optimizer, self.model, **options)

    def step(self, batch: Batch) -> None:
        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = cross_entropy(self.model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        self.optimizer.step(closure)


def timed(parallel: str, rounds: int) -> Row:
    batch = next(signals(256))
    runs = {
        "bare": Training(parallel),
        "probing": Training(parallel, every=1, control=False),
        "between": Training(parallel, every=10**6, control=False),
    }
    for _ in range(12):  # the first probe and the opening looks are over
        for run in runs.values():
            run.step(batch)
    before = runs["probing"].optimizer.counts.cost
    times = interleaved({name: partial(run.step, batch) for name, run in runs.items()}, rounds)
    probed = runs["probing"].optimizer
    assert not [row["reason"] for row in probed.history if "failed" in row["reason"]]
    return {
        "parameters": size_of(mlp(WIDTH, 3)),
        "bare ms": 1e3 * median(times["bare"]),
        "probe in evaluations": (probed.counts.cost - before) / (rounds + 1),
        "probe in steps": relative(times, "probing", "between") - 1,
        "step without probe %": 100 * (relative(times, "between", "bare") - 1),
    }


def resident(parallel: str, wrapped: bool) -> Row:
    """In vectors of all parameters: growth of the largest resident size over four steps."""
    options = {"every": 1, "control": False} if wrapped else {}
    batch = next(signals(8))
    small = Training(parallel, 16, **options)  # loads what is loaded at a first step
    for _ in range(4):
        small.step(batch)
    run = Training(parallel, WIDE, **options)
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(4):
        run.step(batch)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)
    return {"vectors": grown / (4 * size_of(mlp(WIDE, 3)))}


def on_ranks(*task: str) -> Row:
    """Run `task` on both ranks; what rank 0 has printed last."""
    launch = "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", "-m"
    command = sys.executable, *launch, "benchmarks.costs_what_it_says.ranks", "rank", *task
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE)
    if done.returncode:
        raise SystemExit(f"the ranks of {' '.join(task)} ended with {done.returncode}")
    found: Row = json.loads(done.stdout.decode().strip().splitlines()[-1])
    return found


def measured(parallel: str, rounds: int) -> Row:
    bare, wrapped = (on_ranks("memory", parallel, kind)["vectors"] for kind in ("bare", "wrapped"))
    return on_ranks("time", parallel, str(rounds)) | {"bare vectors": bare, "added in a probe": wrapped - bare}


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def rank(task: str, parallel: str, setting: str) -> None:
    """One rank's part; started by the main command."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    row = timed(parallel, int(setting)) if task == "time" else resident(parallel, setting == "wrapped")
    if dist.get_rank() == 0:
        print(json.dumps(row))
    dist.destroy_process_group()


@app.callback(invoke_without_command=True)
def main(context: typer.Context, quick: Quick = False, only_report: Report = False) -> None:
    """Measure DDP and FSDP2, print the table, write it to benchmarks/results."""
    if context.invoked_subcommand is None:
        settings = {"quick": quick, "ranks": RANKS}
        results = Results("costs_on_ranks", settings, fresh=quick and not only_report, only_report=only_report)
        rows = [{"parallel": p} | results.row(p, measured, p, 7 if quick else 41) for p in PARALLEL]
        table("Beside the bare optimizer, on two processes over gloo", rows, COLUMNS)
        results.finish({})
        console.print(f"written to {results.path}")


if __name__ == "__main__":
    app()
