"""The control law, simulated on synthetic curves of its three gauges: no model, no tensors."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings, strategies as st

from warmctl.control.cadence import Cadence
from warmctl.control.controller import (
    EVIDENCE,
    FLOOR,
    PATIENT_STEPS,
    RETURN,
    SHORTENED,
    UNMEASURED,
    WAITING,
    Controller,
    Decision,
    Reading,
)

Curve = Callable[[int], float]
STEPS = 600

CURVES: dict[str, Curve] = {
    "falling": lambda t: 100 * math.exp(-t / 60) + 0.1,
    "adaptive start": lambda t: 3000 / t**2 + 0.3,
    "sharpening": lambda t: 0.05 * 1.01**t,
    "flat below": lambda t: 0.2,
    "flat above": lambda t: 5.0,
    "jumps": lambda t: 0.3 if (t // 97) % 2 == 0 else 6.0,
    "negative": lambda t: -1.0,
}


def simulate(
    curve: Curve,
    controller: Controller,
    every: int | str = 1,
    noise: Callable[[int], float] = lambda t: 1.0,
    steps: int = STEPS,
) -> list[tuple[float, bool, Decision]]:
    """(true ratio at full rate, whether probed, decision) each step; the gradient norm shows the curvature.

    The other gauges leave the way free: the next gradients agree, and a step at the full rate has an RRC of .05.
    """
    cadence = Cadence(every=every)
    record = []
    for t in range(1, steps + 1):
        true = curve(t)
        norm = math.sqrt(max(true, 0.01)) if math.isfinite(true) else math.nan
        guarding = controller.phase != "warmup"
        probed = bool(cadence.due(2.0, guarding))
        cadence.step(norm, 2.0, guarding)
        decision = controller.update(1.0, Reading(true * noise(t)) if probed else None, 0.4, cadence.surprise)
        controller.changed(0.2 * decision.scale, decision.scale)
        if probed:
            cadence.probed(2.0, decision.closeness)
        record.append((true, probed, decision))
    return record


@pytest.mark.parametrize("name", CURVES)
def test_ratio_is_within_target_at_every_probe(name: str) -> None:
    for true, probed, decision in simulate(CURVES[name], Controller(0.5)):
        assert probed
        assert decision.scale * true <= 0.5 * (1 + 1e-9)


@pytest.mark.parametrize("every", [5, 20, "auto"])
@pytest.mark.parametrize("name", CURVES)
def test_ratio_exceeds_target_for_one_probe_at_most(name: str, every: int | str) -> None:
    """Between two probes curvature may run ahead; at the next one the ratio is back at target."""
    for true, probed, decision in simulate(CURVES[name], Controller(0.5), every):
        if probed:
            assert decision.scale * true <= 0.5 * (1 + 1e-9)


@given(seed=st.integers(0, 10_000), name=st.sampled_from(sorted(CURVES)))
@settings(max_examples=20, deadline=None)
def test_warmup_always_ends(seed: int, name: str) -> None:
    """Whatever the curvature does, with readings a factor √10 off to either side."""
    draw = random.Random(seed)
    record = simulate(CURVES[name], Controller(0.5), "auto", lambda t: 10 ** draw.uniform(-0.5, 0.5), steps=12_000)
    assert record[-1][2].phase == "guard"


@pytest.mark.parametrize("after", ["guard", "hold", "release"])
@pytest.mark.parametrize("name", ["falling", "adaptive start", "flat below", "flat above", "negative"])
def test_warmup_ends_where_curvature_settles(name: str, after: str) -> None:
    record = simulate(CURVES[name], Controller(0.5, after=after), steps=2000)
    ends = [d for _, _, d in record if d.reason.startswith("warmup ended")]
    assert len(ends) == 1
    assert record[-1][2].phase == ("guard" if after == "guard" else "done")
    carried = min(1.0, 0.5 / max(CURVES[name](2000), 1e-9))
    scale = record[-1][2].scale
    assert scale == pytest.approx(1.0) if after == "release" else 0.85 * carried <= scale <= carried * (1 + 1e-9)


def test_max_warmup_ends_it_in_any_case() -> None:
    controller = Controller(0.5, max_warmup=40)
    record = simulate(CURVES["adaptive start"], controller)
    assert [d.phase for _, _, d in record].index("guard") == 39
    assert "max_warmup of 40 steps" in record[39][2].reason


def test_full_rate_at_once_where_the_landscape_carries_it() -> None:
    assert Controller(0.5).update(0.1, Reading(0.2)).scale == 1.0


@pytest.mark.parametrize("reading", [50.0, 1e-9, 0.0, -7.0])
def test_a_fall_counts_half_in_log_and_as_two_decades_at_most(reading: float) -> None:
    controller = Controller(0.5)
    controller.update(1.0, Reading(100.0))
    controller.update(1.0, Reading(reading))
    assert controller.state.forecast == pytest.approx(math.sqrt(100.0 * max(reading, 1.0)))
    controller.update(1.0, Reading(500.0))
    assert controller.state.forecast == 500.0


def test_the_schedule_scales_the_forecast() -> None:
    """Between probes the ratio follows the scheduled rate: a decaying schedule frees the scale."""
    controller = Controller(0.5)
    assert controller.update(1.0, Reading(1.0)).scale == pytest.approx(0.5)
    for _ in range(20):
        decision = controller.update(0.25)
    assert decision.scale == pytest.approx(1.0)
    assert decision.ratio == pytest.approx(0.25)


@pytest.mark.parametrize("phase", ["warmup", "guard"])
@pytest.mark.parametrize("tolerant", [False, True])
def test_a_rising_schedule_is_held_between_readings(phase: str, tolerant: bool) -> None:
    controller = Controller(0.5)
    while (decision := controller.update(0.1, Reading(0.3, tolerant=tolerant))).phase != phase or decision.scale < 1.0:
        pass
    assert not controller.rising(0.1) and controller.rising(0.2)
    assert controller.update(0.15).scale == pytest.approx(1.0)
    edge = 1.0 if tolerant else 0.5
    assert controller.update(1.0).scale == pytest.approx(0.5 / 3.0)
    assert controller.update(0.99 * edge / 0.5).ratio <= edge


def test_momentum_that_is_still_filling_lowers_the_limit() -> None:
    assert Controller(0.5).update(1.0, Reading(1.0, share=0.1)).scale == pytest.approx(0.05)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_failed_probe_never_raises_the_scale(bad: float) -> None:
    controller = Controller(0.5)
    before = controller.update(1.0, Reading(2.0)).scale
    decision = controller.update(1.0, Reading(bad, reason="out of memory"))
    assert decision.scale == before
    assert "out of memory" in decision.reason


def test_without_any_reading_the_scale_is_held_low_and_warmup_ends_in_the_end() -> None:
    controller = Controller(0.5)
    for _ in range(PATIENT_STEPS):
        assert controller.phase == "warmup"
        decision = controller.update(1.0, Reading(math.nan, reason="no"))
    assert (decision.scale, decision.phase) == (UNMEASURED, "guard")
    assert math.isnan(decision.ratio) and "no probe succeeded" in decision.reason
    assert controller.update(1.0, Reading(0.01)).scale == UNMEASURED  # guard leads no higher


def test_warmup_ends_although_probes_begin_to_fail() -> None:
    controller = Controller(0.5)
    controller.update(1.0, Reading(2.0))
    for _ in range(300):
        decision = controller.update(1.0, Reading(math.nan, reason="no"))
    assert (decision.scale, decision.phase) == (0.25, "guard")


def test_a_tolerant_rule_is_cut_at_the_edge_another_at_target() -> None:
    for tolerant, scale in ((True, 0.5), (False, 0.5 / 1.9)):
        controller = Controller(0.5)
        controller.update(1.0, Reading(1.0))
        assert controller.update(1.0, Reading(1.9, tolerant=tolerant)).scale == pytest.approx(scale)
        assert controller.update(1.0, Reading(2.1, tolerant=tolerant)).scale == pytest.approx(0.5 / 2.1)


def test_warmup_goes_on_while_the_schedule_itself_rises() -> None:
    controller = Controller(0.5)
    phases = []
    for step in range(1, 601):
        rate = min(step / 300, 1.0)
        phases.append(controller.update(rate, Reading(0.1 * rate)).phase)
    assert phases.index("guard") > 300


@pytest.mark.parametrize("ratio, least, most", [(0.1, 20, 40), (1.0, 100, 140)])
def test_below_the_full_rate_warmup_waits_longer_for_its_end(ratio: float, least: int, most: int) -> None:
    controller = Controller(0.5)
    phases = [controller.update(1.0, Reading(ratio)).phase for _ in range(most)]
    assert least <= phases.index("guard") < most


def test_noisy_readings_are_averaged_both_ways() -> None:
    """A ratio of λ and a share of its own; what counts is one over the other."""
    controller = Controller(0.5)
    controller.update(1.0, Reading(8.0))
    decision = controller.update(1.0, Reading(8.0, share=16.0, noisy=True))  # 8, and a share of 1 before
    assert decision.closeness == pytest.approx(decision.scale * 8.0 / (0.5 * 4.0))
    controller.update(1.0, Reading(32.0, share=4.0, noisy=True))
    assert controller.state.forecast == pytest.approx(16.0)
    assert controller.state.share == pytest.approx(4.0)


@pytest.mark.parametrize("noisy", [False, True])
def test_a_reading_in_distress_does_not_lower_what_is_known_of_the_ratio(noisy: bool) -> None:
    controller = Controller(0.5)
    controller.update(1.0, Reading(8.0))
    controller.update(1.0, Reading(2.0, noisy=noisy, distress=True))
    controller.update(1.0, Reading(8.0, share=100.0, noisy=noisy, distress=True))
    assert controller.state.forecast == pytest.approx(8.0) and controller.state.share == 1.0
    controller.update(1.0, Reading(32.0, noisy=noisy, distress=True))
    assert controller.state.forecast == pytest.approx(16.0 if noisy else 32.0)


def test_guard_cuts_and_comes_back_to_where_warmup_ended() -> None:
    controller = Controller(0.5)
    while controller.phase == "warmup":
        controller.update(1.0, Reading(1.0))
    assert controller.update(1.0, Reading(4.0)).scale == pytest.approx(0.125)
    assert controller.update(1.0, Reading(math.nan, reason="no")).scale == pytest.approx(0.125)
    scales = [controller.update(1.0, Reading(0.8)).scale for _ in range(40)]
    assert scales[:3] == pytest.approx([0.125 * RETURN, 0.125 * RETURN**2, 0.125 * RETURN**3])
    assert scales[-1] == pytest.approx(0.5) == max(scales)  # the landscape would carry more
    assert controller.phase == "guard"


def test_guard_stays_where_the_landscape_carries_no_more() -> None:
    controller = Controller(0.5)
    while controller.phase == "warmup":
        controller.update(1.0, Reading(1.0))
    for _ in range(200):
        decision = controller.update(1.0, Reading(2.0))
    assert decision.scale == pytest.approx(0.25)


@given(seed=st.integers(0, 10_000), level=st.floats(0.1, 20.0))
@settings(max_examples=60, deadline=None)
def test_noise_of_a_decade_does_not_drive_the_scale_to_the_floor(seed: int, level: float) -> None:
    """Readings a factor √10 to either side: the scale stays within that factor of what the worst of them allows."""
    draw = random.Random(seed)
    record = simulate(lambda t: level, Controller(0.5), "auto", lambda t: 10 ** draw.uniform(-0.5, 0.5))
    scales = [d.scale for _, _, d in record[1:]]
    assert min(scales) >= min(1.0, 0.5 / (level * 10**0.5)) * (1 - 1e-9) > FLOOR


@given(ratios=st.lists(st.floats(0.001, 1e5), min_size=1, max_size=80), target=st.floats(0.1, 1.5))
@settings(max_examples=80, deadline=None)
def test_any_sequence_of_readings_keeps_the_scale_in_bounds(ratios: list[float], target: float) -> None:
    controller = Controller(target=target)
    for ratio in ratios:
        decision = controller.update(0.1, Reading(ratio))
        assert FLOOR <= decision.scale <= 1.0
        assert decision.ratio <= target * (1 + 1e-9) or decision.scale == FLOOR


def test_state_round_trip_continues_identically() -> None:
    one = Controller(0.5)
    draw = random.Random(0)
    readings = [Reading(draw.uniform(0.1, 9)) if draw.random() < 0.4 else None for _ in range(200)]
    for reading in readings[:50]:
        one.changed(0.4, one.update(1.0, reading, draw.uniform(-0.2, 0.6)).scale)
    two = Controller(0.5)
    for part, saved in zip(two.parts, one.parts, strict=True):
        part.load_state_values(saved.state_values())
    assert [one.update(1.0, r) for r in readings[50:]] == [two.update(1.0, r) for r in readings[50:]]


@pytest.mark.parametrize("reading", [Reading(math.nan, reason="no"), Reading(0.45), None])
def test_a_surprise_shortens_the_step_whatever_became_of_its_probe(reading: Reading | None) -> None:
    controller = Controller(0.5)
    for _ in range(50):
        controller.update(1.0, Reading(0.45))
    assert controller.update(1.0, reading, surprise=50.0).scale == pytest.approx(0.1)


def test_a_shortened_step_says_so_and_no_longer_than_it_lasts() -> None:
    controller = Controller(0.5)
    for _ in range(50):
        controller.update(1.0, Reading(0.45))
    said = [controller.update(1.0, surprise=50.0 if step == 0 else 1.0) for step in range(20)]
    assert [SHORTENED in decision.reason for decision in said] == [decision.scale < 1.0 for decision in said]
    assert said[0].reason == SHORTENED and not said[-1].reason


def test_a_rate_that_only_lacks_a_reading_says_so() -> None:
    """The next gradients agree, r is far from target, and there is no more to hear of either."""
    controller = Controller(0.8)
    decisions = [controller.update(1.0, Reading(1e-3, relative_update=1.0) if t == 0 else None, 0.4) for t in range(90)]
    held = [d for before, d in pairwise(decisions) if d.scale == before.scale]
    assert len(held) > 50 and {d.reason for d in held} == {WAITING}
    assert held[-1].scale == pytest.approx(EVIDENCE * decisions[0].scale)
    decisions += [controller.update(1.0, None, 0.4) for _ in range(300)]
    (ended,) = [d.reason for d in decisions if d.reason.startswith("warmup ended")]
    assert ended.endswith(WAITING)


def test_restart_begins_again() -> None:
    controller = Controller(0.5, max_warmup=1)
    controller.update(1.0, Reading(1.0))
    assert controller.phase == "guard"
    controller.restart()
    assert controller.phase == "warmup"
    assert controller.update(1.0, Reading(5.0)).scale == pytest.approx(0.1)


def test_controller_and_cadence_import_no_torch() -> None:
    code = (
        "import sys, types\n"
        "sys.modules['warmctl'] = package = types.ModuleType('warmctl'); package.__path__ = ['warmctl']\n"
        "import warmctl.control.controller, warmctl.control.cadence\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_release_never_raises_a_rate_that_was_never_measured() -> None:
    controller = Controller(0.5, after="release")
    scales = [controller.update(1.0).scale for _ in range(PATIENT_STEPS + 300)]
    assert controller.phase == "done" and set(scales) == {UNMEASURED}


def test_a_surprising_gradient_near_the_edge_shortens_the_step_for_a_while() -> None:
    near, far, wild = Controller(0.5), Controller(0.5), Controller(0.5)
    for controller, ratio, surprise in ((near, 0.4, 3.0), (far, 0.004, 3.0), (wild, 0.4, 1e6)):
        assert controller.update(1.0, Reading(ratio)).scale == 1.0
        controller.update(1.0, surprise=surprise)
    assert near.applied == pytest.approx(2 / 3)
    assert far.applied == 1.0
    assert wild.applied == pytest.approx(0.1)
    scales = [wild.update(1.0).scale for _ in range(20)]
    assert scales[1] == pytest.approx(1.4**2 * 0.1) and scales[-1] == 1.0


# -- what changes in mid-run ----------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [30, 250])
def test_a_task_that_becomes_harder_is_met_at_the_next_probe_and_warmup_still_ends(at: int) -> None:
    """Curvature rises a hundredfold at one step, in warmup or after it, and the gradient norm with it."""
    record = simulate(lambda t: 0.4 if t < at else 40.0, Controller(0.5), "auto", steps=3000)
    late = [d.scale * true for true, _, d in record[at - 1 :]]
    assert late[0] <= 0.2 * 40.0 * (1 + 1e-9), "the step that shows it is shortened, the next one probed"
    assert max(late[1:]) <= 0.5 * (1 + 1e-9)
    assert record[-1][2].phase == "guard" and record[-1][2].scale == pytest.approx(0.5 / 40, rel=0.15)


def test_a_task_that_becomes_easier_again_gives_the_scale_back() -> None:
    record = simulate(lambda t: 4.0 if 200 <= t < 300 else 0.4, Controller(0.5), "auto", steps=3000)
    assert record[210][2].scale <= 0.125 * (1 + 1e-9)
    assert record[-1][2].scale == pytest.approx(1.0)


@pytest.mark.parametrize("growth", [0.25, 4.0])
def test_another_batch_size_is_no_reason_to_run_away_or_to_collapse(growth: float) -> None:
    """The noise of readings and slopes changes with the batch, their mean does not."""
    draw = random.Random(0)
    controller, scales = Controller(0.5), []
    for t in range(1, 1200):
        spread = 0.5 if t < 150 else 0.5 / growth**0.5
        reading = Reading(2.0 * math.exp(spread * draw.gauss(0, 1)), noisy=True) if t % 10 == 1 else None
        slope = min(max(0.05 + spread * draw.gauss(0, 1), -1.0), 1.0)
        decision = controller.update(1.0, reading, slope)
        if decision.phase == "warmup":
            controller.changed(0.2 * decision.scale, decision.scale)
        scales.append(decision.scale)
    off = max(abs(math.log(scale / 0.25)) for scale in scales[150:])
    assert off < 2.0 * max(0.5, 0.5 / growth**0.5), "within two standard deviations of a reading, in log"
    assert controller.phase == "guard"


def test_a_restart_in_mid_run_is_a_warmup_of_its_own() -> None:
    controller = Controller(0.5)
    before = simulate(CURVES["falling"], controller)
    assert controller.phase == "guard"
    controller.restart()
    again = simulate(CURVES["adaptive start"], controller)
    assert again[0][2].scale < 0.01 < before[-1][2].scale
    assert all(d.scale * true <= 0.5 * (1 + 1e-9) for true, _, d in again)
    assert controller.phase == "guard" and again[-1][2].scale > 0.9
