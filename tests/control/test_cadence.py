"""When probes are made: budget, gaps, shocks."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given, settings, strategies as st

from warmctl.control.cadence import APART, DEBT, EARNED, GAP_MOST, LOOKS, SAVED, START, Cadence


def step(cadence: Cadence, norm: float = 1.0, cost: float = 2.0, closeness: float = 1.0, guarding: bool = False) -> str:
    """One step, probed if it is due. Why it was."""
    due = cadence.due(cost, guarding)
    cadence.step(norm, cost, guarding)
    if due:
        cadence.probed(cost, closeness)
    return due


def run(cadence: Cadence, steps: int, cost: float = 2.0, closeness: float = 1.0, guarding: bool = False) -> list[int]:
    """The steps at which probes were made."""
    return [n for n in range(1, steps + 1) if step(cadence, 1.0, cost, closeness, guarding)]


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
    """Whatever the gradient norm does: token bucket, after the first probe; a debt of one, or of `DEBT` in distress."""
    cadence, draw, spent, owed = Cadence(budget=budget), random.Random(seed), 0.0, 1.0
    for n in range(1, 1500):
        due = step(cadence, draw.expovariate(1), cost, closeness)
        spent, owed = spent + cost * bool(due), 1.0 + DEBT if due == "distress" else owed
        cadence.look()
        earned = EARNED * cost * (1.0 + math.log(n)) + budget * n
        assert spent <= (1.0 + owed) * cost + max(START, cost) + earned


def test_a_run_that_breaks_up_is_probed_every_few_steps_on_credit() -> None:
    """Its norm grows so steadily that no step of it is a surprise."""
    cadence, norms = Cadence(), [*[1.0 - 0.01 * n for n in range(40)], *[0.6 * 1.1**n for n in range(80)]]
    due = [step(cadence, norm) for norm in norms]
    probed = [n for n, why in enumerate(due) if why == "distress"]
    assert len(probed) >= DEBT and {b - a for a, b in itertools.pairwise(probed[: int(DEBT)])} == {APART}
    assert "shock" not in due and norms[probed[0]] > 10 * 0.6
    assert cadence.state.tokens >= -(1.0 + DEBT) * 2.0


@pytest.mark.parametrize("last", [0.2, 1.0, 5.0])
def test_a_norm_that_changes_by_less_is_no_distress(last: float) -> None:
    cadence, asked_for = Cadence(), Cadence(every=50)
    assert "distress" not in [step(cadence, last ** (n / 300)) for n in range(300)]
    assert "distress" not in [step(asked_for, 2.0**n) for n in range(300)]


def test_accumulated_gradients_earn_as_many_tokens() -> None:
    one, eight = Cadence(), Cadence()
    one.state.tokens = eight.state.tokens = 0.0
    one.step(1.0, 0.0, False)
    eight.step(1.0, 0.0, False, 8)
    assert eight.state.tokens == pytest.approx(8 * one.state.tokens)


def test_guarding_costs_two_fifths() -> None:
    cadence = Cadence(budget=0.05)
    run(cadence, 2000)
    cadence.state.tokens = 0.0
    draw, probes = random.Random(0), 0
    for _ in range(10_000):
        probes += bool(step(cadence, draw.expovariate(1), guarding=True))
        cadence.look(warming=False)
    assert 0 < probes * 2.0 <= 0.4 * 0.05 * 10_000 + 2.0


def test_gaps_grow_with_age_and_with_distance_from_the_edge() -> None:
    near, far = run(Cadence(budget=1.0), 300, closeness=1.0), run(Cadence(budget=1.0), 300, closeness=0.05)
    assert len(near) > 1.5 * len(far)
    gaps = [b - a for a, b in itertools.pairwise(near)]
    assert gaps[0] == 1 and max(gaps) <= GAP_MOST and gaps == sorted(gaps)


@pytest.mark.parametrize("norm, measured", [(1.8, False), (2.5, True)])
def test_what_a_shock_leaves_is_probed_and_looked_at(norm: float, measured: bool) -> None:
    """Not at the shock itself: the batch that stands out would be all that is seen."""
    cadence, looks, shocked = Cadence(), [], []
    for n in range(1, 61):
        shocked += [n] if step(cadence, norm if n == 50 else 1.0) == "shock" else []
        looks += [n] if cadence.look() else []
        assert (cadence.surprise > 1.0) == (n == 50)
    assert looks == [1, 2, 3, 4, 5, 6, 7, 8, 12, 18, 27, 41] + [55] * measured
    assert shocked == [51] * measured


def test_after_warmup_shocks_alone_are_looked_at() -> None:
    cadence, looks = Cadence(), []
    for n in range(1, 401):
        assert cadence.looks_next(warming=n <= 50) == (n in (*range(1, 9), 12, 18, 27, 41, 105, 305))
        step(cadence, 2.5 if n in (100, 300) else 1.0, guarding=n > 50)
        looks += [n] if cadence.look(warming=n <= 50) else []
    assert looks[-4:] == [27, 41, 105, 305]


@pytest.mark.parametrize(
    ("norm", "tokens", "age", "due"),
    [
        (1.0, 3.0, 20, "clock"),
        (1.0, 2.8, 20, ""),
        (1.8, 2.8, 20, ""),
        (5.0, 0.1, 20, "shock"),
        (5.0, -0.2, 20, ""),
        (5.0, 0.1, LOOKS, ""),
    ],
)
def test_a_shock_alone_is_probed_on_credit(norm: float, tokens: float, age: int, due: str) -> None:
    """In the first steps, where all changes fast, it is not; nor is a second one before the first is earned."""
    cadence = Cadence(budget=1e-9)
    run(cadence, age - 1)
    cadence.state.last_probe, cadence.state.gap, cadence.state.tokens = 1.0, 2.0, tokens
    cadence.step(norm, 3.0, False)
    assert cadence.due(3.0, False) == due


def test_the_clock_leaves_enough_for_a_shock() -> None:
    cadence, draw, reasons = Cadence(), random.Random(0), []
    for n in range(1, 20_001):
        norm = 5.0 if n % 2000 == 1999 else math.exp(0.15 * draw.gauss(0, 1))
        reason = step(cadence, norm, cost=3.0, guarding=n > 100)
        cadence.look(warming=n <= 100)
        if n % 2000 == 0:
            reasons.append(reason)
    assert reasons == ["shock"] * 10


def test_ordinary_noise_does_not_stand_out() -> None:
    cadence, draw, surprises = Cadence(), random.Random(1), 0
    for _ in range(3000):
        step(cadence, math.exp(0.1 * draw.gauss(0, 1)))
        surprises += cadence.surprise > 1.0
    assert surprises < 30


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
def test_bad_signals_leave_the_averages_alone(bad: float) -> None:
    cadence = Cadence()
    run(cadence, 20)
    before = cadence.state.norm, cadence.state.norm_spread
    cadence.step(bad, 2.0, False)
    assert (cadence.state.norm, cadence.state.norm_spread) == before and cadence.surprise == 1.0


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
    assert cadence.due(2.0, False) == "first"


def test_a_probe_dearer_than_the_tokens_of_the_start_is_saved_up_for() -> None:
    assert len(run(Cadence(), 2000, cost=24.0)) > 1


@pytest.mark.parametrize("cost, most", [(0.5, START), (3.0, SAVED * 3.0)])
def test_no_more_than_three_probes_are_saved_up(cost: float, most: float) -> None:
    cadence = Cadence(budget=1.0)
    run(cadence, 1, cost)
    cadence.state.gap = math.inf
    assert run(cadence, 100, cost) == [] and cadence.state.tokens == most


@pytest.mark.parametrize("cost", [2.0, 3.0, 24.0])
def test_probes_are_as_far_apart_as_the_run_is_old_whatever_they_cost(cost: float) -> None:
    """Two fifths of a probe an e-fold: a reading of the first steps must not hold the rate for hundreds."""
    probes = run(Cadence(budget=0.0), 20_000, cost, closeness=0.1)
    assert probes[0] == 1 and probes[1] <= 6 and len(probes) == 6
    assert all(b / a < 13.0 for a, b in itertools.pairwise(probes))
    assert all(b / a > 10.0 for a, b in itertools.pairwise(probes[-3:]))
