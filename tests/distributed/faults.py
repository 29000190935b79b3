"""Probes that go wrong on one rank. Run by test_faults.py with torchrun; rank 0 prints a line of JSON.

Every case trains under DDP or FSDP2 on different rows on each rank, while the last rank's probes fail as the case says.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import traceback
import warnings
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.worker import Regressor, full_weights, own, shard
from warmctl import AdaptiveWarmup

STEPS = 5
SOURCES = ("closure", "captured", "observed", "backward")
ERRORS = ("RuntimeError", "OutOfMemoryError", "KeyError", "nan")


class Faulty(Regressor):
    """Goes wrong in the evaluation of a step that `fails_at` says, 0 being the step's own; never, if it is None.

    Where the loss cannot be evaluated again, its second derivative goes wrong instead.
    """

    def __init__(self, error: str) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)  # DDP broadcasts its buffers in each forward pass
        self.error, self.fails_at, self.seen, self.on_graph = error, -1, 0, False

    def forward(self, x: Tensor, y: Tensor) -> Any:
        evaluation, self.seen = self.seen, self.seen + 1
        out = self.norm(x)
        for index, layer in enumerate(self.body):
            out = layer(out)
            if index == 1:
                out = self.go_wrong(out, evaluation)
        return out if self.on_graph else {"loss": nn.functional.mse_loss(out, y)}  # or the loss would be captured

    def go_wrong(self, out: Tensor, evaluation: int) -> Tensor:
        if self.on_graph:
            result: Tensor = Once.apply(out, self)
            return result
        if 0 < self.fails_at == evaluation:
            return self.fault(out)
        return out

    def fault(self, out: Tensor) -> Tensor:
        if self.error == "nan":
            return out * float("nan")
        kind = {"RuntimeError": RuntimeError, "KeyError": KeyError}.get(self.error, torch.OutOfMemoryError)
        raise kind("no such thing")


class Once(torch.autograd.Function):
    """The identity, whose second derivative may go wrong."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, owner: Faulty) -> Tensor:
        ctx.owner = owner
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        result: Tensor = Twice.apply(gradient, ctx.owner)
        return result, None


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, owner: Faulty) -> Tensor:
        ctx.owner = owner
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return (ctx.owner.fault(gradient) if ctx.owner.fails_at > 0 else gradient), None


def train(source: str, error: str, at: tuple[int, ...], evaluation: int, place: str, probed: bool = True) -> Any:
    """Rates and weights of every rank, and why its probes failed. `at`: the steps at which the last rank's fail."""
    torch.manual_seed(0)
    model = Faulty(error).double()
    model.on_graph = source == "backward"
    outer: nn.Module = shard(model) if place == "fsdp" else DistributedDataParallel(model)
    base = torch.optim.SGD(outer.parameters(), lr=0.05, momentum=0.9)
    options: dict[str, Any] = {"loss_fn": lambda m, b: m(*b)["loss"]} if source == "observed" else {}
    known = outer if source == "observed" else model
    opt: Any = AdaptiveWarmup(base, known, every=1, control=False, **options) if probed else base
    last = dist.get_rank() == dist.get_world_size() - 1
    for step in range(STEPS):
        model.seen, model.fails_at = 0, evaluation if last and step in at else -1
        one_step(outer, opt, own(step), source if probed else "captured")
    rows = list(opt.history) if probed else []
    return {
        "decisions": [(row["scale"], repr(row["stability_ratio"]), row["phase"], row["probed"]) for row in rows],
        "reasons": [row["reason"] for row in rows],
        "weights": full_weights(outer),
        "buffers": [b.tolist() for b in model.buffers()],
    }


def one_step(model: nn.Module, opt: Any, batch: tuple[Tensor, Tensor], source: str) -> None:
    def closure() -> Tensor:
        opt.zero_grad()
        out = model(*batch)
        loss: Tensor = out["loss"] if isinstance(out, dict) else nn.functional.mse_loss(out, batch[1])
        opt.backward(loss) if source == "backward" else loss.backward()  # type: ignore[no-untyped-call]
        return loss

    if source == "closure":
        opt.step(closure)
        return
    if source == "observed":
        opt.observe(batch)
    closure()
    opt.step()


def cases() -> dict[str, tuple[Any, ...]]:
    found: dict[str, tuple[Any, ...]] = {}
    for place, source, error in itertools.product(("ddp", "fsdp"), SOURCES, ERRORS):
        if place == "fsdp" and source == "backward":  # sharded parameters have no exact product
            continue
        for name, at in (("first", (0,)), ("later", (2,)), ("all", tuple(range(STEPS)))):
            for evaluation in (1, 2) if source != "backward" else (1,):
                found[f"{place} {source} {error} {name} {evaluation}"] = (source, error, at, evaluation, place)
    return found


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    results: dict[str, Any] = {}
    words = set(sys.argv[1:]) - {"quick"}
    wanted = [name for name in cases() if words <= set(name.split())]
    if "quick" in sys.argv:
        wanted = [name for name in wanted if "all" not in name.split() and "KeyError" not in name.split()]
    for name in wanted:
        try:
            found: Any = train(*cases()[name])
        except Exception:  # reported to the test, which fails with it
            found = {"error": traceback.format_exc()}
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, found)
        results[name] = ranks
    for place in {cases()[name][4] for name in wanted}:
        for source in SOURCES:
            if place == "ddp" or source != "backward":
                results[f"bare {place} {source}"] = [train(source, "", (), 0, place, probed=False)]
    if dist.get_rank() == 0:
        print("RESULTS " + json.dumps(results), flush=True)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # the interpreter's own end, with gloo's threads still there, aborts now and then


if __name__ == "__main__":
    main()
