"""A loss that the model returns as the source, and what is not to be taken for one."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from tests.helpers import OwnLoss, batch_of, mlp
from tests.loss.helpers import FORMS, Returns, dense, exact_monitor, loss_of, sharpness_of
from warmctl import AdaptiveWarmup
from warmctl.loss.source import EXACT, NEVER


@pytest.mark.parametrize("form", FORMS)
def test_model_returning_its_own_loss(form: str) -> None:
    model = Returns(FORMS[form])
    expected = dense(model.body)
    opt = exact_monitor(model)
    opt.zero_grad()
    loss_of(model(*batch_of(0))).backward()
    opt.step()
    assert sharpness_of(opt) == pytest.approx(expected, rel=1e-3)


def test_evaluation_forwards_are_not_the_training_loss() -> None:
    model = Returns(FORMS["dict"])
    expected = dense(model.body)
    opt = exact_monitor(model)
    opt.zero_grad()
    loss_of(model(*batch_of(0))).backward()
    with torch.no_grad():
        model(*batch_of(9))
    opt.step()
    assert sharpness_of(opt) == pytest.approx(expected, rel=1e-3)


def test_a_forward_that_raised_is_not_taken_for_the_next() -> None:
    class Interrupted(OwnLoss):
        fails = False

        def forward(self, batch: Any) -> dict[str, Tensor]:
            if self.fails:
                raise KeyboardInterrupt
            return super().forward(batch)

    model = Interrupted()
    opt = AdaptiveWarmup(SGD(model.parameters(), 0.1), model, control=False)
    model.fails = True
    with pytest.raises(KeyboardInterrupt):
        model(batch_of(0))
    model.fails = False
    with torch.no_grad():
        evaluated = model(batch_of(0))["loss"]
    model(batch_of(0))["loss"].backward()
    opt.step()
    assert opt.history["loss"] == [float(evaluated)]


@pytest.mark.parametrize("factor", [1.0, 0.25, 7.0, 2.0**16])
@pytest.mark.parametrize("hvp", ["finite_difference", "double_backward"])
def test_a_factor_on_the_models_loss_counts(factor: float, hvp: str) -> None:
    """But for a gradient scaler's, which is taken out of the gradient again before the step."""
    model = Returns(FORMS["dict"])
    expected = dense(model.body) * (1.0 if factor > 1000 else factor)
    opt = exact_monitor(model, hvp=hvp)
    opt.zero_grad()
    (loss_of(model(*batch_of(0))) * factor).backward()
    if factor > 1000:
        for p in model.parameters():
            p.grad.div_(factor)  # type: ignore[union-attr]
    opt.step()
    assert sharpness_of(opt) == pytest.approx(expected, rel=1e-2)


def test_the_own_loss_of_a_compiled_model_is_found() -> None:
    def run(compiled: bool) -> float:
        model: Any = OwnLoss()
        params = list(model.parameters())
        model = torch.compile(model, backend="aot_eager") if compiled else model
        opt = AdaptiveWarmup(SGD(params, 1e-3), model, control=False, every=1)
        for step in range(3):
            opt.zero_grad()
            model(batch_of(step))["loss"].backward()
            opt.step()
        assert opt.metrics["probes"] == 3
        return float(opt.metrics["sharpness"])

    assert run(True) == pytest.approx(run(False), rel=1e-3)


def test_a_gradient_that_nobody_touched_is_not_computed_again() -> None:
    model = Returns(FORMS["dict"])
    opt = exact_monitor(model, hvp="finite_difference", probe_steps=2)
    costs = []
    for _ in range(3):
        opt.zero_grad()
        loss_of(model(*batch_of(0))).backward()
        opt.step()
        costs.append(opt.meter.last.cost if opt.meter.last else 0.0)
    assert costs == [5, 2, 2]  # twice the products from cold, and the check


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("batches", [1, 2])
def test_captured_passes_of_a_skipped_step_do_not_count(batches: int, to_none: bool) -> None:
    def run(skipped: int) -> float:
        model = OwnLoss()
        opt = AdaptiveWarmup(SGD(model.parameters(), 1e-3), model, control=False, every=1)
        for step in range(2 + skipped):
            for _ in range(batches):
                (model(batch_of(0))["loss"] / batches).backward()
            if 0 < step < 1 + skipped:  # a spike, say
                opt.zero_grad(set_to_none=to_none)
                continue
            opt.step()
            opt.zero_grad(set_to_none=to_none)
        return float(opt.metrics["sharpness"])

    assert run(3) == pytest.approx(run(0), rel=0.02)  # not four times it


@pytest.mark.parametrize("why", ["a closure is given", "warmup is done"])
def test_forwards_pass_through_hooks_only_while_they_may_be_needed(why: str) -> None:
    model = nn.Linear(2, 1)
    opt = AdaptiveWarmup(torch.optim.SGD(model.parameters(), lr=0.1), model, max_warmup=1, after="hold")
    assert model._forward_hooks and model._forward_pre_hooks

    def loss() -> Tensor:
        opt.zero_grad()
        return model(torch.ones(1, 2)).square().mean()

    def closure() -> Tensor:
        value = loss()
        value.backward()
        return value

    for _ in range(3):
        if why == "a closure is given":
            opt.step(closure)
        else:
            opt.backward(loss())
            opt.step()
    assert not model._forward_hooks and not model._forward_pre_hooks
    other = copy.deepcopy(opt)
    assert not other.model._forward_hooks
    opt.restart()
    assert len(model._forward_hooks) == len(model._forward_pre_hooks) == 1


# What is not the loss that is trained on --------------------------------------------------------------------


def test_another_loss_than_the_models_own_is_not_mistaken_for_it() -> None:
    model = Returns(FORMS["dict"])
    opt = exact_monitor(model, hvp="finite_difference")

    def step() -> None:
        opt.zero_grad()
        out = model(*batch_of(0))
        penalty = sum((p**2).sum() for p in model.parameters())
        opt.backward(out["total"] + 3.0 * penalty)
        opt.step()

    with pytest.warns(RuntimeWarning, match="own loss is not what is trained on"):
        step()
    expected = dense(model.body) + 6.0
    step()
    step()
    assert sharpness_of(opt) == pytest.approx(expected, rel=0.05)


def test_a_models_own_loss_that_is_not_used_is_no_source() -> None:
    model = Returns(FORMS["dict"])
    opt = exact_monitor(model)

    def step(backward: Callable[[Tensor], Any]) -> None:
        opt.zero_grad()
        out = model(*batch_of(0))
        backward(5 * F.mse_loss(out["logits"], batch_of(0)[1]))
        opt.step()

    with pytest.raises(RuntimeError, match="no loss to measure"):
        step(Tensor.backward)
    step(opt.backward)
    step(opt.backward)
    expected = 5 * dense(model.body)
    step(opt.backward)
    assert sharpness_of(opt) == pytest.approx(expected, rel=1e-3)


def test_a_scalar_prediction_is_no_loss() -> None:
    model = nn.Linear(8, 1, bias=False)
    opt = AdaptiveWarmup(SGD(model.parameters(), lr=1.0), model)
    (model(torch.ones(1, 8)) - 3.0).square().sum().backward()
    with pytest.raises(RuntimeError, match="no loss to measure"):
        opt.step()


def test_an_energy_that_is_trained_on_by_a_function_of_it_is_no_loss() -> None:
    class Energy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).square().mean()

    model = Energy()
    opt = AdaptiveWarmup(SGD(model.parameters(), lr=0.1), model)
    (model(batch_of(0)[0]) - 3.0).square().backward()
    with pytest.warns(RuntimeWarning, match="not what is trained on"):
        opt.step()


@pytest.mark.parametrize("clip", [None, 0.01])
def test_a_term_that_joins_the_models_own_loss_later_is_noticed(clip: float | None) -> None:
    """It would be taken for curvature: a finite difference begins with the gradient of the step."""
    model = OwnLoss()
    opt = AdaptiveWarmup(SGD(model.parameters(), 0.1), model, every=5)
    with pytest.warns(RuntimeWarning, match="the model's own loss is not what is trained on"):
        for step in range(60):
            opt.zero_grad()
            penalty = sum(p.square().sum() for p in model.parameters())
            (model(batch_of(0))["loss"] + (0.1 * penalty if step >= 30 else 0.0)).backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            opt.step()
    assert opt.sources.verdict.repeats == NEVER
    measured = [sharpness for sharpness in opt.history["sharpness"] if math.isfinite(sharpness)]
    assert max(measured) < 3.0 * measured[0]
    assert opt.metrics["scale"] >= opt.history["scale"][29]


def test_a_reading_that_jumps_by_itself_is_compared_once_more_and_stands() -> None:
    model = OwnLoss()
    opt = AdaptiveWarmup(SGD(model.parameters(), 1e-5), model, control=False, every=1)
    costs = []
    for size in (1.0, 1.0, 30.0, 30.0):  # of the inputs
        opt.zero_grad()
        x, y = batch_of(0)
        model((size * x, y))["loss"].backward()
        opt.step()
        assert opt.meter.last is not None
        costs.append(opt.meter.last.cost)
    assert costs == [5, 2, 3, 2]
    assert opt.sources.verdict.repeats == EXACT and opt.metrics["sharpness"] > 3.0 * opt.history["sharpness"][1]


def test_a_reading_of_several_micro_batches_that_jumps_is_not_made_twice() -> None:
    """The comparison needs the first of them, which is kept only where it is awaited."""
    model = OwnLoss()
    opt = AdaptiveWarmup(SGD(model.parameters(), 1e-5), model, control=False, every=1)
    products = []
    for size in (1.0, 1.0, 30.0, 30.0, 30.0):
        opt.zero_grad()
        for part in range(2):
            x, y = batch_of(part)
            (model((size * x, y))["loss"] / 2).backward()
        opt.step()
        assert opt.meter.last is not None
        products.append(opt.meter.last.hvps)
    assert products == [4, 2, 2, 2, 2]
    assert opt.metrics["sharpness"] > 3.0 * opt.history["sharpness"][1] and opt.sources.verdict.repeats == EXACT
