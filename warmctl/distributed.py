"""What all ranks must agree on: gradients averaged over ranks, inner products over shards, one decision.

Without an initialised process group, or with a single rank, everything here does nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor

from warmctl.vectors import Vector, dot, local, squares


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_sharded(params: Sequence[Tensor]) -> bool:
    """Whether a parameter is a DTensor, as under FSDP2 or tensor parallelism."""
    return any(hasattr(p, "_local_tensor") for p in params)


@torch.no_grad()
def average_(vector: Vector) -> None:
    """Mean over ranks in place, one collective per dtype and device.

    Right whether or not DDP has already averaged: the mean of equal values is that value.
    """
    world = world_size()
    if world == 1:
        return
    for kind in dict.fromkeys((t.dtype, t.device) for t in vector):
        members = [t for t in vector if (t.dtype, t.device) == kind]
        flat = torch.cat([t.flatten() for t in members])
        dist.all_reduce(flat)
        flat /= world
        parts = torch.split(flat, [t.numel() for t in members])
        torch._foreach_copy_(members, [part.view_as(t) for part, t in zip(parts, members, strict=True)])


def averager(params: Sequence[Tensor]) -> Callable[[Vector], None] | None:
    """What averages a gradient over ranks; None for sharded parameters, whose gradients are averages already."""
    return None if is_sharded(params) else average_


def average(values: Tensor) -> Tensor:
    """Mean over ranks, the same on every rank to the last bit. One small collective; waits for nothing."""
    if world_size() > 1:
        dist.all_reduce(values)
        values /= world_size()
    return values


def agree(values: Sequence[float], device: torch.device) -> list[float]:
    """`average` of numbers."""
    mean: list[float] = average(torch.tensor(values, dtype=torch.float64, device=device)).tolist()
    return mean


def norms(params: Sequence[Tensor], vector: Vector) -> list[float]:
    """The norm of each tensor of a parameter-shaped vector, over all its shards."""
    found: list[float] = squares(vector).tolist()
    if is_sharded(params):
        weighted = [square * weight for square, weight in zip(found, _shard_weights(params), strict=True)]
        found = [mean * world_size() for mean in agree(weighted, local(params[0]).device)]
    return [math.sqrt(square) for square in found]


def largest(value: float, device: torch.device) -> float:
    """Maximum over ranks."""
    if world_size() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return float(tensor)


def inner_product(params: Sequence[Tensor]) -> Callable[[Vector, Vector], float]:
    """The inner product of parameter-shaped vectors: local, or summed over the shards of all ranks."""
    if not is_sharded(params):
        return dot
    weights, device = _shard_weights(params), local(params[0]).device

    def inner(a: Vector, b: Vector) -> float:
        return agree([dot(a, b, weights)], device)[0] * world_size()

    return inner


def sum_over_shards(params: Sequence[Tensor], values: Tensor) -> Tensor:
    """Sum of one value a parameter, of this process's part of it, such that the mean over ranks is the global sum.

    That is right for values that add up over shards, as squares do; of replicas the mean is any of them. Waits for
    nothing.
    """
    world = world_size()
    if world == 1 or not is_sharded(params):
        return values.sum()
    total, start = values.new_zeros(()), 0
    for weight, run in groupby(_shard_weights(params)):  # one run, mostly
        end = start + sum(1 for _ in run)
        total += values[start:end].sum() * (weight * world)
        start = end
    return total


def _shard_weights(params: Sequence[Tensor]) -> list[float]:
    """Weights with which local inner products add up, over all ranks, to the global one.

    A shard counts once, a copy 1/n times where n ranks hold it.
    """
    world = world_size()
    weights = []
    for p in params:
        mesh, placements = getattr(p, "device_mesh", None), getattr(p, "placements", ())
        if mesh is None:
            weights.append(1 / world)
            continue
        copies = math.prod(mesh.size(i) for i, placement in enumerate(placements) if placement.is_replicate())
        weights.append(1 / (copies * (world // mesh.size())))
    return weights
