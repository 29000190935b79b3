"""What blocks an exact Hessian-vector product, and the way round, kernel by kernel.

Each test first shows that the kernel does block plain autograd (else the way round would prove nothing),
then that `HessianOperator` gets the right product all the same.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from tests.curvature.helpers import replay
from tests.problems_closed_form import (
    Problem,
    batch_norm,
    classification,
    dense_hessian,
    flat,
    oracle,
    tanh_mlp,
    transformer,
)
from warmctl.curvature.eigen import lanczos
from warmctl.curvature.operators import HessianOperator
from warmctl.loss.replay import Replay
from warmctl.vectors import random_like


def plain_product(loss: Tensor, params: list[nn.Parameter]) -> list[Tensor]:
    """Double backward as one would write it by hand."""
    gradient = torch.autograd.grad(loss, params, create_graph=True)
    return list(torch.autograd.grad(gradient, params, random_like(params, 0)))


def error(operator: HessianOperator, hessian: np.ndarray) -> float:
    """Of one product, relative to the norm of the Hessian."""
    vector = random_like(operator.template, 0)
    wrong = flat(operator.matvec(vector)) - hessian @ flat(vector)
    return float(np.linalg.norm(wrong) / np.linalg.norm(hessian, 2) / np.linalg.norm(flat(vector)))


@pytest.mark.parametrize("training, dropout", [(True, 0.0), (False, 0.0), (False, 0.2)])
def test_flash_attention(training: bool, dropout: float) -> None:
    """dropout > 0 in train mode hides the flash kernel on a CPU, so it must not be what is tested."""
    problem = transformer()
    problem.model.train(training)
    problem.model.dropout = dropout  # type: ignore[assignment]
    with (
        sdpa_kernel(SDPBackend.FLASH_ATTENTION),
        pytest.raises(RuntimeError, match=r"flash_attention.*not implemented"),
    ):
        plain_product(problem.loss(), problem.params)
    with pytest.raises(RuntimeError, match=r"flash_attention.*not implemented"):
        plain_product(problem.loss(), problem.params)
    for method in ("auto", "double_backward", "forward_over_reverse"):
        operator = HessianOperator(problem.loss, problem.params, method)
        assert error(operator, oracle(problem)) < 1e-6
        assert operator.fallback == ""


def test_a_kernel_that_the_model_insists_on() -> None:
    """A model that chooses flash attention itself is out of reach of the switch: finite differences."""
    problem = transformer()

    def loss() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return problem.loss()

    operator = HessianOperator(loss, problem.params)
    assert error(operator, oracle(problem)) < 2e-3
    assert operator.method == "finite_difference"
    assert "flash_attention" in operator.fallback
    with pytest.raises(RuntimeError, match="flash_attention"):
        HessianOperator(loss, problem.params, "double_backward").matvec(random_like(problem.params, 0))


@pytest.mark.parametrize("whole_loss", [False, True])
def test_compiled_model(whole_loss: bool) -> None:
    """A compiled module, and a compiled function round it; the eager code is differentiated instead."""
    problem = tanh_mlp()
    if whole_loss:
        loss = torch.compile(problem.loss, backend="aot_eager")
    else:
        compiled = torch.compile(problem.model, backend="aot_eager")
        loss = lambda: classification(compiled, problem.batch)  # noqa: E731
    with pytest.raises(RuntimeError, match=r"does not currently support double backward|donated buffers"):
        plain_product(loss(), problem.params)
    operator = HessianOperator(loss, problem.params)
    assert error(operator, oracle(problem)) < 1e-6
    assert (operator.method, operator.fallback) == ("double_backward", "")
    differences = HessianOperator(loss, problem.params, "finite_difference")
    assert error(differences, oracle(problem)) < 2e-3


def embedding_bag() -> tuple[list[nn.Parameter], Callable[[], Tensor], Callable[[], Tensor]]:
    torch.manual_seed(0)
    table, tokens, target = nn.Parameter(torch.randn(6, 4)), torch.randint(6, (5, 3)), torch.randint(4, (5,))
    blocked = lambda: F.cross_entropy(F.embedding_bag(tokens, table, mode="mean"), target)  # noqa: E731
    twin = lambda: F.cross_entropy(F.embedding(tokens, table).mean(1), target)  # noqa: E731
    return [table], blocked, twin


def ctc() -> tuple[list[nn.Parameter], Callable[[], Tensor], None]:
    torch.manual_seed(0)
    scores, targets = nn.Parameter(torch.randn(8, 2, 5)), torch.randint(1, 5, (2, 3))
    lengths = torch.tensor([8, 8]), torch.tensor([3, 3])
    return [scores], lambda: F.ctc_loss(scores.log_softmax(-1), targets, *lengths), None


@pytest.mark.parametrize("make, message", [(embedding_bag, "_embedding_bag_backward"), (ctc, "_ctc_loss_backward")])
def test_kernels_without_a_second_derivative(make: Callable[..., tuple], message: str) -> None:
    params, loss, twin = make()
    with pytest.raises(RuntimeError, match=message):
        plain_product(loss(), params)
    operator = HessianOperator(loss, params)
    vector = random_like(params, 0)
    product = operator.matvec(vector)[0]
    assert operator.method == "finite_difference" and message in operator.fallback
    if twin is not None:
        exact = HessianOperator(twin, params, "double_backward").matvec(vector)[0]
    else:  # no twin that autograd differentiates twice: central differences of the gradient in float64
        exact = _central_difference(loss, params[0], vector[0])
    assert float((product - exact).norm() / exact.norm()) < 0.03  # ctc_loss is the rougher of the two in float32


def _central_difference(loss: Callable[[], Tensor], param: nn.Parameter, vector: Tensor) -> Tensor:
    kept = param.data
    sides = []
    for sign in (1, -1):
        param.data = kept.double() + sign * 1e-5 * vector.double()
        param.grad = None
        sides.append(torch.autograd.grad(loss(), param)[0])
    param.data = kept
    return (sides[0] - sides[1]) / 2e-5


@pytest.mark.parametrize("hidden", [True, False])
def test_reentrant_checkpoint(hidden: bool) -> None:
    """With `hidden` all parameters are inside: autograd.grad finds none and would silently report zero."""
    problem = tanh_mlp()
    x, y = problem.batch
    first, rest = problem.model[0], problem.model[1:]
    x = x.clone().requires_grad_()

    def loss() -> Tensor:
        if hidden:
            return F.cross_entropy(checkpoint(problem.model, x, use_reentrant=True), y)
        return F.cross_entropy(checkpoint(rest, first(x), use_reentrant=True), y)

    if hidden:
        grads = torch.autograd.grad(loss(), problem.params, allow_unused=True, materialize_grads=True)
        assert not any(g.any() for g in grads)
    else:
        with pytest.raises(RuntimeError, match=r"(?i)checkpoint.*is(?: not|n't)? ?(in)?compatible"):
            torch.autograd.grad(loss(), problem.params, allow_unused=True)
    operator = HessianOperator(loss, problem.params)
    assert error(operator, oracle(problem)) < 2e-3
    assert operator.method == "finite_difference" and "use_reentrant=False" in operator.fallback
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        HessianOperator(loss, problem.params, "double_backward").matvec(random_like(problem.params, 0))


def test_other_checkpoints_are_exact() -> None:
    problem = tanh_mlp()
    x, y = problem.batch
    loss = lambda: F.cross_entropy(checkpoint(problem.model, x, use_reentrant=False), y)  # noqa: E731
    operator = HessianOperator(loss, problem.params)
    assert error(operator, oracle(problem)) < 1e-6
    assert operator.method == "double_backward"


@pytest.mark.parametrize("method", ["double_backward", "forward_over_reverse", "finite_difference"])
def test_unused_parameters_are_rows_of_zeros(method: str) -> None:
    problem = tanh_mlp()
    unused = nn.Parameter(torch.ones(3))
    with pytest.raises(RuntimeError, match=r"not (to )?have been used in the graph"):
        plain_product(problem.loss(), [*problem.params, unused])
    operator = HessianOperator(problem.loss, [unused, *problem.params], method)
    product = operator.matvec(random_like(operator.template, 0))
    assert not product[0].any()
    assert any(p.any() for p in product[1:])


@pytest.mark.parametrize("method", ["double_backward", "forward_over_reverse", "finite_difference"])
def test_a_constant_gradient_has_no_curvature(method: str) -> None:
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    with pytest.raises(RuntimeError, match="does not require grad"):
        plain_product(3 * w.sum(), [w])
    result = lanczos(HessianOperator(lambda: 3 * w.sum(), [w], method))
    assert result.eigenvalue == pytest.approx(0.0, abs=1e-2)
    assert method == "finite_difference" or (result.eigenvalue == 0.0 and result.converged)


def test_batch_norm_keeps_its_counters() -> None:
    problem = batch_norm()
    norm = problem.model[1]
    plain_product(problem.loss(), problem.params)
    assert norm.num_batches_tracked.item() == 1  # by hand they move
    mean = norm.running_mean.clone()
    for method in ("double_backward", "forward_over_reverse", "finite_difference"):
        assert error(HessianOperator(replay(problem), problem.params, method), oracle(problem)) < 2e-3
        assert norm.num_batches_tracked.item() == 1
        assert torch.equal(norm.running_mean, mean)


def test_dropout_draws_the_same_mask_on_both_sides() -> None:
    """With another mask a difference of gradients would be noise divided by the step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 3))
    problem = Problem("dropout", model, classification, (torch.randn(20, 5), torch.randint(3, (20,))))
    results = []
    for method in ("double_backward", "forward_over_reverse", "finite_difference"):
        torch.manual_seed(7)
        operator = HessianOperator(problem.loss, problem.params, method)
        torch.manual_seed(1)  # the caller's stream goes on; the loss stays the one of seed 7
        torch.rand(5)
        state = torch.get_rng_state()
        results.append(lanczos(operator, steps=30))
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(7)
        assert error(operator, dense_hessian(model, classification, problem.batch)) < 2e-3
    torch.manual_seed(7)
    top = np.linalg.eigvalsh(dense_hessian(model, classification, problem.batch))[-1]
    for result in results:
        assert result.eigenvalue == pytest.approx(top, rel=2e-3)


def half(problem: Problem, dtype: torch.dtype) -> Callable[[], Tensor]:
    x, y = problem.batch

    def loss() -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return F.cross_entropy(problem.model(x).float(), y)

    return loss


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_measured_exactly(dtype: torch.dtype) -> None:
    """The rounding of half precision drowns a difference of gradients: "auto" notices it in the first one."""
    problem = tanh_mlp()
    loss, top = half(problem, dtype), np.linalg.eigvalsh(oracle(problem))[-1]
    gradient = Replay.of_loss(loss, problem.params).gradient()[1]
    operator = HessianOperator(loss, problem.params, gradient=gradient)
    assert operator.method == "finite_difference"
    result = lanczos(operator, steps=20)
    assert operator.method == "double_backward" and operator.fallback == ""
    assert result.eigenvalue == pytest.approx(top, rel=0.02)


def test_differences_under_autocast_take_a_longer_step() -> None:
    """Where nothing else is left they must at least not be noise along the top eigenvector."""
    problem = tanh_mlp()
    values, vectors = np.linalg.eigh(oracle(problem))
    operator = HessianOperator(half(problem, torch.bfloat16), problem.params, "finite_difference", central=True)
    top = [
        torch.from_numpy(v).float()
        for v in np.split(vectors[:, -1], np.cumsum([p.numel() for p in problem.params])[:-1])
    ]
    top = [t.reshape(p.shape) for t, p in zip(top, problem.params, strict=True)]
    product = operator.matvec(top)
    assert sum(float((a * b).sum()) for a, b in zip(top, product, strict=True)) == pytest.approx(values[-1], rel=0.1)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.05), (torch.float16, 0.02)])
@pytest.mark.parametrize("method", ["auto", "double_backward"])
def test_half_precision_parameters(dtype: torch.dtype, tolerance: float, method: str) -> None:
    problem = tanh_mlp()
    problem.model.to(dtype)
    x, y = problem.batch
    hessian = dense_hessian(problem.model, problem.loss_fn, problem.batch)
    operator = HessianOperator(lambda: F.cross_entropy(problem.model(x.to(dtype)).float(), y), problem.params, method)
    result = lanczos(operator, steps=12)
    assert result.eigenvalue == pytest.approx(np.linalg.eigvalsh(hessian)[-1], rel=tolerance)
    assert operator.method == "double_backward"
    assert {v.dtype for v in result.eigenvector} == {dtype}


def test_half_precision_parameters_are_put_back() -> None:
    problem = tanh_mlp()
    problem.model.bfloat16()
    x, y = problem.batch
    before = [p.detach().clone() for p in problem.params]
    operator = HessianOperator(
        lambda: F.cross_entropy(problem.model(x.bfloat16()).float(), y), problem.params, "finite_difference"
    )
    product = operator.matvec(random_like(operator.template, 0))
    assert all(p.isfinite().all() and p.dtype == torch.bfloat16 for p in product)
    assert all(torch.equal(p, b) for p, b in zip(problem.params, before, strict=True))
