"""The norm of a linear map that is known as a function, by Lanczos on AᵀA in float64, without a matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from warmctl.curvature.eigen import lanczos
from warmctl.vectors import Vector, wide

STEPS = 100
TOL = 1e-6
"""Of ‖A‖², relative."""
TOL_OF_JACOBIANS = 1e-3
"""Theirs: products cost the most there, and bounds that they stand in are loose by far more."""


def operator_norm(linear: Callable[[Tensor], Tensor], like: Tensor) -> float:
    """‖A‖₂ of x ↦ `linear`(x) for x of the shape of `like`.

    Cost: at most 100 applications of A and of its adjoint, which autograd gives.
    """

    def gram(flat: Tensor) -> Tensor:
        with torch.enable_grad():
            x = flat.view(like.shape).requires_grad_()
            y = linear(x)
            (back,) = torch.autograd.grad(y, x, y.detach())
        return back.flatten()

    return _norm(gram, torch.zeros_like(wide(like.detach())).flatten(), TOL)


def jacobian_norm(function: Callable[[Vector], Tensor], at: Vector) -> float:
    """‖J‖₂ of x ↦ `function`(x) at `at`, up to 0.05 % more. Called once and kept; autograd differentiates it twice.

    Cost: at most 100 times its backward pass, and that of its backward pass.
    """
    sizes = [tensor.numel() for tensor in at]
    with torch.enable_grad():
        x = torch.cat([tensor.detach().flatten() for tensor in at]).requires_grad_()
        parts = [part.view_as(tensor) for part, tensor in zip(x.split_with_sizes(sizes), at, strict=True)]
        y = function(parts)
        dual = torch.zeros_like(y, requires_grad=True)
        (adjoint,) = torch.autograd.grad(y, x, dual, create_graph=True)  # Jᵀ·dual, whose own adjoint is J

    def gram(flat: Tensor) -> Tensor:
        (product,) = torch.autograd.grad(adjoint, dual, flat, retain_graph=True)
        (back,) = torch.autograd.grad(y, x, product, retain_graph=True)
        return back

    return _norm(gram, x.detach(), TOL_OF_JACOBIANS)


def matrix_norm(matrix: Tensor) -> float:
    """‖A‖₂ of a matrix."""
    return float(torch.linalg.matrix_norm(wide(matrix.detach()), 2)) if matrix.numel() else 0.0


def _norm(gram: Callable[[Tensor], Tensor], like: Tensor, tol: float) -> float:
    """A Ritz value is a lower bound; its residual is added, so that what comes out can stand in an upper one."""
    found = lanczos(_Gram(gram, [like]), tol=tol, steps=STEPS)
    return math.sqrt(max(found.eigenvalue + found.residual, 0.0))


@dataclass
class _Gram:
    """AᵀA on flat tensors, as the eigensolver takes it."""

    product: Callable[[Tensor], Tensor]
    template: Vector

    def matvec(self, vector: Vector) -> Vector:
        return [self.product(vector[0].detach())]

    def inner(self, a: Vector, b: Vector) -> float:
        return float(torch.dot(a[0], b[0]))
