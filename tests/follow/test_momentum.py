"""Momentum by its formula, in place while the update is made, and the group's own after it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim import SGD, AdamW, RMSprop

from tests.follow.helpers import AFTER, WARMUP, drive, parameter
from warmctl import Momentum

STEPS = [*WARMUP, *AFTER]


def of(group: dict[str, Any]) -> float:
    return float(group["betas"][0] if "betas" in group else group["momentum"])


@pytest.mark.parametrize(
    "make",
    [
        lambda p: SGD(p, lr=0.1, momentum=0.9),
        lambda p: AdamW(p, lr=0.1, betas=(0.95, 0.99)),
        lambda p: RMSprop(p, lr=0.1, momentum=0.9),
    ],
)
def test_it_rises_with_the_scale_to_the_groups_own(make: Any) -> None:
    optimizer = make([parameter()])
    group, own = optimizer.param_groups[0], of(optimizer.param_groups[0])
    before = {k: v for k, v in group.items() if k != "params"}
    follower = Momentum(low=0.8)
    seen = drive(optimizer, follower, STEPS, look=lambda: of(group))
    assert seen == pytest.approx([0.8 + (own - 0.8) * scale for scale, _ in STEPS], rel=1e-15)
    assert seen[-1] == own and {k: v for k, v in group.items() if k != "params"} == before
    assert follower.readings() == {"momentum": own}


def test_the_update_is_that_of_sgd_with_this_momentum_at_every_step() -> None:
    """Against the recursion b ← β_t b + g, θ ← θ − s_t η b, written out."""
    p = parameter(1.0, 2.0)
    optimizer = SGD([p], lr=0.1, momentum=0.9)
    theta, buffer = p.detach().clone(), torch.zeros(2, dtype=torch.float64)

    def update() -> None:
        p.grad = p.detach().clone()
        optimizer.step()

    drive(optimizer, Momentum(low=0.5), STEPS, update)
    for scale, _ in STEPS:
        buffer = (0.5 + 0.4 * scale) * buffer + theta
        theta = theta - 0.1 * scale * buffer
    torch.testing.assert_close(p.detach(), theta, rtol=1e-13, atol=0.0)


def test_a_group_below_low_keeps_its_own_and_a_schedule_of_momentum_goes_on() -> None:
    optimizer = SGD([{"params": [parameter()], "momentum": 0.5}, {"params": [parameter()]}], lr=0.1, momentum=0.9)
    first, second = optimizer.param_groups
    seen = []

    def look() -> None:
        seen.append((of(first), of(second)))
        second["momentum"] = 0.95  # a hook of the scheduler's

    drive(optimizer, Momentum(low=0.8), [(0.5, "warmup"), (0.5, "warmup")], look=look)
    assert seen == [(0.5, pytest.approx(0.85)), (0.5, pytest.approx(0.875))]
    assert second["momentum"] == 0.95


def test_nothing_to_raise_is_said_at_once() -> None:
    for optimizer in (SGD([parameter()], lr=0.1), AdamW([parameter()], betas=(0.8, 0.9))):
        with pytest.raises(ValueError, match=r"has a momentum above low=0.85 \(found: 0"):
            drive(optimizer, Momentum(), STEPS)
    for low in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="low must be in"):
            Momentum(low)
