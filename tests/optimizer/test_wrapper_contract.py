"""What a PyTorch optimizer is to everyone who handles one: schedulers, hooks, copies, compilers, loggers."""

from __future__ import annotations

import copy
import inspect
import io
import json
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import schedulefree  # type: ignore[import-untyped]
import torch
import torch.optim.lr_scheduler as schedulers
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.optim.swa_utils import SWALR

from tests.helpers import METRICS, assert_same, batch_of, closure_for, everything, loss_fn, mlp, noisy_net, train
from warmctl import AdaptiveWarmup

STEEP = 50.0
"""A rate far above what these problems carry with SGD: the scale stays well below 1."""


def wrapped(
    rate: float = STEEP, optimizer_class: Any = torch.optim.SGD, model: Any = None, **options: Any
) -> tuple[Any, AdaptiveWarmup]:
    model = model or mlp()
    kwargs = {"momentum": 0.9} if optimizer_class is torch.optim.SGD else {}
    options = {"every": 1, **options}
    return model, AdaptiveWarmup(optimizer_class(model.parameters(), lr=rate, **kwargs), model, **options)


def rates_in_step(opt: torch.optim.Optimizer) -> list[float]:
    """Filled with the first group's rate at the end of each step, still inside the wrapped optimizer."""
    seen: list[float] = []
    opt.register_step_post_hook(lambda base, *_: seen.append(float(base.param_groups[0]["lr"])))
    return seen


# One optimizer, two names ---------------------------------------------------------------------------------


def test_it_is_an_optimizer_that_shares_all_state_with_its_base() -> None:
    model, opt = wrapped()
    for _ in range(2):
        assert isinstance(opt, torch.optim.Optimizer)
        assert opt.param_groups is opt.base.param_groups
        assert opt.state is opt.base.state
        assert opt.defaults is opt.base.defaults
        train(opt, model, range(2))
        opt.load_state_dict(opt.state_dict())  # replaces the base's lists and dictionaries


def test_repr_names_the_base_and_the_phase() -> None:
    text = repr(wrapped(optimizer_class=torch.optim.AdamW)[1])
    assert text.startswith("AdaptiveWarmup(AdamW,") and "phase='warmup'" in text


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool) -> None:
    model, opt = wrapped()
    loss_fn(model, batch_of(0)).backward()
    opt.zero_grad(set_to_none=set_to_none)
    assert all(p.grad is None if set_to_none else not p.grad.count_nonzero() for p in model.parameters())


def test_metrics_are_those_of_the_contract_and_plain() -> None:
    model, opt = wrapped()
    for row in [opt.metrics, *train(opt, model, range(3))]:
        assert tuple(row) == METRICS
        assert all(type(value) in (int, float, str) for value in row.values())
        json.dumps(row)
    assert opt.metrics["step"] == len(opt.history) == 3
    assert opt.metrics["phase"] == opt.phase


@pytest.mark.parametrize("set_to", [0.0, torch.tensor(0.0)])
def test_metrics_at_no_rate(set_to: Any) -> None:
    model, opt = wrapped()
    train(opt, model, range(2))
    opt.param_groups[0]["lr"] = set_to
    train(opt, model, range(1))
    assert opt.metrics["lr"] == 0.0 and opt.metrics["step"] == 2


# Rates ----------------------------------------------------------------------------------------------------

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


class _BreaksFirst(Exception):
    pass


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


def test_a_closure_that_raises_leaves_everything_as_it_was() -> None:
    model, opt = wrapped()
    train(opt, model, range(3))
    before = everything(model, opt)

    def closure() -> Tensor:
        raise _BreaksFirst

    with pytest.raises(_BreaksFirst):
        opt.step(closure)
    assert_same(everything(model, opt), before)
    assert opt.metrics["step"] == 3


# Hooks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_base", [False, True])
def test_every_hook_fires_once(on_base: bool) -> None:
    model, opt = wrapped()
    target = opt.base if on_base else opt
    fired: list[str] = []
    kinds = [name for name in dir(torch.optim.Optimizer) if name.startswith("register_") and "hook" in name]
    assert len(kinds) == 6
    for kind in kinds:
        getattr(target, kind)(lambda *_, kind=kind: fired.append(kind))
    train(opt, model, [0])
    opt.load_state_dict(opt.state_dict())
    assert sorted(fired) == sorted(kinds)


def test_global_step_hooks_and_the_profiler_see_one_step() -> None:
    model, opt = wrapped(optimizer_class=torch.optim.AdamW)
    fired: list[str] = []
    handle = register_optimizer_step_post_hook(lambda *_: fired.append("post"))
    try:
        with torch.profiler.profile() as profile:
            train(opt, model, [0])
    finally:
        handle.remove()
    assert fired == ["post"]
    names = [event.key for event in profile.key_averages() if event.key.startswith("Optimizer.step")]
    assert names == ["Optimizer.step#AdamW.step"]
    assert [e.count for e in profile.key_averages() if e.key == names[0]] == [1]


# Groups added later ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", ["guard", "hold", "release"])
def test_a_group_added_later_is_trained_and_restarts_warmup(after: str) -> None:
    model: Any = mlp()
    base = torch.optim.AdamW(model[0].parameters(), lr=0.01)
    opt = AdaptiveWarmup(base, model, every=1, max_warmup=3, after=after)
    train(opt, model, range(5))
    assert opt.phase == ("guard" if after == "guard" else "done")
    opt.add_param_group({"params": model[2].parameters(), "lr": 0.02})
    assert opt.phase == "warmup" and len(opt.base.param_groups) == 2
    before, probes = model[2].weight.detach().clone(), opt.metrics["probes"]
    train(opt, model, range(2))
    assert opt.metrics["probes"] > probes
    assert not torch.equal(model[2].weight, before)


# Copies ---------------------------------------------------------------------------------------------------


def _saved(pair: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(pair, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
    "torch.save": _saved,
}


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Muon])
@pytest.mark.parametrize("scheduled", [False, True])
def test_a_copy_goes_on_as_the_original_does(copied: str, optimizer_class: Any, scheduled: bool) -> None:
    model: Any = nn.Sequential(nn.Linear(6, 3, bias=False)) if optimizer_class is torch.optim.Muon else mlp()
    model, opt = wrapped(1.0, optimizer_class, model)
    if scheduled:  # a scheduler replaces `step` on the instance
        schedulers.StepLR(opt, 100)
    train(opt, model, range(5))
    twin_model, twin = COPIES[copied]((model, opt))
    assert twin.model is twin_model
    before = everything(model, opt)
    rows = train(twin, twin_model, range(5, 10))
    assert_same(everything(model, opt), before)  # the original did not move
    assert_same(train(opt, model, range(5, 10)), rows)
    assert_same(everything(model, opt), everything(twin_model, twin))


def test_a_shallow_copy_drives_the_same_base() -> None:
    model, opt = wrapped()
    twin = copy.copy(opt)
    assert twin.base is opt.base and twin.param_groups is opt.param_groups
    train(twin, model, range(2))
    assert opt.base.state and twin.metrics["step"] == 2


# Schedule-free --------------------------------------------------------------------------------------------


def test_train_and_eval_reach_a_schedule_free_base() -> None:
    def run(wrap: bool) -> tuple[list[Any], Any]:
        model = mlp()
        opt: Any = schedulefree.AdamWScheduleFree(model.parameters(), lr=1e-9)
        if wrap:
            opt = AdaptiveWarmup(opt, model, every=2, control=False)
        trace = []
        for step in range(4):
            opt.train()
            train(opt, model, [step])
            opt.eval()
            trace.append(everything(model, opt))
        return trace, opt

    assert_same(run(True)[0], run(False)[0])
    with pytest.raises(Exception, match="train mode"):
        train(run(True)[1], mlp(), [0])
    plain = wrapped()[1]
    plain.train()
    plain.eval()


# Compilers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("hvp", ["auto", "finite_difference"])
def test_a_compiled_model_is_probed(backend: str, hvp: str) -> None:
    torch._dynamo.reset()

    def run(compiled: bool) -> list[dict[str, Any]]:
        model, opt = wrapped(0.5, hvp=hvp, model=noisy_net())
        called: Any = torch.compile(model, backend=backend) if compiled else model
        return train(opt, called, range(4))

    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # a failed probe
        rows, eager = run(True), run(False)
    assert rows[-1]["probes"] == eager[-1]["probes"] == 4
    for row, reference in zip(rows, eager, strict=True):
        assert row["sharpness"] == pytest.approx(reference["sharpness"], rel=1e-3)


@pytest.mark.parametrize("tensor_rate", [False, True])
def test_a_compiled_step_does_the_same(tensor_rate: bool) -> None:
    torch._dynamo.reset()

    def run(compile_step: bool) -> Any:
        rate: Any = torch.tensor(1.0) if tensor_rate else 1.0
        model, opt = wrapped(rate, torch.optim.Adam)
        opt_step = torch.compile(opt.step, backend="eager") if compile_step else opt.step
        for step in range(4):
            opt_step(closure_for(opt, model, batch_of(step)))
        return everything(model, opt), opt.metrics

    compiled, eager = run(True), run(False)
    assert_same(compiled[1], eager[1])
    assert_same(compiled[0]["weights and buffers"], eager[0]["weights and buffers"])


@pytest.mark.parametrize("after", ["guard", "hold"])
def test_the_record_has_the_loss_of_every_closure_to_the_end(after: str) -> None:
    """Also when warmup is over: the figure would draw a missing loss as a diverged run."""
    model = torch.nn.Linear(4, 2)
    opt = AdaptiveWarmup(torch.optim.SGD(model.parameters(), lr=0.1), model, after=after, max_warmup=2)
    losses = []
    for step in range(6):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))

        def closure(x: torch.Tensor = x) -> torch.Tensor:
            opt.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        losses.append(float(opt.step(closure).detach()))
    assert opt.history["loss"] == pytest.approx(losses)
