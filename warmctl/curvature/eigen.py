"""The algebraically largest eigenvalue of a symmetric operator that is known only through its products.

Stability needs the largest *algebraic* eigenvalue. At initialisation the most negative one can be larger in
magnitude, so both algorithms are built to return the right end of the spectrum. A Ritz value is a lower
bound: read it together with the residual ‖Av − λv‖, which bounds the distance to the nearest eigenvalue.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import scipy.linalg
import torch

from warmctl.vectors import Vector, add_, combine, random_like, scale_

WARM_START_NOISE = 1e-2
"""Size of the random component that is added to a warm start, so that no eigenvector stays out of reach."""


class SymmetricOperator(Protocol):
    """What the eigensolvers need: a product, an inner product and the shapes of the space."""

    @property
    def template(self) -> Vector: ...

    def matvec(self, vector: Vector) -> Vector: ...

    def inner(self, a: Vector, b: Vector) -> float: ...


@dataclass(frozen=True)
class EigenResult:
    """An approximate eigenpair.

    Attributes:
        eigenvalue: the Ritz value, never above the true eigenvalue but for rounding; nan if a product was
            not finite.
        eigenvector: unit vector, one tensor per parameter.
        residual: ‖Av − λv‖, absolute: divide by the eigenvalue for a relative one.
        hvps: products spent.
        converged: whether the residual met the tolerance.
    """

    eigenvalue: float
    eigenvector: Vector = field(repr=False)
    residual: float
    hvps: int
    converged: bool


def lanczos(
    operator: SymmetricOperator,
    *,
    start: Vector | None = None,
    steps: int = 30,
    tol: float = 1e-3,
    seed: int = 0,
    noise: float = WARM_START_NOISE,
) -> EigenResult:
    """Largest algebraic eigenvalue by Lanczos with full reorthogonalisation.

    Args:
        start: a guess of the eigenvector, mixed with a small random component; random if omitted.
        steps: products at most. Memory is one parameter-sized vector per step.
        tol: stops as soon as the residual is at most `tol`·|λ|.
        seed: of the random component, drawn from a generator of its own.
        noise: size of that component beside a start of length 1; 0 where the start holds all that is
            reachable, and then `start` is taken over and scaled, not copied.

    Cost: one product per step. Source: Golub & Van Loan, Matrix Computations, §10.1; the residual is
        |β_k s_k|.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if start is not None:
        check_start(start, operator.template)
    first = _start_vector(operator, start, seed, noise)
    if first is None:
        return EigenResult(0.0, [torch.zeros_like(t) for t in operator.template], 0.0, 0, True)
    del start  # by now the caller's alone, or nobody's
    basis, alphas = [first], []
    betas: list[float] = []
    while True:
        product = operator.matvec(basis[-1])
        alphas.append(operator.inner(basis[-1], product))
        if not math.isfinite(alphas[-1]):
            return EigenResult(math.nan, first, math.nan, len(alphas), False)
        beta, size = _orthogonalise(operator, product, basis)
        if not math.isfinite(beta):
            return EigenResult(math.nan, first, math.nan, len(alphas), False)
        value, weights = _top_ritz_pair(alphas, betas)
        residual = beta * abs(float(weights[-1]))
        rounding = 10 * _precision(product) * size
        exhausted = beta <= rounding  # what is left of the product is rounding: the Krylov space is complete
        converged = residual <= max(tol * abs(value), min(rounding, tol * size) if exhausted else 0.0)
        if converged or exhausted or len(alphas) == steps:
            vector = basis[0] if len(basis) == 1 else combine(basis, weights.tolist())
            return EigenResult(value, vector, residual, len(alphas), converged)
        betas.append(beta)
        basis.append(scale_(product, 1.0 / beta))


def power_iteration(
    operator: SymmetricOperator,
    *,
    start: Vector | None = None,
    steps: int = 100,
    tol: float = 1e-3,
    seed: int = 0,
    noise: float = WARM_START_NOISE,
) -> EigenResult:
    """Largest algebraic eigenvalue by power iteration on A + σI.

    The shift σ = max over the iterates of (‖Av‖ − vᵀAv)/2 is zero on a dominant positive eigenvector and
    |λ_min| on the most negative one, so the iteration cannot settle there. Where the residual stalls, both
    ends may be tied: then σ grows by 5 % a step, at most to the largest ‖Av‖ seen.

    Arguments as for `lanczos`. Cost: one product per step; memory: two vectors.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if start is not None:
        check_start(start, operator.template)
    vector = _start_vector(operator, start, seed, noise)
    if vector is None:
        return EigenResult(0.0, [torch.zeros_like(t) for t in operator.template], 0.0, 0, True)
    shift, longest, before = 0.0, 0.0, math.inf
    for hvps in range(1, steps + 1):
        product = operator.matvec(vector)
        value = operator.inner(vector, product)
        difference = add_(product, vector, -value)  # subtracted, not ‖Av‖² − λ²: that cancels
        residual = _norm(operator, difference)
        length = math.hypot(value, residual)
        if not math.isfinite(length):
            return EigenResult(math.nan, vector, math.nan, hvps, False)
        if residual <= 10 * _precision(vector) * length:  # an eigenvector to rounding: the iteration would stay
            return EigenResult(value, vector, residual, hvps, True)
        longest = max(longest, length)
        stalled = residual > 0.99 * before
        shift = max(shift, (length - value) / 2, min(1.05 * shift, longest) if stalled else 0.0)
        before = residual
        # On an eigenvector of the wrong end value + shift is 0: a small residual there means nothing.
        converged = residual <= tol * abs(value) and value + shift > tol * length
        if converged or hvps == steps:
            return EigenResult(value, vector, residual, hvps, converged)
        following = add_(difference, vector, value + shift)
        vector = scale_(following, 1.0 / _norm(operator, following))
    raise AssertionError("unreachable")


def check_start(start: Vector, template: Vector) -> None:
    """Raise ValueError unless `start` has the shapes of the operator's space."""
    shapes, wanted = [tuple(t.shape) for t in start], [tuple(t.shape) for t in template]
    if shapes != wanted:
        raise ValueError(f"start must have one tensor per parameter with shapes {wanted}, got {shapes}")


def _start_vector(operator: SymmetricOperator, start: Vector | None, seed: int, noise: float) -> Vector | None:
    """Unit start vector; None where the space is empty. Without noise `start` itself, scaled in place."""
    if start is not None and noise == 0.0:
        length = math.sqrt(operator.inner(start, start))
        if math.isfinite(length) and length > 0.0:
            return scale_(start, 1.0 / length)
    vector = random_like(operator.template, seed)
    length = math.sqrt(operator.inner(vector, vector))
    if start is not None:
        start_length = math.sqrt(operator.inner(start, start))
        if math.isfinite(start_length) and start_length > 0.0:
            scale_(vector, noise / max(length, 1e-30))
            add_(vector, start, 1.0 / start_length)
            length = math.sqrt(operator.inner(vector, vector))
    return scale_(vector, 1.0 / length) if length > 0.0 else None


def _orthogonalise(operator: SymmetricOperator, vector: Vector, basis: list[Vector]) -> tuple[float, float]:
    """Remove the components along `basis` in place, twice (Kahan: twice is enough).

    Returns the norm that remains and the norm before.
    """
    before = _norm(operator, vector)
    for _ in range(2):
        for other in basis:
            add_(vector, other, -operator.inner(other, vector))
    return _norm(operator, vector), before


def _norm(operator: SymmetricOperator, vector: Vector) -> float:
    return math.sqrt(max(operator.inner(vector, vector), 0.0))


def _precision(vector: Vector) -> float:
    return max(torch.finfo(t.dtype).eps for t in vector)


def _top_ritz_pair(alphas: list[float], betas: list[float]) -> tuple[float, np.ndarray]:
    last = len(alphas) - 1
    if last == 0:  # older SciPy cannot
        return alphas[0], np.ones(1)
    values, vectors = scipy.linalg.eigh_tridiagonal(
        np.array(alphas), np.array(betas), select="i", select_range=(last, last)
    )
    return float(values[0]), vectors[:, 0]
