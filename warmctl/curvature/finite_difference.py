"""Hv as the difference of two gradients, (∇L(θ + εv) − ∇L(θ)) / ε, or the central one, (∇L(θ + εv) − ∇L(θ − εv)) / 2ε.

One gradient evaluation, given that at θ, or two. Works with every kernel, compiled or sharded; the top eigenvalue is
off by about 1e-3 of itself in float32 on smooth losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from warmctl.vectors import Vector, add_, local, scale_

STEP = 1e-4
"""‖ε v‖ / max(1, ‖θ‖/√(number of tensors)) in float32; other precisions by their square root, at most 5e-3.

A step relative to the whole ‖θ‖ grows with depth and is far too long for top eigenvectors, which live in a few
tensors.
"""
EPS = torch.finfo(torch.float32).eps


def is_precise(precision: float) -> bool:
    """Whether gradients of this precision are exact enough to be subtracted from each other."""
    return precision <= EPS


def step_length(step: float, length: float, size: float, precision: float, central: bool) -> float:
    """ε such that ‖εv‖ is step·max(1, size), in float32; 0 or nan where `length` is.

    Three times that for the central difference, whose error is of second order.

    Args:
        length: ‖v‖. size: root mean square of the norms of the parameters' tensors.
        precision: relative error of a gradient's entries, eps of its dtype.
    """
    if length == 0.0:
        return 0.0
    wanted = min(step * math.sqrt(precision / EPS), 5e-3) * max(1.0, size) * (3.0 if central else 1.0)
    return wanted / length if math.isfinite(length) else math.nan


def product(
    gradient: Callable[[], Vector],
    at_rest: Vector | None,
    params: Sequence[Tensor],
    vector: Vector,
    scale: Vector | None,
    step: float,
) -> Vector:
    """H(scale ∘ vector), a new vector; the parameters are moved in place meanwhile, and put back bit for bit.

    scale ∘ vector is never held beside the snapshot: that saves the memory of one vector.

    Args:
        gradient: ∇L at the parameters as they are when it is called.
        at_rest: ∇L(θ); None for the central difference.
        step: ε.
    """
    shards = [local(p.data) for p in params]  # .data: graphs that saved these parameters stay valid
    snapshot = [s.clone() for s in shards]
    try:
        _move(shards, vector, scale, step)
        difference = gradient()
        if at_rest is not None:
            return scale_(add_(difference, at_rest, -1.0), 1.0 / step)
        torch._foreach_copy_(shards, snapshot)
        _move(shards, vector, scale, -step)
        return scale_(add_(difference, gradient(), -1.0), 0.5 / step)
    finally:
        torch._foreach_copy_(shards, snapshot)  # copied back, never subtracted: bit for bit


@torch.no_grad()
def _move(shards: Vector, vector: Vector, scale: Vector | None, step: float) -> None:
    """shards += step · (scale ∘ vector) in place."""
    if scale is None:
        add_(shards, vector, step)
    else:
        torch._foreach_addcmul_(shards, vector, scale, value=step)
