"""The truth: λ_max of the dense Hessian of a small model, or without a matrix for a large one, all in float64."""

from __future__ import annotations

import copy
import math

import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from benchmarks.harness.data import Batch
from benchmarks.harness.oracle import preconditioner, top_eigenvalue
from benchmarks.tracks_sharpness.nets import loss_of


def double(net: nn.Module, batch: Batch) -> tuple[list[nn.Parameter], Tensor]:
    """Parameters of a copy in float64, and its loss."""
    twin = copy.deepcopy(net).double()
    x, y = batch
    return list(twin.parameters()), loss_of(twin, (x.double() if x.is_floating_point() else x, y))


def dense_hessian(net: nn.Module, batch: Batch, chunk: int = 256) -> Tensor:
    """[n, n] in float64, by double backward on a copy of the net, row by row."""
    rows = []
    with sdpa_kernel(SDPBackend.MATH):
        params, loss = double(net, batch)
        for gradient in torch.autograd.grad(loss, params, create_graph=True):
            units = torch.eye(gradient.numel(), dtype=torch.float64).view(-1, *gradient.shape)
            for unit in units.split(chunk):
                columns = torch.autograd.grad(
                    gradient, params, unit, retain_graph=True, is_grads_batched=True, materialize_grads=True
                )
                rows.append(torch.cat([column.flatten(1) for column in columns], 1))
    return torch.cat(rows)


def dense_top_eigenvalue(matrix: Tensor) -> float:
    """The largest algebraic one of a symmetric matrix [n, n]."""
    start = torch.ones(len(matrix), dtype=torch.float64).numpy()
    return float(eigsh(matrix.numpy(), k=1, which="LA", tol=1e-10, v0=start, return_eigenvectors=False)[0])


def true_sharpness(net: nn.Module, optimizer: Optimizer, batch: Batch) -> float:
    """λ_max(P^-½HP^-½) at the coming step, its gradient in `.grad`."""
    gradient = [p.grad for p in net.parameters() if p.grad is not None]
    root = preconditioner(optimizer, gradient).rsqrt()
    return dense_top_eigenvalue(root[:, None] * dense_hessian(net, batch) * root)


def reference(net: nn.Module, batch: Batch) -> float:
    """The largest eigenvalue in float64 to 1e-6, by products of its own."""
    with sdpa_kernel(SDPBackend.MATH):
        params, loss = double(net, batch)
        gradient = torch.autograd.grad(loss, params, create_graph=True)
    return top_eigenvalue(gradient, params, 1e-6)


def relative_error(found: float, truth: float) -> float:
    """|found − truth| / |truth|; a failed measurement is 100 % off."""
    return abs(found - truth) / abs(truth) if math.isfinite(found) else 1.0
