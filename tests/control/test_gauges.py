"""The law, one gauge at a time: representation change, end slope, and what is said of what holds the rate."""

from __future__ import annotations

import math

import pytest

from warmctl.control.controller import (
    CUT,
    EVIDENCE,
    FIRST,
    RATIO,
    REPRESENTATION,
    RISING,
    SLOPE,
    UNDONE,
    Controller,
    Reading,
)
from warmctl.control.gauges import CHANGE, LIFT


def warmed(
    change: float = 0.2, slope: float = math.nan, steps: int = 12, scale: float = 0.01, spread: float = 0.0
) -> Controller:
    """After some steps at this scale, with an RRC of `change` and an end slope, which swings by `spread`."""
    controller = Controller(0.5)
    for step in range(steps):
        controller.update(1.0, Reading(0.001), slope + spread * (-1.0) ** step)
        controller.state.scale = controller.state.highest_scale = controller.state.measured_scale = scale
        controller.changed(change, scale)
    return controller


def growth(controller: Controller, slope: float = math.nan) -> float:
    before = controller.state.scale
    return controller.update(1.0, None, slope).scale / before


def test_the_first_step_changes_the_weights_by_a_little() -> None:
    assert Controller(0.5).update(1.0, Reading(0.01, relative_update=0.5)).scale == pytest.approx(FIRST / 0.5)


@pytest.mark.parametrize("slope, power", [(0.2, 4.0), (0.01, 4.0), (-0.3, 0.5)])
def test_the_scale_grows_while_the_next_gradients_agree(slope: float, power: float) -> None:
    """Whatever the size of e: what counts is how surely it is positive."""
    assert growth(warmed(0.2, slope), slope) == pytest.approx(min(math.exp(0.6), (13 / 12) ** power))


def test_steps_that_hardly_move_the_network_double_whatever_the_slope() -> None:
    assert growth(warmed(0.004, -0.5, steps=4)) == pytest.approx(2.0)
    assert growth(warmed(0.004, -0.5, steps=60)) == pytest.approx((61 / 60) ** 4.0)


@pytest.mark.parametrize("change, power", [(0.2, 0.5), (0.45, 0.0)])
def test_once_the_slope_has_turned_the_scale_grows_with_the_root_of_the_age_at_most(
    change: float, power: float
) -> None:
    assert growth(warmed(change, -0.02, steps=40, spread=0.06), -0.02) == pytest.approx((41 / 40) ** power)


@pytest.mark.parametrize("slope", [-0.02, -0.3])
@pytest.mark.parametrize("change", [0.2, 0.45])
def test_where_the_next_gradients_surely_undo_the_steps_the_scale_falls_as_one_over_the_age(
    change: float, slope: float
) -> None:
    controller = warmed(change, slope, steps=40)
    before = controller.state.scale
    decision = controller.update(1.0, None, slope)
    assert decision.scale == pytest.approx(before * 40 / 41) and decision.reason == UNDONE
    for _ in range(60):
        decision = controller.update(1.0, None, slope)
    assert decision.scale == pytest.approx(before * 40 / 101)
    for _ in range(60):  # no quick way back
        after = controller.update(1.0, None, 0.05 * (-1.0) ** controller.state.age)
        age = controller.state.age
        assert after.scale <= decision.scale * (age / (age - 1)) ** 2 * (1 + 1e-9)
        decision = after


def test_after_the_slope_has_turned_growth_is_bounded_by_the_square_of_the_age() -> None:
    controller = warmed(0.2, -0.02, steps=40, spread=0.06)
    for _ in range(8):
        before = controller.state.scale
        controller.update(1.0, None, 0.5)
    age = controller.state.age
    assert controller.state.scale / before == pytest.approx((age / (age - 1)) ** 2.0)


def test_a_slope_that_has_turned_is_remembered_where_steps_are_short_again() -> None:
    controller = warmed(0.2, -0.02, steps=40, spread=0.06)
    controller.changed(1e-5, controller.state.scale)
    controller.changed(1e-5, controller.state.scale)
    assert controller.change.of(controller.state.scale) < 0.13
    assert growth(controller, -0.02) < 1.02


def test_the_slope_may_turn_while_the_ratio_holds_the_scale() -> None:
    """A constant schedule held at target leaves no room to grow: the fall must not wait for it."""
    controller = Controller(0.5)
    for _ in range(60):
        decision = controller.update(1.0, Reading(50.0), -0.3)
        controller.changed(0.2, decision.scale)
    assert controller.state.turned == 1.0 and decision.reason == UNDONE and decision.scale < 0.009


def test_a_warmup_that_ends_while_the_scale_falls_says_so() -> None:
    controller = warmed(0.2, -0.3, steps=40)
    while controller.phase == "warmup":
        decision = controller.update(1.0, None, -0.3)
    assert decision.reason == f"warmup ended: the scale fell to {decision.scale:.3g}: {UNDONE}"


def test_without_representations_the_scale_grows_with_the_age() -> None:
    controller = Controller(0.5)
    for _ in range(20):
        controller.update(1.0, Reading(50.0))
    before = controller.update(1.0, Reading(1.0)).scale
    assert controller.update(1.0, Reading(1.0)).scale == pytest.approx(before * 22 / 21)


def test_the_representation_change_is_held_and_cut_gently() -> None:
    controller = warmed(0.2)
    controller.state.turned = 1.0
    controller.changed(200.0, controller.state.scale)  # averaged in log: 6.3
    before = controller.state.scale
    decision = controller.update(1.0)
    assert decision.scale == pytest.approx(CUT * before) and REPRESENTATION in decision.reason
    for _ in range(40):
        decision = controller.update(1.0)
    assert controller.change.of(decision.scale) == pytest.approx(CHANGE, rel=0.3)
    assert decision.reason == REPRESENTATION or controller.change.of(decision.scale) > CHANGE


def test_a_sure_slope_lifts_what_a_step_may_change() -> None:
    controller = Controller(0.5)
    assert controller.slope.allowed_change(1.0) == CHANGE
    for _ in range(200):
        controller.slope.take(0.1)
    assert controller.slope.allowed_change(1.0) == pytest.approx(CHANGE + LIFT, rel=1e-4)
    for _ in range(200):
        controller.slope.take(-0.1)
    assert controller.slope.allowed_change(1.0) == CHANGE


def test_the_applied_rate_is_the_landscapes_own_whatever_the_peak() -> None:
    """Thirty times the rate, a thirtieth of the scale."""
    rates = []
    for peak in (1.0, 30.0):
        controller, applied = Controller(0.5), []
        for t in range(1, 300):
            reading = Reading(2.0 * peak, relative_update=1.0 * peak) if t % 10 == 1 else None
            decision = controller.update(peak, reading, 0.3 if t < 40 else -0.05)
            applied.append(peak * decision.scale)
            controller.changed(13.0 * applied[-1], applied[-1])
        rates.append(applied)
    assert rates[0] == pytest.approx(rates[1], rel=1e-9)
    assert max(rates[0]) < 1.0


def test_no_growth_beyond_the_evidence() -> None:
    controller = warmed(0.004, steps=3)
    for _ in range(20):
        decision = controller.update(1.0)
    assert decision.scale == pytest.approx(0.01 * EVIDENCE)


def test_what_holds_the_rate_is_said() -> None:
    assert Controller(0.5).update(1.0, Reading(0.2)).reason == "started at scale 1"
    held = Controller(0.5)
    held.update(1.0, Reading(5.0))
    assert held.update(1.0, Reading(5.0)).reason == RATIO
    assert warmed(0.2, 0.3).update(1.0, None, 0.3).reason == RISING
    assert warmed(0.45, -0.3).update(1.0, None, -0.3).reason == SLOPE
    assert warmed(0.45, -0.3, steps=40).update(1.0, None, -0.3).reason == UNDONE
    assert warmed(0.2, 0.3, scale=1.0).update(1.0).reason == ""


@pytest.mark.parametrize("fall", [1.0, 0.97])
def test_the_end_names_what_held_the_rate(fall: float) -> None:
    """A schedule that falls faster than the rate may rise is no limit of the landscape."""
    controller, rate = Controller(0.5), 1.0
    while controller.phase == "warmup":
        decision = controller.update(rate, Reading(1e-4 * rate), -0.045 - 0.06 * (-1.0) ** controller.state.age)
        controller.changed(0.2 * rate * decision.scale / 0.01, rate * decision.scale)
        rate *= fall if decision.scale > 0.011 else 1.0
    cause = "the schedule falls faster" if fall < 1.0 else REPRESENTATION
    assert decision.scale < 1.0
    assert decision.reason.startswith("warmup ended") and cause in decision.reason


@pytest.mark.parametrize("fall", [1.0, 0.9995])
def test_an_end_while_the_rate_still_creeps_names_the_slope(fall: float) -> None:
    """Growth with age is all that e allows; a schedule that falls more slowly than that is not to blame."""
    controller, rate = Controller(0.5), 1.0
    while controller.phase == "warmup":
        before, age = controller.state.scale, controller.state.age
        decision = controller.update(rate, Reading(1e-4 * rate), 0.01 * (-1.0) ** age - 0.0075)
        controller.changed((14.0 if age < 20 else 1.0) * rate * decision.scale, rate * decision.scale)
        rate *= fall
    assert before < decision.scale < 1.0
    assert decision.reason.startswith("warmup ended: the scale settled at") and decision.reason.endswith(SLOPE)


def test_steps_that_persist_may_move_the_network_less() -> None:
    """Both limits on its movement are of what lasts; what a sure slope adds is not divided."""
    slope = Controller().slope
    assert slope.allowed_change(5.0) == pytest.approx(slope.allowed_change(1.0) / 5.0)
    for _ in range(200):
        slope.take(0.1)
    assert slope.allowed_change(5.0) == pytest.approx(CHANGE / 5.0 + LIFT, rel=1e-4)
    ended = []
    for persistence in (1.0, 5.0):
        controller = Controller()
        for _ in range(60):
            decision = controller.update(1.0, Reading(0.01), -0.02, 1.0, persistence)
            controller.changed(decision.scale, decision.scale)
        ended.append(decision.scale)
    assert ended[0] > 2.0 * ended[1]


def test_what_a_shock_has_broken_holds_the_rate_in_the_guard_too() -> None:
    """Its small ratio would let the scale come back at once."""
    controller = warmed(0.2, -0.02)
    controller.state.phase, controller.state.settled = 1.0, controller.state.scale
    assert controller.update(1.0, Reading(0.01)).scale == controller.state.settled
    controller.changed(200.0, controller.state.scale)  # averaged in log: 6.3
    decision = controller.update(1.0, Reading(0.001))
    assert decision.scale == pytest.approx(CUT * controller.state.settled) and REPRESENTATION in decision.reason
    controller.changed(0.0001, controller.state.scale)
    assert controller.update(1.0, Reading(0.001)).scale > decision.scale
