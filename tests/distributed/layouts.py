"""More checks of worker.py: FSDP2 by `backward(loss)`, FSDP1, layers split between ranks."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.worker import STEPS, batch, build, check, main as main, own, seen, shard, truth, wrap
from warmctl import AdaptiveWarmup


@check
def fsdp_backward() -> dict[str, Any]:
    """The loss outside of the model, on its graph alone: measured along the update, with the next gradient."""
    model = shard(build())
    opt = AdaptiveWarmup(torch.optim.SGD(model.parameters(), lr=8.0, momentum=0.9), model)
    for step in range(80):
        x, y = own(step % 4)
        opt.zero_grad()
        opt.backward(nn.functional.mse_loss(model(x, None)["prediction"], y))
        opt.step()
    rows = list(opt.history)
    return {
        "scales": [row["scale"] for row in rows],
        "losses": [row["loss"] for row in rows],
        "probes": opt.metrics["probes"],
        "failures": [row["reason"] for row in rows if "failed" in row["reason"]],
    }


def uneven_accumulation(source: str) -> dict[str, Any]:
    """One rank has another number of micro-batches than the other, and than at the step before."""
    model = build()
    outer = DistributedDataParallel(model)
    opt = AdaptiveWarmup(torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9), model, budget=0.05)
    for step in range(60):
        opt.zero_grad()
        parts = 1 + (1 + step % 4 if dist.get_rank() else 0)
        for part in range(parts):
            x, y = own(step, part % 2, 2)
            with nullcontext() if part == parts - 1 else outer.no_sync():
                if source == "captured":
                    (outer(x, y)["loss"] / parts).backward()
                else:
                    opt.backward(nn.functional.mse_loss(outer(x, None)["prediction"], y) / parts)
        opt.step()
    return seen(model, opt, truth(build()))


@check
def ddp_uneven_captured() -> dict[str, Any]:
    return uneven_accumulation("captured")


@check
def ddp_uneven_backward() -> dict[str, Any]:
    return uneven_accumulation("backward")


@check
def fsdp1() -> dict[str, Any]:
    """Refused, whichever comes first."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    said = []
    for original in (False, True):
        outer = FullyShardedDataParallel(build(), use_orig_params=original, device_id=torch.device("cpu"))
        try:
            AdaptiveWarmup(torch.optim.SGD(outer.parameters(), lr=0.1), outer)
        except RuntimeError as error:
            said.append(str(error))
    model = build()
    opt = AdaptiveWarmup(torch.optim.SGD(model.parameters(), lr=0.1), model)
    outer = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    outer(*own(0))["loss"].backward()
    try:
        opt.step()
    except RuntimeError as error:
        said.append(str(error))
    return {"said": said}


@check
def tensor_parallel() -> dict[str, Any]:
    """Both ranks see the whole batch; the layers are split between them."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = build()
    expected = truth(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {"body.0": ColwiseParallel(), "body.2": RowwiseParallel()}
    parallelize_module(model, mesh, plan)
    opt = wrap(model, model)
    for step in range(STEPS):
        opt.zero_grad()
        model(*batch(step))["loss"].backward()
        opt.step()
    return seen(model, opt, expected)
