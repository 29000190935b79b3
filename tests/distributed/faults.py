"""Probes that go wrong on one rank, launched by test_faults.py.

Every case trains under DDP or FSDP2 on different rows on each rank, while the last rank's probes fail as the case says.
"""

from __future__ import annotations

import itertools
import traceback
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.launch import from_all_ranks
from tests.distributed.worker import Regressor, full_weights, own, shard
from tests.faults.harness import FAULTS
from warmctl import AdaptiveWarmup

STEPS = 5
SOURCES = ("closure", "captured", "observed", "backward")
ERRORS = ("RuntimeError", "OutOfMemoryError", "KeyError", "nan")
BACKWARD = "backward:"
"""Before the name of a fault: it happens between two units of the backward pass."""
IN_BACKWARD = ("RuntimeError", "OutOfMemoryError", "MemoryError", "StopIteration", "no words", "nan")
FAILING = {"1,2": {0: 1, 2: 2}, "2,1": {0: 2, 2: 1}, "always": dict.fromkeys(range(STEPS), 1)}
"""The evaluation that goes wrong, by step: in the first probe and in a later one, after one that was good."""


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
        if self.on_graph or self.error.startswith(BACKWARD):
            result: Tensor = Once.apply(out, self, evaluation)
            return result
        return self.fault(out, evaluation)

    def fault(self, out: Tensor, evaluation: int) -> Tensor:
        return FAULTS[self.error.removeprefix(BACKWARD)](self, out) if 0 < self.fails_at == evaluation else out


class Once(torch.autograd.Function):
    """The identity, whose first or second derivative may go wrong."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, owner: Faulty, evaluation: int) -> Tensor:
        ctx.owner, ctx.evaluation = owner, evaluation
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        if ctx.owner.on_graph:
            result: Tensor = Twice.apply(gradient, ctx.owner)
            return result, None, None
        return ctx.owner.fault(gradient, ctx.evaluation), None, None


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, owner: Faulty) -> Tensor:
        ctx.owner = owner
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.owner.fault(gradient, ctx.owner.fails_at), None


def train(source: str, error: str, failing: dict[int, int], place: str, probed: bool = True) -> Any:
    """Rates and weights of every rank, and why its probes failed. `failing`: as in FAILING, on the last rank."""
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
        model.seen, model.fails_at = 0, failing.get(step, -1) if last else -1
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


def cases(place: str) -> dict[str, tuple[Any, ...]]:
    found: dict[str, tuple[Any, ...]] = {}
    for source, error, (name, failing) in itertools.product(SOURCES, ERRORS, FAILING.items()):
        if source != "backward" or (place == "ddp" and name != "2,1"):  # no exact product of shards; one evaluation
            found[f"{place} {source} {error} {name}"] = (source, error, failing, place)
    for error in IN_BACKWARD:
        name = f"{place} closure {BACKWARD}{error.replace(' ', '_')} 1,2"
        found[name] = "closure", BACKWARD + error, FAILING["1,2"], place
    return found


def main(arguments: list[str]) -> dict[str, list[Any]]:
    """Args: the places, and after a minus what to leave out."""
    results: dict[str, list[Any]] = {}
    for place in (word for word in arguments if not word.startswith("-")):
        for name, case in cases(place).items():
            if any(f"-{word}" in arguments for word in name.split()):
                continue
            try:
                found: Any = train(*case)
            except Exception:  # reported to the test, which fails with it
                found = {"error": traceback.format_exc()}
            results[name] = from_all_ranks(found)
        for source in SOURCES[: 4 if place == "ddp" else 3]:
            results[f"bare {place} {source}"] = [train(source, "", {}, place, probed=False)]
    return results
