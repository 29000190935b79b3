"""Without a gradient but zero, what is left of a weight is the product of 1 − ηw: the accounting to the last bits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy.optimize import brentq
from torch.optim import SGD, Adam, AdamW, Muon

from tests.follow.helpers import AFTER, WARMUP, drive, parameter
from warmctl import WeightDecay

RATE, DECAY = 0.1, 0.3
STEPS = [*WARMUP, *AFTER, *[(1.0, "done")] * 6]


def run(follower: Any, steps: list[Any], make: Any = None) -> tuple[float, list[float]]:
    """What is left of a weight of 1 after these steps, and the decay that was in place at each."""
    p = parameter()
    p.grad = torch.zeros_like(p)
    optimizer = (make or (lambda params: AdamW(params, lr=RATE, weight_decay=DECAY)))([p])
    seen = drive(optimizer, follower, steps, optimizer.step, lambda: float(optimizer.param_groups[0]["weight_decay"]))
    assert optimizer.param_groups[0]["weight_decay"] == DECAY
    return float(p.detach()), seen


MAKERS = {
    "AdamW": lambda params: AdamW(params, lr=RATE, weight_decay=DECAY),
    "Adam, decoupled": lambda params: Adam(params, lr=RATE, weight_decay=DECAY, decoupled_weight_decay=True),
    "SGD": lambda params: SGD(params, lr=RATE, weight_decay=DECAY),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_compensated_weights_shrink_as_at_the_full_schedule(make: Any) -> None:
    follower = WeightDecay("compensate")
    left, seen = run(follower, STEPS, make)
    assert left == pytest.approx((1 - RATE * DECAY) ** len(STEPS), rel=1e-13)
    assert seen == pytest.approx([DECAY / scale for scale, _ in STEPS], rel=1e-15)
    assert {decay for decay, (scale, _) in zip(seen, STEPS, strict=True) if scale == 1.0} == {DECAY}
    readings = follower.readings()
    assert readings["shrinkage"] == pytest.approx(left, rel=1e-13)
    assert readings["full_shrinkage"] == pytest.approx(left, rel=1e-13)


def test_without_a_follower_weights_shrink_less() -> None:
    """What the follower is for, and what the reading counts: the oracle itself."""

    class Nothing:
        def follow(self, scale: float, rate: float, phase: str) -> None: ...

    left, _ = run(Nothing(), STEPS)
    assert left == pytest.approx(math.prod(1 - scale * RATE * DECAY for scale, _ in STEPS), rel=1e-13)
    assert left > 1.1 * (1 - RATE * DECAY) ** len(STEPS)


def test_delayed_decay_is_made_up_for_exactly_and_at_a_constant_rate_by_a_constant_decay() -> None:
    """The constant of Σ_{t≥t₀} ln(1 − ηv) = Σ_t ln(1 − ηw), by a root finder."""
    steps = [(0.1, "warmup")] * 6 + [(1.0, "guard")] * 9
    follower = WeightDecay("delay", over=9)
    left, seen = run(follower, steps)
    due = 15 * math.log1p(-RATE * DECAY)
    root = brentq(lambda w: 9 * math.log1p(-RATE * w) - due, 1e-9, 9.0, xtol=1e-14)
    assert seen[:6] == [0.0] * 6 and seen[6:] == pytest.approx([root] * 9, rel=1e-11)
    assert left == pytest.approx(math.exp(due), rel=1e-12)
    assert follower.readings()["shrinkage"] == pytest.approx(left, rel=1e-12)


def test_delayed_decay_is_paid_in_as_many_steps_as_warmup_took_and_then_is_the_groups_own() -> None:
    follower = WeightDecay("delay")
    left, seen = run(follower, STEPS)  # five of warmup, and five of them at other scales than 1
    assert left == pytest.approx((1 - RATE * DECAY) ** len(STEPS), rel=1e-12)
    assert seen[len(WARMUP) + 5 :] == [DECAY] * (len(STEPS) - len(WARMUP) - 5)


def test_warmup_that_begins_again_is_delayed_again() -> None:
    left, seen = run(WeightDecay("delay"), [*WARMUP, *AFTER[:2], *WARMUP, *[(1.0, "guard")] * 7])
    assert left == pytest.approx((1 - RATE * DECAY) ** (2 * len(WARMUP) + 9), rel=1e-12)
    assert seen[-1] == DECAY


def test_groups_are_accounted_for_each_by_its_own_rate_and_the_first_that_decays_is_shown() -> None:
    p, q = parameter(), parameter()
    p.grad, q.grad = torch.zeros_like(p), torch.zeros_like(q)
    optimizer = AdamW([{"params": [p], "weight_decay": 0.0}, {"params": [q], "lr": 0.2}], lr=RATE, weight_decay=DECAY)
    follower = WeightDecay("compensate")
    drive(optimizer, follower, STEPS, optimizer.step)
    assert float(p.detach()) == 1.0
    assert float(q.detach()) == pytest.approx((1 - 0.2 * DECAY) ** len(STEPS), rel=1e-13)
    assert follower.readings()["shrinkage"] == pytest.approx(float(q.detach()), rel=1e-13)


def test_muon_decays_decoupled() -> None:
    weight = torch.nn.Parameter(torch.eye(2))
    weight.grad = torch.zeros_like(weight)
    optimizer = Muon([weight], lr=RATE, weight_decay=DECAY)
    drive(optimizer, WeightDecay("compensate"), STEPS, optimizer.step)
    assert float(weight.detach()[0, 0]) == pytest.approx((1 - RATE * DECAY) ** len(STEPS), rel=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: Adam(p, lr=RATE, weight_decay=DECAY),
        lambda p: SGD(p, lr=RATE, weight_decay=DECAY, momentum=0.9),
        lambda p: AdamW(p, lr=RATE, weight_decay=0.0),
    ],
)
def test_coupled_decay_and_none_are_refused(make: Any) -> None:
    with pytest.raises(ValueError, match="has decoupled weight decay"):
        drive(make([parameter()]), WeightDecay("compensate"), STEPS)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="'compensate', 'delay', got 'later'"):
        WeightDecay("later")
    for over in (0, 1.5, True):
        with pytest.raises(ValueError, match="over must be None or a number of steps"):
            WeightDecay("delay", over=over)  # type: ignore[arg-type]
