"""`sharpness` of one batch: right on every problem, without a trace, and honest about what it did not reach."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from tests.curvature.helpers import replay
from tests.helpers import batch_of, loss_fn, mlp
from tests.problems_closed_form import (
    PROBLEMS,
    Problem,
    batch_norm,
    classification,
    dense_hessian,
    flat,
    lstm,
    maximised,
    mean_square,
    oracle,
    softmax_regression,
    tanh_mlp,
    transformer,
)
from warmctl.curvature.eigen import lanczos
from warmctl.curvature.operators import HessianOperator
from warmctl.curvature.sharpness import sharpness

by_name = pytest.mark.parametrize("make", PROBLEMS, ids=lambda make: make.__name__)


@by_name
@pytest.mark.parametrize("method", ["auto", "finite_difference"])
def test_sharpness_is_the_top_of_the_dense_hessian(make: Callable[[], Problem], method: str) -> None:
    problem = make()
    values = np.linalg.eigvalsh(oracle(problem))
    result = sharpness(problem.model, problem.loss_fn, problem.batch, method=method)
    assert result.eigenvalue == pytest.approx(values[-1], rel=1e-3)
    assert result.converged and result.residual <= 1e-3 * abs(result.eigenvalue)
    vector = flat(result.eigenvector)
    assert np.linalg.norm(vector) == pytest.approx(1, rel=1e-4)
    true = np.linalg.norm(oracle(problem) @ vector - result.eigenvalue * vector)
    assert true <= (1.1e-3 if method == "auto" else 4e-3) * np.abs(values).max()


@by_name
def test_lanczos_is_the_top_of_the_dense_hessian(make: Callable[[], Problem]) -> None:
    problem = make()
    with HessianOperator(replay(problem), problem.params) as operator:
        result = lanczos(operator, steps=60, tol=1e-4)
    assert result.eigenvalue == pytest.approx(np.linalg.eigvalsh(oracle(problem))[-1], rel=1e-4)


def test_the_problems_cover_what_they_claim() -> None:
    values = np.linalg.eigvalsh(oracle(maximised()))
    assert -values[0] > 2 * values[-1] > 0  # the largest magnitude would be the wrong answer
    assert batch_norm().model.training
    assert isinstance(lstm().model.recurrent, nn.LSTM)  # type: ignore[union-attr]
    problem = transformer()
    assert problem.model.head.weight is problem.model.embedding.weight  # type: ignore[union-attr]
    assert len(PROBLEMS) >= 8


@by_name
@pytest.mark.parametrize("method", ["auto", "finite_difference"])
def test_a_loose_tolerance_is_a_percent_of_the_eigenvalue(make: Callable[[], Problem], method: str) -> None:
    """tol=0.03 by exact products or forward differences; seeds change the random half of the start alone."""
    problem = make()
    top = np.linalg.eigvalsh(oracle(problem))[-1]
    for seed in range(3):
        result = sharpness(problem.model, problem.loss_fn, problem.batch, method=method, tol=0.03, seed=seed)
        assert result.converged and result.residual <= 0.03 * abs(result.eigenvalue)
        assert result.eigenvalue == pytest.approx(top, rel=0.01)


def test_a_gradient_without_the_top_eigenvector_is_no_trap() -> None:
    """L = ½ Σ λᵢ θᵢ²: the gradient at a coordinate axis is an eigenvector, of a lower eigenvalue."""
    curvature = torch.tensor([9.0, 4.0, 1.0, -2.0])
    net = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.0, 1.0, 0.0, 0.0]]))
    result = sharpness(net, lambda m, b: 0.5 * (b * m.weight[0] ** 2).sum(), curvature)
    assert result.eigenvalue == pytest.approx(9.0, rel=1e-5)
    with torch.no_grad():
        net.weight.zero_()  # no gradient at all
    assert sharpness(net, lambda m, b: 0.5 * (b * m.weight[0] ** 2).sum(), curvature).eigenvalue == pytest.approx(9.0)


def test_forward_differences_cost_one_evaluation_a_product() -> None:
    problem = tanh_mlp()
    calls = 0

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return problem.loss_fn(model, batch)

    result = sharpness(problem.model, loss_fn, problem.batch, method="finite_difference", tol=1e-2)
    assert calls == 1 + result.hvps
    calls = 0
    result = sharpness(problem.model, loss_fn, problem.batch, method="finite_difference", tol=1e-3)
    assert calls == 1 + 2 * result.hvps


@pytest.mark.parametrize("method", ["auto", "finite_difference"])
@pytest.mark.parametrize("draws", ["globally", "loader", "sampler"])
def test_no_trace(method: str, draws: str) -> None:
    """A model with batch norm and dropout, a shuffling loader, gradients that are there already."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 2))
    model[2].eval()
    model[0].bias.requires_grad_(False)
    generator = None if draws == "globally" else torch.Generator().manual_seed(3)
    data = TensorDataset(torch.randn(20, 4), torch.randint(2, (20,)))
    sampler = BatchSampler(RandomSampler(data, generator=generator), 8, drop_last=False)
    inside = draws == "sampler"
    loader = DataLoader(data, 8, True, generator=generator) if not inside else DataLoader(data, batch_sampler=sampler)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    grads, state = [p.grad for p in model.parameters()], copy.deepcopy(model.state_dict())
    streams = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[index]
    own = generator.get_state() if generator is not None else None

    first = sharpness(model, classification, loader, method=method)

    assert torch.equal(torch.get_rng_state(), streams[0])
    assert np.array_equal(np.random.get_state()[1], streams[1])  # type: ignore[index]
    assert random.getstate() == streams[2]
    assert generator is None or torch.equal(generator.get_state(), own)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert all(g is None or torch.equal(g, torch.ones_like(g)) for g in grads)
    assert [m.training for m in model.modules()] == [True, True, True, False, True]
    assert not model[0].bias.requires_grad
    second = sharpness(model, classification, loader, method=method)
    assert first.eigenvalue == second.eigenvalue  # the same batches, the same start
    assert [v.shape for v in first.eigenvector] == [p.shape for p in model.parameters() if p.requires_grad]


def test_the_present_mode_is_the_one_measured() -> None:
    problem = batch_norm()
    problem.model(torch.randn(50, 5) * 3 + 1)  # running statistics unlike those of the batch
    train = sharpness(problem.model, problem.loss_fn, problem.batch)
    problem.model.eval()
    found = sharpness(problem.model, problem.loss_fn, problem.batch)
    top = np.linalg.eigvalsh(dense_hessian(problem.model, problem.loss_fn, problem.batch))[-1]
    assert found.eigenvalue == pytest.approx(top, rel=1e-3)
    assert abs(found.eigenvalue / train.eigenvalue - 1) > 0.02


def test_it_works_where_gradients_are_off() -> None:
    problem = softmax_regression()
    with torch.no_grad():
        result = sharpness(problem.model, problem.loss_fn, problem.batch)
    assert result.eigenvalue == pytest.approx(np.linalg.eigvalsh(oracle(problem))[-1], rel=1e-3)


def test_a_result_short_of_the_tolerance_says_so() -> None:
    problem = tanh_mlp()
    with pytest.warns(RuntimeWarning, match=r"did not reach tol=1e-08: residual .* after 3 products"):
        result = sharpness(problem.model, problem.loss_fn, problem.batch, steps=3, tol=1e-8)
    assert not result.converged and result.hvps == 3
    assert result.residual > 1e-8 * result.eigenvalue
    assert result.eigenvalue <= np.linalg.eigvalsh(oracle(problem))[-1] * (1 + 1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sharpness(problem.model, problem.loss_fn, problem.batch)


def test_a_loss_that_is_not_finite_is_no_result() -> None:
    problem = tanh_mlp()
    with pytest.warns(RuntimeWarning, match="did not reach"):
        result = sharpness(problem.model, lambda m, b: classification(m, b) * float("nan"), problem.batch)
    assert np.isnan(result.eigenvalue) and not result.converged


def test_a_loss_without_curvature() -> None:
    model = nn.Linear(3, 1)
    for loss in (lambda m, b: m(b).mean(), lambda m, b: torch.tensor(1.0)):
        result = sharpness(model, loss, torch.ones(4, 3))
        assert (result.eigenvalue, result.residual, result.converged) == (0.0, 0.0, True)


def test_seeds_and_steps_reach_the_solver() -> None:
    problem = tanh_mlp()
    with pytest.warns(RuntimeWarning):
        a, b, c = (
            sharpness(problem.model, problem.loss_fn, problem.batch, steps=2, seed=seed).eigenvalue
            for seed in (0, 0, 1)
        )
    assert a == b != c


def test_bad_input() -> None:
    model = nn.Linear(3, 2)
    rows = torch.ones(4, 3)
    frozen = nn.Linear(3, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires grad"):
        sharpness(frozen, lambda m, b: m(b).mean(), rows)
    with pytest.raises(ValueError, match="no parameter that requires grad"):
        sharpness(nn.Tanh(), lambda m, b: m(b).mean(), rows)
    for empty in ([], iter(()), [(torch.ones(0, 3),)]):
        with pytest.raises(ValueError, match="no batches to measure on"):
            sharpness(model, lambda m, b: m(b).mean(), empty)
    used = iter([(rows,)])
    next(used)
    with pytest.raises(ValueError, match="or was read before"):
        sharpness(model, lambda m, b: m(b[0]).mean(), used)
    with pytest.raises(ValueError, match="must hold a tensor"):
        sharpness(model, lambda m, b: m(rows).mean(), [("text",), ("more",)])
    with pytest.raises(ValueError, match=r"must be a scalar, got shape \(4, 2\)"):
        sharpness(model, lambda m, b: m(b), rows)
    with pytest.raises(TypeError, match="scalar tensor, got float"):
        sharpness(model, lambda m, b: 1.0, rows)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match="method must be one of"):
        sharpness(model, mean_square, (rows, rows), method="exact")
    with pytest.raises(ValueError, match="steps must be at least 1"):
        sharpness(model, mean_square, (rows, torch.ones(4, 2)), steps=0)
    with pytest.raises(ValueError, match="meta device"):
        sharpness(nn.Linear(3, 2, device="meta"), mean_square, (rows, torch.ones(4, 2)))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [(("net", loss_fn), TypeError), ((None, None), TypeError), ((None, loss_fn, -1.0), ValueError)],
)
def test_sharpness_names_its_arguments(arguments: tuple[Any, ...], error: type[Exception]) -> None:
    model, loss, tol = (*arguments, 1e-3)[:3]
    with pytest.raises(error, match=r"sharpness\(model, loss_fn, batch\)|tol must not be negative"):
        sharpness(model or mlp(), loss, batch_of(0), tol=tol)
