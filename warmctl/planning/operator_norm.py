"""The norm of a linear map that is known as a function, by Lanczos on AᵀA in float64: exact to rounding, no matrix."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from warmctl.curvature.eigen import lanczos
from warmctl.vectors import Vector, dot, wide

TOL, STEPS = 1e-6, 100


def operator_norm(linear: Callable[[Tensor], Tensor], like: Tensor) -> float:
    """‖A‖₂ of x ↦ `linear`(x) for x of the shape of `like`.

    A Ritz value is a lower bound; its residual is added, so that what comes out can stand in an upper one.

    Cost: at most 100 applications of A and of its adjoint, which autograd gives.
    """
    gram = _Gram(linear, torch.zeros_like(wide(like.detach())))
    found = lanczos(gram, tol=TOL, steps=STEPS)
    return math.sqrt(max(found.eigenvalue + found.residual, 0.0))


def matrix_norm(matrix: Tensor) -> float:
    """‖A‖₂ of a matrix."""
    return float(torch.linalg.matrix_norm(wide(matrix.detach()), 2)) if matrix.numel() else 0.0


class _Gram:
    """AᵀA, as the eigensolver takes it."""

    def __init__(self, linear: Callable[[Tensor], Tensor], like: Tensor) -> None:
        self.linear, self.template = linear, [like]
        self.inner = dot

    def matvec(self, vector: Vector) -> Vector:
        with torch.enable_grad():
            x = vector[0].detach().requires_grad_()
            y = self.linear(x)
            (back,) = torch.autograd.grad(y, x, y.detach())
        return [back]
