"""Checks of test_on_ranks.py, on each of its two ranks: DDP, FSDP2, tensor parallelism, what a loop is built of."""

from __future__ import annotations

import copy
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import load, save  # type: ignore[attr-defined]
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.launch import from_all_ranks
from tests.distributed.regression import Regressor, batch, build, full_weights, own
from tests.integrations import stacks, test_unmodified_scripts as scripts
from tests.integrations.helpers import decisions, failures
from warmctl import AdaptiveWarmup, sharpness

LAYOUTS = "DDP", "FSDP2", "tensor parallel"
UNDER_DDP = [name for name in stacks.STACKS if name != "plain PyTorch"]


class Script:
    """A training in one layout, by the model's own loss."""

    def __init__(
        self,
        name: str,
        *,
        wrapped: bool = True,
        low: bool = False,
        seed: int = 0,
        base: Any = torch.optim.AdamW,
        lr: float = 0.03,
        **options: Any,
    ) -> None:
        self.name, self.low, self.model = name, low, build(seed).float()
        self.called: Any = self.model
        if name == "FSDP2":
            policy = MixedPrecisionPolicy(torch.bfloat16) if low else MixedPrecisionPolicy()
            for layer in (*self.model.body, self.model):
                if isinstance(layer, (nn.Linear, Regressor)):
                    fully_shard(layer, mp_policy=policy)
        elif name == "tensor parallel":
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            parallelize_module(self.model, mesh, {"body.0": ColwiseParallel(), "body.2": RowwiseParallel()})
        else:
            self.called = DistributedDataParallel(self.model)
        made = base(self.model.parameters(), lr)
        self.opt: Any = AdaptiveWarmup(made, self.model, **options) if wrapped else made

    def last_of(self, part: int, parts: int) -> Any:
        """Reduces gradients with the last micro-batch only."""
        last = part == parts - 1
        if self.name == "FSDP2":
            self.called.set_requires_gradient_sync(last)
        elif self.name != "tensor parallel" and not last:
            return self.called.no_sync()
        return nullcontext()

    def train(self, steps: range, parts: int = 1) -> Script:
        for step in steps:
            self.opt.zero_grad()
            for part in range(parts):
                x, y = own(step % 8, part, parts) if self.name != "tensor parallel" else _whole(step % 8, part, parts)
                autocast = self.low and self.name != "FSDP2"
                with self.last_of(part, parts), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    (self.called(x.float(), y.float())["loss"] / parts).backward()
            self.opt.step()
        return self

    @property
    def loss(self) -> float:
        with torch.no_grad():
            return sum(float(self.called(*(t.float() for t in batch(step)))["loss"]) for step in range(8)) / 8

    @property
    def seen(self) -> dict[str, Any]:
        return seen(self.model, self.opt)


def seen(model: nn.Module, opt: AdaptiveWarmup) -> dict[str, Any]:
    """What the ranks must agree on, and what is held against another measurement."""
    rows: list[dict[str, Any]] = list(opt.history)
    return {
        "decisions": [(row["scale"], row["stability_ratio"], row["phase"]) for row in rows],
        "weights": full_weights(model)[:500],
        "failures": failures(rows),
        "log": opt.scalars(),
        "sharpness": next(row["sharpness"] for row in rows if row["probed"]),
        "ratio": rows[-1]["stability_ratio"],
    }


def _whole(step: int, part: int, parts: int) -> tuple[Tensor, Tensor]:
    x, y = batch(step)
    return x.chunk(parts)[part], y.chunk(parts)[part]


def level(name: str) -> list[float]:
    bare, ours = Script(name, wrapped=False), Script(name)
    return [bare.loss, *(script.train(range(100)).loss for script in (bare, ours))]


def accumulated(name: str) -> dict[str, Any]:
    script = Script(name, base=torch.optim.SGD, lr=8.0, every=1, probe_steps=14).train(range(2), 2)
    last = _whole(0, 1, 2) if name == "tensor parallel" else last_of_all_ranks(0, 2)
    expected = sharpness(build(), lambda m, b: m(*b)["loss"], last, tol=1e-8).eigenvalue
    return script.seen | {"expected": expected}


def last_of_all_ranks(step: int, parts: int) -> tuple[Tensor, ...]:
    """The last micro-batches of a step, of every rank."""
    ranks = dist.get_world_size()
    return tuple(torch.cat(t.chunk(ranks * parts)[parts - 1 :: parts]) for t in batch(step))


def resumed(name: str) -> dict[str, Any]:
    whole = Script(name, every=2).train(range(3))
    phase = whole.opt.phase
    again = Script(name, every=2, seed=1)
    if name == "DDP":
        model, optimizer = copy.deepcopy((whole.model.state_dict(), whole.opt.state_dict()))
        whole.train(range(3, 7))
        again.model.load_state_dict(model)
        again.opt.load_state_dict(optimizer)
    else:
        folder = [tempfile.mkdtemp()]
        dist.broadcast_object_list(folder)
        save(_state(whole), checkpoint_id=Path(folder[0]))
        whole.train(range(3, 7))
        loaded = _state(again)
        load(loaded, checkpoint_id=Path(folder[0]))
        set_state_dict(again.model, again.opt, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    again.train(range(3, 7))
    return {
        "phase": phase,
        "equal": full_weights(whole.model) == full_weights(again.model),
        "decisions": [decisions(list(whole.opt.history))[3:], decisions(list(again.opt.history))],
    }


def _state(script: Script) -> dict[str, Any]:
    weights, moments = get_state_dict(script.model, script.opt)
    return {"model": weights, "optimizer": moments}


def nanogpt() -> dict[str, Any]:
    """Its script switches the reduction of gradients by an attribute, not by `no_sync`."""
    model, opt, *_ = scripts.nanogpt(AdaptiveWarmup, learning_rate=0.3, outer=DistributedDataParallel)
    return seen(model, opt)


def main(arguments: list[str]) -> dict[str, list[Any]]:
    found: dict[str, Any] = {"nanoGPT's script": nanogpt()}
    for name in LAYOUTS:
        found[f"{name}: level"] = level(name)
        if name != "FSDP2":  # see tests/distributed
            found[f"{name}: resumed"] = resumed(name)
        found[f"{name}: accumulated"] = accumulated(name)
        for low in (True, False):
            found[f"{name}: {'low' if low else 'full'} precision"] = Script(name, every=1, low=low).train(range(3)).seen
    for name in UNDER_DDP:
        script = stacks.Script(name, outer=DistributedDataParallel, every=1).train(range(3))
        found[name] = seen(script.model, script.opt)
    return {name: from_all_ranks(value) for name, value in found.items()}
