"""Every way to a Hessian-vector product against the dense Hessian."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.curvature.helpers import products, replay
from tests.problems_closed_form import PROBLEMS, Problem, awkward, oracle, tanh_mlp, transformer, unflat
from warmctl.curvature.operators import METHODS, HessianOperator
from warmctl.vectors import dot, random_like


@pytest.mark.parametrize("make", PROBLEMS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("method", METHODS)
def test_products_are_those_of_the_dense_hessian(make: Callable[[], Problem], method: str) -> None:
    problem = make()
    hessian = oracle(problem)
    with HessianOperator(replay(problem), problem.params, method) as operator:
        vectors, found = products(operator)
    error = np.linalg.norm(found - hessian @ vectors) / (np.linalg.norm(hessian, 2) * np.linalg.norm(vectors))
    assert error < (2e-3 if method == "finite_difference" else 1e-6)
    assert operator.hvps == vectors.shape[1]


@pytest.mark.parametrize("make", PROBLEMS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("central", [False, True])
def test_finite_differences_are_accurate_along_the_top_eigenvector(make: Callable[[], Problem], central: bool) -> None:
    problem = make()
    values, vectors = np.linalg.eigh(oracle(problem))
    operator = HessianOperator(replay(problem), problem.params, "finite_difference", central=central)
    top = unflat(vectors[:, -1], operator.template)
    assert dot(top, operator.matvec(top)) == pytest.approx(values[-1], rel=2e-4 if central else 1e-3)


def test_the_step_does_not_grow_with_the_number_of_tensors() -> None:
    """A top eigenvector that lives in one small tensor: a step relative to the norm of all is too long."""
    torch.manual_seed(0)
    small = nn.Parameter(torch.tensor([0.05]))
    large = [nn.Parameter(torch.full((400,), 0.5)) for _ in range(40)]

    def loss() -> Tensor:
        return 1 - torch.cos(30 * small).sum() + sum(p.square().mean() for p in large)

    params = [small, *large]
    exact = 900 * np.cos(30 * 0.05)
    vector = [torch.ones(1), *(torch.zeros(400) for _ in large)]
    product = HessianOperator(loss, params, "finite_difference").matvec(vector)
    assert product[0].item() == pytest.approx(exact, rel=0.25)
    assert HessianOperator(loss, params, "finite_difference", central=True).matvec(vector)[0].item() == pytest.approx(
        exact, rel=2e-3
    )


@pytest.mark.parametrize("method", METHODS)
def test_float64_products(method: str) -> None:
    problem = tanh_mlp()
    hessian = oracle(problem)
    problem.model.double()
    x, y = problem.batch
    operator = HessianOperator(lambda: F.cross_entropy(problem.model(x.double()), y), problem.params, method)
    vectors, found = products(operator)
    error = np.linalg.norm(found - hessian @ vectors) / (np.linalg.norm(hessian, 2) * np.linalg.norm(vectors))
    assert error < (1e-6 if method == "finite_difference" else 1e-13)


@pytest.mark.parametrize("method", METHODS)
def test_a_zero_vector_has_a_zero_product(method: str) -> None:
    problem = tanh_mlp()
    operator = HessianOperator(problem.loss, problem.params, method)
    product = operator.matvec([torch.zeros_like(t) for t in operator.template])
    assert all(not p.any() for p in product)


@pytest.mark.parametrize("method", ["finite_difference", "double_backward", "forward_over_reverse"])
def test_blocks_are_stacked_products(method: str) -> None:
    problem = transformer()
    operator = HessianOperator(problem.loss, problem.params, method)
    vectors = [random_like(operator.template, seed) for seed in range(3)]
    block = [torch.stack(column) for column in zip(*vectors, strict=True)]
    found = operator.matmat(block)
    assert operator.hvps == 3
    for i, vector in enumerate(vectors):
        for a, b in zip(found, operator.matvec(vector), strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["auto", "forward_over_reverse"])
@pytest.mark.parametrize("which, end", [("LA", -1), ("SA", 0)])
def test_scipy_takes_the_operator(method: str, which: str, end: int) -> None:
    problem = awkward()
    values = np.linalg.eigvalsh(oracle(problem))
    operator = HessianOperator(replay(problem), problem.params, method)
    linear = operator.to_scipy()
    assert linear.shape == (len(values), len(values)) and linear.dtype == np.float64
    found = scipy.sparse.linalg.eigsh(linear, k=1, which=which, return_eigenvectors=False, tol=1e-6)
    assert found[0] == pytest.approx(values[end], rel=1e-4)
    identity = linear.matmat(np.eye(len(values)))
    np.testing.assert_allclose(identity, oracle(problem), atol=1e-4)


def test_product_on_a_live_graph() -> None:
    problem = tanh_mlp()
    operator = HessianOperator.on_graph(problem.loss(), problem.params)
    vectors, found = products(operator, 2)
    np.testing.assert_allclose(found, oracle(problem) @ vectors, atol=1e-5)


def test_a_block_of_the_parameters_leaves_the_others_alone() -> None:
    problem = tanh_mlp()
    hessian = oracle(problem)
    block = problem.params[2:4]
    offset = sum(p.numel() for p in problem.params[:2])
    size = sum(p.numel() for p in block)
    for p in problem.params:
        p.grad = torch.full_like(p, 7.0)
    grads = [p.grad for p in problem.params]
    for method in METHODS:
        operator = HessianOperator(problem.loss, block, method)
        vectors, found = products(operator, 1)
        np.testing.assert_allclose(found, hessian[offset : offset + size, offset : offset + size] @ vectors, atol=4e-3)
        assert all(
            p.grad is g and torch.equal(g, torch.full_like(g, 7.0)) for p, g in zip(problem.params, grads, strict=True)
        )


@pytest.mark.parametrize("method", METHODS)
def test_a_local_counter_is_not_mistaken_for_one_of_batch_norm(method: str) -> None:
    w = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))

    def loss() -> Tensor:
        index = torch.arange(2)
        index.add_(1)
        return w[index].pow(3).sum()

    product = HessianOperator(loss, [w], method).matvec([torch.ones(3)])
    torch.testing.assert_close(product[0], torch.tensor([0.0, 12.0, 18.0]), rtol=1e-3, atol=1e-3)


def test_a_product_with_nan_is_nan() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    operator = HessianOperator(lambda: p.square().sum(), [p], "finite_difference")
    assert operator.matvec([torch.full((3,), float("nan"))])[0].isnan().all()


def test_bad_arguments() -> None:
    w = nn.Parameter(torch.ones(2))
    loss = lambda: w.sum()  # noqa: E731
    with pytest.raises(ValueError, match="method must be one of auto"):
        HessianOperator(loss, [w], "exact")
    with pytest.raises(ValueError, match="params is empty"):
        HessianOperator(loss, [])
    with pytest.raises(ValueError, match="complex"):
        HessianOperator(loss, [nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    with pytest.raises(ValueError, match="meta device"):
        HessianOperator(loss, [w, nn.Parameter(torch.ones(2, device="meta"))])
    with pytest.raises(ValueError, match=r"params\[1\].*does not require grad"):
        HessianOperator(loss, [w, nn.Parameter(torch.ones(2), requires_grad=False)])
    with pytest.raises(ValueError, match="twice"):
        HessianOperator(loss, [w, w])


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_is_no_scalar_is_refused(method: str) -> None:
    w = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="must be a scalar, got shape"):
        HessianOperator(lambda: w * 2, [w], method).matvec([torch.ones(2)])
    with pytest.raises(TypeError, match="scalar tensor, got float"):
        HessianOperator(lambda: 2.0, [w], method).matvec([torch.ones(2)])  # type: ignore
