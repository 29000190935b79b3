"""Probes that go wrong on one rank, launched by test_faults.py and sweep.py.

Every case trains under DDP, FSDP2 or FSDP2 of two copies on different rows on each rank, and on more of them on some,
while the probes of one rank fail as the case says.
"""

from __future__ import annotations

import itertools
import traceback
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.launch import from_all_ranks
from tests.distributed.regression import Regressor, full_weights, own
from tests.distributed.worker import shard
from tests.faults.faults import IN_FORWARD
from warmctl import AdaptiveWarmup
from warmctl.loss.no_trace import measuring

STEPS = 5
SOURCES = ("closure", "captured", "observed", "backward")
ERRORS = ("RuntimeError", "OutOfMemoryError", "KeyError", "nan")
BACKWARD = "backward:"
"""Before the name of a fault: it happens between two units of the backward pass."""
IN_BACKWARD = ("RuntimeError", "OutOfMemoryError", "MemoryError", "StopIteration", "no words", "nan")
COLLECTIVE = {"gather:": "all_gather", "reduce:": "reduce_scatter"}
"""Before the name of a fault: it happens where FSDP2 asks for the memory of that collective."""
IN_COLLECTIVE = ("OutOfMemoryError", "RuntimeError")
LOOK = 100
"""The first evaluation of a step without gradients, as the looks at the representations are."""
FAILING = {
    "1,2": {0: 1, 2: 2},
    "2,1": {0: 2, 2: 1},
    "always": dict.fromkeys(range(STEPS), 1),
    "look": dict.fromkeys(range(STEPS), LOOK),
    "after": dict.fromkeys(range(STEPS), LOOK + 1),
}
"""The evaluation that goes wrong, by step: in the first probe and in a later one, after one that was good; in all of
them; in the looks before an update, and after it."""


class Faulty(Regressor):
    """Goes wrong in the evaluation of a step that `fails_at` says, 0 being the step's own; never, if it is None.

    Where the loss cannot be evaluated again, its second derivative goes wrong instead.
    """

    def __init__(self, error: str) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)  # DDP broadcasts its buffers in each forward pass
        self.error, self.on_graph = error, False
        self.next_step(-1)

    def next_step(self, fails_at: int) -> None:
        self.fails_at, self.seen, self.looked = fails_at, 0, LOOK

    def forward(self, x: Tensor, y: Tensor) -> Any:
        if torch.is_grad_enabled():
            evaluation, self.seen = self.seen, self.seen + 1
        else:
            evaluation, self.looked = self.looked, self.looked + 1
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
        if self.error.startswith(tuple(COLLECTIVE)) or not 0 < self.fails_at == evaluation:
            return out
        return IN_FORWARD[self.error.removeprefix(BACKWARD)](self, out)

    def run_out_of_memory(self) -> None:
        """In a collective of FSDP2's, in the evaluation that goes wrong."""
        from torch.distributed.fsdp._fully_shard import _fsdp_collectives

        owner, where, error = self, *self.error.split(":")
        base: Any = _fsdp_collectives.DefaultAllGather if where == "gather" else _fsdp_collectives.DefaultReduceScatter

        class RunsOut(base):
            def allocate(self, *args: Any, **kwargs: Any) -> Any:
                if 0 < owner.fails_at == owner.seen - 1 and measuring(owner.parameters()):
                    IN_FORWARD[error](owner, torch.empty(0))
                return super().allocate(*args, **kwargs)

        for module in self.modules():
            if isinstance(module, FSDPModule):
                getattr(module, f"set_custom_{COLLECTIVE[where + ':']}")(RunsOut())


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


def placed(model: Faulty, place: str) -> nn.Module:
    ranks = dist.get_world_size()
    if place == "ddp":
        return DistributedDataParallel(model)
    shard(model, (ranks,) if place == "fsdp" else (2, ranks // 2))
    if model.error.startswith(tuple(COLLECTIVE)):
        model.run_out_of_memory()
    return model


def uneven(step: int) -> tuple[Tensor, Tensor]:
    """Of this rank's rows one is missing for each rank before it."""
    x, y = own(step)
    return x[dist.get_rank() :], y[dist.get_rank() :]


def train(
    source: str, error: str, failing: dict[int, int], place: str, probed: bool = True, failing_rank: int = 0
) -> Any:
    """Rates and weights of every rank, and why its probes failed. `failing`: as in FAILING, on that rank."""
    torch.manual_seed(0)
    model = Faulty(error).double()
    model.on_graph = source == "backward"
    outer = placed(model, place)
    base = torch.optim.SGD(outer.parameters(), lr=0.05, momentum=0.9)
    options: dict[str, Any] = {"loss_fn": lambda m, b: m(*b)["loss"]} if source == "observed" else {}
    known = outer if source == "observed" else model
    opt: Any = AdaptiveWarmup(base, known, every=1, control=False, **options) if probed else base
    for step in range(STEPS):
        model.next_step(failing.get(step, -1) if dist.get_rank() == failing_rank else -1)
        one_step(outer, opt, uneven(step), source if probed else "captured")
    rows = list(opt.history) if probed else []
    return {
        "decisions": [(row["scale"], repr(row["stability_ratio"]), row["phase"], row["probed"]) for row in rows],
        "reasons": [row["reason"] for row in rows],
        "looks": [repr(row["representation_change"]) for row in rows],
        "fails": dist.get_rank() == failing_rank,
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
        if source != "backward" or (place == "ddp" and name in ("1,2", "always")):  # no exact product of shards
            found[f"{place} {source} {error} {name}"] = (source, error, failing, place)
    errors = [BACKWARD + error for error in IN_BACKWARD]
    if place != "ddp":
        errors += [where + error for where, error in itertools.product(COLLECTIVE, IN_COLLECTIVE)]
    for error in errors:
        found[f"{place} closure {error.replace(' ', '_')} 1,2"] = "closure", error, FAILING["1,2"], place
    return found


def main(arguments: list[str]) -> dict[str, list[Any]]:
    """Args: the places, and after a minus what to leave out, after a plus what to keep to, of the words of a case."""
    results: dict[str, list[Any]] = {}
    kept = {word[1:] for word in arguments if word.startswith("+")}
    for place in (word for word in arguments if word[0] not in "+-"):
        for index, (name, case) in enumerate(cases(place).items()):
            if any(f"-{word}" in arguments for word in name.split()) or not kept <= set(name.split()):
                continue
            try:
                found: Any = train(*case, failing_rank=index % dist.get_world_size())
            except Exception:  # reported to the test, which fails with it
                found = {"error": traceback.format_exc()}
            results[name] = from_all_ranks(found)
        for source in SOURCES[: 4 if place == "ddp" else 3]:
            results[f"bare {place} {source}"] = [train(source, "", {}, place, probed=False)]
    return results
