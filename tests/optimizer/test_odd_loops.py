"""What else happens in a loop: gradients left over, sources in turn, parameters frozen and thawed."""

from __future__ import annotations

from torch import Tensor
from torch.optim import SGD

from tests.helpers import assert_same, batch_of, closure_for, everything, loss_fn, mlp, monitor, sgd, train
from warmctl import AdaptiveWarmup


def test_gradients_left_from_before_the_wrapper() -> None:
    model = mlp()
    base = sgd(model)
    closure_for(base, model, batch_of(7))()
    opt = monitor(model, base)
    opt.step(closure_for(opt, model, batch_of(0)))
    assert opt.metrics["sharpness"] > 0


def test_zeroed_instead_of_cleared_gradients() -> None:
    model, twin = mlp(), mlp()
    opt, other = monitor(model, hvp="finite_difference"), monitor(twin, hvp="finite_difference")
    for step in range(3):

        def closure(step: int = step) -> Tensor:
            opt.zero_grad(set_to_none=False)
            loss = loss_fn(model, batch_of(step))
            loss.backward()
            return loss

        opt.step(closure)
        other.step(closure_for(other, twin, batch_of(step)))
    assert opt.metrics["sharpness"] == other.metrics["sharpness"]
    assert opt.metrics["overhead"] == other.metrics["overhead"] == (5 + 2 + 2) / 3


def test_the_model_is_trained_with_closures_and_without_in_turn() -> None:
    model = mlp()
    opt = monitor(model, loss_fn=loss_fn)
    for step in range(4):
        if step % 2:
            opt.observe(batch_of(step))
            closure_for(opt, model, batch_of(step))()
            opt.step()
        else:
            opt.step(closure_for(opt, model, batch_of(step)))
    assert opt.metrics["probes"] == 4 and not opt.metrics["reason"].startswith("probe failed")


def test_all_parameters_frozen_later() -> None:
    model = mlp()
    opt = monitor(model)
    train(opt, model, range(2))
    model.requires_grad_(False)
    opt.zero_grad()
    before = everything(model, opt)
    opt.step()
    assert_same(everything(model, opt), before)


def test_parameters_frozen_and_thawed_between_probes() -> None:
    model = mlp()
    opt = monitor(model)
    for frozen in (False, True, False):
        model[0].requires_grad_(not frozen)
        train(opt, model, range(2))
        assert opt.meter.last is not None and not opt.meter.last.reason


def test_thawing_parameters_begins_warmup_again() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    opt = AdaptiveWarmup(SGD(model.parameters(), 0.01), model, after="hold", max_warmup=2)

    def steps(count: int) -> str:
        train(opt, model, range(count))
        return opt.phase

    assert steps(3) == "done"
    probes = opt.metrics["probes"]
    model[0].requires_grad_(True)
    assert steps(1) == "warmup" and opt.metrics["probes"] == probes + 1
    assert steps(3) == "done"
    model[2].requires_grad_(False)
    assert steps(1) == "done"
