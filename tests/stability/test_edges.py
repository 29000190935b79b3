"""The edge of every update rule, checked against the optimizer itself.

On a quadratic, with all state but the momentum held as some real steps have left it, the optimizer must
train 2 % inside the predicted edge and diverge 2 % outside.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    RAdam,
    RMSprop,
)

from tests.stability.quadratic import (
    LONG_RUN,
    SIZE,
    Make,
    all_parameters,
    arguments,
    at_ratio,
    fate,
    flat,
    hessian,
    label,
    normal,
    parameters,
    random_steps,
    rule_of,
    set_gradients,
    two_groups,
)
from warmctl import AdaptiveWarmup
from warmctl.stability.update_rules import stability_threshold

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
