"""λ_max of a preconditioned Hessian by definition: float64, plain double backward, ARPACK. No code of warmctl's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor
from torch.optim import Optimizer


def top_eigenvalue(
    gradient: Sequence[Tensor], params: Sequence[Tensor], tol: float, root: Tensor | None = None
) -> float:
    """The largest algebraic eigenvalue of RHR, R = diag(root) or 1, to a relative `tol`.

    Args:
        gradient: of the loss with respect to `params`, its graph kept, both in float64.
        root: P^-½ [n].
    """
    sizes = [p.numel() for p in params]
    scale = torch.ones(sum(sizes), dtype=torch.float64) if root is None else root

    def product(vector: np.ndarray) -> np.ndarray:
        parts = (scale * torch.from_numpy(vector.ravel())).split(sizes)
        directions = [part.view_as(p) for part, p in zip(parts, params, strict=True)]
        image = torch.autograd.grad(gradient, params, directions, retain_graph=True)
        return (scale * torch.cat([part.flatten() for part in image])).numpy()

    operator = LinearOperator((sum(sizes),) * 2, matvec=product, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(sum(sizes))
    return float(eigsh(operator, k=1, which="LA", tol=tol, v0=start, return_eigenvectors=False)[0])


def preconditioner(optimizer: Optimizer, gradient: Sequence[Tensor]) -> Tensor:
    """P [n] of Adam's coming step, √v̂ + ε with `gradient` in v̂, in float64; 1 for SGD. One parameter group."""
    (group,) = optimizer.param_groups
    if "betas" not in group:
        return torch.ones(sum(g.numel() for g in gradient), dtype=torch.float64)
    beta, parts = group["betas"][1], []
    for p, g in zip(group["params"], gradient, strict=True):
        state = optimizer.state.get(p, {})
        past = state["exp_avg_sq"].double() if state else torch.zeros_like(g, dtype=torch.float64)
        steps = float(state["step"]) if state else 0.0
        second = (beta * past + (1 - beta) * g.double() ** 2) / (1 - beta ** (steps + 1))
        parts.append((second.sqrt() + group["eps"]).flatten())
    return torch.cat(parts)
