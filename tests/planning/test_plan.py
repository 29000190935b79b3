"""`plan` against closed forms, dense linear algebra, and steps that are really made."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import warmctl
from tests import problems_closed_form as problems
from tests.helpers import assert_same, batch_of, everything, loss_fn, mlp, noisy_net, train
from warmctl import AdaptiveWarmup, ReferenceRun, plan


class Bowl(nn.Module):
    """½ Σ λ x²"""

    def __init__(self, curvatures: list[float], at: float = 1.0) -> None:
        super().__init__()
        self.curvatures = torch.tensor(curvatures, dtype=torch.float64)
        self.x = nn.Parameter(torch.full_like(self.curvatures, at))


def bowl_loss(model: nn.Module, batch: Any) -> Tensor:
    return 0.5 * (model.curvatures * model.x**2).sum()  # type: ignore[operator]


def plan_of(optimizer: torch.optim.Optimizer, model: nn.Module, **options: Any) -> warmctl.Plan:
    return plan(model, bowl_loss, torch.zeros(8), optimizer, **options)


def test_momentum_on_a_quadratic_in_closed_form() -> None:
    model = Bowl([4.0, 1.0])
    found = plan_of(torch.optim.SGD(model.parameters(), 2.0, momentum=0.9), model)
    assert found.sharpness == pytest.approx(4.0) and found.threshold == pytest.approx(3.8)
    assert found.ratio == pytest.approx(2.0 * 4 / 3.8) and found.critical_rate == pytest.approx(3.8 / 4)
    assert found.ratio_first_step == found.ratio and found.critical_rate_first_step == found.critical_rate
    # Along −g = −(4, 1) the loss is back where gᵀg = η gᵀHg / 2: η = 2·17/65.
    assert found.critical_rate_forward == pytest.approx(34 / 65, rel=2e-3)


def test_plain_descent_meets_one_edge_by_curvature_and_by_forward_passes() -> None:
    model = Bowl([5.0])
    found = plan_of(torch.optim.SGD(model.parameters(), 1e-6), model)
    assert found.critical_rate == pytest.approx(0.4)
    assert found.critical_rate_forward == pytest.approx(0.4, rel=2e-3)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.95)])
def test_adam_against_the_dense_preconditioned_hessian(betas: tuple[float, float]) -> None:
    problem = problems.tanh_mlp()
    optimizer = torch.optim.Adam(problem.params, 1e-2, betas=betas)
    found = plan(problem.model, problem.loss_fn, problem.batch, optimizer)
    hessian = problems.oracle(problem)
    gradient = problems.flat(torch.autograd.grad(problem.loss(), problem.params))
    root = (np.abs(gradient) + 1e-8) ** -0.5
    sharpness = np.linalg.eigvalsh(root[:, None] * hessian * root)[-1]
    edge = 2 * (1 + betas[0]) / (1 - betas[0])
    assert found.sharpness == pytest.approx(np.linalg.eigvalsh(hessian)[-1], rel=1e-3)
    assert found.threshold == pytest.approx(edge)
    assert found.ratio == pytest.approx(1e-2 * sharpness / edge, rel=1e-2)
    assert found.critical_rate == pytest.approx(edge / sharpness, rel=1e-2)
    assert found.critical_rate_first_step == pytest.approx((1 - betas[0]) * edge / sharpness, rel=1e-2)
    assert found.ratio_first_step == pytest.approx(found.ratio / (1 - betas[0]))


class Lookahead(torch.optim.Optimizer):
    """Climbs to where the loss is higher and descends by the gradient there: needs a closure, as SAM does."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is not None, "a closure is required"
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["climbed"] = 0.05 * p.grad
                p.add_(self.state[p]["climbed"])
        with torch.enable_grad():
            closure()
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(self.state[p]["climbed"])
                p.sub_(p.grad, alpha=group["lr"])


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.3, momentum=0.9, nesterov=True),
    "ASGD": lambda p: torch.optim.ASGD(p, 0.3),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01),
    "Adam": lambda p: torch.optim.Adam(p, 1e-6, amsgrad=True),
    "NAdam": lambda p: torch.optim.NAdam(p, 0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, 0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
    "Adadelta": lambda p: torch.optim.Adadelta(p, 1.0),
    "Adamax": lambda p: torch.optim.Adamax(p, 0.01),
    "two groups": lambda p: torch.optim.SGD([{"params": p[:1], "lr": 0.1}, {"params": p[1:], "lr": 1.0}]),
    "Muon": lambda p: torch.optim.Muon([q for q in p if q.ndim == 2], 0.02),
    "Adafactor": lambda p: torch.optim.Adafactor(p, 0.01),
    "a closure": lambda p: Lookahead(p, 0.3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_loss_rises_beyond_the_forward_critical_rate_in_steps_really_made(name: str) -> None:
    def loss_after(factor: float) -> float:
        model = mlp().double()
        optimizer = OPTIMIZERS[name](list(model.parameters()))
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * factor

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = loss_fn(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        before = float(closure().detach())
        optimizer.step(closure if name == "a closure" else None)
        return float(loss_fn(model, batch).detach()) - before

    batch = tuple(t.double() for t in batch_of(0))
    model = mlp().double()
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    found = plan(model, loss_fn, batch, optimizer)
    if name == "Adafactor":  # takes no more than 1 for its rate: no rate is too large here
        assert found.critical_rate_forward == math.inf and loss_after(1e4) == loss_after(1e6) < 0
        return
    assert found.critical_rate_forward is not None and 0 < found.critical_rate_forward < math.inf
    factor = found.critical_rate_forward / optimizer.param_groups[0]["lr"]
    assert loss_after(0.99 * factor) < 0 < loss_after(1.01 * factor)
    if name in ("Muon", "a closure"):
        assert found.critical_rate is None and "no update rule" in found.reasons["critical_rate"]
        assert found.ratio == pytest.approx(1 / factor)
    else:
        assert found.critical_rate == pytest.approx(found.rate / found.ratio)  # type: ignore[operator]


def test_no_trace_bit_for_bit() -> None:
    model = noisy_net()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    stepped = []
    optimizer.register_step_post_hook(lambda *_: stepped.append(1))
    train(optimizer, model, range(3))
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=10)
    model[1].weight.grad[0] = 7.0  # type: ignore[index, union-attr]
    before, hooks = everything(model, optimizer), [dict(m._forward_hooks) for m in model.modules()]
    state = copy.deepcopy(scheduler.state_dict())
    found = plan(model, loss_fn, batch_of(9), optimizer)
    assert_same(everything(model, optimizer), before)
    assert [dict(m._forward_hooks) for m in model.modules()] == hooks
    assert stepped == [1, 1, 1] and scheduler.state_dict() == state
    assert found.rate == 1e-3  # the peak that the schedule leads to, not its present tenth


def test_the_second_plan_is_the_first() -> None:
    model = noisy_net()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    assert plan(model, loss_fn, batch_of(0), optimizer) == plan(model, loss_fn, batch_of(0), optimizer)


def test_a_wrapped_optimizer_stands_for_its_base() -> None:
    model = mlp()
    base = torch.optim.Adam(model.parameters(), 1e-3)
    bare = plan(model, loss_fn, batch_of(0), base)
    assert plan(model, loss_fn, batch_of(0), AdaptiveWarmup(base, model)) == bare


def test_frozen_parameters_are_left_out() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    found = plan(model, loss_fn, batch_of(0), torch.optim.SGD(model.parameters(), 0.1))
    assert found.sharpness == pytest.approx(
        np.linalg.eigvalsh(problems.dense_hessian(model, loss_fn, batch_of(0)))[-1], rel=1e-3
    )


def test_rates_of_zero_give_a_critical_rate_all_the_same() -> None:
    model = Bowl([4.0])
    optimizer = torch.optim.SGD(model.parameters(), torch.tensor(0.0))
    found = plan_of(optimizer, model)
    assert found.rate == 0 and found.ratio == 0 and found.critical_rate == pytest.approx(0.5)
    assert found.critical_rate_forward == pytest.approx(0.5, rel=2e-3) and found.warmup_steps == 0
    assert found.largest_batch is None and float(optimizer.param_groups[0]["lr"]) == 0.0


def test_a_slope_without_curvature_has_no_critical_rate() -> None:
    model = Bowl([1.0])
    found = plan(model, lambda m, b: m.x.sum(), torch.zeros(3), torch.optim.SGD(model.parameters(), 0.1))
    assert found.critical_rate == math.inf and found.critical_rate_forward == math.inf and found.ratio == 0


def test_at_a_minimum_there_is_no_update_to_try() -> None:
    model = Bowl([1.0], at=0.0)
    found = plan_of(torch.optim.SGD(model.parameters(), 0.1), model)
    assert found.critical_rate_forward is None and "does not descend" in found.reasons["critical_rate_forward"]
    assert found.critical_rate == pytest.approx(2.0)


def test_a_model_without_a_second_derivative() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return 2 * x**2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return 4 * x * grad

    model = Bowl([1.0])  # the loss is 4x⁴: a gradient of 16 and a curvature of 48 at 1
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    found = plan(model, lambda m, b: Once.apply(m.x).sum() ** 2, torch.zeros(3), optimizer)
    assert found.critical_rate == pytest.approx(2 / 48, rel=1e-3)
    assert found.critical_rate_forward == pytest.approx(2 / 16, rel=2e-3)


def test_the_table_has_a_line_for_each_figure() -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), 10.0)
    found = plan(model, loss_fn, batch_of(0), optimizer, total_steps=100, batch_size=64)
    text = str(found).splitlines()
    assert text[0].strip() == "Adam, on 16 rows"
    named = {line.name for line in found.lines()}
    assert {"sharpness", "threshold", "ratio", "critical rate", "critical rate forward", "spectral bound"} <= named
    assert {"warmup steps", "scaled rate", "largest batch", "ratio first step", "second moment steps"} <= named
    assert len(text) == len(named) + 1 and all(line.advice for line in found.lines())
    assert "preconditioned sharpness" in str(found) and max(map(len, text)) < 150
    assert found._repr_html_().count("<tr>") == len(named)


class Lion(torch.optim.Optimizer):
    """Two betas, and no second moment."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad.sign(), alpha=group["lr"])


@pytest.mark.parametrize(
    ("make", "steps"),
    [
        (lambda p: Lion(p, 0.1), None),
        (lambda p: torch.optim.Adamax(p, 0.1), None),
        (lambda p: torch.optim.ASGD(p, 0.1), None),
        (lambda p: torch.optim.AdamW(p, 0.1, betas=(0.9, 0.99)), 200),
        (lambda p: torch.optim.RMSprop(p, 0.1, alpha=0.98), 100),
    ],
)
def test_only_rules_that_average_squared_gradients_ask_for_their_warmup(make: Any, steps: int | None) -> None:
    model = mlp()
    found = plan(model, loss_fn, batch_of(0), make(model.parameters()))
    assert found.second_moment_steps == steps
    assert steps or "not known to average squared gradients" in found.reasons["second_moment_steps"]


def test_what_a_printed_plan_promises() -> None:
    model = mlp()
    said = [
        str(plan(model, loss_fn, batch_of(0), optimizer(model.parameters(), 0.1), reference=reference))
        for optimizer in (torch.optim.SGD, torch.optim.Adam)
        for reference in (None, (0.05, 64))
    ]
    assert ["does not bound the useful rate: see rate_range" in text for text in said] == [True, True, False, False]
    assert ["no reference rate was given: from the peak that is set" in t for t in said] == [True, False] * 2
    assert not [text for text in said if "the reference's rate" in text or max(map(len, text.splitlines())) > 150]


def test_what_is_missing_says_why() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.TransformerEncoderLayer(6, 1, 6, dropout=0.1), nn.Linear(6, 3))
    found = plan(model, loss_fn, batch_of(0), torch.optim.SGD(model.parameters(), 1e4))
    assert found.spectral_bound is None and "1 (TransformerEncoderLayer)" in found.spectral_bound_reason
    assert found.warmup_steps is None and "lower the peak" in found.reasons["warmup_steps"]
    assert found.spectral_bound_reason in str(found)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"optimizer": "adam"}, TypeError, "optimizer must be a torch.optim.Optimizer, got str"),
        ({"model": 3}, TypeError, "model must be a torch.nn.Module"),
        ({"loss_fn": 3}, TypeError, "loss_fn must be callable"),
        ({"total_steps": 0}, ValueError, "total_steps must be a whole number of at least 1, got 0"),
        ({"batch_size": 1.5}, ValueError, "batch_size must be a whole number"),
        ({"target": 0.0}, ValueError, "target must be in"),
        ({"reference": 3}, TypeError, "reference must be a pair"),
        ({"reference": (0.1, -1)}, ValueError, "batch_size of ReferenceRun must be a number above 0"),
        ({"reference": [{"step": 1}]}, ValueError, "history of reference has no finite stability_ratio"),
        ({"loss_fn": lambda m, b: loss_fn(m, b) * math.nan}, ValueError, "the loss on batch is nan"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], words: str) -> None:
    model = mlp()
    good: dict[str, Any] = {
        "model": model,
        "loss_fn": loss_fn,
        "batch": batch_of(0),
        "optimizer": torch.optim.SGD(model.parameters(), 0.1),
    }
    with pytest.raises(error, match=words):
        plan(**good | change)


def test_lbfgs_and_strangers_are_refused() -> None:
    model = mlp()
    with pytest.raises(TypeError, match="LBFGS"):
        plan(model, loss_fn, batch_of(0), torch.optim.LBFGS(model.parameters()))
    with pytest.raises(ValueError, match="are not parameters of model"):
        plan(model, loss_fn, batch_of(0), torch.optim.SGD(mlp().parameters(), 0.1))
    with pytest.raises(ValueError, match="rate of ReferenceRun"):
        ReferenceRun(rate=0.0)


def test_a_token_batch_in_a_dict_is_counted() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(12, 5))
    batch = {"ids": torch.randint(5, (7, 3)), "labels": torch.randint(5, (7,))}
    found = plan(
        model, lambda m, b: F.cross_entropy(m(b["ids"]), b["labels"]), batch, torch.optim.SGD(model.parameters(), 0.1)
    )
    assert found.rows == found.batch_size == 7
    assert found.largest_batch == pytest.approx(7 * found.critical_rate / 0.1)  # type: ignore[operator]
