"""Every way to a Hessian-vector product against the dense Hessian, and what the operator promises."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.problems_closed_form import (
    PROBLEMS,
    Problem,
    awkward,
    batch_norm,
    flat,
    linear_regression,
    oracle,
    tanh_mlp,
    transformer,
    unflat,
)
from warmctl.curvature.eigen import lanczos
from warmctl.curvature.operators import METHODS, HessianOperator, ScaledOperator
from warmctl.loss.replay import Replay
from warmctl.vectors import dot, gathered, random_like, squares

EXACT = ["double_backward", "forward_over_reverse"]


def replay(problem: Problem) -> Replay:
    return Replay.of_loss(problem.loss, problem.params, module=problem.model)


def products(operator: HessianOperator, count: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Random vectors and their products, as columns."""
    vectors = [random_like(operator.template, seed) for seed in range(count)]
    return np.stack([flat(v) for v in vectors], 1), np.stack([flat(operator.matvec(v)) for v in vectors], 1)


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
def test_products_belong_to_the_caller(method: str) -> None:
    """Autograd may return an expanded scalar or the vector that went in; both must be safe to write to."""
    w = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    for loss in (lambda: 0.5 * w.sum() ** 2, lambda: HalfSquare.apply(w)):
        if method == "forward_over_reverse" and loss() == HalfSquare.apply(w):
            continue
        operator = HessianOperator(loss, [w], method)
        vector = [torch.tensor([1.0, 0.0, 0.0])]
        first = operator.matvec(vector)
        kept = first[0].clone()
        first[0].add_(100.0)
        assert torch.equal(vector[0], torch.tensor([1.0, 0.0, 0.0]))
        assert torch.equal(operator.matvec(vector)[0], kept)


class HalfSquare(torch.autograd.Function):
    """½‖x‖², whose double backward hands the vector through."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return 0.5 * x.square().sum()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return Scale.apply(ctx.saved_tensors[0], grad)


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, grad: Tensor) -> Tensor:
        return x * grad

    @staticmethod
    def backward(ctx, vector: Tensor) -> tuple[Tensor, None]:
        return vector, None


def test_auto_takes_the_cheapest_that_works() -> None:
    problem = tanh_mlp()
    gradient = replay(problem).gradient()[1]
    assert HessianOperator(problem.loss, problem.params).method == "double_backward"
    operator = HessianOperator(problem.loss, problem.params, gradient=gradient)
    assert operator.method == "finite_difference"
    operator.matvec(random_like(operator.template, 0))
    assert (operator.method, operator.fallback) == ("finite_difference", "")


def test_auto_falls_back_once_and_says_why() -> None:
    torch.manual_seed(0)
    bag, target = nn.EmbeddingBag(5, 3), torch.tensor([0, 2])
    tokens = torch.tensor([[0, 1], [2, 4]])
    operator = HessianOperator(lambda: F.cross_entropy(bag(tokens), target), list(bag.parameters()))
    vector = random_like(operator.template, 0)
    first, second = operator.matvec(vector), operator.matvec(vector)
    assert operator.method == "finite_difference"
    assert "embedding_bag" in operator.fallback
    assert torch.equal(first[0], second[0])
    assert operator.hvps == 2
    assert operator.cost == pytest.approx(1.3 + 2.4 + 3)  # the attempt; one gradient; two displaced gradients


def test_a_forced_method_does_not_fall_back() -> None:
    bag = nn.EmbeddingBag(5, 3)
    loss = lambda: bag(torch.tensor([[0, 1]])).square().sum()  # noqa: E731
    for method in EXACT:
        operator = HessianOperator(loss, list(bag.parameters()), method)
        with pytest.raises(RuntimeError):
            operator.matvec(random_like(operator.template, 0))


def test_auto_leaves_an_exact_product_that_is_not_finite() -> None:
    """|w|^1.5 has a gradient at 0 but no second derivative there."""
    w = nn.Parameter(torch.tensor([0.0, 1.0, 2.0]))

    def loss() -> Tensor:
        return w.abs().pow(1.5).sum()

    exact = HessianOperator(loss, [w], "double_backward").matvec([torch.ones(3)])
    assert not torch.isfinite(exact[0]).all()
    operator = HessianOperator(loss, [w])
    product = operator.matvec([torch.ones(3)])
    assert operator.method == "finite_difference" and "not finite" in operator.fallback
    assert torch.isfinite(product[0]).all()


def test_cost_is_counted_in_gradient_evaluations() -> None:
    problem = tanh_mlp()
    gradient = replay(problem).gradient()[1]
    expected = {
        ("finite_difference", False, True): 2.0,
        ("finite_difference", False, False): 3.0,
        ("finite_difference", True, True): 4.0,
        ("double_backward", False, False): 1.3 + 2 * 2.4,
        ("forward_over_reverse", False, False): 2 * 3.3,
    }
    for (method, central, given), cost in expected.items():
        evaluations = 0

        def loss() -> Tensor:
            nonlocal evaluations
            evaluations += 1
            return problem.loss()

        operator = HessianOperator(loss, problem.params, method, gradient=gradient if given else None, central=central)
        for seed in range(2):
            operator.matvec(random_like(operator.template, seed))
        assert operator.cost == pytest.approx(cost)
        assert operator.hvps == 2
        if method == "finite_difference":
            assert evaluations == cost  # counted, not claimed
        else:
            assert evaluations == (1 if method == "double_backward" else 2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("central", [False, True])
def test_the_present_gradient_is_nothing_extra_where_products_need_it(method: str, central: bool) -> None:
    problem = tanh_mlp()
    operator = HessianOperator(problem.loss, problem.params, method, central=central)
    gradient = operator.present_gradient()
    torch.testing.assert_close(gradient, list(torch.autograd.grad(problem.loss(), problem.params)))
    for g in gradient:
        g.zero_()  # it belongs to the caller
    vector = random_like(problem.params, 0)
    product = operator.matvec(vector)
    other = HessianOperator(problem.loss, problem.params, method, central=central)
    torch.testing.assert_close(product, other.matvec(vector))
    extra = operator.cost - other.cost
    assert extra == pytest.approx(1.0 if method == "forward_over_reverse" or (central and "finite" in method) else 0.0)


def test_the_present_gradient_falls_back_with_the_products() -> None:
    torch.manual_seed(0)
    bag, tokens, target = nn.EmbeddingBag(6, 3), torch.randint(6, (12, 2)), torch.randint(3, (12,))

    def loss() -> Tensor:
        return F.cross_entropy(bag(tokens), target)

    operator = HessianOperator(loss, list(bag.parameters()))
    gradient = operator.present_gradient()
    torch.testing.assert_close(gradient, list(torch.autograd.grad(loss(), list(bag.parameters()))))
    operator.matvec([torch.ones_like(g) for g in gradient])
    assert operator.method == "finite_difference" and operator.fallback


def test_a_kept_graph_does_not_hold_the_gradient() -> None:
    problem = tanh_mlp()
    with HessianOperator(problem.loss, problem.params, "double_backward") as operator:
        operator.matvec([torch.ones_like(p) for p in problem.params])
        assert operator._graph is not None
        assert not any(isinstance(end, Tensor) for end in operator._graph)


def test_a_known_gradient_is_not_written_to() -> None:
    problem = tanh_mlp()
    gradient = replay(problem).gradient()[1]
    before = [g.clone() for g in gradient]
    operator = HessianOperator(problem.loss, problem.params, "finite_difference", gradient=gradient)
    a = operator.matvec(random_like(operator.template, 0))
    b = operator.matvec(random_like(operator.template, 0))
    assert all(torch.equal(x, y) for x, y in zip(before, gradient, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


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


def bits(params: list[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


@pytest.mark.parametrize("make", [tanh_mlp, batch_norm, awkward], ids=lambda make: make.__name__)
@pytest.mark.parametrize("method", METHODS)
def test_parameters_and_buffers_stay_bit_for_bit(make: Callable[[], Problem], method: str) -> None:
    problem = make()
    before = copy.deepcopy(problem.model.state_dict())
    addresses = [p.data_ptr() for p in problem.params]
    lanczos(HessianOperator(replay(problem), problem.params, method), steps=4)
    for name, value in problem.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert [p.data_ptr() for p in problem.params] == addresses
    assert all(p.grad is None for p in problem.model.parameters())


@pytest.mark.parametrize("central", [False, True])
def test_parameters_are_put_back_when_the_loss_raises(central: bool) -> None:
    problem = tanh_mlp()
    calls = 0

    def loss() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyError("in the middle of a product")
        return problem.loss()

    before = bits(problem.params)
    for p in problem.params:
        p.grad = torch.ones_like(p)
    operator = HessianOperator(loss, problem.params, "finite_difference", central=central)
    with pytest.raises(KeyError):
        operator.matvec(random_like(operator.template, 0))
    assert calls == 2
    assert all(torch.equal(p, b) for p, b in zip(problem.params, before, strict=True))
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in problem.params)


def test_a_graph_that_is_alive_stays_valid() -> None:
    """A probe between forward and backward: displaced and restored parameters must not look modified."""
    problem = batch_norm()
    wanted = torch.autograd.grad(problem.loss(), problem.params)
    loss = problem.loss()
    HessianOperator(replay(problem), problem.params, "finite_difference").matvec(random_like(problem.params, 0))
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(loss, problem.params), wanted, strict=True))


def test_product_on_a_live_graph() -> None:
    problem = tanh_mlp()
    operator = HessianOperator.on_graph(problem.loss(), problem.params)
    vectors, found = products(operator, 2)
    np.testing.assert_allclose(found, oracle(problem) @ vectors, atol=1e-5)


def test_the_graph_is_dropped_on_closing() -> None:
    problem = tanh_mlp()
    with HessianOperator(problem.loss, problem.params, "double_backward") as operator:
        operator.matvec(random_like(operator.template, 0))
        assert operator._graph is not None
    assert operator._graph is None and operator.gradient is None


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


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_scaled_operator_is_the_dense_product(sign: float) -> None:
    problem = tanh_mlp()
    operator = HessianOperator(problem.loss, problem.params, "double_backward")
    root = [t.abs() + 0.1 for t in random_like(operator.template, 5)]
    root[0][0] = 0.0  # a coordinate that the coming step does not move
    decay = [0.1 * (i + 1) for i in range(len(root))]
    shift = np.concatenate([np.full(t.numel(), d) for t, d in zip(root, decay, strict=True)])
    d = flat(root)
    dense = d[:, None] * (sign * oracle(problem) + np.diag(shift)) * d[None, :]
    scaled = ScaledOperator(operator, root, decay, sign)
    vector = random_like(operator.template, 1)
    np.testing.assert_allclose(flat(scaled.matvec(vector)), dense @ flat(vector), atol=1e-5)
    result = lanczos(scaled, steps=60, tol=1e-5)
    assert result.eigenvalue == pytest.approx(np.linalg.eigvalsh(dense)[-1], rel=1e-4)
    assert operator.hvps == 1 + result.hvps


def test_scaling_without_decay_leaves_the_vector_alone() -> None:
    problem = linear_regression()
    operator = HessianOperator(problem.loss, problem.params, "double_backward")
    root = [torch.full_like(t, 2.0) for t in operator.template]
    vector = random_like(root, 0)
    before = flat(vector)
    found = ScaledOperator(operator, root).matvec(vector)
    np.testing.assert_allclose(flat(found), 4 * oracle(problem) @ before, atol=1e-5)
    assert np.array_equal(flat(vector), before)


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


def test_sums_stay_in_float32_where_the_device_has_no_float64() -> None:
    with FakeTensorMode():
        vector = [torch.empty(3, device="mps"), torch.empty(2, 2, device="mps", dtype=torch.float16)]
        assert squares(vector).dtype == gathered([t.sum() for t in vector]).dtype == torch.float32
        assert squares([t.cpu() for t in vector]).dtype == torch.float64
