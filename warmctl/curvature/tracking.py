"""One probe along an eigenvector that is tracked from probe to probe: the value now, and the vector a step further on.

Where the Hessian moves slowly, two products here do what a run of Lanczos from cold needs many for.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from warmctl.curvature.eigen import EigenResult, SymmetricOperator, lanczos
from warmctl.vectors import Vector, add_, scale_

COLLINEAR = 1e-3
"""Length of what is left of the tracked vector beside the coming step, below which it is rounding."""


def ritz_step(
    operator: SymmetricOperator, vector: Vector, direction: Callable[[], Vector]
) -> tuple[EigenResult, float]:
    """Rayleigh–Ritz on two directions, the tracked eigenvector and that of the coming step, and one power step.

    Neither direction is taken from the Hessian of this batch, as those of a Krylov space are, whose choice biases the
    Ritz value of a mini-batch upward. The eigenvector returned is one (shifted) power step on: it costs no product,
    and the next value converges where the operator stays the same.

    Args:
        vector: the tracked eigenvector, a unit vector; overwritten.
        direction: makes the second direction anew; called twice, to hold one vector less.

    Returns: the Ritz pair, and the Rayleigh quotient of the second direction alone (nan where it has no length).

    Cost: 2 products. Memory: two vectors beside `vector`, and what a product takes.
    """
    first = _unit(operator, direction())
    if first is None:
        return power_step(operator, vector), math.nan
    image = operator.matvec(first)
    along = operator.inner(first, image)
    add_(vector, first, -operator.inner(first, vector))
    second = _unit(operator, vector) if operator.inner(vector, vector) > COLLINEAR**2 else None
    if second is None:
        size = math.sqrt(operator.inner(image, image))
        return EigenResult(along, first, math.sqrt(max(size * size - along * along, 0.0)), 1, False), along
    across = operator.inner(second, image)
    del first
    other = operator.matvec(second)
    matrix = np.array([[along, across], [across, operator.inner(second, other)]])
    if not np.isfinite(matrix).all():
        return EigenResult(math.nan, second, math.nan, 2, False), math.nan
    values, vectors = np.linalg.eigh(matrix)
    value, (a, b) = float(values[-1]), (float(vectors[0, -1]), float(vectors[1, -1]))
    product = add_(scale_(image, a), other, b)
    size = math.sqrt(operator.inner(product, product))
    residual = math.sqrt(max(size * size - value * value, 0.0))
    shift = max((size - value) / 2, 0.0)
    add_(product, second, shift * b)
    del other, second
    again = direction()
    length = math.sqrt(operator.inner(again, again))
    following = _unit(operator, add_(product, again, shift * a / max(length, 1e-30)))
    return EigenResult(value, again if following is None else following, residual, 2, False), along


def _unit(operator: SymmetricOperator, vector: Vector) -> Vector | None:
    """`vector` scaled to length 1 in place; None if it has no direction."""
    length = math.sqrt(operator.inner(vector, vector))
    return scale_(vector, 1.0 / length) if math.isfinite(length) and length > 0.0 else None


def power_step(operator: SymmetricOperator, start: Vector) -> EigenResult:
    """One product: the Rayleigh quotient of `start`, and, for the next probe, the vector one power step on.

    The shift (‖Av‖ − vᵀAv)/2 keeps a dominant negative eigenvalue from taking over, as in `power_iteration`.
    """
    length = math.sqrt(operator.inner(start, start))
    if not (math.isfinite(length) and length > 0.0):
        return lanczos(operator, start=start, steps=1)
    scale_(start, 1.0 / length)
    product = operator.matvec(start)
    value, size = operator.inner(start, product), math.sqrt(operator.inner(product, product))
    residual = math.sqrt(max(size * size - value * value, 0.0))
    add_(product, start, max((size - value) / 2, 0.0))
    length = math.sqrt(operator.inner(product, product))
    following = scale_(product, 1.0 / length) if math.isfinite(length) and length > 0.0 else start
    return EigenResult(value, following, residual, 1, False)
