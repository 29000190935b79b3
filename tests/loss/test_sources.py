"""Where the loss comes from: every source measures the same, and none is believed that cannot be repeated."""

from __future__ import annotations

import copy
import gc
import itertools
import math
import random
import warnings
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import batch_of, closure_for, loss_fn, mlp, noisy_net
from tests.problems_closed_form import dense_hessian
from warmctl import AdaptiveWarmup

RATE = 0.1


class Returns(nn.Module):
    """A model that returns its own loss, in one form or another."""

    def __init__(self, form: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.body, self.form = mlp(), form

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        out = self.body(x)
        return out if y is None else self.form(F.mse_loss(out, y), out)


FORMS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "attribute": lambda loss, out: SimpleNamespace(loss=loss, logits=out),
    "tuple": lambda loss, out: (out, loss),
    "dict": lambda loss, out: {"logits": out, "total": loss},
    "dict with loss": lambda loss, out: {"loss": loss, "other": loss * 2},
    "loss itself": lambda loss, out: loss,
}


def monitor(model: nn.Module, base: torch.optim.Optimizer | None = None, **options: Any) -> AdaptiveWarmup:
    base = base or torch.optim.SGD(model.parameters(), RATE)
    defaults: dict[str, Any] = {"probe_steps": 25, "hvp": "double_backward", "every": 1, "control": False}
    return AdaptiveWarmup(base, model, **(defaults | options))


def sharpness_of(opt: AdaptiveWarmup) -> float:
    assert opt.last is not None and not opt.last.reason, opt.last
    return opt.last.sharpness


def dense(model: nn.Module, batch: Any = None, loss: Any = loss_fn) -> float:
    return float(np.linalg.eigvalsh(dense_hessian(model, loss, batch_of(0) if batch is None else batch)).max())


def loss_of(output: Any) -> Tensor:
    if isinstance(output, dict):
        return output.get("loss", output.get("total"))
    return output if isinstance(output, Tensor) else getattr(output, "loss", None) or output[1]


# The four sources ------------------------------------------------------------------------------------------


def test_closure() -> None:
    model = mlp()
    expected = dense(model)
    opt = monitor(model)
    opt.step(closure_for(opt, model, batch_of(0)))
    assert sharpness_of(opt) == pytest.approx(expected, rel=1e-3)


def test_observed_batch() -> None:
    model = mlp()
    expected = dense(model)
    opt = monitor(model, loss_fn=loss_fn)
    closure_for(opt, model, batch_of(0))()
    opt.observe(batch_of(0))
    opt.step()
    assert sharpness_of(opt) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_model_returning_its_own_loss(form: str) -> None:
    model = Returns(FORMS[form])
    expected = dense(model.body)
    opt = monitor(model)
    opt.zero_grad()
    loss_of(model(*batch_of(0))).backward()
    opt.step()
    assert sharpness_of(opt) == pytest.approx(expected, rel=1e-3)


def test_backward() -> None:
    model = mlp()
    expected = dense(model)
    opt = monitor(model)
    opt.zero_grad()
    opt.backward(loss_fn(model, batch_of(0)))
    opt.step()
    assert sharpness_of(opt) == pytest.approx(expected, rel=1e-3)


def test_the_sources_leave_the_same_trajectory() -> None:
    ends = []
    for source in ("bare", "closure", "observe", "backward"):
        model = mlp()
        base = torch.optim.AdamW(model.parameters(), 0.01)
        opt: Any = base if source == "bare" else monitor(model, base, loss_fn=loss_fn, probe_steps=2)
        for step in range(4):
            if source == "closure":
                opt.step(closure_for(opt, model, batch_of(step)))
                continue
            opt.zero_grad()
            loss = loss_fn(model, batch_of(step))
            if source == "backward":
                opt.backward(loss)
            else:
                loss.backward()
            if source == "observe":
                opt.observe(batch_of(step))
            opt.step()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert all(torch.equal(end, ends[0]) for end in ends[1:])


def test_a_probe_on_the_live_graph_does_not_keep_it() -> None:
    model = mlp()
    opt = monitor(model)

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    for _ in range(3):
        alive: weakref.WeakSet[Saved] = weakref.WeakSet()

        def pack(tensor: Tensor, alive: weakref.WeakSet[Saved] = alive) -> Saved:
            saved = Saved(tensor)
            alive.add(saved)
            return saved

        opt.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
            loss = loss_fn(model, batch_of(0))
        assert len(alive) > 0
        opt.backward(loss)
        opt.step()
        gc.collect()
        assert len(alive) == 0 and loss.grad_fn is not None
    assert opt.metrics["probes"] == 2


# Precedence ------------------------------------------------------------------------------------------------


def test_closure_comes_before_an_observed_batch() -> None:
    model = mlp()
    expected = dense(model, batch_of(0))
    opt = monitor(model, loss_fn=lambda m, b: 100 * loss_fn(m, b))
    opt.observe(batch_of(1))
    opt.step(closure_for(opt, model, batch_of(0)))
    assert sharpness_of(opt) == pytest.approx(expected, rel=1e-3)


def test_observed_batch_comes_before_the_models_own_loss() -> None:
    model = Returns(FORMS["dict"])
    expected = 100 * dense(model.body, batch_of(1))
    opt = monitor(model, loss_fn=lambda m, b: 100 * loss_fn(m.body, b))
    opt.zero_grad()
    loss_of(model(*batch_of(0))).backward()
    opt.observe(batch_of(1))
    opt.step()
    assert sharpness_of(opt) == pytest.approx(expected, rel=1e-3)


def test_the_models_own_loss_comes_before_the_live_graph() -> None:
    model = Returns(FORMS["dict"])
    opt = monitor(model, hvp="finite_difference", probe_steps=2)
    opt.zero_grad()
    opt.backward(loss_of(model(*batch_of(0))))
    opt.step()
    assert opt.metrics["overhead"] == 5  # four products and the check


def test_a_batch_is_observed_for_one_step_only() -> None:
    model = mlp()
    opt = monitor(model, loss_fn=loss_fn)
    closure_for(opt, model, batch_of(0))()
    opt.observe(batch_of(0))
    opt.step()
    closure_for(opt, model, batch_of(1))()
    opt.step()
    assert opt.metrics["probes"] == 1


@pytest.mark.parametrize("rule", [torch.optim.SGD, torch.optim.Rprop])
@pytest.mark.parametrize("first", [0, 5])
def test_a_probe_waits_for_a_step_with_a_batch(first: int, rule: Any) -> None:
    model = mlp()
    opt = monitor(model, rule(model.parameters(), 1e-3), loss_fn=loss_fn, control=True)
    probed = []
    for step in range(36):
        closure_for(opt, model, batch_of(step))()
        if step % 10 == first:
            opt.observe(batch_of(step))
        probes = opt.metrics["probes"]
        opt.step()
        opt._publish("", recorded=False)  # a rule that is not known is measured behind the step
        if opt.metrics["probes"] > probes:
            probed.append(step)
    assert probed == list(range(first, 36, 10))


def test_a_loss_fn_that_never_sees_a_batch_is_warned_of_once() -> None:
    model = mlp()
    opt = monitor(model, loss_fn=loss_fn, control=True)
    with pytest.warns(RuntimeWarning, match="observe") as caught:
        for step in range(120):
            closure_for(opt, model, batch_of(step))()
            opt.step()
    assert len(caught) == 1 and opt.metrics["probes"] == 0


# What the loop does with the model's loss ------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.0, 0.25, 7.0, 2.0**16])
@pytest.mark.parametrize("hvp", ["finite_difference", "double_backward"])
def test_a_factor_on_the_models_loss_counts(factor: float, hvp: str) -> None:
    """But for a gradient scaler's, which is taken out of the gradient again before the step."""
    model = Returns(FORMS["dict"])
    expected = dense(model.body) * (1.0 if factor > 1000 else factor)
    opt = monitor(model, hvp=hvp)
    opt.zero_grad()
    (loss_of(model(*batch_of(0))) * factor).backward()
    if factor > 1000:
        for p in model.parameters():
            p.grad.div_(factor)  # type: ignore[union-attr]
    opt.step()
    assert sharpness_of(opt) == pytest.approx(expected, rel=1e-2)


def test_another_loss_than_the_models_own_is_not_mistaken_for_it() -> None:
    model = Returns(FORMS["dict"])
    opt = monitor(model, hvp="finite_difference")

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
    opt = monitor(model)

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


def test_evaluation_forwards_are_not_the_training_loss() -> None:
    model = Returns(FORMS["dict"])
    expected = dense(model.body)
    opt = monitor(model)
    opt.zero_grad()
    loss_of(model(*batch_of(0))).backward()
    with torch.no_grad():
        model(*batch_of(9))
    opt.step()
    assert sharpness_of(opt) == pytest.approx(expected, rel=1e-3)


# Gradient accumulation -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["mean", "sum"])
@pytest.mark.parametrize(
    "source, hvp",
    [
        ("closure", "finite_difference"),
        ("captured", "finite_difference"),
        ("captured", "double_backward"),
        ("captured and clipped", "finite_difference"),
        ("captured and scaled", "finite_difference"),
        ("backward", "double_backward"),
    ],
)
def test_accumulation_measures_the_whole_loss(source: str, mode: str, hvp: str) -> None:
    """With equal micro-batches the Hessian of the whole is that of one, once (mean) or n times (sum)."""
    model = Returns(FORMS["dict"])
    n, batch = 4, batch_of(0)
    share = 1 / n if mode == "mean" else 1.0
    scale = 2.0**16 if "scaled" in source else 1.0
    opt = monitor(model, hvp=hvp, probe_steps=10)
    for _ in range(3):  # `backward` asks in the second step for the probe that it makes in the third
        expected = dense(model.body) * n * share
        if source == "closure":

            def closure() -> float:
                opt.zero_grad()
                total = 0.0
                for _ in range(n):
                    loss = loss_fn(model, batch) * share
                    loss.backward()
                    total += float(loss.detach())
                return total

            opt.step(closure)
        else:
            opt.zero_grad()
            for _ in range(n):
                if source == "backward":
                    opt.backward(loss_fn(model, batch) * share)
                else:
                    (loss_of(model(*batch)) * share * scale).backward()
            for p in model.parameters():
                p.grad.div_(scale)  # type: ignore[union-attr]
            if "clipped" in source:
                nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            opt.step()
    assert sharpness_of(opt) == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("mode", ["mean", "sum"])
def test_closure_that_adds_to_earlier_micro_batches(mode: str) -> None:
    """As Lightning does it: the closure is the last micro-batch only."""
    model, n = mlp(), 4
    share = 1 / n if mode == "mean" else 1.0
    expected = dense(model) * n * share
    opt = monitor(model, hvp="finite_difference")

    def closure() -> Tensor:
        loss = loss_fn(model, batch_of(0)) * share
        loss.backward()
        return loss

    for _ in range(n - 1):
        closure()
    opt.step(closure)
    assert sharpness_of(opt) == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("where", ["inside the closure", "replaced inside the closure", "after backward"])
def test_clipping_does_not_change_the_sharpness(where: str) -> None:
    model = Returns(FORMS["dict"])
    expected = dense(model.body)
    opt = monitor(model, hvp="finite_difference")

    def closure() -> Tensor:
        opt.zero_grad()
        loss = loss_of(model(*batch_of(0)))
        loss.backward()
        if "replaced" in where:
            for p in model.parameters():
                p.grad = p.grad * 1e-3  # type: ignore[operator]
        else:
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        return loss

    if "closure" in where:
        opt.step(closure)
    else:
        closure()
        opt.step()
    assert sharpness_of(opt) == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("clipped", range(4))
def test_clipping_one_layer_is_noticed(clipped: int) -> None:
    """A finite difference against a gradient that is not that of the loss would be wrong by any amount."""
    model = Returns(FORMS["dict"])
    opt = monitor(model, hvp="finite_difference")
    for step in range(2):  # the first probe compares the gradients in any case
        expected = dense(model.body)
        opt.zero_grad()
        loss_of(model(*batch_of(0))).backward()
        if step:
            list(model.parameters())[clipped].grad.mul_(0.01)  # type: ignore[union-attr]
        opt.step()
    assert sharpness_of(opt) == pytest.approx(expected, rel=1e-2)


def test_a_gradient_that_nobody_touched_is_not_computed_again() -> None:
    model = Returns(FORMS["dict"])
    opt = monitor(model, hvp="finite_difference", probe_steps=2)
    costs = []
    for _ in range(3):
        opt.zero_grad()
        loss_of(model(*batch_of(0))).backward()
        opt.step()
        costs.append(opt.last.cost if opt.last else 0.0)
    assert costs == [5, 2, 2]  # twice the products from cold, and the check


# Closures that cannot be repeated --------------------------------------------------------------------------


def drawing(kind: str, opt: AdaptiveWarmup, model: nn.Module) -> Callable[[], Tensor]:
    data: Iterator[int] = itertools.count()
    own, drift = np.random.default_rng(0), [1.0]

    def closure() -> Tensor:
        drift[0] *= 1.5
        factor = {
            "data iterator": 1.0,
            "generator of its own": float(own.normal()) + 3,
            "drifting state": drift[0],
        }[kind]
        batch = batch_of(next(data) if kind == "data iterator" else 0)
        opt.zero_grad()
        loss = factor * loss_fn(model, batch)
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("kind", ["data iterator", "generator of its own", "drifting state"])
def test_a_closure_that_cannot_be_repeated_is_noticed_once_and_measured_on_its_live_graph(kind: str) -> None:
    model = mlp()
    opt = monitor(model, hvp="auto", probe_steps=3)
    closure = drawing(kind, opt, model)
    before = model[0].weight.detach().clone()
    with pytest.warns(RuntimeWarning, match="observe") as caught:
        for _ in range(4):
            opt.step(closure)
    assert len([w for w in caught if w.category is RuntimeWarning]) == 1
    assert not torch.equal(model[0].weight, before)
    assert sharpness_of(opt) > 0 and opt.metrics["probes"] == 3  # a live graph is asked for one step ahead
    assert opt.metrics["hvps"] == 6 + 3  # none in the first probe; twice as many from cold


def test_the_live_graph_of_a_closure_gives_the_sharpness() -> None:
    model = mlp()
    opt = monitor(model)
    closure = drawing("data iterator", opt, model)
    with pytest.warns(RuntimeWarning, match="observe"):
        opt.step(closure)
    expected = dense(model, batch_of(2))  # the first step took 0 and its check 1
    opt.step(closure)
    assert sharpness_of(opt) == pytest.approx(expected, rel=1e-3)
    assert math.isfinite(opt.metrics["overhead"])


def test_an_observed_batch_helps_a_closure_that_cannot_be_repeated() -> None:
    model = mlp()
    expected = dense(model, batch_of(5))
    opt = monitor(model, loss_fn=loss_fn)
    opt.observe(batch_of(5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(drawing("data iterator", opt, model))
    assert sharpness_of(opt) == pytest.approx(expected, rel=1e-3)


def test_a_closure_that_runs_out_of_data_in_the_check_does_not_stop_training() -> None:
    model = mlp()
    opt = monitor(model)
    batches = iter([batch_of(0)])

    def closure() -> Tensor:
        return closure_for(opt, model, next(batches))()

    before = model[0].weight.detach().clone()
    with pytest.warns(RuntimeWarning, match="StopIteration"):
        opt.step(closure)
    assert not torch.equal(model[0].weight, before)


@pytest.mark.parametrize("stream", ["torch", "numpy", "python"])
def test_the_global_random_streams_are_repeated(stream: str) -> None:
    model = mlp()
    opt = monitor(model)

    def closure() -> Tensor:
        draw = {"torch": lambda: float(torch.rand(())), "numpy": np.random.rand, "python": random.random}[stream]()
        opt.zero_grad()
        loss = (1 + draw) * loss_fn(model, batch_of(0))
        loss.backward()
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            opt.step(closure)
    assert opt.prober.closure_replays == 1.0 and sharpness_of(opt) > 0


def test_dropout_and_batch_norm_can_be_repeated() -> None:
    model = noisy_net()
    opt = monitor(model, hvp="finite_difference", probe_steps=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            opt.step(closure_for(opt, model, batch_of(step)))
    assert opt.prober.closure_replays == 1.0 and sharpness_of(opt) > 0
    assert int(model[1].num_batches_tracked) == 3


def test_backward_of_the_wrapper_inside_a_closure() -> None:
    model = mlp()
    expected = dense(model)
    opt = monitor(model, hvp="finite_difference", probe_steps=25)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = loss_fn(model, batch_of(0))
        opt.backward(loss)
        return loss

    opt.step(closure)
    assert sharpness_of(opt) == pytest.approx(expected, rel=1e-2)
    assert opt.metrics["overhead"] == 51  # and the check


# Rules that are not known ----------------------------------------------------------------------------------


class Lion(torch.optim.Optimizer):
    def __init__(self, params: Any, lr: float = 1e-3, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    average = self.state[p].setdefault("average", torch.zeros_like(p))
                    average.lerp_(p.grad, 1 - group["momentum"])
                    p.sub_(average.sign(), alpha=group["lr"])
                    p.grad.zero_()  # an optimizer may do as it likes with the gradient
        return loss


class Sam(torch.optim.Optimizer):
    """Sharpness-aware minimisation in the form that calls its closure twice."""

    def __init__(self, params: Any, lr: float = 0.1, radius: float = 0.05) -> None:
        super().__init__(params, {"lr": lr, "radius": radius})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        closure = torch.enable_grad()(closure)
        loss = closure()
        params = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        ascent = [p.grad * (self.param_groups[0]["radius"] / norm) for p in params]
        for p, e in zip(params, ascent, strict=True):
            p.add_(e)
        closure()
        for p, e in zip(params, ascent, strict=True):
            p.sub_(e).sub_(p.grad, alpha=self.param_groups[0]["lr"])
        return loss


class Quadratic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        root = torch.randn(6, 6, dtype=torch.float64)
        self.curvature = root @ root.T / 6
        self.matrix = nn.Parameter(torch.randn(3, 2, dtype=torch.float64))

    def forward(self) -> Tensor:
        flat = self.matrix.flatten()
        return 0.5 * flat @ self.curvature @ flat


UNKNOWN: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "Rprop": lambda p: torch.optim.Rprop(p, 1e-2),
    "Adafactor": lambda p: torch.optim.Adafactor(p, 1e-2),
    "Lion": Lion,
    "SAM": Sam,
}
if hasattr(torch.optim, "Muon"):
    UNKNOWN["Muon"] = lambda p: torch.optim.Muon(p, 1e-2)


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_rules_are_measured_along_the_update_they_make(name: str, clipped: bool) -> None:
    model = Quadratic()
    opt = monitor(model, UNKNOWN[name](model.parameters()))
    assert opt.rule is None

    def closure() -> Tensor:
        opt.zero_grad()
        loss = model()
        loss.backward()
        if clipped:
            nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
        return loss

    for _ in range(3):
        before = model.matrix.detach().flatten().clone()
        opt.step(closure)
        update = model.matrix.detach().flatten() - before
        gradient = model.curvature @ before
        expected = -0.5 * float(update @ model.curvature @ update) / float(gradient @ update)
        assert opt.last is not None
        if float(gradient @ update) < 0:
            assert opt.last.ratio == pytest.approx(expected, rel=1e-6)
        else:
            assert "descend" in opt.last.reason
    assert opt.counts.probes == 3


def test_unknown_rule_under_control_gets_off_the_ground() -> None:
    """The first step has no update to measure along yet; it must not be so small that there never is one."""
    model = Quadratic()
    opt = AdaptiveWarmup(Lion(model.parameters(), 1e-3), model)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = model()
        loss.backward()
        return loss

    first = float(model().detach())
    for _ in range(30):
        opt.step(closure)
    assert opt.last is not None and opt.last.ratio > 0
    assert opt.metrics["scale"] > 1e-3 and float(model().detach()) < first


def test_ratio_of_an_unknown_rule_is_at_the_full_rate() -> None:
    """Measured along a scaled update and divided by the scale."""
    model = Quadratic()
    opt = AdaptiveWarmup(Lion(model.parameters(), 1e-3), model, every=1)
    opt.controller.state.scale = 0.25

    def closure() -> Tensor:
        opt.zero_grad()
        loss = model()
        loss.backward()
        return loss

    before = model.matrix.detach().flatten().clone()
    opt.step(closure)
    full = (model.matrix.detach().flatten() - before) / opt.metrics["scale"]
    gradient = model.curvature @ before
    expected = -0.5 * float(full @ model.curvature @ full) / float(gradient @ full)
    assert opt.last is not None and opt.last.ratio == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("change", [0.01, 100.0])
def test_the_reading_of_an_unknown_rule_follows_the_rate(change: float) -> None:
    """It is made along an update at one rate and used at the next step, which may have another."""

    def run(change: float) -> dict[str, Any]:
        model = Quadratic()
        opt = monitor(model, Lion(model.parameters(), 1e-5))
        for step in range(5):

            def closure() -> Tensor:
                opt.zero_grad()
                loss = model()
                loss.backward()
                return loss

            if step == 4:
                opt.param_groups[0]["lr"] *= change
            opt.step(closure)
        return opt.metrics

    same, changed = run(1.0), run(change)
    assert changed["stability_ratio"] == pytest.approx(same["stability_ratio"] * change, rel=1e-6)


def test_restarting_forgets_the_reading_to_come() -> None:
    model = Quadratic()
    opt = monitor(model, Lion(model.parameters(), 1e-3))

    def closure() -> Tensor:
        opt.zero_grad()
        loss = model()
        loss.backward()
        return loss

    opt.step(closure)
    opt.restart()
    assert opt.last is None
    opt.step(closure)
    assert not opt.history[-1]["probed"] and math.isnan(opt.metrics["stability_ratio"])


def test_sam_with_a_known_rule_inside_counts_one_step_a_step() -> None:
    model = Quadratic()
    opt = monitor(model, Sam(model.parameters()))
    for _ in range(4):

        def closure() -> Tensor:
            opt.zero_grad()
            loss = model()
            loss.backward()
            return loss

        opt.step(closure)
    assert opt.metrics["step"] == 4


def test_lbfgs_is_refused() -> None:
    model = mlp()
    with pytest.raises(TypeError, match="LBFGS chooses its own step"):
        AdaptiveWarmup(torch.optim.LBFGS(model.parameters()), model)


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
