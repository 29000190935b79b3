"""Rates: as schedulers and hooks set them outside of the step, scaled inside of it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.optim.lr_scheduler as schedulers
from torch import nn
from torch.optim.swa_utils import SWALR

from tests.helpers import assert_same, batch_of, loss_fn, mlp, train
from tests.optimizer.helpers import STEEP, rates_in_step, wrapped
from warmctl import AdaptiveWarmup


def test_rates_written_by_hand_are_scaled_inside_the_step_and_put_back() -> None:
    model, opt = wrapped()
    opt.add_param_group({"params": [], "lr": 7.0})
    applied = rates_in_step(opt)
    for step in range(6):
        opt.param_groups[0]["lr"] = rate = STEEP / (1 + step)
        train(opt, model, [step])
        assert [group["lr"] for group in opt.param_groups] == [rate, 7.0]
        assert applied[-1] == opt.metrics["lr"] == opt.metrics["scale"] * rate
    assert opt.metrics["scale"] < 1


@pytest.mark.parametrize("rate", [STEEP, torch.tensor(STEEP)], ids=["float", "tensor"])
def test_a_checkpoint_of_a_step_hook_has_the_rates_of_the_schedule(rate: Any) -> None:
    model, saved = mlp(), []
    opt = AdaptiveWarmup(torch.optim.SGD(model.parameters(), lr=rate), model, every=1)
    opt.register_step_post_hook(lambda *_: saved.append([float(g["lr"]) for g in opt.state_dict()["param_groups"]]))
    train(opt, model, range(3))
    assert opt.metrics["scale"] < 1.0
    assert saved == [[pytest.approx(STEEP)]] * 3


@pytest.mark.parametrize("optimizer_class", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_a_tensor_rate_is_filled_in_place(optimizer_class: Any) -> None:
    model = mlp()
    rate = torch.tensor(STEEP)
    opt = AdaptiveWarmup(optimizer_class(model.parameters(), lr=rate), model, every=1)
    applied = rates_in_step(opt)
    for step in range(4):
        train(opt, model, [step])
        assert opt.param_groups[0]["lr"] is rate and rate.item() == STEEP
    assert 0 < applied[-1] < STEEP
    assert applied[-1] == pytest.approx(opt.metrics["lr"], rel=1e-6)


def test_a_tensor_rate_shared_by_groups_is_scaled_once() -> None:
    model = mlp()
    rate = torch.tensor(STEEP)
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    opt = AdaptiveWarmup(torch.optim.SGD(groups, lr=rate), model, every=1)
    assert opt.param_groups[0]["lr"] is opt.param_groups[1]["lr"]
    seen = rates_in_step(opt)
    for step in range(3):
        (row,) = train(opt, model, [step])
        assert 0 < row["scale"] < 1
        assert seen[-1] == pytest.approx(STEEP * row["scale"])
        assert all(group["lr"] is rate and float(rate) == STEEP for group in opt.param_groups)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("when", ["pre", "post"])
@pytest.mark.parametrize("by", ["number", "fill", "replace"])
def test_a_rate_written_in_a_step_hook_stays(by: str, when: str, shared: bool) -> None:
    model, opt = wrapped()
    second = nn.Parameter(torch.ones(2))
    opt.add_param_group({"params": [second], "lr": STEEP})
    if by != "number":
        rate = torch.tensor(STEEP)
        for group in opt.param_groups:
            group["lr"] = rate if shared else rate.clone()

    def write(base: Any, *_: Any) -> None:
        group = base.param_groups[0]
        if by == "fill":
            group["lr"].fill_(0.25)
        else:
            group["lr"] = 0.25 if by == "number" else torch.tensor(0.25)

    register = opt.register_step_pre_hook if when == "pre" else opt.register_step_post_hook
    register(write)
    loss_fn(model, batch_of(0)).backward()
    opt.backward(second.sum())
    opt.step()
    assert 0 < opt.metrics["scale"] < 1
    assert float(opt.param_groups[0]["lr"]) == 0.25
    assert float(opt.param_groups[1]["lr"]) == (0.25 if shared and by == "fill" else STEEP)


def _by_closure(opt: Any, model: nn.Module, step: int) -> None:
    train(opt, model, [step])


def _by_observe(opt: Any, model: Any, step: int) -> None:
    opt.observe(batch_of(step))
    opt.zero_grad()
    loss_fn(model, batch_of(step)).backward()
    opt.step()


@pytest.mark.parametrize("loop", [_by_closure, _by_observe])
@pytest.mark.parametrize("after", ["guard", "hold", "release"])
def test_the_scale_is_applied_and_logged_in_every_phase(after: str, loop: Callable[..., None]) -> None:
    model, opt = wrapped(after=after, max_warmup=3, loss_fn=loss_fn)
    applied = rates_in_step(opt)
    for step in range(12):
        loop(opt, model, step)
        assert applied[-1] == opt.metrics["lr"] == opt.metrics["scale"] * STEEP == opt.history[-1]["lr"]
        assert opt.history[-1]["scheduled_lr"] == STEEP
        assert opt.metrics["step"] == len(opt.history) == step + 1
    assert opt.phase == ("guard" if after == "guard" else "done")
    kept: list[Any] = [row["scale"] for row in opt.history[4:]]
    if after == "hold":
        assert len(set(kept)) == 1 and 0 < kept[0] < 1
    if after == "release":
        assert kept == sorted(kept) and kept[-1] > kept[0]


class _Breaks(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        if closure is not None:
            closure()
        raise RuntimeError("no luck", self.param_groups[0]["lr"])


@pytest.mark.parametrize("tensor_rate", [False, True])
def test_rates_are_put_back_when_the_step_fails(tensor_rate: bool) -> None:
    model = mlp()
    rate = torch.tensor(STEEP) if tensor_rate else STEEP
    opt = AdaptiveWarmup(_Breaks(model.parameters(), lr=rate), model, every=1, max_warmup=1)
    opt.controller.state.scale = 0.25
    with pytest.raises(RuntimeError, match="no luck") as failure:
        train(opt, model, [0])
    assert failure.value.args[1] is not rate or tensor_rate
    assert opt.param_groups[0]["lr"] is rate and float(rate) == STEEP


# Schedulers -------------------------------------------------------------------------------------------------


LR = schedulers


SCHEDULERS: dict[type, Callable[[Any], Any]] = {
    LR.LambdaLR: lambda o: LR.LambdaLR(o, lambda step: 0.9**step),
    LR.MultiplicativeLR: lambda o: LR.MultiplicativeLR(o, lambda step: 0.9),
    LR.StepLR: lambda o: LR.StepLR(o, 3),
    LR.MultiStepLR: lambda o: LR.MultiStepLR(o, [2, 5]),
    LR.ConstantLR: lambda o: LR.ConstantLR(o, total_iters=4),
    LR.LinearLR: lambda o: LR.LinearLR(o, total_iters=4),
    LR.ExponentialLR: lambda o: LR.ExponentialLR(o, 0.8),
    LR.PolynomialLR: lambda o: LR.PolynomialLR(o, total_iters=8, power=2.0),
    LR.CosineAnnealingLR: lambda o: LR.CosineAnnealingLR(o, 8),
    LR.CosineAnnealingWarmRestarts: lambda o: LR.CosineAnnealingWarmRestarts(o, 3),
    LR.CyclicLR: lambda o: LR.CyclicLR(o, 0.1, STEEP, step_size_up=3, cycle_momentum=True),
    LR.OneCycleLR: lambda o: LR.OneCycleLR(o, STEEP, total_steps=12, cycle_momentum=True),
    LR.ChainedScheduler: lambda o: LR.ChainedScheduler([LR.ExponentialLR(o, 0.9), LR.StepLR(o, 3)]),
    LR.SequentialLR: lambda o: LR.SequentialLR(
        o, [LR.LinearLR(o, total_iters=3), LR.CosineAnnealingLR(o, 6)], milestones=[3]
    ),
    LR.ReduceLROnPlateau: lambda o: LR.ReduceLROnPlateau(o, patience=1, mode="max"),
    SWALR: lambda o: SWALR(o, swa_lr=0.1, anneal_epochs=4),
}


def test_every_scheduler_of_torch_is_here() -> None:
    classes = {v for k, v in vars(LR).items() if inspect.isclass(v) and k[0] != "_"}
    assert {c for c in classes if issubclass(c, LR.LRScheduler)} - {LR.LRScheduler} <= SCHEDULERS.keys()


@pytest.mark.parametrize("kind", SCHEDULERS, ids=lambda kind: kind.__name__)
def test_a_scheduler_sees_and_sets_the_rates_of_the_bare_optimizer(kind: type) -> None:
    def run(wrap: bool) -> tuple[list[Any], list[str], bool]:
        model, opt = wrapped()
        applied = rates_in_step(opt.base)
        opt_seen: Any = opt if wrap else opt.base
        scheduled, below = [], False
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            scheduler = SCHEDULERS[kind](opt_seen)
            for step in range(8):
                scheduled.append([dict(g, params=0, warmctl=0) for g in opt.param_groups])
                train(opt_seen, model, [step])
                below |= applied[-1] < scheduled[-1][0]["lr"]
                scheduler.step(1.0) if kind is LR.ReduceLROnPlateau else scheduler.step()
                scheduled.append(scheduler.get_last_lr())
        return scheduled, [str(w.message) for w in said if "scheduler" in str(w.message)], below

    bare, found = run(False), run(True)
    assert_same(found[:2], bare[:2])
    assert found[2] and not bare[2]  # the wrapper did scale inside
    assert not any("before" in message for message in found[1])


def test_flat_shards_in_place_of_the_models_parameters_are_refused() -> None:
    """As an engine leaves them that takes the optimizer over after it was wrapped."""
    model, opt = wrapped()
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in model.parameters()]))
    opt.param_groups[0]["params"] = [flat]
    loss_fn(model, batch_of(0)).backward()
    with pytest.raises(RuntimeError, match="flat shards"):
        opt.step()


@pytest.mark.parametrize("frozen", [1e-3, 100.0])
def test_the_rate_of_a_frozen_group_has_no_say(frozen: float) -> None:
    def run(rate: float) -> list[dict[str, Any]]:
        model = mlp()
        model[0].requires_grad_(False)
        groups = [{"params": model[0].parameters(), "lr": rate}, {"params": model[2].parameters()}]
        opt = AdaptiveWarmup(torch.optim.SGD(groups, STEEP), model)
        decay = schedulers.LambdaLR(opt, [lambda _: 1.0, lambda step: 1.0 - step / 40])
        for step in range(30):
            train(opt, model, [step])
            decay.step()
        return list(opt.history)

    rows = run(frozen)
    assert str(rows) == str(run(STEEP)) and rows[0]["scheduled_lr"] == STEEP


@pytest.mark.parametrize("at", [12, 40])
def test_freezing_the_fastest_group_is_no_fall_of_the_schedule(at: int) -> None:
    """A steep bowl at a tenth of the flat one's rate: what is known of it stays known."""
    flat, steep = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    model = nn.ParameterList([flat, steep])
    groups = [{"params": [flat], "lr": 1.0}, {"params": [steep], "lr": 0.1}]
    opt = AdaptiveWarmup(torch.optim.SGD(groups), model)
    noise = torch.Generator().manual_seed(1)
    for step in range(200):
        flat.requires_grad_(step < at)
        opt.zero_grad()
        pull = (0.1 * torch.randn(4, generator=noise) * steep).sum()
        opt.backward(0.0005 * (flat**2).sum() + 50 * (steep**2).sum() + 0.01 * (steep**4).sum() + pull)
        opt.step()
        if step >= at:
            assert opt.metrics["scale"] * 0.1 * 100.0 / 2.0 < 0.81
    assert opt.history["scheduled_lr"][at - 1 :: at] == [1.0, *[0.1] * (len(opt.history) // at - 1)]


def test_a_reading_along_the_last_update_is_referred_to_the_groups_that_still_train() -> None:
    class Plain(torch.optim.Optimizer):
        """A rule that is not known is measured along the update that it has made, whatever the next one is."""

        def __init__(self, groups: list[dict[str, Any]]) -> None:
            super().__init__(groups, {})

        def step(self, closure: Any = None) -> None:
            closure()
            with torch.no_grad():
                for group in self.param_groups:
                    for p in group["params"]:
                        p.sub_(0.0 if p.grad is None else group["lr"] * p.grad)

    flat, steep = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    groups = [{"params": [flat], "lr": 1.0}, {"params": [steep], "lr": 0.1}]
    opt = AdaptiveWarmup(Plain(groups), nn.ParameterList([flat, steep]), every=1)

    def closure() -> torch.Tensor:
        opt.zero_grad()
        loss = 0.0005 * (flat**2).sum() + 50 * (steep**2).sum()
        loss.backward()
        return loss

    for step in range(31):
        flat.requires_grad_(step < 30)
        opt.step(closure)
    assert opt.history["stability_ratio"][-2:] == [pytest.approx(0.8)] * 2


def ratio_of_bowls(rates: list[float]) -> float:
    """The true one of two bowls of sharpness .001 and 100 under SGD, at these rates."""
    return max(rates[0] * 0.001, rates[1] * 100.0) / 2.0


@pytest.mark.parametrize("factor", [10.0, 30.0])
def test_a_steep_group_that_is_raised_beside_a_faster_flat_one(factor: float) -> None:
    flat, steep = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    groups = [{"params": [flat], "lr": 1.0}, {"params": [steep], "lr": 0.001}]
    opt = AdaptiveWarmup(torch.optim.SGD(groups), nn.ParameterList([flat, steep]))
    schedule = schedulers.LambdaLR(opt, [lambda _: 1.0, lambda step: factor if step >= 150 else 1.0])
    noise = torch.Generator().manual_seed(1)
    for step in range(300):
        opt.zero_grad()
        pull = (0.1 * torch.randn(4, generator=noise) * (steep + 0.001 * flat)).sum()
        opt.backward(0.0005 * (flat**2).sum() + 50 * (steep**2).sum() + pull)
        opt.step()
        rates = [group["lr"] * opt.metrics["scale"] for group in opt.param_groups]
        assert ratio_of_bowls(rates) < 0.85
        if step == 140:
            assert opt.metrics["scale"] == 1.0
        schedule.step()
    assert opt.metrics["scale"] == pytest.approx(min(1.0, 0.8 / ratio_of_bowls([1.0, 0.001 * factor])), rel=0.2)


def test_a_group_that_is_given_a_rate_later_is_warmed_up_as_one_that_is_thawed() -> None:
    def run(thaw: bool) -> tuple[list[float], list[float]]:
        model = mlp()
        model[0].requires_grad_(not thaw)
        groups = [{"params": model[2].parameters(), "lr": 0.1}, {"params": model[0].parameters(), "lr": 1.0}]
        opt = AdaptiveWarmup(torch.optim.SGD(groups), model)
        schedule = schedulers.LambdaLR(opt, [lambda _: 1.0, lambda step: float(thaw or step >= 60)])
        for step in range(70):
            if step == 60:
                model[0].requires_grad_(True)
            train(opt, model, [step])
            schedule.step()
        return opt.history["scale"][:62], opt.history["scheduled_lr"]

    (scales, _), (thawed, _) = run(False), run(True)
    assert scales[60] < 0.1 * scales[59]
    assert scales == pytest.approx(thawed, rel=1e-3)


def test_groups_that_take_turns_are_each_warmed_up_once() -> None:
    model = mlp()
    groups = [{"params": layer.parameters(), "lr": 0.1} for layer in (model[0], model[2])]
    opt = AdaptiveWarmup(torch.optim.SGD(groups), model)
    turns = schedulers.LambdaLR(opt, [lambda step: float(step % 2), lambda step: float((step + 1) % 2)])
    for step in range(120):
        train(opt, model, [step])
        turns.step()
    assert opt.metrics["scale"] == 1.0 and opt.phase == "guard" and opt.metrics["probes"] < 8


@pytest.mark.parametrize("start", [1e-10, 1e-8, 1e-4])
def test_a_rate_that_begins_next_to_nothing_is_no_measure_of_what_comes(start: float) -> None:
    model = mlp()
    groups = [{"params": layer.parameters(), "lr": 0.1} for layer in (model[0], model[2])]
    opt = AdaptiveWarmup(torch.optim.SGD(groups), model)
    ramp = schedulers.LambdaLR(opt, [lambda step: min(1.0, start + step / 50), lambda _: 1.0])
    for step in range(60):
        train(opt, model, [step])
        ramp.step()
    assert opt.metrics["scale"] == 1.0


def test_a_decay_to_nothing_is_no_beginning() -> None:
    model = mlp()
    groups = [{"params": layer.parameters(), "lr": rate} for layer, rate in ((model[0], 1e-5), (model[2], 0.1))]
    opt = AdaptiveWarmup(torch.optim.SGD(groups), model)
    decay = schedulers.LambdaLR(opt, [lambda _: 1.0, lambda step: max(0.0, 1.0 - step / 50) + 1e-6])
    for step in range(60):
        train(opt, model, [step])
        decay.step()
    assert opt.metrics["scale"] == 1.0 and not any("started" in reason for reason in opt.history["reason"][1:])
