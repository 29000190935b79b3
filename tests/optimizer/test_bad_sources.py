"""No loss to measure, or one that breaks the contract: an error or a warning with the remedy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from tests.helpers import assert_same, batch_of, closure_for, everything, loss_fn, mlp, monitor, sgd, train, weights
from warmctl import AdaptiveWarmup


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Rprop], ids=["known rule", "unknown rule"])
def test_no_source_of_a_loss(base: Any) -> None:
    """One error with the three remedies, each on a line; then any of them goes on."""
    model = mlp()
    opt = AdaptiveWarmup(base(model.parameters(), 0.1), model)
    closure_for(opt, model, batch_of(0))()
    before = everything(model, opt)
    with pytest.raises(RuntimeError) as caught:
        opt.step()
    message = str(caught.value)
    lines = message.splitlines()
    for remedy in ("opt.step(closure)", "opt.backward(loss)", "opt.observe(batch)"):
        assert sum(remedy in line for line in lines) == 1, message
    assert_same(everything(model, opt), before)
    assert len(opt.history) == 0  # no step was made, and none is said to have been left out
    opt.step(closure_for(opt, model, batch_of(0)))
    assert opt.metrics["probes"] >= (base is torch.optim.SGD)


def test_observe_without_loss_fn() -> None:
    with pytest.raises(ValueError, match=r"observe\(batch\) needs AdaptiveWarmup\(\.\.\., loss_fn="):
        monitor(mlp()).observe(batch_of(0))


@pytest.mark.parametrize("loss", [None, 1.0, torch.zeros(3)])
def test_backward_on_something_else_than_a_loss(loss: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"backward\(loss\) takes a scalar tensor, got"):
        monitor(mlp()).backward(loss)


class SignDescent(torch.optim.Optimizer):
    """A rule that nobody has registered."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad.sign())


def test_backward_with_an_unknown_rule_says_what_else_to_call() -> None:
    model = mlp()
    opt = AdaptiveWarmup(SignDescent(model.parameters(), 1e-3), model)
    opt.backward(loss_fn(model, batch_of(0)))
    with pytest.raises(RuntimeError, match=r"SignDescent.*opt\.step\(closure\).*opt\.observe\(batch\)"):
        opt.step()


def test_a_criterion_in_place_of_loss_fn() -> None:
    model = mlp()
    opt = AdaptiveWarmup(torch.optim.SGD(model.parameters(), 0.1), model, loss_fn=nn.CrossEntropyLoss())
    opt.observe(batch_of(0))
    loss_fn(model, batch_of(0)).backward()
    with pytest.warns(RuntimeWarning, match=r"loss_fn failed: it must run the model itself"):
        opt.step()


def test_loss_fn_without_observe_is_noticed_within_a_few_steps() -> None:
    model = mlp()
    opt = AdaptiveWarmup(torch.optim.SGD(model.parameters(), 0.1), model, loss_fn=loss_fn)
    with pytest.warns(RuntimeWarning, match=r"observe\(batch\) was not called") as said:
        for step in range(30):
            opt.zero_grad()
            loss_fn(model, batch_of(step)).backward()
            opt.step()
    assert len(said) == 1


def test_a_warning_points_at_the_users_line() -> None:
    model = mlp()
    opt = AdaptiveWarmup(torch.optim.SGD(model.parameters(), 0.1), model, loss_fn=lambda model, batch: 1 / 0)
    opt.observe(batch_of(0))
    loss_fn(model, batch_of(0)).backward()
    with pytest.warns(RuntimeWarning, match="ZeroDivisionError") as said:
        opt.step()
    assert said[0].filename == __file__


# Closures ---------------------------------------------------------------------------------------------------


CLOSURES: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "returns None": (lambda loss: loss.backward(), "returned None: it must return the loss"),
    "returns a vector": (lambda loss: (loss.backward(), torch.ones(3) * loss)[1], r"shape \(3,\).*scalar"),
    "returns a tuple": (lambda loss: (loss.backward(), (loss, 1))[1], "returned tuple.*scalar loss"),
    "does not call backward": (lambda loss: loss, "did not call loss.backward"),
}


@pytest.mark.parametrize("kind", CLOSURES)
@pytest.mark.parametrize("clears", [True, False], ids=["after zero_grad", "with an old gradient"])
def test_closures_that_break_the_contract(kind: str, clears: bool) -> None:
    model = mlp()
    opt = monitor(model)
    finish, message = CLOSURES[kind]
    if not clears:
        closure_for(opt, model, batch_of(1))()

    def closure() -> Any:
        if clears:
            opt.zero_grad()
        return finish(loss_fn(model, batch_of(0)))

    before = weights(model)
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        opt.step(closure)
    assert_same(weights(model), before)
    assert opt.param_groups[0]["lr"] == 0.1 and opt.metrics["step"] == 0 and not opt.base.state
    opt.step(closure_for(opt, model, batch_of(0)))
    assert opt.metrics["step"] == 1


def test_a_loss_in_place_of_the_closure() -> None:
    model = mlp()
    opt = monitor(model)
    with pytest.raises(TypeError, match=r"step\(closure\) takes a function.*got Tensor"):
        opt.step(loss_fn(model, batch_of(0)))  # type: ignore[arg-type]


def test_a_closure_that_raises() -> None:
    model = mlp()
    opt = AdaptiveWarmup(sgd(model), model)
    train(opt, model, range(3))
    before = everything(model, opt)

    def closure() -> Tensor:
        raise KeyError("label")

    with pytest.raises(KeyError):
        opt.step(closure)
    assert_same(everything(model, opt), before)
    assert torch.autograd.backward.__module__ == "torch.autograd"


def test_a_closure_that_skips_the_step() -> None:
    """Nothing to learn from in this batch: no gradient, no loss. As in PyTorch, nothing happens."""
    model = mlp()
    opt = monitor(model)
    opt.zero_grad()
    before = everything(model, opt)
    opt.step(lambda: None)
    assert_same(everything(model, opt), before)
    assert opt.metrics["step"] == 0


@pytest.mark.parametrize("returned", [float, lambda loss: loss.item(), lambda loss: loss.detach().numpy()])
def test_a_closure_may_return_a_number(returned: Callable[[Tensor], Any]) -> None:
    model = mlp()
    opt = monitor(model)
    for _ in range(2):
        opt.step(lambda: returned(closure_for(opt, model, batch_of(0))().detach()))
    assert opt.metrics["probes"] == 2 and opt.metrics["sharpness"] > 0


def test_a_closure_that_sets_gradients_itself() -> None:
    """By autograd.grad, without a backward pass: cannot be measured, trains."""
    model = mlp()
    opt = monitor(model)

    def closure() -> Tensor:
        loss = loss_fn(model, batch_of(0))
        params = list(model.parameters())
        for p, g in zip(params, torch.autograd.grad(loss, params), strict=True):
            p.grad = g
        return loss

    before = model[0].weight.detach().clone()
    with pytest.warns(RuntimeWarning, match="did not call backward"):
        opt.step(closure)
    assert not torch.equal(model[0].weight, before)
    opt.step(closure)
    assert math.isnan(opt.metrics["sharpness"]) and opt.metrics["step"] == 2


def test_a_nan_guard_in_the_closure_lets_the_step_through() -> None:
    model = mlp()
    opt = AdaptiveWarmup(SGD(model.parameters(), 0.1), model)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = loss_fn(model, batch_of(0)) * float("nan")
        if torch.isfinite(loss):
            loss.backward()
        return loss

    opt.step(closure)
