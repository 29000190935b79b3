"""What else happens in a loop: gradients left over, sources in turn, parameters frozen and thawed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

from tests.helpers import (
    FORWARD_COST,
    assert_same,
    batch_of,
    closure_for,
    everything,
    loss_fn,
    mlp,
    monitor,
    sgd,
    train,
)
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
    assert opt.metrics["overhead"] == other.metrics["overhead"] == pytest.approx((5 + 2 + 2) / 3 + FORWARD_COST)


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
    assert opt.metrics["probes"] == 4 and "failed" not in opt.metrics["reason"]


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


def test_as_many_parameters_thawed_as_frozen_begin_warmup_again() -> None:
    model = mlp()
    first, second = list(model[0].parameters()), list(model[2].parameters())
    for p in second:
        p.requires_grad_(False)
    opt = AdaptiveWarmup(SGD(model.parameters(), lr=0.1), model)
    train(opt, model, range(6))
    assert opt.controller.state.age == 6
    for p, trains in [(p, False) for p in first] + [(p, True) for p in second]:
        p.requires_grad_(trains)
        p.grad = None
    train(opt, model, range(6, 8))
    assert opt.controller.state.age == 2
    assert opt.sources.params == second


def test_a_step_that_is_not_decided_shows_the_rate_zero() -> None:
    model = mlp()
    opt = AdaptiveWarmup(SGD(model.parameters(), lr=0.1), model)
    train(opt, model, range(2))
    opt.param_groups[0]["lr"] = 0.0

    def out_of_data() -> Tensor:
        raise StopIteration

    with pytest.raises(StopIteration):
        opt.step(out_of_data)
    assert opt.metrics["lr"] == 0.0


def test_only_a_change_of_phase_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = mlp()
    opt = AdaptiveWarmup(SGD(model.parameters(), lr=0.1), model, max_warmup=5)
    with caplog.at_level("INFO", logger="warmctl"):
        train(opt, model, range(7))
        opt.restart()
        train(opt, model, range(7, 10))
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("step")]
    assert len(said) == 1 and said[0].startswith("step 5: warmup ended")


def test_when_warmup_is_done_a_closure_is_still_held_to_its_contract() -> None:
    model = mlp()
    opt = AdaptiveWarmup(SGD(model.parameters(), lr=0.1), model, max_warmup=3, after="hold")
    train(opt, model, range(3))
    assert opt.phase == "done"
    weights = everything(model, opt)["weights and buffers"]

    def returns_nothing() -> None:
        closure_for(opt, model, batch_of(3))()

    with pytest.raises(TypeError, match="returned None"):
        opt.step(returns_nothing)
    assert all((a == weights[name]).all() for name, a in model.state_dict().items())


@pytest.mark.parametrize("after", ["guard", "hold"])
def test_a_closure_is_one_evaluation_however_many_passes_it_makes(after: str) -> None:
    model = mlp()
    opt = AdaptiveWarmup(sgd(model), model, after=after, max_warmup=2)

    def closure() -> Tensor:
        opt.zero_grad()
        losses = [loss_fn(model, batch_of(part)) / 3 for part in range(3)]
        for loss in losses:
            loss.backward()
        return torch.stack(losses).sum().detach()

    for _ in range(5):
        opt.step(closure)
    assert opt.phase != "warmup" and opt.counts.gradients == 5
