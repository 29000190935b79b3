"""Signals and decisions on several ranks, launched by test_signals.py.

save FOLDER         train from the start by DDP, FSDP2 and both at once; save the sharded run in mid-warmup
load FOLDER ...     go on with what each of these numbers of ranks has saved
"""

from __future__ import annotations

from collections.abc import Callable
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
from tests.distributed.regression import Regressor, build, own
from warmctl import AdaptiveWarmup
from warmctl.stability.signals import Signals

STEPS, SAVED_AT, LATER = 6, 4, 8


def rule(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.03)


def watched(model: nn.Module, known: nn.Module) -> tuple[AdaptiveWarmup, list[list[float]]]:
    """The wrapper, and the signals of each of its steps to come."""
    opt, rows = AdaptiveWarmup(rule(model), known, control=False, every=100), []
    read = opt._signals.read

    def noted(*arguments: Any, **options: Any) -> Signals:
        found = read(*arguments, **options)
        rows.append([found.loss, found.norm, found.end_slope])
        return found

    opt._signals.read = noted  # type: ignore[method-assign]
    return opt, rows


def train(
    model: nn.Module, opt: AdaptiveWarmup, steps: range, rows: Callable[[int], tuple[Tensor, Tensor]] = own
) -> None:
    for step in steps:
        x, y = rows(step)

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            opt.zero_grad()
            loss: Tensor = model(x, y)["loss"]
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        opt.step(closure)


def controlled(model: nn.Module) -> AdaptiveWarmup:
    return AdaptiveWarmup(rule(model), model, every=1, probe_steps=2)


def decisions(opt: AdaptiveWarmup) -> list[list[float]]:
    """Of each step: the scale, whether it is warmup, the representation change, the stability ratio."""
    rows: list[dict[str, Any]] = list(opt.history)
    names = "representation_change", "stability_ratio"
    return [[row["scale"], float(row["phase"] == "warmup"), *(row[name] for name in names)] for row in rows]


def sharded(seed: int = 0, copies: int = 1) -> Regressor:
    """By FSDP2 over all ranks, or over each of `copies` groups of them."""
    world = dist.get_world_size()
    if copies == 1:
        mesh = init_device_mesh("cpu", (world,))
    else:
        mesh = init_device_mesh("cpu", (copies, world // copies), mesh_dim_names=("replicate", "shard"))
    model = build(seed)
    for layer in model.body:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def trained(name: str) -> list[list[float]]:
    model = build() if name == "ddp" else sharded(copies=2 if name == "hybrid" else 1)
    outer = DistributedDataParallel(model) if name == "ddp" else model
    opt, rows = watched(model, outer)
    train(outer, opt, range(STEPS))
    return rows


def state(model: nn.Module, opt: AdaptiveWarmup) -> dict[str, Any]:
    weights, moments = get_state_dict(model, opt)
    return {"model": weights, "optimizer": moments}


def saved(folder: Path) -> list[list[float]]:
    model = sharded()
    opt, rows = watched(model, model)
    train(model, opt, range(SAVED_AT))
    save(state(model, opt), checkpoint_id=folder)
    train(model, opt, range(SAVED_AT, LATER))
    return rows[SAVED_AT:]


def loaded(folder: Path) -> list[list[float]]:
    model = sharded(seed=1)
    opt, rows = watched(model, model)
    found = state(model, opt)
    load(found, checkpoint_id=folder)
    set_state_dict(model, opt, model_state_dict=found["model"], optim_state_dict=found["optimizer"])
    train(model, opt, range(SAVED_AT, LATER))
    return rows


def decided(folder: Path, what: str) -> list[list[float]]:
    """By FSDP2, saved in mid-warmup; or from there."""
    model = sharded(seed=int(what == "load"))
    opt = controlled(model)
    if what == "save":
        train(model, opt, range(SAVED_AT))
        save(state(model, opt), checkpoint_id=folder)
    else:
        found = state(model, opt)
        load(found, checkpoint_id=folder)
        set_state_dict(model, opt, model_state_dict=found["model"], optim_state_dict=found["optimizer"])
    train(model, opt, range(SAVED_AT, LATER))
    return decisions(opt)


def main(arguments: list[str]) -> list[dict[str, Any]]:
    what, folders = arguments[0], [Path(name) for name in arguments[1:]]
    if what == "load":
        return from_all_ranks(
            {f.name: {"decided": decided(f / "decided", what), "later": loaded(f / "signals")} for f in folders}
        )
    folder = folders[0]
    found = {name: trained(name) for name in ("ddp", "fsdp", "hybrid")}
    return from_all_ranks(found | {"decided": decided(folder / "decided", what), "later": saved(folder / "signals")})
