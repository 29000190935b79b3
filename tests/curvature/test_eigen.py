"""Lanczos and power iteration against numpy on matrices that are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from tests.problems_closed_form import flat, unflat
from warmctl.curvature.eigen import lanczos, power_iteration
from warmctl.vectors import Vector, dot

SOLVERS = [lanczos, power_iteration]


class Matrix:
    """A symmetric matrix as an operator on two tensors; counts its products."""

    def __init__(self, matrix: np.ndarray, dtype: torch.dtype = torch.float64) -> None:
        self.matrix = np.asarray(matrix, dtype=np.float64)
        half = len(self.matrix) // 2
        self.template: Vector = [
            torch.zeros(half, dtype=dtype),
            torch.zeros(len(self.matrix) - half, 1, dtype=dtype),
        ]
        self.products = 0

    def matvec(self, vector: Vector) -> Vector:
        self.products += 1
        return unflat(self.matrix @ flat(vector), self.template)

    def inner(self, a: Vector, b: Vector) -> float:
        return dot(a, b)

    @property
    def top(self) -> float:
        return float(np.linalg.eigvalsh(self.matrix)[-1])


def with_spectrum(values: list[float], seed: int = 0) -> np.ndarray:
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values), len(values))))
    return (q * np.asarray(values)) @ q.T


def true_residual(operator: Matrix, value: float, vector: list[Tensor]) -> float:
    v = flat(vector)
    return float(np.linalg.norm(operator.matrix @ v - value * v))


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 14), seed=st.integers(0, 10**6), rank=st.integers(0, 14), shift=st.floats(-20, 20))
def test_lanczos_finds_the_algebraic_top_of_any_matrix(size: int, seed: int, rank: int, shift: float) -> None:
    a = np.random.default_rng(seed).normal(size=(size, min(rank, size)))
    operator = Matrix(a @ a.T + shift * np.eye(size))
    result = lanczos(operator, steps=3 * size, tol=1e-10, seed=seed)
    norm = np.linalg.norm(operator.matrix, 2)
    assert result.eigenvalue == pytest.approx(operator.top, abs=1e-8 * norm + 1e-12)
    assert result.converged
    assert result.hvps == operator.products <= size


@settings(max_examples=40, deadline=None)
@given(size=st.integers(2, 14), seed=st.integers(0, 10**6), steps=st.integers(1, 14))
def test_lanczos_stopped_early_is_a_lower_bound_with_a_true_residual(size: int, seed: int, steps: int) -> None:
    a = np.random.default_rng(seed).normal(size=(size, size))
    operator = Matrix(a + a.T)
    result = lanczos(operator, steps=steps, tol=0.0, seed=seed)
    norm = np.linalg.norm(operator.matrix, 2)
    assert result.eigenvalue <= operator.top + 1e-9 * norm
    assert result.residual == pytest.approx(
        true_residual(operator, result.eigenvalue, result.eigenvector), abs=1e-9 * norm
    )
    assert np.linalg.norm(flat(result.eigenvector)) == pytest.approx(1.0)
    assert np.abs(np.linalg.eigvalsh(operator.matrix) - result.eigenvalue).min() <= result.residual + 1e-9 * norm
    assert result.hvps == operator.products <= steps


@settings(max_examples=40, deadline=None)
@given(size=st.integers(2, 10), seed=st.integers(0, 10**6))
def test_power_iteration_reports_a_true_residual_and_never_too_much(size: int, seed: int) -> None:
    a = np.random.default_rng(seed).normal(size=(size, size))
    operator = Matrix(a + a.T)
    result = power_iteration(operator, steps=25, tol=1e-8, seed=seed)
    norm = np.linalg.norm(operator.matrix, 2)
    assert result.eigenvalue <= operator.top + 1e-9 * norm
    assert result.residual == pytest.approx(
        true_residual(operator, result.eigenvalue, result.eigenvector), abs=1e-7 * norm
    )
    assert result.hvps == operator.products <= 25


@pytest.mark.parametrize("solve", SOLVERS)
@pytest.mark.parametrize(
    "spectrum",
    [
        [-10.0, -1.0, 0.5, 1.0],  # the most negative dominates
        [-1.1, -0.5, 0.0, 1.0],
        [-1.0, 0.0, 0.2, 1.0],  # both ends equally large
        [-5.0, -4.0, -3.0, -1.0],  # negative definite
        [0.1, 2.0, 2.0, 2.0],  # degenerate
        [3.0, 3.0, 3.0, 3.0],  # a multiple of the identity
        [1e-6, 2e-6, 5e-6, 1e-5],
        [1e6, 2e6, 3e6, 9e6],
    ],
)
def test_right_end_of_the_spectrum(solve, spectrum: list[float]) -> None:
    operator = Matrix(with_spectrum(spectrum))
    result = solve(operator, steps=400, tol=1e-6)
    assert result.converged
    assert result.eigenvalue == pytest.approx(spectrum[-1], rel=1e-5)
    assert true_residual(operator, result.eigenvalue, result.eigenvector) <= 2e-6 * max(map(abs, spectrum))


def test_magnitude_would_have_been_wrong() -> None:
    """The start is the eigenvector of the wrong end, ten times larger: without a shift it stays there."""
    matrix = np.diag([-10.0, 0.3, 0.5, 1.0])
    operator = Matrix(matrix)
    start = unflat(np.array([1.0, 0.0, 0.0, 0.0]), operator.template)
    for solve in SOLVERS:
        assert solve(operator, start=start, steps=400, tol=1e-6).eigenvalue == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("solve", SOLVERS)
def test_zero_operator(solve) -> None:
    for steps in (1, 5):
        result = solve(Matrix(np.zeros((4, 4))), steps=steps)
        assert (result.eigenvalue, result.residual, result.hvps, result.converged) == (0.0, 0.0, 1, True)


@pytest.mark.parametrize("solve", SOLVERS)
@pytest.mark.parametrize("value", [2.5, -2.5, 0.0])
def test_one_by_one(solve, value: float) -> None:
    result = solve(Matrix(np.array([[value]])), steps=20)
    assert result.eigenvalue == pytest.approx(value)
    assert result.converged
    assert result.hvps <= 2


@pytest.mark.parametrize("solve", SOLVERS)
def test_empty_space(solve) -> None:
    result = solve(Matrix(np.zeros((0, 0))))
    assert (result.eigenvalue, result.hvps, result.converged) == (0.0, 0, True)
    assert [v.numel() for v in result.eigenvector] == [0, 0]


@pytest.mark.parametrize("solve", SOLVERS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e300])
def test_a_product_that_is_not_finite_is_not_an_eigenvalue(solve, poison: float) -> None:
    class Broken(Matrix):
        def matvec(self, vector: Vector) -> Vector:
            product = super().matvec(vector)
            if self.products == 2:
                product[0][0] = poison  # the square of 1e300 overflows
            return product

    operator = Broken(with_spectrum([1.0, 2.0, 3.0, 4.0, 5.0]))
    result = solve(operator, steps=9, tol=1e-12)
    assert math.isnan(result.eigenvalue) and math.isnan(result.residual)
    assert not result.converged
    assert result.hvps == operator.products == 2


@pytest.mark.parametrize("solve", SOLVERS)
def test_warm_start_saves_products(solve) -> None:
    operator = Matrix(with_spectrum([*np.linspace(0, 1, 60), 1.5]))
    cold = solve(operator, steps=300, tol=1e-3)
    warm = solve(operator, start=cold.eigenvector, steps=300, tol=1e-3, noise=1e-4, seed=1)
    assert warm.converged and warm.hvps < cold.hvps / 2
    assert warm.eigenvalue == pytest.approx(1.5, rel=1e-4)


@pytest.mark.parametrize("solve", SOLVERS)
def test_warm_start_can_leave_an_eigenvector_that_has_been_overtaken(solve) -> None:
    operator = Matrix(np.diag([1.0, 2.0, 3.0, 8.0]))
    stale = unflat(np.array([0.0, 0.0, 1.0, 0.0]), operator.template)
    assert solve(operator, start=stale, steps=200, tol=1e-6).eigenvalue == pytest.approx(8.0, rel=1e-4)
    stuck = solve(operator, start=stale, steps=200, tol=1e-6, noise=0.0)
    assert stuck.eigenvalue == pytest.approx(3.0)


@pytest.mark.parametrize("solve", SOLVERS)
@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_a_start_without_a_direction_is_replaced(solve, bad: float) -> None:
    operator = Matrix(np.diag([1.0, 2.0, 5.0]))
    start = [torch.full_like(t, bad) for t in operator.template]
    assert solve(operator, start=start, steps=100).eigenvalue == pytest.approx(5.0, rel=1e-3)


@pytest.mark.parametrize("solve", SOLVERS)
def test_arguments_are_checked(solve) -> None:
    operator = Matrix(np.eye(4))
    with pytest.raises(ValueError, match="one tensor per parameter with shapes"):
        solve(operator, start=[torch.zeros(2)])
    with pytest.raises(ValueError, match="one tensor per parameter with shapes"):
        solve(operator, start=[torch.zeros(3), torch.zeros(1, 1)])
    with pytest.raises(ValueError, match="steps must be at least 1"):
        solve(operator, steps=0)
    assert operator.products == 0


def test_the_start_is_not_written_to() -> None:
    operator = Matrix(np.diag([1.0, 2.0, 5.0]))
    start = unflat(np.array([1.0, 2.0, 3.0]), operator.template)
    before = flat(start)
    for solve in SOLVERS:
        solve(operator, start=start, steps=10)
        assert np.array_equal(flat(start), before)


def test_global_random_streams_are_not_touched() -> None:
    state = torch.get_rng_state()
    a = lanczos(Matrix(np.diag([1.0, 2.0, 3.0])), steps=2, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    b = lanczos(Matrix(np.diag([1.0, 2.0, 3.0])), steps=2, seed=3)
    c = lanczos(Matrix(np.diag([1.0, 2.0, 3.0])), steps=2, seed=4)
    assert a.eigenvalue == b.eigenvalue != c.eigenvalue


def test_too_few_steps_are_said_to_be_too_few() -> None:
    operator = Matrix(with_spectrum(list(np.linspace(0, 1, 80))))
    result = lanczos(operator, steps=3, tol=1e-6)
    assert not result.converged
    assert result.residual > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_coarse_vectors_do_not_claim_more_than_they_know(dtype: torch.dtype) -> None:
    """A remainder below ten roundings ends the iteration; the residual is still the one that is left."""
    operator = Matrix(with_spectrum([1.0, 1.01, 1.02, 1.03, 1.04, 1.05]), dtype)
    result = lanczos(operator, steps=6, tol=1e-4)
    claimed, true = result.residual, true_residual(operator, result.eigenvalue, result.eigenvector)
    assert abs(claimed - true) < (1e-5 if dtype == torch.float32 else 0.03)
    if dtype == torch.bfloat16:
        assert not result.converged
    else:
        assert result.eigenvalue == pytest.approx(1.05, rel=1e-4)
