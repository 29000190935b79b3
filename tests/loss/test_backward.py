"""The gradients of a closure's own backward passes, taken before they reach `.grad`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.problems_closed_form import awkward, batch_norm, tanh_mlp
from warmctl.curvature.operators import HessianOperator
from warmctl.loss.backward import intercept_backward
from warmctl.loss.replay import Replay
from warmctl.vectors import random_like


@pytest.mark.parametrize("kind", ["norm", "value", "by hand"])
def test_clipping_in_the_closure_does_not_change_the_gradient(kind: str) -> None:
    problem = tanh_mlp()

    def clip() -> None:
        if kind == "norm":
            torch.nn.utils.clip_grad_norm_(problem.params, 1e-6)
        elif kind == "value":
            torch.nn.utils.clip_grad_value_(problem.params, 1e-9)  # fails where every gradient is None
        else:
            for p in problem.params:
                p.grad.clamp_(-1e-9, 1e-9)

    plain = Replay.of_loss(problem.loss, problem.params).gradient()[1]

    def closure() -> Tensor:
        for p in problem.params:
            p.grad = None
        loss = problem.loss()
        loss.backward()
        clip()
        return loss

    replay = Replay(closure, problem.params)
    clipped = replay.gradient()[1]
    assert all(torch.equal(a, b) for a, b in zip(plain, clipped, strict=True))
    on_graph = torch.autograd.grad(replay.loss(), problem.params)
    for a, b in zip(plain, on_graph, strict=True):
        torch.testing.assert_close(a, b)
    assert all(p.grad is None for p in problem.params)
    assert replay.value() == pytest.approx(problem.loss().item())


def test_several_backward_passes_add_up() -> None:
    """Gradient accumulation in the closure: equal parts, with and without weights."""
    problem = tanh_mlp()
    x, y = problem.batch

    def closure() -> Tensor:
        total = torch.zeros(())
        for rows in (slice(0, 24), slice(24, 48)):
            loss = F.cross_entropy(problem.model(x[rows]), y[rows])
            loss.backward(torch.tensor(0.5))
            total += loss.detach() / 2
        return total

    replay = Replay(closure, problem.params)
    whole_loss, whole = Replay.of_loss(problem.loss, problem.params).gradient()
    loss, gradient = replay.gradient()
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    for a, b in zip(whole, gradient, strict=True):
        torch.testing.assert_close(a, b)
    assert replay.loss().item() == pytest.approx(whole_loss, rel=1e-6)
    vector = random_like(problem.params, 0)
    one = HessianOperator(problem.loss, problem.params, "double_backward").matvec(vector)
    two = HessianOperator(replay, problem.params, "double_backward").matvec(vector)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_backward_of_several_outputs_at_once() -> None:
    w = nn.Parameter(torch.tensor([1.0, 2.0]))

    def closure() -> Tensor:
        torch.autograd.backward([w[0] ** 2, w**3], [torch.tensor(2.0), torch.tensor([0.0, 1.0])])
        return w.sum()

    replay = Replay(closure, [w])
    torch.testing.assert_close(replay.gradient()[1][0], torch.tensor([4.0, 12.0]))
    torch.testing.assert_close(torch.autograd.grad(replay.loss(), [w])[0], torch.tensor([4.0, 12.0]))


def test_a_closure_without_backward_is_refused() -> None:
    problem = tanh_mlp()
    replay = Replay(problem.loss, problem.params)
    for evaluate in (replay.gradient, replay.loss):
        with pytest.raises(ValueError, match=r"did not call backward\(\)"):
            evaluate()


def test_a_loss_that_depends_on_nothing_has_a_zero_gradient() -> None:
    w = nn.Parameter(torch.ones(3))
    for loss in (lambda: torch.tensor(2.0), lambda: torch.ones(1, requires_grad=True).sum()):
        value, gradient = Replay.of_loss(loss, [w]).gradient()
        assert value in (1.0, 2.0)
        assert torch.equal(gradient[0], torch.zeros(3))


def test_sparse_gradients_come_dense_and_unused_ones_zero() -> None:
    problem = awkward()
    model = problem.model
    _, gradient = Replay.of_loss(problem.loss, problem.params, module=model).gradient()
    problem.loss().backward()
    for p, g in zip(problem.params, gradient, strict=True):
        assert g.layout == torch.strided and g.shape == p.shape and g.dtype == p.dtype
        expected = torch.zeros_like(p) if p.grad is None else p.grad.to_dense()
        torch.testing.assert_close(g, expected)


def test_gradients_of_other_leaves_are_not_accumulated_into() -> None:
    """Parameters outside the optimizer, and inputs that require grad."""
    problem = tanh_mlp()
    x = problem.batch[0].clone().requires_grad_()
    others = [x, *problem.params[2:]]
    others[1].grad = kept = torch.ones_like(others[1])
    replay = Replay.of_loss(lambda: F.cross_entropy(problem.model(x), problem.batch[1]), problem.params[:2])
    for _ in range(2):
        replay.gradient()
    assert others[1].grad is kept and torch.equal(kept, torch.ones_like(kept))
    assert all(other.grad is None for other in [others[0], *others[2:]])


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_segments(reentrant: bool) -> None:
    """The nested backward of a reentrant checkpoint is part of the outer one; recomputing leaves no trace."""
    problem = batch_norm()
    x, y = problem.batch
    x.requires_grad_()  # reentrant checkpoints need an input that requires grad
    counter = problem.model[1].num_batches_tracked

    def loss() -> Tensor:
        return F.cross_entropy(checkpoint(problem.model, x, use_reentrant=reentrant), y)

    replay = Replay.of_loss(loss, problem.params, module=problem.model)
    plain = Replay.of_loss(problem.loss, problem.params, module=problem.model).gradient()[1]
    for a, b in zip(replay.gradient()[1], plain, strict=True):
        torch.testing.assert_close(a, b)
    operator = HessianOperator(replay, problem.params)
    operator.matvec(random_like(operator.template, 0))
    assert counter.item() == 0
    assert x.grad is None


def test_only_the_outermost_backward_is_intercepted() -> None:
    seen: list[Tensor] = []

    def handler(original: Callable[..., None], tensors: Tensor, *args: object, **kwargs: object) -> None:
        seen.append(tensors)
        torch.autograd.backward(tensors * 1, retain_graph=True)  # nested: goes through
        original(tensors, *args, **kwargs)

    w = nn.Parameter(torch.tensor(3.0))
    original = torch.autograd.backward
    with intercept_backward(handler):
        w.square().backward(retain_graph=True)
    assert len(seen) == 1
    assert w.grad.item() == 12.0
    assert torch.autograd.backward is original
