"""When probes are made: budget, gaps, events."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given, settings, strategies as st

from warmctl.control.cadence import EARNED, GAP_MOST, LOOKS, SAVED, START, Cadence


def run(
    cadence: Cadence,
    steps: int,
    cost: float = 2.0,
    closeness: float = 1.0,
    norm: float = 1.0,
    guarding: bool = False,
) -> list[int]:
    """The steps at which probes were made."""
    probes = []
    for step in range(1, steps + 1):
        if cadence.due(1.0, norm, cost, guarding):
            probes.append(step)
            cadence.probed(cost, closeness)
    return probes


def test_first_step_probes_whatever_it_costs() -> None:
    assert run(Cadence(), 1, cost=10 * START) == [1]


@pytest.mark.parametrize("every", [1, 7, 50])
def test_fixed_cadence(every: int) -> None:
    assert run(Cadence(every=every), 200) == list(range(1, 201, every))


@given(
    cost=st.floats(0.5, 10),
    budget=st.floats(0.005, 0.3),
    seed=st.integers(0, 1000),
    closeness=st.floats(0.01, 2),
)
@settings(max_examples=60, deadline=None)
def test_auto_never_spends_more_than_it_has_earned(cost: float, budget: float, seed: int, closeness: float) -> None:
    """Whatever the loss and the gradient norm do: token bucket, after the first probe, and at most one of debt."""
    cadence, draw, spent = Cadence(budget=budget), random.Random(seed), 0.0
    for step in range(1, 1500):
        if cadence.due(draw.expovariate(1), draw.expovariate(1), cost, guarding=False):
            cadence.probed(cost, closeness)
            spent += cost
        earned = EARNED * cost * (1.0 + math.log(step)) + budget * step
        assert spent <= 2 * cost + max(START, cost) + earned


def test_accumulated_gradients_earn_as_many_tokens() -> None:
    one, eight = Cadence(), Cadence()
    one.state.tokens = eight.state.tokens = 0.0
    one.due(1.0, 1.0, 0.0, False)
    eight.due(1.0, 1.0, 0.0, False, 8)
    assert eight.state.tokens == pytest.approx(8 * one.state.tokens)


def test_guarding_costs_two_fifths() -> None:
    cadence = Cadence(budget=0.05)
    run(cadence, 2000, norm=1.0)
    cadence.state.tokens = 0.0
    draw, probes = random.Random(0), 0
    for _ in range(10_000):
        if cadence.due(1.0, draw.expovariate(1), 2.0, guarding=True):
            cadence.probed(2.0, 1.0)
            probes += 1
    assert 0 < probes * 2.0 <= 0.4 * 0.05 * 10_000 + 2.0


def test_gaps_grow_with_age_and_with_distance_from_the_edge() -> None:
    near, far = run(Cadence(budget=1.0), 300, closeness=1.0), run(Cadence(budget=1.0), 300, closeness=0.05)
    assert len(near) > 1.5 * len(far)
    gaps = [b - a for a, b in itertools.pairwise(near)]
    assert gaps[0] == 1 and max(gaps) <= GAP_MOST and gaps == sorted(gaps)


@pytest.mark.parametrize("signal", ["gradient norm", "loss"])
def test_an_event_calls_for_a_probe_at_once(signal: str) -> None:
    cadence, draw = Cadence(budget=0.5), random.Random(0)
    for step in range(1, 200):
        loss, norm = 1.0 + 0.02 * draw.gauss(0, 1), math.exp(0.05 * draw.gauss(0, 1))
        if cadence.due(loss, norm, 2.0, False):
            cadence.probed(2.0, 0.05)
        if step > 100 and cadence.state.age == cadence.state.last_probe + 1:
            break
    loss, norm = (3.0, 1.0) if signal == "loss" else (1.0, 5.0)
    assert cadence.due(loss, norm, 2.0, False) == signal


@pytest.mark.parametrize("norm, looked_at", [(1.8, False), (2.5, True)])
def test_what_a_shock_leaves_is_looked_at(norm: float, looked_at: bool) -> None:
    cadence, looks = Cadence(), []
    for step in range(1, 61):
        cadence.due(1.0, norm if step == 50 else 1.0, 2.0, False)
        looks += [step] if cadence.look() else []
    assert looks == [1, 2, 3, 4, 5, 6, 7, 8, 12, 18, 27, 41] + [55] * looked_at


def test_after_warmup_shocks_alone_are_looked_at() -> None:
    cadence, looks = Cadence(), []
    for step in range(1, 401):
        cadence.due(1.0, 2.5 if step in (100, 300) else 1.0, 2.0, step > 50)
        looks += [step] if cadence.look(warming=step <= 50) else []
        if step == 50:
            cadence.rest()
    assert looks[-4:] == [27, 41, 105, 305]


@pytest.mark.parametrize(
    ("norm", "tokens", "step", "due"),
    [
        (1.0, 3.0, 20, "clock"),
        (1.0, 2.9, 20, ""),
        (1.8, 3.0, 20, "gradient norm"),
        (1.8, 2.9, 20, ""),
        (5.0, 0.1, 20, "gradient norm"),
        (5.0, -0.1, 20, ""),
        (5.0, 0.1, LOOKS, ""),
        (5.0, 3.0, LOOKS, "gradient norm"),
    ],
)
def test_a_shock_alone_is_probed_on_credit(norm: float, tokens: float, step: int, due: str) -> None:
    """In the first steps, where all changes fast, it is not; nor is a second one before the first is earned."""
    cadence = Cadence(budget=1e-9)
    run(cadence, step - 1, norm=1.0)
    cadence.state.last_probe, cadence.state.gap, cadence.state.tokens = 1.0, 2.0, tokens
    assert cadence.due(1.0, norm, 3.0, False) == due


def test_small_events_leave_enough_for_a_shock() -> None:
    """In a long run after warmup, where what noise makes would take every token as it is earned."""
    cadence, draw, reasons = Cadence(), random.Random(0), []
    for step in range(1, 20_001):
        norm = 5.0 if step % 2000 == 0 else math.exp(0.15 * draw.gauss(0, 1))
        reason = cadence.due(1.0, norm, 3.0, guarding=step > 100)
        if reason:
            cadence.probed(3.0, 1.0)
        if step % 2000 == 0:
            reasons.append(reason)
    assert reasons == ["gradient norm"] * 10


def test_ordinary_noise_is_no_event() -> None:
    cadence, draw = Cadence(budget=0.0001), random.Random(1)
    run(cadence, 1)
    cadence.state.tokens = START
    events = sum(
        cadence._event(2.0 + 0.05 * draw.gauss(0, 1), math.exp(0.1 * draw.gauss(0, 1))) != "" for _ in range(3000)
    )
    assert events < 30


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
def test_bad_signals_leave_the_averages_alone(bad: float) -> None:
    cadence = Cadence()
    run(cadence, 20)
    before = cadence.state.state_values()
    assert cadence._event(bad if bad else math.nan, bad) == ""
    assert cadence.state.state_values() == before


def test_state_round_trip() -> None:
    one = Cadence()
    run(one, 100)
    one.state.tokens = -2.0  # in debt
    two = Cadence()
    two.state.load_state_values(one.state.state_values())
    assert run(one, 100) == run(two, 100)


@pytest.mark.parametrize("saved_up", [0.0, 3.0, 24.0])
def test_restart_probes_at_once_and_has_tokens_of_its_own(saved_up: float) -> None:
    """Less than was saved up for a dear probe it never is."""
    cadence = Cadence()
    run(cadence, 300)
    cadence.state.tokens = saved_up
    cadence.restart()
    assert cadence.state.tokens == max(START, saved_up)
    assert cadence.due(1.0, 1.0, 2.0, False) == "first"


def test_a_probe_dearer_than_the_tokens_of_the_start_is_saved_up_for() -> None:
    cadence, probes = Cadence(), 0
    for _ in range(2000):
        if cadence.due(1.0, 1.0, 24.0, False):
            cadence.probed(24.0, 1.0)
            probes += 1
    assert probes > 1


@pytest.mark.parametrize("cost, most", [(0.5, START), (3.0, SAVED * 3.0)])
def test_no_more_than_three_probes_are_saved_up(cost: float, most: float) -> None:
    cadence = Cadence(budget=1.0)
    run(cadence, 1, cost)
    cadence.state.gap = math.inf
    assert run(cadence, 100, cost) == [] and cadence.state.tokens == most


@pytest.mark.parametrize("cost", [2.0, 3.0, 24.0])
def test_probes_are_as_far_apart_as_the_run_is_old_whatever_they_cost(cost: float) -> None:
    """Half a probe an e-fold: a reading of the first steps must not hold the rate for hundreds."""
    cadence, probes = Cadence(budget=0.0), []
    for step in range(1, 20_001):
        if cadence.due(1.0, 1.0, cost, False):
            cadence.probed(cost, 0.1)
            probes.append(step)
    assert probes[0] == 1 and probes[1] <= 4 and len(probes) >= 6
    assert all(b / a < 8.0 for a, b in itertools.pairwise(probes))
    assert all(b / a > 7.0 for a, b in itertools.pairwise(probes[-3:]))
