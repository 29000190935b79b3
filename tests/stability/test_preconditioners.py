"""The preconditioner of every update rule, checked against the optimizer itself.

Without momentum, the step that a copy of the optimizer makes must be η/P times the gradient.
"""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
)

from tests.stability.quadratic import (
    SIZE,
    Make,
    all_parameters,
    arguments,
    flat,
    label,
    normal,
    parameters,
    random_steps,
    rule_of,
    set_gradients,
    start_from,
)
from warmctl.stability.rules import coming_step

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
    monkeypatch.setattr(coming_step, "_number", lambda value: torch.as_tensor(value, dtype=torch.float64))
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


def test_catapult_is_for_gradient_descent() -> None:
    tolerant = [make for make in EVERY_RULE if rule_of(make(parameters())).tolerates_overshoot]
    assert [type(make(parameters())).__name__ for make in tolerant] == ["SGD", "ASGD"]
