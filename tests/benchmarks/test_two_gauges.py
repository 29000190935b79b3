"""The law under trial: what each of its gauges does, and that it trains at a rate that kills plain training."""

from __future__ import annotations

import math

import pytest

from benchmarks.tasks import runs
from benchmarks.tasks.two_gauges import CAP, TwoGauges

RATE = 1.0


def started(scale: float = 0.01) -> TwoGauges:
    law = TwoGauges()
    law.age, law.scale, law.highest, law.measured_scale = 1, scale, scale, scale
    return law


def driven(law: TwoGauges, steps: int, change: float, e: float) -> list[float]:
    """Scales of so many steps, each of which moves the outputs by `change` times its rate."""
    scales = []
    for _ in range(steps):
        if law.age >= law.next - 1:
            law.measured(change * RATE * law.scale, RATE)
        scales.append(law.decide(e, RATE))
    return scales


def test_it_grows_to_the_full_rate_where_nothing_moves() -> None:
    assert driven(started(), 60, change=0.01, e=0.3)[-1] == 1.0


def test_it_stays_below_the_cap_on_the_representation_change() -> None:
    """Where the slope is positive on average, and not surely so."""
    law = started()
    scales = [driven(law, 1, change=2.0, e=e)[0] for e in [0.3, -0.1] * 100]
    assert max(scales) <= CAP / 2.0 * (1 + 1e-9) and scales[-1] > 0.8 * CAP / 2.0


def test_a_sure_slope_lifts_the_cap() -> None:
    assert driven(started(), 200, change=2.0, e=0.4)[-1] > 2 * CAP / 2.0


def test_it_does_not_grow_against_the_next_gradients() -> None:
    """Where steps move the outputs enough to be asked."""
    law = started(0.05)
    driven(law, 4, change=1.0, e=0.3)
    reached = law.scale
    assert max(driven(law, 100, change=1.0, e=-0.3)) < 1.5 * reached


def test_it_is_cut_where_a_step_moves_too_much() -> None:
    law = started()
    driven(law, 60, change=0.01, e=0.3)
    for _ in range(4):
        law.measured(0.9, RATE)
        law.decide(0.0, RATE)
    assert law.scale < 0.75


def test_a_change_that_is_not_finite_counts_as_too_much() -> None:
    law = started()
    law.measured(math.inf, RATE)
    assert law.decide(0.3, RATE) < 0.01


@pytest.mark.parametrize("rate", [3, 6])
def test_it_trains_as_well_at_thirty_times_the_best_rate(rate: int) -> None:
    row = runs.measure(runs.Job(0, rate, "two-gauges", 400, 0))
    assert row["loss"] < 0.45 and row["overhead"] < 0.05  # no warmup ends at 0.41 and 2.3
