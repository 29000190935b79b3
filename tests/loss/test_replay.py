"""A loss evaluated again must be the same loss: its data, its average over ranks, its precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tests.problems_closed_form import tanh_mlp
from warmctl.curvature.operators import HessianOperator
from warmctl.loss.replay import NotReplayable, Replay
from warmctl.vectors import random_like


def iterator() -> Callable[[], Tensor]:
    batches = iter(torch.randn(50, 8, 5))

    def forward() -> Tensor:
        return next(batches)

    return forward


def unseeded() -> Callable[[], Tensor]:
    generator = torch.Generator()
    generator.seed()
    return lambda: torch.randn(8, 5, generator=generator)


@pytest.mark.parametrize("make", [iterator, unseeded])
def test_a_closure_that_draws_new_data_is_noticed(make: Callable[[], Callable[[], Tensor]]) -> None:
    torch.manual_seed(0)
    model, draw = nn.Linear(5, 1), make()
    replay = Replay.of_loss(lambda: model(draw()).square().mean(), list(model.parameters()))
    with pytest.raises(NotReplayable, match="draws new data or keeps state"):
        replay.verify(*replay.gradient())


def test_a_gradient_that_drifts_is_noticed_though_the_loss_does_not() -> None:
    w, calls = nn.Parameter(torch.ones(2)), 0

    def loss() -> Tensor:
        nonlocal calls
        calls += 1
        return (w * calls - (w * calls).detach()).sum()

    replay = Replay.of_loss(loss, [w])
    with pytest.raises(NotReplayable, match="keeps state"):
        replay.verify(*replay.gradient())


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_gradients_that_are_views_of_ddp_buckets(one_process: None) -> None:
    """DDP writes every backward pass into the memory of the gradients that are already there."""
    problem = tanh_mlp()
    x, y = problem.batch
    model = nn.parallel.DistributedDataParallel(problem.model, gradient_as_bucket_view=True)

    def loss() -> Tensor:
        return F.cross_entropy(model(x), y)

    for _ in range(2):  # buckets are laid out anew after the first pass
        model.zero_grad()
        loss().backward()
    grads = [p.grad for p in problem.params]
    values = [g.clone() for g in grads]
    assert any(g._is_view() for g in grads)

    replay = Replay.of_loss(loss, problem.params, module=model)
    _, gradient = replay.gradient()
    taken = [g.clone() for g in gradient]
    operator = HessianOperator(replay, problem.params, "finite_difference", gradient=gradient)
    product = operator.matvec(random_like(operator.template, 0))

    exact = HessianOperator(problem.loss, problem.params, "double_backward").matvec(random_like(operator.template, 0))
    for a, b in zip(product, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)
    assert all(torch.equal(a, b) for a, b in zip(gradient, taken, strict=True))
    for p, grad, value in zip(problem.params, grads, values, strict=True):
        assert p.grad is grad and torch.equal(grad, value)


def test_the_average_over_ranks_reaches_gradients_and_exact_products() -> None:
    problem = tanh_mlp()

    def halve(vector: list[Tensor]) -> None:
        torch._foreach_mul_(vector, 0.5)

    whole = Replay.of_loss(problem.loss, problem.params)
    half = Replay.of_loss(problem.loss, problem.params, reduce=halve)
    for a, b in zip(whole.gradient()[1], half.gradient()[1], strict=True):
        assert torch.equal(a / 2, b)
    vector = random_like(problem.params, 0)
    for method in ("double_backward", "forward_over_reverse", "finite_difference"):
        one = HessianOperator(whole, problem.params, method).matvec(vector)
        two = HessianOperator(half, problem.params, method).matvec(vector)
        for a, b in zip(one, two, strict=True):
            torch.testing.assert_close(a / 2, b, rtol=1e-4, atol=1e-6)


def test_an_outer_autocast_neither_hides_the_step_nor_keeps_it() -> None:
    """Autocast keeps bfloat16 copies of the parameters: displaced ones must not be missed, nor leak out."""
    problem = tanh_mlp()
    x, y = problem.batch
    vector = random_like(problem.params, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = problem.model(x)
        replay = Replay.of_loss(lambda: F.cross_entropy(problem.model(x).float(), y), problem.params)
        gradient = replay.gradient()[1]
        problem.model(x)  # casts, and keeps, the parameters where they are
        operator = HessianOperator(replay, problem.params, "finite_difference", gradient=gradient)
        product = operator.matvec(vector)
        assert any(p.any() for p in product)
        assert torch.equal(problem.model(x), before)


def test_precision_is_that_of_the_forward_pass() -> None:
    problem = tanh_mlp()
    x, y = problem.batch

    def mixed() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.cross_entropy(problem.model(x), y)

    plain, cast = Replay.of_loss(problem.loss, problem.params), Replay.of_loss(mixed, problem.params)
    assert plain.precision == cast.precision == torch.finfo(torch.float32).eps
    plain.gradient(), cast.gradient()
    assert plain.precision == torch.finfo(torch.float32).eps
    assert cast.precision == torch.finfo(torch.bfloat16).eps
