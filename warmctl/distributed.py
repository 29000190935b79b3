"""What all ranks must agree on: gradients averaged over ranks, inner products over shards, one decision.

Without an initialised process group, or with a single rank, everything here does nothing.

Inside a `transaction` every collective begins with a meeting of all ranks, at which one that has failed is missed: none
waits for what another will never send.
"""

from __future__ import annotations

import math
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor, nn

from warmctl.vectors import Vector, dot, local, squares

FLAT = (
    "{} the parameters in flat shards, which are not those of the model: no curvature can be measured there. Use FSDP2 "
    "(torch.distributed.fsdp.fully_shard, then AdaptiveWarmup; in Accelerate fsdp_version 2) or DDP"
)


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_sharded(params: Sequence[Tensor]) -> bool:
    """Whether a parameter is a DTensor, as under FSDP2 or tensor parallelism."""
    return any(hasattr(p, "_local_tensor") for p in params)


def check_layout(model: nn.Module, params: Sequence[Tensor]) -> None:
    """Raise RuntimeError where the optimizer holds flat shards in place of the model's own parameters.

    Some that are not the model's are no such sign; nor is FSDP2's model while its parameters are gathered.
    """
    own = {id(p) for p in model.parameters()}
    flat = any(getattr(p, "_fsdp_flattened", False) for p in params)  # torch's own mark
    if flat or (params and own.isdisjoint(map(id, params)) and not is_sharded(params)):
        raise RuntimeError(
            FLAT.format("FSDP1 (FullyShardedDataParallel) holds" if flat else "DeepSpeed, or the like, holds")
        )


class OnAnotherRank(RuntimeError):
    """What this rank was about failed on another one, or took another course there."""


class _Apart(BaseException):
    """The ranks are apart, until all are back at transaction number `depth`. No handler on the way may keep it."""

    def __init__(self, depth: int, rank: int | None) -> None:
        super().__init__("it took another course on another rank" if rank is None else f"it failed on rank {rank}")
        self.depth = depth


class _Meeting:
    """Where the ranks of one outermost transaction meet.

    Attributes:
        depth: of the innermost transaction; the outermost has 0.
        evaluations: of the loss begun so far, a part of every place.
        apart: what has been raised, for code that kept it.
    """

    def __init__(self, device: torch.device) -> None:
        self.depth, self.evaluations = -1, 0
        self.apart: _Apart | None = None
        self._sent = torch.zeros(4, dtype=torch.int64, device=device)  # there is no memory for it when it runs out

    def at(self, place: str, failed: bool = False) -> None:
        """All ranks are at this place, none has failed; else raises `_Apart`, on all of them."""
        if self.apart is not None:
            raise self.apart
        self.apart = _Apart(0, None)  # unless there is an answer
        here = zlib.crc32(f"{place} {self.evaluations} {self.depth}".encode())
        self._sent.copy_(torch.tensor([here, -here, -self.depth, (dist.get_rank() + 1) * failed]))
        dist.all_reduce(self._sent, dist.ReduceOp.MAX)
        high, low, shallowest, rank = self._sent.tolist()
        self.apart = None
        if rank or high != -low:
            self.apart = _Apart(-shallowest if rank else 0, rank - 1 if rank else None)
            raise self.apart

    def back(self, depth: int) -> None:
        """All ranks are at the end of a transaction again; raises `_Apart` where they went apart outside of it."""
        assert self.apart is not None
        if self.apart.depth < depth:
            raise self.apart
        self.apart = None


class _Here(threading.local):
    meeting: _Meeting | None = None


_here = _Here()


@contextmanager
def transaction(device: torch.device) -> Iterator[None]:
    """What is inside is done on every rank or fails on every rank. To be entered by all ranks.

    Where it fails, with an Exception, that goes on; the other ranks raise OnAnotherRank. Transactions nest: after the
    inner one has failed all ranks go on in the outer one.

    Cost: one small collective for each collective inside, and one at the end.
    """
    if world_size() == 1:
        yield
        return
    meeting = _here.meeting = _here.meeting or _Meeting(device)
    meeting.depth += 1
    depth = meeting.depth
    try:
        try:
            yield
            meeting.at("the end")
        except Exception:
            try:
                meeting.at("", failed=True)
            except _Apart:
                meeting.back(depth)
            raise
    except _Apart as apart:
        meeting.back(depth)
        raise OnAnotherRank(str(apart)) from None
    finally:
        meeting.depth -= 1
        if depth == 0:
            _here.meeting = None


def meet(place: str) -> None:
    """Before a collective inside a transaction: go on once every rank has come to the same place."""
    if _here.meeting is not None:
        _here.meeting.at(place)


def meeting(place: str) -> Callable[[], None]:
    """`meet`, to be called in whatever thread: a device's backward pass has one of its own."""
    here = _here.meeting
    return (lambda: None) if here is None else partial(here.at, place)


def begin_evaluation() -> None:
    """What follows inside a transaction belongs to another evaluation of the loss."""
    if _here.meeting is not None:
        _here.meeting.evaluations += 1


def everywhere(here: bool, device: torch.device) -> bool:
    """Whether it is so on every rank."""
    return here if world_size() == 1 else agree([float(here)], device)[0] == 1.0


@torch.no_grad()
def average_(vector: Vector) -> None:
    """Mean over ranks in place, one collective per dtype and device.

    Right whether or not DDP has already averaged: the mean of equal values is that value.
    """
    world = world_size()
    if world == 1:
        return
    kinds = dict.fromkeys((t.dtype, t.device) for t in vector)
    grouped = [[t for t in vector if (t.dtype, t.device) == kind] for kind in kinds]
    flats = [torch.cat([t.flatten() for t in members]) for members in grouped]  # may run out of memory: before meeting
    meet("gradient")
    for members, flat in zip(grouped, flats, strict=True):
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
        meet("average")
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
    meet("largest")
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
