"""A probe that fails leaves training as it was and never raises the rate."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import assert_same, batch_of, closure_for, loss_fn, mlp, monitor, sgd, train, weights
from warmctl import AdaptiveWarmup


class FailsInProbes(nn.Module):
    """Raises in the evaluations that a probe makes, which are those after the first of a step."""

    def __init__(self, error: BaseException, allowed: int = 1) -> None:
        super().__init__()
        self.body, self.error, self.allowed = mlp(), error, allowed
        self.register_buffer("calls", torch.zeros(()))  # put back after a probe: count beside it
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        self.calls += 1
        if self.seen > self.allowed:
            raise self.error
        return self.body(x)


ERRORS: dict[str, BaseException] = {
    "out of memory": torch.OutOfMemoryError("CUDA out of memory"),
    "forward raises": RuntimeError("shape mismatch"),
    "key error": KeyError("mask"),
    "assertion": AssertionError("bad"),
}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("allowed", [1, 2, 3])  # in the check, in the first product, in the second
@pytest.mark.parametrize("control", [False, True])
def test_a_probe_that_fails_leaves_training_as_it_was(name: str, allowed: int, control: bool) -> None:
    model, twin = FailsInProbes(ERRORS[name], allowed), mlp()
    base, bare = torch.optim.AdamW(model.parameters(), 0.01), torch.optim.AdamW(twin.parameters(), 0.01)
    opt = AdaptiveWarmup(base, model, every=1, control=control, hvp="finite_difference")
    scale = opt.metrics["scale"]  # before anything was measured
    with pytest.warns(RuntimeWarning, match="no learning rate is raised") as caught:
        for step in range(3):
            model.seen = 0
            closure = closure_for(opt, model, batch_of(step))
            opt.step(closure)
    assert len([w for w in caught if w.category is RuntimeWarning]) == 1
    assert opt.meter.last is not None
    assert opt.meter.last.reason and math.isnan(opt.meter.last.ratio)
    if allowed == 1 and name != "out of memory":
        assert opt.sources.verdict.failures == 2  # and in between it was measured on its live graph
        assert opt.controller.state.readings == 1
    else:
        assert opt.metrics["scale"] == scale
    assert float(model.calls) == 3  # one a step
    assert opt.param_groups[0]["lr"] == 0.01
    if not control:
        train(bare, twin, range(3))
        assert_same(weights(model), weights(twin))


def test_memory_that_is_short_only_once_is_tried_again() -> None:
    model = FailsInProbes(ERRORS["out of memory"])
    opt = monitor(model, hvp="finite_difference")
    with pytest.warns(RuntimeWarning, match="out of memory"):
        opt.step(closure_for(opt, model, batch_of(0)))
    model.allowed = 1000
    opt.step(closure_for(opt, model, batch_of(1)))
    assert opt.meter.last is not None and not opt.meter.last.reason and opt.sources.verdict.repeats == 1.0


@pytest.mark.parametrize("cause", ["exception", "inf", "nan"])
@pytest.mark.parametrize("source", ["closure", "captured"])
@pytest.mark.parametrize("bad", [1, 2])
def test_a_first_check_that_fails_for_a_passing_cause_is_made_again(cause: str, source: str, bad: int) -> None:
    """On a model without a second derivative, so that no live graph helps."""
    model = FailsForAWhile(cause, source == "captured", bad)
    opt = AdaptiveWarmup(torch.optim.SGD(model.parameters(), 0.1), model, every=1, hvp="finite_difference")
    reasons = []

    def closure() -> Tensor:
        opt.zero_grad()
        out = model(*batch_of(0))
        loss = out["loss"] if source == "captured" else out
        loss.backward()
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2 * bad + 2):
            model.in_step = True
            if source == "captured":
                closure()
                model.in_step = False
                opt.step()
            else:
                opt.step(closure)
            assert opt.meter.last is not None
            reasons.append(opt.meter.last.reason)
    assert model.failed == bad
    assert all("not finite" in r or "passing" in r or "twice" in r for r in reasons if r)
    assert reasons[-1] == "" and opt.sources.verdict.repeats == 1.0
    assert opt.metrics["scale"] > 0.01


@pytest.mark.parametrize("source", ["closure", "captured"])
@pytest.mark.parametrize("factor", [0.0, 0.1, 30.0])
@pytest.mark.parametrize("first", [1, 4])
def test_a_probe_that_sees_another_loss_fails(source: str, factor: float, first: int) -> None:
    """From the probe of this step on; it is one that would have let the rate rise."""
    model = SeesAnotherLoss()
    opt = AdaptiveWarmup(torch.optim.SGD(model.parameters(), 0.5), model, every=1)

    def closure() -> Tensor:
        opt.zero_grad()
        out = model(batch_of(0))
        out["loss"].backward()
        return out["loss"]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(6):
            model.seen, model.factor = 0, factor if step >= first else 1.0
            if source == "closure":
                opt.step(closure)
            else:
                closure()
                opt.step()
            assert opt.meter.last is not None
            assert bool(opt.meter.last.reason) == (step >= first)
    assert "the probe saw a loss of" in opt.meter.last.reason  # type: ignore[union-attr]
    assert opt.controller.state.readings == first


def test_a_loss_next_to_nothing_may_change_by_as_much() -> None:
    """Half a step of the finite difference from its minimum."""
    model = nn.Linear(4, 1, bias=False)
    model.weight.data.fill_(1.0)
    opt = monitor(model)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = 0.5 * (model.weight - (1.0 - 5e-4)).square().sum()
        loss.backward()
        return loss

    opt.step(closure)
    assert opt.meter.last is not None and not opt.meter.last.reason
    assert opt.metrics["sharpness"] == pytest.approx(1.0, rel=1e-2)


def test_a_closure_that_fails_each_time_is_left_to_its_live_graph() -> None:
    model = FailsInProbes(ERRORS["key error"])
    opt = AdaptiveWarmup(torch.optim.SGD(model.parameters(), 0.1), model, every=1)
    with pytest.warns(RuntimeWarning, match="The next probe tries again"):
        for step in range(14):
            model.seen = 0
            opt.step(closure_for(opt, model, batch_of(step)))
    assert opt.sources.verdict.failures == 3
    assert opt.meter.last is not None and not opt.meter.last.reason
    assert opt.counts.probes - opt.controller.state.readings == 3


def test_a_permanent_reason_names_the_cause_and_the_remedy() -> None:
    """A closure that draws its own data, of a model that cannot be differentiated twice."""
    model = NoSecondDerivative()
    opt, data = AdaptiveWarmup(torch.optim.SGD(model.parameters(), 0.1), model, every=1), iter(range(100))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(4):
            opt.step(lambda: closure_for(opt, model, batch_of(next(data)))())
    assert opt.meter.last is not None
    assert "draws new data" in opt.meter.last.reason and "opt.observe(batch)" in opt.meter.last.reason
    assert "opt.step(closure)" not in opt.meter.last.reason


@pytest.mark.parametrize("allowed", [1, 2, 3])
@pytest.mark.parametrize("hvp", ["finite_difference", "double_backward"])
def test_keyboard_interrupt_inside_a_probe(allowed: int, hvp: str) -> None:
    """Goes through to the user; parameters, gradients, rates, buffers and modes are as before the probe."""
    model = FailsInProbes(KeyboardInterrupt(), allowed)
    opt = monitor(model, hvp=hvp, control=True)
    before = weights(model)
    grads: list[Tensor] = []

    def closure() -> Tensor:
        loss = closure_for(opt, model, batch_of(0))()
        if not grads:
            grads.extend(p.grad.clone() for p in model.parameters())  # type: ignore[union-attr]
        return loss

    if hvp == "double_backward" and allowed == 3:
        model.allowed = 2  # one graph is all it needs
    with pytest.raises(KeyboardInterrupt):
        opt.step(closure)
    assert_same(weights(model), before)
    assert_same([p.grad for p in model.parameters()], grads)
    assert float(model.calls) == 1 and model.training and opt.param_groups[0]["lr"] == 0.1
    assert torch.autograd.backward.__module__ == "torch.autograd" and opt.sources.captured.capture._pending is None
    model.allowed = 1000
    opt.step(closure_for(opt, model, batch_of(0)))
    assert opt.meter.last is not None and not opt.meter.last.reason


# Models without a second derivative -------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.head = nn.Linear(6, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(4, 4, 1, 3, 8).permute(3, 0, 2, 1, 4)
        return self.head(F.scaled_dot_product_attention(q, k, v).reshape(16, 8))


def test_an_exact_product_through_flash_attention() -> None:
    model = Attention()
    opt = monitor(model, hvp="double_backward")
    train(opt, model, range(2))
    assert opt.metrics["sharpness"] > 0


class NoSecondDerivative(nn.Module):
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return 2 * ctx.saved_tensors[0] * gradient

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.Square.apply(self.body(x))


class FailsForAWhile(NoSecondDerivative):
    """The first evaluations that are not a step's raise, or are not finite."""

    def __init__(self, cause: str, returns_dict: bool, bad: int) -> None:
        super().__init__()
        self.cause, self.returns_dict, self.bad = cause, returns_dict, bad
        self.in_step, self.failed = True, 0

    def forward(self, x: Tensor, y: Tensor) -> Any:
        loss = F.mse_loss(super().forward(x), y)
        if not self.in_step and self.failed < self.bad:
            self.failed += 1
            if self.cause == "exception":
                raise OSError("a passing cause")
            loss = loss * float(self.cause)
        self.in_step = False
        return {"loss": loss} if self.returns_dict else loss


class SeesAnotherLoss(nn.Module):
    """In all evaluations after the first of a step, `factor` times the loss, with a gradient to match."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.seen, self.factor = mlp(), 0, 1.0

    def forward(self, batch: Any) -> dict[str, Tensor]:
        self.seen += 1
        return {"loss": loss_fn(self.body, batch) * (1.0 if self.seen == 1 else self.factor)}


@pytest.mark.parametrize("source", ["closure", "backward"])
@pytest.mark.parametrize("hvp", ["double_backward", "auto"])
def test_an_exact_product_that_the_model_does_not_have(source: str, hvp: str) -> None:
    """Asked for, it fails safely and says so; "auto" takes finite differences; a live graph cannot."""
    model, twin = NoSecondDerivative(), NoSecondDerivative()
    opt, bare = monitor(model, hvp=hvp), sgd(twin)

    def step() -> None:
        if source == "closure":
            opt.step(closure_for(opt, model, batch_of(0)))
        else:
            opt.zero_grad()
            opt.backward(loss_fn(model, batch_of(0)))
            opt.step()

    if hvp == "auto" and source == "closure":
        step()
        assert opt.meter.last is not None and opt.meter.last.ratio > 0
    else:
        with pytest.warns(RuntimeWarning, match="once_differentiable"):
            step()
        assert opt.meter.last is not None and math.isnan(opt.meter.last.ratio)
    train(bare, twin, range(1))
    assert_same(weights(model), weights(twin))
    if source == "backward":
        assert "opt.step(closure)" in opt.meter.last.reason


class Unspeakable(RuntimeError):
    """Raises again when it is to be put in words."""

    def __str__(self) -> str:
        raise ValueError("no words")

    __repr__ = __str__


@pytest.mark.parametrize("error", [Unspeakable(), KeyError(Unspeakable())], ids=["str", "repr"])
@pytest.mark.parametrize("allowed", [1, 2, 3])
def test_an_error_that_cannot_be_put_in_words_does_not_stop_training(error: Exception, allowed: int) -> None:
    model = FailsInProbes(error, allowed)
    opt = AdaptiveWarmup(torch.optim.AdamW(model.parameters(), 0.01), model, every=1, hvp="finite_difference")
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        for step in range(3):
            model.seen = 0
            opt.step(closure_for(opt, model, batch_of(step)))
    assert opt.meter.last is not None and opt.metrics["step"] == 3
    said = opt.sources.verdict.why_not if allowed == 1 else opt.meter.last.reason
    assert f"{type(error).__name__}: (its own words raise ValueError)" in said


@pytest.mark.parametrize("name", ERRORS)
def test_warnings_that_are_errors_are_logged_and_do_not_stop_training(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = FailsInProbes(ERRORS[name], 2)
    opt = monitor(model, hvp="finite_difference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            model.seen = 0
            opt.step(closure_for(opt, model, batch_of(step)))
    assert opt.metrics["step"] == 3
    said = [record for record in caplog.records if "no learning rate is raised" in record.getMessage()]
    assert len(said) == 1 and said[0].levelname == "WARNING"


def test_a_warning_that_is_an_error_before_the_first_batch_is_observed(caplog: pytest.LogCaptureFixture) -> None:
    model = mlp()
    opt = AdaptiveWarmup(sgd(model), model, loss_fn=loss_fn)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(12):
            opt.zero_grad()
            loss_fn(model, batch_of(step)).backward()
            opt.step()
    assert "observe(batch)" in caplog.text
