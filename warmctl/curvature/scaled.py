"""D^½ A D^½: an operator in the coordinates in which an optimizer's step is plain gradient descent."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from warmctl.curvature.operators import HessianOperator
from warmctl.vectors import Vector, scale_


class ScaledOperator:
    """D^½ A D^½ for a diagonal D ≥ 0, plus an optional diagonal shift inside: D^½ (±A + diag(shift)) D^½.

    It is symmetric and has the spectrum of D·A, which is not.

    Args:
        root: D^½, one tensor per parameter.
        shift: the coupled weight decay of each tensor, which joins the Hessian.
        sign: −1 where the optimizer maximises.
    """

    def __init__(self, operator: HessianOperator, root: Vector, shift: Sequence[float] = (), sign: float = 1.0) -> None:
        self.operator, self.root, self.sign = operator, root, sign
        self.shift = list(shift) or [0.0] * len(root)

    @property
    def template(self) -> Vector:
        return self.root

    def inner(self, a: Vector, b: Vector) -> float:
        return self.operator.inner(a, b)

    def matvec(self, vector: Vector) -> Vector:
        if not vector:
            return []
        product = self.operator.matvec(vector, self.root)
        if self.sign != 1.0:
            scale_(product, self.sign)
        if any(self.shift):
            direction = torch._foreach_mul(vector, self.root)
            torch._foreach_mul_(direction, self.shift)
            torch._foreach_add_(product, direction)
        torch._foreach_mul_(product, self.root)
        return product
