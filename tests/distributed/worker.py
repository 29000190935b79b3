"""Checks that need several processes, launched by test_distributed.py.

Every check runs on both ranks, on different halves of the same batches, and returns what each rank saw.
A two-rank gradient is the mean of the halves' gradients: that of the whole
batch, which one process can measure alone.
"""

from __future__ import annotations

import copy
import tempfile
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import load, save  # type: ignore[attr-defined]
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.launch import from_all_ranks
from tests.distributed.regression import (
    STEPS,
    Regressor,
    batch,
    build,
    full_weights,
    own,
    seen,
    train,
    truth,
    wrap,
)
from warmctl import AdaptiveWarmup, sharpness

Check = Callable[[], dict[str, Any]]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


def ddp(source: str, *, known: str, bare: bool = False, unused: bool = False, **options: Any) -> dict[str, Any]:
    """Train under DDP. `known` is the model the wrapper is given: the one inside, or DDP's."""
    model = build(unused=unused)
    expected = truth(model)
    if known == "inner":
        opt = wrap(model, model)
    outer = DistributedDataParallel(model.body if bare else model, find_unused_parameters=unused, **options)
    if known == "outer":
        opt = wrap(outer, outer)
    train(outer, opt, source)
    return seen(model, opt, expected)


@check
def ddp_inner_closure() -> dict[str, Any]:
    return ddp("closure", known="inner")


@check
def ddp_inner_captured() -> dict[str, Any]:
    return ddp("captured", known="inner")


@check
def ddp_outer_closure() -> dict[str, Any]:
    return ddp("closure", known="outer")


@check
def ddp_outer_captured() -> dict[str, Any]:
    return ddp("captured", known="outer")


@check
def ddp_bucket_view_unused() -> dict[str, Any]:
    return ddp("closure", known="outer", unused=True, gradient_as_bucket_view=True)


@check
def ddp_bucket_view_unused_captured() -> dict[str, Any]:
    return ddp("captured", known="inner", unused=True, gradient_as_bucket_view=True)


@check
def ddp_backward() -> dict[str, Any]:
    model = build()
    opt = wrap(model, model)
    outer = DistributedDataParallel(model.body)
    train(outer, opt, "backward")
    return seen(model, opt, truth(build()))


@check
def ddp_no_sync() -> dict[str, Any]:
    """Two micro-batches a step, reduced at the second only; the captured loss is the last one's."""
    model = build()
    bare = copy.deepcopy(model)
    outer = DistributedDataParallel(model)
    opt = wrap(model, outer)
    for step in range(STEPS):
        opt.zero_grad()
        for part in range(2):
            with outer.no_sync() if part == 0 else nullcontext():
                (outer(*own(step, part, 2))["loss"] / 2).backward()
        opt.step()
    last = [tuple(t[r * 16 + 8 : r * 16 + 16] for t in batch(0)) for r in range(2)]
    both = tuple(torch.cat(parts) for parts in zip(*last, strict=True))
    expected = sharpness(bare, lambda m, b: m(*b)["loss"], both, tol=1e-8).eigenvalue
    return seen(model, opt, expected)


def shard(model: Regressor, shape: tuple[int, ...] | None = None) -> Regressor:
    shape = shape or (dist.get_world_size(),)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copies", "parts")[-len(shape) :])
    for layer in model.body:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def monitor(place: Callable[[Regressor], nn.Module]) -> dict[str, Any]:
    """With control=False the weights are those of the bare optimizer, bit for bit."""
    runs, failures, probes = [], [], 0
    for monitored in (True, False):
        model = build()
        placed = place(model)
        base = torch.optim.SGD(placed.parameters(), lr=0.05, momentum=0.9)
        opt: Any = AdaptiveWarmup(base, placed, every=1, control=False) if monitored else base
        for source in ("captured", "closure"):
            train(placed, opt, source, range(3))
        runs.append(full_weights(placed))
        if monitored:
            probes = opt.metrics["probes"]
            failures = [row["reason"] for row in opt.history if "failed" in row["reason"]]
    return {"equal": runs[0] == runs[1], "probes": probes, "failures": failures}


@check
def monitor_ddp() -> dict[str, Any]:
    return monitor(lambda model: DistributedDataParallel(model, gradient_as_bucket_view=True))


@check
def monitor_fsdp() -> dict[str, Any]:
    return monitor(shard)


def fsdp(source: str) -> dict[str, Any]:
    model = build()
    expected = truth(model)
    shard(model)
    opt = wrap(model, model)
    train(model, opt, source)
    return seen(model, opt, expected)


@check
def fsdp_closure() -> dict[str, Any]:
    return fsdp("closure")


@check
def fsdp_captured() -> dict[str, Any]:
    return fsdp("captured")


@check
def fsdp_checkpoint() -> dict[str, Any]:
    """Saved after three steps by torch.distributed.checkpoint, loaded into another model, run on."""

    def fresh(seed: int) -> tuple[Regressor, AdaptiveWarmup]:
        model = shard(build(seed))
        base = torch.optim.AdamW(model.parameters(), lr=0.05)
        return model, AdaptiveWarmup(base, model, every=2)

    def state(model: Regressor, opt: AdaptiveWarmup) -> dict[str, Any]:
        weights, moments = get_state_dict(model, opt)
        return {"model": weights, "optimizer": moments}

    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    model, opt = fresh(0)
    train(model, opt, "closure", range(3))
    at_save = (opt.phase, opt.metrics["scale"])
    save(state(model, opt), checkpoint_id=Path(folder[0]))
    train(model, opt, "closure", range(3, 9))

    other, resumed = fresh(1)
    loaded = state(other, resumed)
    load(loaded, checkpoint_id=Path(folder[0]))
    set_state_dict(other, resumed, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    at_load = (resumed.phase, resumed.metrics["scale"])
    train(other, resumed, "closure", range(3, 9))
    decisions = [
        [
            (r["step"], r["scale"], repr(r["stability_ratio"]), r["probed"], r["overhead"])
            for r in o.history
            if int(str(r["step"])) > 3
        ]
        for o in (opt, resumed)
    ]
    return {
        "at_save": at_save,
        "at_load": at_load,
        "decisions": decisions,
        "equal": full_weights(model) == full_weights(other),
        "probed": sum(bool(row["probed"]) for row in resumed.history),
        "failures": [row["reason"] for row in opt.history if "failed" in str(row["reason"])],
    }


@check
def failure_on_one_rank() -> dict[str, Any]:
    """A probe that finds nan on one rank is a failure on both."""
    model = build()
    opt = wrap(model, model)
    outer = DistributedDataParallel(model)
    train(outer, opt, "captured", range(2))
    before = opt.metrics["scale"]
    assert opt.meter.last is not None
    found = opt.meter.last.times(float("nan") if dist.get_rank() == 1 else 0.5)
    opt.meter.prober.probe = lambda *arguments: found  # type: ignore[method-assign]
    train(outer, opt, "captured", range(2, 3))
    return {"before": before, "after": opt.metrics["scale"], "reason": opt.metrics["reason"]}


@check
def nan_on_one_rank() -> dict[str, Any]:
    """The first loss is nan on one rank alone; its gradient then is nan on both."""
    model = build()
    opt = wrap(model, model)
    outer = DistributedDataParallel(model)

    def closure() -> Tensor:
        opt.zero_grad()
        x, y = own(0)
        loss: Tensor = outer(x, y * torch.nan if dist.get_rank() == 1 else y)["loss"]
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    opt.step(closure)
    rows = list(opt.history)
    return {"decisions": [(r["scale"], r["phase"]) for r in rows], "probed": any(r["hvps"] for r in rows)}


@check
def join_in_warmup() -> dict[str, Any]:
    """A rank that runs out of batches would leave the others waiting."""
    model = build()
    opt, outer, said = wrap(model, model), DistributedDataParallel(model), ""
    before = full_weights(model)
    try:
        with outer.join():
            train(outer, opt, "captured", range(2 + dist.get_rank()))
    except RuntimeError as error:
        said = str(error)
    return {"said": said, "equal": full_weights(model) == before}


@check
def join_after_warmup() -> dict[str, Any]:
    model = build()
    opt = wrap(model, model, max_warmup=2, after="release")
    opt.param_groups[0]["lr"] = 0.05
    outer = DistributedDataParallel(model)
    train(outer, opt, "captured", range(3))
    with outer.join():
        train(outer, opt, "captured", range(3, 5 + dist.get_rank()))
    return {"phase": opt.phase, "steps": opt.metrics["step"], "weights": full_weights(model)}


def main(names: list[str]) -> dict[str, list[Any]]:
    results = {}
    for name in names or CHECKS:
        try:
            found = CHECKS[name]()
        except Exception:  # reported to the test, which fails with it
            found = {"error": traceback.format_exc()}
        results[name] = from_all_ranks(found)
    return results
