"""The slope at the end of the step, against closed forms and against snapshots of every step."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import assert_same, batch_of, closure_for, loss_fn, mlp, monitor, sgd, train
from tests.optimizer.test_checkpoint import FORMATS, OPTIMIZERS, build, by_closures
from tests.optimizer.test_no_trace import dense_configurations
from tests.stability.snapshots import BETA, Snapshots
from warmctl import AdaptiveWarmup

pytestmark = pytest.mark.filterwarnings("ignore:warmctl:RuntimeWarning")
CURVATURES = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
START = torch.tensor([3.0, -1.0, 0.4], dtype=torch.float64)


class Quadratic(nn.Module):
    """½ Σ λᵢ θᵢ²"""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(START.clone())

    def forward(self) -> Tensor:
        return 0.5 * (CURVATURES * self.theta.square()).sum()


def slopes_on_the_quadratic(rate: float, steps: int) -> list[float]:
    model = Quadratic()
    opt = monitor(model, torch.optim.SGD(model.parameters(), rate), every=5)
    for _ in range(steps):
        opt.step(closure_for(opt, model, None, lambda m, _: m()))
    return opt.history["end_slope"]


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9, 1.2])
def test_plain_gradient_descent_on_a_quadratic_in_closed_form(rate: float) -> None:
    shrink = 1 - rate * CURVATURES
    found = slopes_on_the_quadratic(rate, 12)
    assert math.isnan(found[0])
    for t in range(1, 12):
        gradient = CURVATURES * shrink**t * START
        movement = sum(BETA ** (t - k + 1) * shrink ** (k - 1) for k in range(1, t + 1)) * (shrink - 1) * START
        expected = -float(gradient @ movement) / float(gradient.norm() * movement.norm())
        assert found[t] == pytest.approx(expected, rel=1e-9)


def test_crosses_zero_at_the_minimum_along_the_first_step() -> None:
    """Cauchy's step: the rate at which the new gradient is orthogonal to the old one."""
    gradient = CURVATURES * START
    best = float(gradient @ gradient) / float(gradient @ (CURVATURES * gradient))
    below, at, above = (slopes_on_the_quadratic(factor * best, 2)[1] for factor in (0.98, 1.0, 1.02))
    assert below > 1e-3 and above < -1e-3
    assert at == pytest.approx(0.0, abs=1e-12)


def carried(slopes: list[float], last: float = math.nan) -> list[float]:
    """As they are shown: where there is none the last one is."""
    shown = []
    for slope in slopes:
        last = last if math.isnan(slope) else slope
        shown.append(last)
    return shown


def by_snapshots(opt: AdaptiveWarmup, model: nn.Module, steps: range, snapshots: Snapshots, dtype: Any) -> list[float]:
    """Train on these steps; what the end slope is by its definition."""
    expected: list[float] = []
    for step in steps:
        batch = tuple(t.to(dtype) for t in batch_of(step))
        plain = closure_for(opt, model, batch)
        known = len(expected)

        def closure(plain: Callable[[], Any] = plain, known: int = known) -> Any:
            loss = plain()
            if len(expected) == known:  # probes and some optimizers evaluate it again
                expected.append(snapshots.end_slope(opt.trainable))
            return loss

        opt.step(closure)
    return expected


@pytest.mark.parametrize(("optimizer_class", "kwargs"), dense_configurations())
def test_is_that_of_snapshots_for_every_optimizer(optimizer_class: Any, kwargs: dict[str, Any]) -> None:
    model = mlp()
    if optimizer_class is torch.optim.Muon:  # takes matrices only
        model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False))
    model.double()
    opt = monitor(model, optimizer_class(model.parameters(), **copy.deepcopy(kwargs)), every=3)
    expected = by_snapshots(opt, model, range(12), Snapshots(), torch.float64)
    found = opt.history["end_slope"]
    assert found == pytest.approx(expected, abs=1e-7, nan_ok=True)
    assert math.isnan(found[0]) and all(map(math.isfinite, found[1:]))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-4)])
@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
def test_narrow_parameters_are_averaged_in_float32(dtype: torch.dtype, tolerance: float, optimizer_class: Any) -> None:
    model = mlp().to(dtype)
    opt = monitor(model, optimizer_class(model.parameters(), lr=0.02), every=5)
    expected = by_snapshots(opt, model, range(15), Snapshots(), dtype)
    assert opt.history["end_slope"] == pytest.approx(expected, abs=tolerance, nan_ok=True)
    assert math.isfinite(opt.metrics["end_slope"])
    assert {t.dtype for t in opt._signals.slope.vector_of(opt.trainable).values()} == {torch.float32}


def test_begins_anew_where_parameters_are_frozen_or_thawed() -> None:
    model, snapshots = mlp().double(), Snapshots()
    opt = monitor(model)
    for first, last, frozen in ((0, 5, False), (5, 9, True), (9, 13, False)):
        model[0].requires_grad_(not frozen)
        snapshots.begin_anew()
        shown = opt.metrics["end_slope"] if frozen else math.nan  # thawing restarts all
        expected = by_snapshots(opt, model, range(first, last), snapshots, torch.float64)
        found = opt.history["end_slope"][first:last]
        assert found == pytest.approx(carried(expected, shown), abs=1e-9, nan_ok=True)
        assert [math.isnan(e) for e in expected] == [True] + [False] * (last - first - 1)


def test_begins_anew_where_a_parameter_is_another_or_of_another_shape() -> None:
    model = mlp()
    opt = monitor(model, torch.optim.SGD(model.parameters(), 0.1), every=50)
    train(opt, model, range(3))
    model[2].weight.data, model[2].bias.data = torch.randn(5, 8), torch.randn(5)  # the same parameters, grown
    for step in range(2):
        opt.step(closure_for(opt, model, batch_of(step), lambda m, b: m(b[0]).square().mean()))
    opt.base.param_groups[0]["params"][3] = model[2].bias = nn.Parameter(torch.randn(5))
    for step in range(2):
        opt.step(closure_for(opt, model, batch_of(step), lambda m, b: m(b[0]).square().mean()))
    found = opt.history["end_slope"]
    assert [math.isnan(e) for e in found] == [True, False, False, False, False, True, False]
    assert found[3] == found[2] != found[4]  # none, so that the last one is shown


def test_undefined_without_movement_or_gradient() -> None:
    model = Quadratic()
    opt = monitor(model, torch.optim.SGD(model.parameters(), 0.1), every=50)
    for factor in (0.0, 0.0, 1.0, 1.0, 0.0, 1.0):
        opt.step(closure_for(opt, model, factor, lambda m, factor: factor * m()))
    found = opt.history["end_slope"]
    #                                         no movement so far
    assert [math.isnan(e) for e in found] == [True, True, True, False, False, False]
    assert found[4] == found[3] != found[5]  # no gradient: the last one is shown


def test_weights_that_were_not_finite_and_put_back_are_forgotten() -> None:
    model, snapshots = mlp().double(), Snapshots()
    opt = monitor(model, every=50)
    last = by_snapshots(opt, model, range(4), snapshots, torch.float64)[-1]
    good = copy.deepcopy(model.state_dict())
    for _ in range(2):  # not finite from the first of these steps on
        opt.step(closure_for(opt, model, batch_of(0), lambda m, b: m(b[0].double()).sum() * math.nan))
    assert not all(p.isfinite().all() for p in model.parameters())
    assert opt.history["end_slope"][-2:] == pytest.approx([last, last], abs=1e-9)  # there was none
    model.load_state_dict(good)
    for state in opt.state.values():
        state["momentum_buffer"].zero_()
    snapshots.begin_anew()
    expected = by_snapshots(opt, model, range(4, 8), snapshots, torch.float64)
    assert opt.history["end_slope"][-4:] == pytest.approx(carried(expected, last), abs=1e-9)
    assert math.isnan(expected[0]) and math.isfinite(expected[-1])


def test_a_step_that_a_scaler_skips_moves_nothing() -> None:
    model, twin = mlp(), mlp()
    found = []
    for module, skipping in ((model, True), (twin, False)):
        opt = monitor(module, torch.optim.Adam(module.parameters(), fused=True), loss_fn=loss_fn, every=50)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=1000, backoff_factor=0.999999)
        for step, bad in ((0, False), (1, False), (7, True), (2, False), (3, False)):
            if bad and not skipping:
                continue
            opt.zero_grad()
            opt.observe(batch_of(step))
            scaler.scale(loss_fn(module, batch_of(step)) * (math.inf if bad else 1.0)).backward()
            before = opt.counts.steps
            scaler.step(opt)
            assert (opt.counts.steps == before) == bad
            scaler.update()
        found.append(opt.history["end_slope"])
    assert found[0] == pytest.approx(found[1], abs=1e-5, nan_ok=True)
    assert len(found[0]) == 4 and math.isfinite(found[0][-1])


@pytest.mark.parametrize("after", ["guard", "hold", "release"])
def test_is_kept_in_warmup_alone(after: str) -> None:
    model = mlp()
    opt = AdaptiveWarmup(sgd(model), model, control=False, max_warmup=4, after=after)
    slope = opt._signals.slope
    train(opt, model, range(6))
    assert [math.isfinite(e) for e in opt.history["end_slope"]] == [False, True, True, False, False, False]
    assert not slope.has_vector and not slope._average
    opt.restart()
    train(opt, model, range(6, 8))
    assert [math.isfinite(e) for e in opt.history["end_slope"][-2:]] == [False, True]


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("stop", [1, 7])
def test_resumes_bit_for_bit(form: str, optimizer_class: Any, stop: int, tmp_path: Path) -> None:
    unbroken, fresh = build(optimizer_class, control=False), build(optimizer_class, seed=1, control=False)
    for group in (*unbroken[1].param_groups, *fresh[1].param_groups):
        group["lr"] *= 1e-3  # nothing holds it back
    by_closures(unbroken, range(stop))
    FORMATS[form](unbroken, fresh, tmp_path)
    expected, found = by_closures(unbroken, range(stop, 12)), by_closures(fresh, range(stop, 12))
    assert [row["end_slope"] for row in found] == [row["end_slope"] for row in expected]
    assert all(math.isfinite(row["end_slope"]) for row in found)


def test_resumes_from_before_the_first_step_and_beside_parameters_that_never_move() -> None:
    """Those have no moments, and so no entry in the state; and the optimizer is loaded before the model."""

    def start() -> tuple[Any, AdaptiveWarmup]:
        model = nn.ModuleDict({"net": mlp(), "unused": nn.Linear(4, 3)})
        return model, AdaptiveWarmup(torch.optim.AdamW(model.parameters()), model, control=False)

    def go_on(run: tuple[Any, AdaptiveWarmup], steps: range) -> list[float]:
        train(run[1], run[0]["net"], steps)
        return run[1].history["end_slope"][-len(steps) :]

    unbroken = start()
    for first, last in ((0, 4), (4, 9)):
        fresh = start()
        fresh[1].load_state_dict(copy.deepcopy(unbroken[1].state_dict()))
        fresh[0].load_state_dict(unbroken[0].state_dict())
        found, expected = go_on(fresh, range(first, last)), go_on(unbroken, range(first, last))
        assert_same(found, expected)
        assert math.isfinite(found[-1])


def test_what_was_saved_after_freezing_begins_anew_as_the_run_does() -> None:
    runs = [
        (model := mlp(), AdaptiveWarmup(torch.optim.AdamW(model.parameters()), model, control=False)) for _ in range(2)
    ]
    (model, opt), (other, resumed) = runs
    train(opt, model, range(4))
    model[0].requires_grad_(False), other[0].requires_grad_(False)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(opt, model, range(4, 7)), train(resumed, other, range(4, 7))
    found = resumed.history["end_slope"]
    assert_same(found, opt.history["end_slope"][-3:])
    assert found[0] == opt.history["end_slope"][3] != found[1]  # none yet: the last one is shown


@pytest.mark.parametrize("how", [copy.deepcopy, lambda run: pickle.loads(pickle.dumps(run))])
def test_copies_go_on_alone(how: Callable[[Any], Any]) -> None:
    model = mlp()
    run = model, AdaptiveWarmup(sgd(model), model, control=False)
    train(run[1], run[0], range(4))
    twin, opt = how(run)
    expected = [row["end_slope"] for row in train(run[1], run[0], range(4, 8))]
    assert [row["end_slope"] for row in train(opt, twin, range(4, 8))] == expected
    assert all(map(math.isfinite, expected))
