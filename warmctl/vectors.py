"""Arithmetic on parameter-shaped vectors: lists of tensors, one entry per parameter, any dtypes and devices.

Nothing here keeps a graph, and only `dot` and `square_norm` wait for the device (they return a Python float).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

Vector = list[Tensor]
FLOAT_EPS = torch.finfo(torch.float32).eps


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds: itself, or the local shard of a DTensor, same storage."""
    shard: Tensor = getattr(tensor, "_local_tensor", tensor)
    return shard


def locals_of(tensors: Sequence[Tensor]) -> Vector:
    return [local(tensor.detach()) for tensor in tensors]


def dense_gradient(param: Tensor) -> Tensor:
    """This process's part of `.grad`, dense, not a copy if it need not be; zeros where there is none."""
    if param.grad is None:
        return torch.zeros_like(local(param.detach()))
    grad = local(param.grad.detach())
    return grad.to_dense() if grad.layout != torch.strided else grad


def as_copied(params: Sequence[Tensor], copy: Vector) -> Vector:
    """The gradients where they are still what was copied of them, so that the copy can go, else the copy.

    A write through `.data` shows in no version counter. Waits for the device.
    """
    present = [dense_gradient(p) for p in params]
    return present if all(map(torch.equal, present, copy)) else copy


def copied_gradients(params: Sequence[Tensor]) -> Vector | None:
    """`dense_gradient` of each, as copies; None where there is no memory for them."""
    try:
        return [owned(dense_gradient(param)) for param in params]
    except (torch.OutOfMemoryError, MemoryError):
        return None


def strided(gradient: Tensor) -> Tensor:
    """A gradient itself, or the values of a sparse one."""
    return gradient if gradient.layout == torch.strided else gradient.coalesce().values()


def owned(tensor: Tensor) -> Tensor:
    """A copy that may be written to: derivatives can be expanded scalars, or the very vector that went in."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def wide(tensor: Tensor) -> Tensor:
    """In float64, or float32 on Apple's GPUs, which have no more."""
    return tensor.float() if tensor.device.type == "mps" else tensor.double()


def dot(a: Sequence[Tensor], b: Sequence[Tensor], weights: Sequence[float] | None = None) -> float:
    """Σ_i wᵢ aᵢ·bᵢ as a float; each tensor is summed in its dtype, at least float32, the sum in float64."""
    if not a:
        return 0.0
    total = squares(a) if a is b or all(map(operator.is_, a, b)) else products(a, b)
    if weights is not None:
        total = total * torch.tensor(weights, dtype=total.dtype, device=total.device)
    return float(total.sum())


@torch.no_grad()
def squares(a: Sequence[Tensor]) -> Tensor:
    """aᵢ·aᵢ, `wide` of shape (len(a),), by one pass over each tensor: half the cost of a product."""
    if any(dtype.itemsize < 4 for dtype in {x.dtype for x in a}):
        return products(a, a)
    return gathered(torch._foreach_norm(list(a))).square()


def square_norm(a: Sequence[Tensor]) -> float:
    """Σᵢ aᵢ·aᵢ of tensors on the host, where reading a number costs less than arithmetic on small tensors."""
    if any(dtype.itemsize < 4 for dtype in {x.dtype for x in a}):
        return float(products(a, a).sum())
    return sum(norm * norm for norm in map(float, torch._foreach_norm(list(a))))


@torch.no_grad()
def products(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """aᵢ·bᵢ, `wide` of shape (len(a),)."""
    return gathered([_dot(x, y) for x, y in zip(a, b, strict=True)])


def gathered(scalars: Sequence[Tensor]) -> Tensor:
    """Scalars of any dtypes and devices as one `wide` tensor where the first is."""
    if len({s.dtype for s in scalars}) > 1 or len({s.device for s in scalars}) > 1:
        scalars = [wide(s.to(scalars[0].device)) for s in scalars]
    return wide(torch.stack(list(scalars)))


def _dot(x: Tensor, y: Tensor) -> Tensor:
    dtype = x.dtype
    if dtype != y.dtype or dtype.itemsize < 4:
        dtype = torch.promote_types(torch.promote_types(dtype, y.dtype), torch.float32)
        x, y = x.to(dtype), y.to(dtype)
    return torch.dot(x.flatten(), y.flatten())


@torch.no_grad()
def random_like(template: Sequence[Tensor], seed: int) -> Vector:
    """Standard normal vector from generators of its own: the global random streams are not touched."""
    generators = {t.device: torch.Generator(t.device).manual_seed(seed) for t in template}
    return [torch.randn(t.shape, dtype=t.dtype, device=t.device, generator=generators[t.device]) for t in template]


@torch.no_grad()
def add_(y: Vector, x: Sequence[Tensor], alpha: float = 1.0) -> Vector:
    """y += alpha·x in place."""
    if y:
        torch._foreach_add_(y, list(x), alpha=alpha)
    return y


@torch.no_grad()
def significant(gradient: Sequence[Tensor], largest: float) -> Vector:
    """True where an entry stands above the rounding of the gradient: 4 eps of `largest`, its largest entry.

    Biases before batch norm and of attention keys have no gradient but rounding, and an adaptive D is huge
    there. H is zero there too, but its finite difference is noise: such entries in D^½ gave ratios 100 times
    too high.
    """
    return [g.abs() > 4 * min(torch.finfo(g.dtype).eps, FLOAT_EPS) * largest for g in gradient]


@torch.no_grad()
def scale_(y: Vector, factor: float) -> Vector:
    """y *= factor in place."""
    if y:
        torch._foreach_mul_(y, factor)
    return y


@torch.no_grad()
def combine(vectors: Sequence[Vector], coefficients: Sequence[float]) -> Vector:
    """Σ_j cⱼ vⱼ as a new vector."""
    total = [torch.zeros_like(t) for t in vectors[0]]
    for vector, coefficient in zip(vectors, coefficients, strict=True):
        add_(total, vector, float(coefficient))
    return total
