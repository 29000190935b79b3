"""Other ways to read the stability ratio: of the estimator, of the coordinates, of what the batch allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from warmctl.curvature.eigen import EigenResult, lanczos
from warmctl.curvature.operators import HessianOperator
from warmctl.curvature.scaled import ScaledOperator
from warmctl.curvature.tracking import power_step
from warmctl.stability.estimator import SharpnessEstimator
from warmctl.stability.measurement import Measurement
from warmctl.vectors import Vector

LEAST_QUOTIENT = 0.01
"""Of the Ritz value, where a quotient below it would enter a geometric mean: quotients may be negative."""


class Krylov(SharpnessEstimator):
    """Lanczos from the tracked eigenvector on the batch's own Krylov space, which chooses its second direction."""

    def _solve(self, scaled: ScaledOperator, params: Sequence[Tensor], seed: int) -> tuple[EigenResult, float]:
        self.solve = partial(lanczos)  # not `lanczos` itself, for which two products mean Rayleigh–Ritz
        return super()._solve(scaled, params, seed)


class Fresh(SharpnessEstimator):
    """vᵀAv on a batch that had no part in v, free of selection bias; two power steps then turn v to this batch."""

    def _solve(self, scaled: ScaledOperator, params: Sequence[Tensor], seed: int) -> tuple[EigenResult, float]:
        if self.vector is None:
            return super()._solve(scaled, params, seed)
        found = power_step(scaled, self.vector)
        turned = power_step(scaled, found.eigenvector)
        return replace(found, eigenvector=turned.eigenvector, hvps=2), math.nan


class BatchSharpness(SharpnessEstimator):
    """gᵀDHDg / gᵀDg, numerator and denominator averaged over probes, half the weight on the last. One product.

    Source: Andreyev & Beneventano, arXiv 2412.20553.
    """

    above = below = 0.0

    def _solve(self, scaled: ScaledOperator, params: Sequence[Tensor], seed: int) -> tuple[EigenResult, float]:
        step = self._update(params, scaled.root)
        size, share = scaled.inner(step, step), self.momentum_share()  # D holds 1 / share: taken out of the averages
        found = power_step(scaled, step)
        weight = 0.5 if self.below else 1.0
        self.above += weight * (found.eigenvalue * size * share**2 - self.above)
        self.below += weight * (size * share - self.below)
        return replace(found, eigenvalue=self.above / self.below / share), math.nan


class RitzAndBatch(SharpnessEstimator):
    """√(Ritz value · quotient along D^½g), from the same two products; the first probe takes the Ritz value."""

    def _solve(self, scaled: ScaledOperator, params: Sequence[Tensor], seed: int) -> tuple[EigenResult, float]:
        found, along = super()._solve(scaled, params, seed)
        return replace(found, eigenvalue=geometric_mean(found.eigenvalue, along)), along


class RitzAndFresh(SharpnessEstimator):
    """√(Ritz value · vᵀAv), from the same two products: v lies in the plane of their directions."""

    def _solve(self, scaled: ScaledOperator, params: Sequence[Tensor], seed: int) -> tuple[EigenResult, float]:
        tracked = None if self.vector is None else [t.clone() for t in self.vector]
        seen = Recorded(scaled)
        found, along = super()._solve(seen, params, seed)
        if tracked is None:
            return found, along
        parts = [(scaled.inner(tracked, v), v, image) for v, image in seen.products]
        fresh = sum(a * b * scaled.inner(v, image) for a, v, _ in parts for b, _, image in parts)
        return replace(found, eigenvalue=geometric_mean(found.eigenvalue, fresh)), along


class Recorded(ScaledOperator):
    """Keeps copies of its directions and their images."""

    def __init__(self, scaled: ScaledOperator) -> None:
        super().__init__(scaled.operator, scaled.root, scaled.shift, scaled.sign)
        self.products: list[tuple[Vector, Vector]] = []

    def matvec(self, vector: Vector) -> Vector:
        copy = [t.clone() for t in vector]
        image = super().matvec(vector)
        self.products.append((copy, [t.clone() for t in image]))
        return image


def geometric_mean(ritz: float, quotient: float) -> float:
    """Of a Ritz value and a quotient that may be far below it; the Ritz value where there is no quotient."""
    if math.isnan(quotient) or not ritz > 0.0:
        return ritz
    return math.sqrt(ritz * max(quotient, LEAST_QUOTIENT * ritz))


class Raw(SharpnessEstimator):
    """λ(H) with one number for Adam's P, its median over the weights that move, instead of a P for each weight.

    A threshold for λ(H) fixed at the first probe would be no fair rival: it would hold what Adam's first P demands,
    10² to 10⁶ times too much, for good. The first step is bounded by the update really made.
    """

    def scaling(self, params: Sequence[Tensor]) -> tuple[Vector, list[float], float]:
        root, shift, sign = super().scaling(params)
        middle = torch.cat([r[r > 0].flatten() for r in root]).median()
        return [middle * (r > 0) for r in root], shift, sign

    def _relative_update(self, params: Sequence[Tensor], root: Vector) -> float:
        return super()._relative_update(params, super().scaling(params)[0])


class BatchAware(SharpnessEstimator):
    """target · √(ρ/λ), ρ the quotient along D^½g, averaged over probes: noisy gradients, ρ far below λ, lower it.

    The edge of momentum falls with the batch (Andreyev et al., arXiv 2604.14108). The opposite of √(Ritz · batch).
    """

    aligned = 1.0

    def _solve(self, scaled: ScaledOperator, params: Sequence[Tensor], seed: int) -> tuple[EigenResult, float]:
        found, along = super()._solve(scaled, params, seed)
        if math.isfinite(along) and found.eigenvalue > 0.0:
            quotient = min(max(along / found.eigenvalue, LEAST_QUOTIENT), 1.0)
            self.aligned = math.sqrt(self.aligned * quotient)
        return found, along

    def measure_on(self, operator: HessianOperator, seed: int, weight: float = 1.0) -> Measurement:
        found = super().measure_on(operator, seed, weight)
        return replace(found, share=found.share * math.sqrt(self.aligned))
