"""The edge and the preconditioner of every update rule, checked against the optimizer itself.

Edges: on a quadratic, with all state but the momentum held as some real steps have left it, the optimizer
must train 2 % inside the predicted edge and diverge 2 % outside. Preconditioners: without momentum, the step
that a copy of the optimizer makes must be η/P times the gradient.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import (
    ASGD,
    LBFGS,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
    SparseAdam,
)

from warmctl import AdaptiveWarmup
from warmctl.stability import update_rules
from warmctl.stability.update_rules import UpdateRule, register_update_rule, stability_threshold, update_rule

Make = Callable[[list[Tensor]], Optimizer]
SHAPES = ((2, 2), (3,))
SIZE = 7
MOMENTUM = ("exp_avg", "momentum_buffer")
LONG_RUN = 10**9  # steps after which bias corrections and NAdam's momentum schedule are over


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update_rules, "_RULES", dict(update_rules._RULES))


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parameters() -> list[Tensor]:
    return [normal(i, *shape).requires_grad_() for i, shape in enumerate(SHAPES)]


def all_parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def set_gradients(params: Sequence[Tensor], values: Tensor) -> None:
    for param, part in zip(params, torch.split(values, [p.numel() for p in params]), strict=True):
        param.grad = part.view_as(param).clone()


def random_steps(optimizer: Optimizer, steps: int) -> None:
    for step in range(steps):
        set_gradients(all_parameters(optimizer), normal(100 + step, SIZE))
        optimizer.step()


def rule_of(optimizer: Optimizer) -> UpdateRule:
    rule = update_rule(optimizer)
    assert rule is not None
    return rule


def arguments(optimizer: Optimizer, group: dict[str, Any]) -> tuple[Any, ...]:
    params = group["params"]
    return params, [p.grad for p in params], [optimizer.state.get(p, {}) for p in params], group


# Edges ----------------------------------------------------------------------------------------------------


def hessian() -> Tensor:
    """Dense over all parameters, so that groups are coupled; eigenvalues .3 to 1."""
    basis: Tensor = torch.linalg.qr(normal(5, SIZE, SIZE))[0]
    return basis @ torch.diag(torch.linspace(0.3, 1, SIZE, dtype=torch.float64)) @ basis.T


def stability_ratio(optimizer: Optimizer) -> float:
    """λ_max(D^½ (H + c) D^½ + ηw/2) by dense linear algebra, from what the rule says of each group."""
    rule, scales, coupled, shrinkage = rule_of(optimizer), [], [], []
    for group in optimizer.param_groups:
        scale = flat(rule.scale(*arguments(optimizer, group)))
        scales.append(scale)
        coupled.append(torch.full_like(scale, rule.coupled_decay(group)))
        shrinkage.append(torch.full_like(scale, group["lr"] * rule.decoupled_decay(group)))
    root = torch.cat(scales).sqrt()
    matrix = root[:, None] * (hessian() + torch.diag(torch.cat(coupled))) * root
    return float(torch.linalg.eigvalsh(matrix + torch.diag(torch.cat(shrinkage)) / 2)[-1])


def start_from(optimizer: Optimizer, next_step: int) -> None:
    """Empties the momentum and sets the counters so that the coming step is number `next_step`."""
    for group in optimizer.param_groups:
        for state in (optimizer.state[p] for p in group["params"]):
            for name in MOMENTUM:
                if isinstance(state.get(name), Tensor):
                    state[name].zero_()
            if "step" in state:
                state["step"].fill_(next_step - 1)
            if "mu_product" in state:
                decay = group["momentum_decay"]
                done = range(1, min(next_step, 2000))
                state["mu_product"].fill_(math.prod(group["betas"][0] * (1 - 0.5 * 0.96 ** (t * decay)) for t in done))


def at_ratio(make: Make, next_step: int, target: float) -> Optimizer:
    """An optimizer close to the minimum of the quadratic, its rates scaled to the ratio `target`."""
    optimizer = make(parameters())
    random_steps(optimizer, 6)
    start_from(optimizer, next_step)
    with torch.no_grad():  # so close that gradients do not count in the second moments
        for p in all_parameters(optimizer):
            p.mul_(1e-12 / p.norm())
    set_gradients(all_parameters(optimizer), torch.zeros(SIZE, dtype=torch.float64))
    factor = target / stability_ratio(optimizer)
    for group in optimizer.param_groups:
        group["lr"] *= factor
        for p in group["params"]:
            if isinstance(optimizer, ASGD):  # keeps the rate in its state
                optimizer.state[p]["eta"].fill_(group["lr"])
    assert stability_ratio(optimizer) == pytest.approx(target, rel=1e-9), "the ratio is linear in the rate"
    return optimizer


def fate(optimizer: Optimizer, momentum: Sequence[str] = MOMENTUM) -> str:
    """What becomes of the parameters when only they and the momentum may move."""
    params, curvature = all_parameters(optimizer), hessian()
    sign = -1 if optimizer.param_groups[0].get("maximize") else 1
    moving = {p: [k for k, v in optimizer.state[p].items() if v is not None and k not in momentum] for p in params}
    held = [(p, k, optimizer.state[p][k].clone()) for p, names in moving.items() for k in names]
    start = flat(params).norm()
    for _ in range(1000):
        theta = flat(params)
        if theta.norm() > 1e5 * start:
            return "diverges"
        if theta.norm() < 1e-3 * start:
            return "trains"
        set_gradients(params, sign * curvature @ theta)
        optimizer.step()
        for p, name, value in held:
            optimizer.state[p][name].copy_(value)
    return "undecided"


def two_groups(cls: type[Optimizer], first: dict[str, Any], second: dict[str, Any]) -> Make:
    def make(params: list[Tensor]) -> Optimizer:
        return cls([{"params": params[:1], **first}, {"params": params[1:], **second}], lr=1.0)  # type: ignore[call-arg]

    return make


EDGES: list[tuple[Make, int]] = [
    (partial(SGD, lr=1.0), 1),
    (partial(SGD, lr=1.0, weight_decay=0.3), 1),
    (partial(SGD, lr=1.0, dampening=0.5), 1),
    (partial(SGD, lr=1.0, momentum=0.9), 1),
    (partial(SGD, lr=1.0, momentum=0.9, weight_decay=0.3, maximize=True), 1),
    (partial(SGD, lr=1.0, momentum=0.9, dampening=0.5), 1),
    (partial(SGD, lr=1.0, momentum=0.5, nesterov=True), 1),
    (partial(SGD, lr=1.0, momentum=0.9, nesterov=True, weight_decay=0.3), 1),
    (two_groups(SGD, {"lr": 0.3}, {"lr": 2.0, "momentum": 0.9}), 1),
    (
        two_groups(SGD, {"momentum": 0.95, "dampening": 0.3}, {"lr": 2.0, "momentum": 0.5, "nesterov": True}),
        1,
    ),
    (partial(ASGD, lr=1.0, lambd=0.1, weight_decay=0.1), 1),
    (partial(RMSprop, lr=1.0), 7),
    (partial(RMSprop, lr=1.0, momentum=0.9, weight_decay=0.3), 7),
    (partial(RMSprop, lr=1.0, momentum=0.5, centered=True, maximize=True), 7),
    (partial(Adagrad, lr=1.0, weight_decay=0.1), 7),
    (partial(Adagrad, lr=1.0, lr_decay=0.1), 7),
    (partial(Adadelta, lr=1.0), 7),
    (partial(Adadelta, lr=1.0, rho=0.99, weight_decay=0.1), 7),
    *((partial(Adam, lr=1.0), t) for t in (1, 2, 7, LONG_RUN)),
    (partial(Adam, lr=1.0, betas=(0.0, 0.9)), 7),
    (partial(Adam, lr=1.0, betas=(0.5, 0.9), amsgrad=True, weight_decay=0.1), 7),
    (partial(Adam, lr=1.0, betas=(0.95, 0.99), weight_decay=0.2, decoupled_weight_decay=True), LONG_RUN),
    (partial(AdamW, lr=1.0, weight_decay=0.2, maximize=True), LONG_RUN),
    (partial(AdamW, lr=1.0, betas=(0.8, 0.9), weight_decay=0.02), 3),
    (two_groups(AdamW, {"lr": 0.3, "weight_decay": 0.05}, {"betas": (0.5, 0.9), "weight_decay": 0.1}), 7),
    (two_groups(Adam, {"weight_decay": 0.3, "betas": (0.95, 0.99)}, {"lr": 2.0}), LONG_RUN),
    *((partial(NAdam, lr=1.0), t) for t in (1, 2, 7, 1000, LONG_RUN)),
    (partial(NAdam, lr=1.0, betas=(0.5, 0.9), weight_decay=0.1, momentum_decay=0.1), 7),
    (partial(NAdam, lr=1.0, weight_decay=0.5, decoupled_weight_decay=True), LONG_RUN),
    *((partial(RAdam, lr=1.0), t) for t in (1, 5, 6, 7, LONG_RUN)),
    (partial(RAdam, lr=1.0, betas=(0.8, 0.5), weight_decay=0.1), LONG_RUN),
    (partial(RAdam, lr=1.0, weight_decay=0.02, decoupled_weight_decay=True), 20),
    (partial(Adamax, lr=1.0), 2),
    (partial(Adamax, lr=1.0, betas=(0.8, 0.9), weight_decay=0.1), LONG_RUN),
]


def label(value: object) -> str:
    if isinstance(value, partial):
        return value.func.__name__ + "".join(f",{k}={v}" for k, v in value.keywords.items() if k != "lr")
    return "groups" if callable(value) else str(value)


@pytest.mark.parametrize(("make", "next_step"), EDGES, ids=label)
def test_edge_is_where_the_optimizer_stops_training(make: Make, next_step: int) -> None:
    assert fate(at_ratio(make, next_step, 0.98)) == "trains"
    assert fate(at_ratio(make, next_step, 1.02)) == "diverges"


THRESHOLDS: list[tuple[Make, float]] = [
    (partial(SGD, lr=0.1), 2),
    (partial(SGD, lr=0.1, dampening=0.5), 2),
    (partial(SGD, lr=0.1, momentum=0.9, weight_decay=5.0), 3.8),
    (partial(SGD, lr=0.1, momentum=0.9, dampening=0.9), 38),
    (partial(SGD, lr=0.1, momentum=0.9, nesterov=True), 3.8 / 2.8),
    (partial(ASGD, lr=0.1), 2),
    (partial(RMSprop, lr=0.1, momentum=0.9), 3.8),
    (partial(Adagrad, lr=0.1), 2),
    (partial(Adadelta, lr=0.1), 2),
    (partial(Adam, lr=0.1, weight_decay=5.0), 38),
    (partial(Adam, lr=torch.tensor(0.1), betas=(torch.tensor(0.95), torch.tensor(0.99))), 78),
    (partial(Adam, lr=0.1, betas=(0.0, 0.999)), 2),
    (partial(AdamW, lr=0.1, weight_decay=5.0), 1.5 * 19),
    (partial(AdamW, lr=10.0, weight_decay=0.3), 0),
    (partial(NAdam, lr=0.1), 38 / 2.8),
    (partial(RAdam, lr=0.1, weight_decay=5.0, decoupled_weight_decay=True), 1.5 * 19),
    (partial(Adamax, lr=0.1), 38),
]


@pytest.mark.parametrize(("make", "expected"), THRESHOLDS, ids=label)
def test_threshold(make: Make, expected: float) -> None:
    assert stability_threshold(make(parameters())) == [pytest.approx(expected, rel=1e-6)]


def test_threshold_of_the_wrapped_optimizer() -> None:
    model = nn.Linear(2, 2)
    assert stability_threshold(AdaptiveWarmup(SGD(model.parameters(), 0.1, momentum=0.9), model)) == [
        pytest.approx(3.8)
    ]
    with pytest.raises(ValueError, match=r"known for Muon.*register_update_rule\(Muon"):
        stability_threshold(AdaptiveWarmup(torch.optim.Muon([model.weight], 0.1), model))


def test_threshold_of_each_group() -> None:
    make = two_groups(AdamW, {"betas": (0.5, 0.9), "weight_decay": 1.0}, {"lr": 0.1, "weight_decay": 0.0})
    assert stability_threshold(make(parameters())) == [pytest.approx(3), pytest.approx(38)]


def test_threshold_bounds_preconditioned_curvature() -> None:
    """At r = 1 after many steps, η·λ_max(P^-½HP^-½) is the threshold, weight decay included."""
    optimizer = at_ratio(partial(AdamW, lr=1.0, weight_decay=0.2), LONG_RUN, 1.0)
    (group,), rule = optimizer.param_groups, rule_of(optimizer)
    assert rule.preconditioner is not None
    root = flat(rule.preconditioner(*arguments(optimizer, group))).rsqrt()
    sharpness = torch.linalg.eigvalsh(root[:, None] * hessian() * root)[-1]
    assert group["lr"] * sharpness == pytest.approx(rule.threshold(group), rel=1e-9)
    assert rule.threshold(group) < 0.9 * 38


def test_first_gradient_of_sgd_is_not_dampened() -> None:
    plain = SGD(parameters(), lr=0.1, momentum=0.9)
    dampened = SGD(parameters(), lr=0.1, momentum=0.9, dampening=0.8)
    scales = []
    for optimizer in (plain, dampened):
        set_gradients(all_parameters(optimizer), normal(3, SIZE))
        scales.append(flat(rule_of(optimizer).scale(*arguments(optimizer, optimizer.param_groups[0]))))
    torch.testing.assert_close(scales[0], torch.full((SIZE,), 0.1 / 3.8, dtype=torch.float64))
    torch.testing.assert_close(scales[0], scales[1])


def test_dampening_one_is_never_unstable() -> None:
    optimizer = SGD(parameters(), lr=0.1, momentum=0.9, dampening=1.0)
    (group,) = optimizer.param_groups
    random_steps(optimizer, 1)
    assert math.isfinite(stability_threshold(optimizer)[0])
    assert flat(rule_of(optimizer).scale(*arguments(optimizer, group))).max() < 1e-15


# Preconditioners ------------------------------------------------------------------------------------------

WITHOUT_MOMENTUM: list[Make] = [
    partial(SGD, lr=0.1, weight_decay=0.3, maximize=True),
    partial(ASGD, lr=0.5, lambd=0.2, alpha=0.7, weight_decay=0.3),
    partial(RMSprop, lr=0.1),
    partial(RMSprop, lr=0.1, alpha=0.8, eps=0.1, centered=True, weight_decay=0.3, maximize=True),
    partial(Adagrad, lr=0.1, lr_decay=0.5, eps=0.1, initial_accumulator_value=0.2),
    partial(Adagrad, lr=0.1, weight_decay=0.3, maximize=True, fused=True),
    partial(Adadelta, lr=0.1),
    partial(Adadelta, lr=0.1, rho=0.7, eps=0.1, weight_decay=0.3, maximize=True),
    partial(Adam, lr=0.1, betas=(0.0, 0.999)),
    partial(Adam, lr=0.1, betas=(0.0, 0.9), eps=0.1, weight_decay=0.3, maximize=True, foreach=True),
    partial(Adam, lr=0.1, betas=(0.0, 0.3), amsgrad=True, weight_decay=0.3, fused=True),
    partial(Adam, lr=0.1, betas=(0.0, 0.9), weight_decay=0.3, decoupled_weight_decay=True),
    partial(Adam, lr=torch.tensor(0.1), betas=(torch.tensor(0.0), torch.tensor(0.9))),
    partial(AdamW, lr=0.1, betas=(0.0, 0.3), amsgrad=True, weight_decay=0.3, maximize=True),
    partial(NAdam, lr=0.1, betas=(0.0, 0.9), eps=0.1, weight_decay=0.3),
    partial(NAdam, lr=0.1, betas=(0.0, 0.999), weight_decay=0.3, decoupled_weight_decay=True, maximize=True),
    partial(RAdam, lr=0.1, betas=(0.0, 0.999), eps=0.1, weight_decay=0.3, maximize=True),
    partial(RAdam, lr=0.1, betas=(0.0, 0.9), weight_decay=0.3, decoupled_weight_decay=True),
    partial(RAdam, lr=0.1, betas=(0.0, 0.5)),
    partial(Adamax, lr=0.1, betas=(0.0, 0.3), eps=0.1, weight_decay=0.3, maximize=True),
]


def true_step(optimizer: Optimizer) -> Tensor:
    """θ_before − θ_after of the coming step, made by a copy."""
    gradients = flat([p.grad for p in all_parameters(optimizer) if p.grad is not None])
    copied = copy.deepcopy(optimizer)
    params = all_parameters(copied)
    before = flat(params)
    set_gradients(params, gradients)
    copied.step()
    return before - flat(params)


@pytest.mark.parametrize("make", WITHOUT_MOMENTUM, ids=label)
def test_step_is_rate_over_preconditioner(make: Make) -> None:
    optimizer = make(parameters())
    params, (group,), rule = all_parameters(optimizer), optimizer.param_groups, rule_of(optimizer)
    coupled, decoupled, lr = rule.coupled_decay(group), rule.decoupled_decay(group), float(group["lr"])
    decays = [group["weight_decay"], group.get("lambd", 0.0)]
    assert coupled + decoupled == sum(decays)
    assert bool(decoupled) == bool(group.get("decoupled_weight_decay") and decays[0])
    for number in range(1, 11):
        set_gradients(params, normal(200 + number, SIZE))
        gradient, theta = normal(200 + number, SIZE), flat(params)
        one = [torch.ones_like(p) for p in params]
        p = flat(rule.preconditioner(*arguments(optimizer, group)) if rule.preconditioner else one)
        seen = (-gradient if group["maximize"] else gradient) + coupled * theta
        torch.testing.assert_close(true_step(optimizer), lr / p * seen + lr * decoupled * theta, rtol=1e-6, atol=1e-12)
        scale = flat(rule.scale(*arguments(optimizer, group)))
        torch.testing.assert_close(scale, lr / (2 * p), msg="without momentum the edge is 2")
        optimizer.step()


@pytest.mark.parametrize("make", [partial(Adam, lr=0.1), partial(RAdam, lr=0.1), partial(Adamax, lr=0.1)], ids=label)
def test_momentum_share_is_the_bias_correction(make: Make) -> None:
    """After an empty momentum the step is (1 − β₁) g η / (q P)."""
    optimizer = make(parameters())
    (group,), rule = optimizer.param_groups, rule_of(optimizer)
    random_steps(optimizer, 3)
    for next_step in (1, 2, 5, 50):
        start_from(optimizer, next_step)
        set_gradients(group["params"], normal(4, SIZE))
        expected = flat(rule.scale(*arguments(optimizer, group))) * 38 * (1 - 0.9) * normal(4, SIZE)
        torch.testing.assert_close(true_step(optimizer), expected, rtol=1e-6, atol=1e-12)


EVERY_RULE: list[Make] = [
    partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.3),
    partial(ASGD, lr=0.1, lambd=0.2),
    partial(RMSprop, lr=0.1, momentum=0.9, centered=True),
    partial(Adagrad, lr=0.1, lr_decay=0.1),
    partial(Adadelta, lr=0.1),
    partial(Adam, lr=0.1, amsgrad=True),
    partial(AdamW, lr=0.1),
    partial(NAdam, lr=0.1),
    partial(RAdam, lr=0.1),
    partial(Adamax, lr=0.1, weight_decay=0.3),
]


@pytest.mark.parametrize("make", EVERY_RULE, ids=label)
@pytest.mark.parametrize("steps", [0, 3])
def test_nothing_is_written_and_no_graph_is_kept(make: Make, steps: int) -> None:
    optimizer = make(parameters())
    random_steps(optimizer, steps)
    params, (group,) = all_parameters(optimizer), optimizer.param_groups
    loss = torch.stack([(p**3).sum() for p in params]).sum()
    grads = list(torch.autograd.grad(loss, params, create_graph=True))
    states, entries = [optimizer.state.get(p, {}) for p in params], len(optimizer.state)
    before = copy.deepcopy((states, [p.detach() for p in params], [g.detach().clone() for g in grads]))
    scale = rule_of(optimizer).scale(params, grads, states, group)
    rule = rule_of(optimizer)
    scale += rule.preconditioner(params, grads, states, group) if rule.preconditioner else []
    assert not any(s.requires_grad for s in scale)
    for s in scale:
        s.fill_(math.nan)
    after = (states, [p.detach() for p in params], [g.detach() for g in grads])
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert len(optimizer.state) == entries


@pytest.mark.parametrize("make", EVERY_RULE, ids=label)
@pytest.mark.parametrize("steps", [0, 3, 20])
def test_counters_on_an_accelerator(make: Make, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step counters that stay tensors, as capturable optimizers have them, give what numbers give."""
    optimizer = make(parameters())
    random_steps(optimizer, steps)
    set_gradients(all_parameters(optimizer), normal(3, SIZE))
    inputs, rule = arguments(optimizer, optimizer.param_groups[0]), rule_of(optimizer)
    expected = rule.scale(*inputs)
    monkeypatch.setattr(update_rules, "_number", lambda value: torch.as_tensor(value, dtype=torch.float64))
    torch.testing.assert_close(rule.scale(*inputs), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="capturable optimizers need a GPU")
@pytest.mark.parametrize("cls", [Adam, AdamW, NAdam, RAdam, Adamax, RMSprop, Adadelta, ASGD])
def test_capturable(cls: Any) -> None:
    scales = []
    for capturable in (False, True):
        params = [p.detach().float().cuda().requires_grad_() for p in parameters()]
        optimizer = cls(params, lr=0.1, capturable=capturable)
        for step in range(7):
            set_gradients(params, normal(step, SIZE).float().cuda())
            optimizer.step()
        scales.append(rule_of(optimizer).scale(*arguments(optimizer, optimizer.param_groups[0])))
    torch.testing.assert_close(scales[0], scales[1])


@pytest.mark.parametrize("make", EVERY_RULE, ids=label)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_of_zero_gradients_is_finite(make: Make, dtype: torch.dtype) -> None:
    params = [p.detach().to(dtype).requires_grad_() for p in parameters()]
    optimizer = make(params)
    for p in params:
        p.grad = torch.zeros_like(p)
    (group,) = optimizer.param_groups
    for _ in range(2):
        scale = rule_of(optimizer).scale(*arguments(optimizer, group))
        assert [(s.shape, s.dtype) for s in scale] == [(p.shape, dtype) for p in params]
        assert all(bool(torch.isfinite(s).all()) for s in scale)
        optimizer.step()
    assert rule_of(optimizer).scale([], [], [], group) == []


def test_accumulator_of_adagrad_before_it_has_state() -> None:
    """As for parameters added later."""
    optimizer = Adagrad(parameters(), lr=0.1, initial_accumulator_value=0.5)
    set_gradients(all_parameters(optimizer), normal(3, SIZE))
    inputs = arguments(optimizer, optimizer.param_groups[0])
    expected = rule_of(optimizer).scale(*inputs)
    params, grads, _, group = inputs
    torch.testing.assert_close(rule_of(optimizer).scale(params, grads, [{}, {}], group), expected)


def test_sparse_gradient_of_adagrad() -> None:
    dense = torch.tensor([[0.0, 0.0], [2.0, 3.0]])
    scales = []
    for gradient in (dense, dense.to_sparse()):
        optimizer = Adagrad([torch.ones(2, 2, requires_grad=True)], lr=0.1, initial_accumulator_value=0.1)
        optimizer.param_groups[0]["params"][0].grad = gradient
        scales.append(rule_of(optimizer).scale(*arguments(optimizer, optimizer.param_groups[0])))
    torch.testing.assert_close(scales[0], scales[1])


def test_adamw_of_older_torch_does_not_say_that_its_decay_is_decoupled() -> None:
    optimizer = AdamW(parameters(), lr=0.1, weight_decay=0.3)
    set_gradients(all_parameters(optimizer), normal(3, SIZE))
    (group,), rule = optimizer.param_groups, rule_of(optimizer)
    expected = rule.scale(*arguments(optimizer, group))
    del group["decoupled_weight_decay"]
    assert (rule.coupled_decay(group), rule.decoupled_decay(group)) == (0.0, 0.3)
    torch.testing.assert_close(rule.scale(*arguments(optimizer, group)), expected)


# Registry -------------------------------------------------------------------------------------------------


class Quiet(AdamW):
    """Inherits its step."""


class Logged(AdamW):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class HeavyBall(Optimizer):
    def __init__(self, params: list[Tensor], lr: float, momentum: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.mul_(group["momentum"]).add_(p.grad)
                p.add_(buffer, alpha=-group["lr"])


UNKNOWN: list[Make] = [
    Rprop,
    Adafactor,
    LBFGS,
    SparseAdam,
    Logged,
    partial(HeavyBall, lr=0.1, momentum=0.5),
    lambda params: torch.optim.Muon([p for p in params if p.ndim == 2]),
]


@pytest.mark.parametrize("make", UNKNOWN)
def test_unknown_update_has_no_rule(make: Make) -> None:
    optimizer = make(parameters())
    assert update_rule(optimizer) is None
    with pytest.raises(ValueError, match=rf"{type(optimizer).__name__}.*register_update_rule"):
        stability_threshold(optimizer)


def test_subclass_inherits_the_rule_with_the_step() -> None:
    assert update_rule(Quiet) is update_rule(Quiet(parameters())) is update_rule(AdamW)
    assert update_rule(AdamW) is not update_rule(Adam)


@pytest.mark.parametrize("first", [0, 1])
def test_order_of_the_first_instances_does_not_matter(first: int) -> None:
    """torch wraps the step of a class, inherited or not, when it makes the first instance."""

    class Base(HeavyBall):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step()

    class Child(Base):
        pass

    register_update_rule(Base, UpdateRule(edge=lambda group: 2.0))
    for cls in (Base, Child)[first:] + (Base, Child)[:first]:
        assert update_rule(cls(parameters(), lr=0.1, momentum=0.5)) is not None
    assert update_rule(Child) is update_rule(Base) is not None


def test_scheduler_does_not_hide_the_rule() -> None:
    optimizer = Adam(parameters(), lr=0.1)
    torch.optim.lr_scheduler.LinearLR(optimizer)  # replaces optimizer.step
    assert update_rule(optimizer) is update_rule(Adam)


def test_registered_rule() -> None:
    make = partial(HeavyBall, lr=0.1, momentum=0.5)
    register_update_rule(HeavyBall, UpdateRule(edge=lambda group: 2 * (1 + group["momentum"])))
    assert stability_threshold(make(parameters())) == [3.0]
    assert fate(at_ratio(make, 1, 0.98)) == "trains"
    assert fate(at_ratio(make, 1, 1.02)) == "diverges"
    register_update_rule(HeavyBall, UpdateRule(edge=lambda group: 1.0))
    assert stability_threshold(make(parameters())) == [1.0]


def test_rule_of_another_class_may_be_registered() -> None:
    rule = update_rule(AdamW)
    assert rule is not None
    register_update_rule(Logged, rule)
    assert update_rule(Logged(parameters(), lr=0.1)) is rule


def test_schedule_free_example() -> None:
    schedulefree = pytest.importorskip("schedulefree")
    cls = schedulefree.SGDScheduleFree
    register_update_rule(
        cls, UpdateRule(edge=lambda g: 2 / (1 - g["momentum"]), coupled_decay=lambda g: g["weight_decay"])
    )

    def make(params: list[Tensor]) -> Optimizer:
        optimizer: Any = cls(params, lr=1.0, weight_decay=0.1)
        optimizer.train()
        optimizer.param_groups[0]["weight_sum"] = 1e12  # long after the start: the average stands still
        return optimizer  # type: ignore[no-any-return]

    assert stability_threshold(make(parameters())) == [pytest.approx(20)]
    for target, expected in ((0.98, "trains"), (1.02, "diverges")):
        optimizer = at_ratio(make, 1, target)
        for p in all_parameters(optimizer):
            optimizer.state[p]["z"] = p.detach() / (1 - 0.9)  # the average at the minimum
        assert fate(optimizer, momentum=("z",)) == expected


def test_registration_is_checked() -> None:
    with pytest.raises(TypeError, match="expected an optimizer class"):
        register_update_rule(Adam(parameters()), UpdateRule(edge=lambda group: 2.0))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected an UpdateRule for HeavyBall"):
        register_update_rule(HeavyBall, lambda group: 2.0)  # type: ignore[arg-type]


def test_catapult_is_for_gradient_descent() -> None:
    tolerant = [make for make in EVERY_RULE if rule_of(make(parameters())).tolerates_overshoot]
    assert [type(make(parameters())).__name__ for make in tolerant] == ["SGD", "ASGD"]
