"""The controller against the law in its plainest form: equal scales, to the last bit, and equal phases."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from hypothesis import given, settings, strategies as st

from warmctl.control.controller import Controller, Reading
from warmctl.control.reference import ReferenceLaw


@dataclass(frozen=True)
class Stretch:
    """Some steps of a run: ratio and rate go from the last stretch's to these, in log; the rest stays as it is."""

    steps: int
    ratio: float
    rate: float
    every: int
    failing: float
    slope: float
    change: float
    share: float
    relative_update: float
    surprise: float
    noise: float


STRETCH = st.builds(
    Stretch,
    steps=st.sampled_from([1, 5, 20, 60, 150, 400]),
    ratio=st.floats(-4, 6).map(lambda log: 10.0**log) | st.sampled_from([0.0, -3.0]),
    rate=st.sampled_from([1e-3, 0.1, 0.3, 1.0]),
    every=st.sampled_from([1, 3, 20, 100]),
    failing=st.sampled_from([0.0, 0.0, 0.2, 1.0]),
    slope=st.sampled_from([math.nan, -0.5, -0.05, 0.0, 0.1, 0.4]),
    change=st.sampled_from([math.nan, 0.0, math.inf]) | st.floats(-3, 3).map(lambda log: 10.0**log),
    share=st.sampled_from([0.1, 1.0, 1.0, 1.0, 30.0]),
    relative_update=st.sampled_from([0.0, 0.0, 0.05, 0.5, 50.0]),
    surprise=st.sampled_from([1.0, 1.0, 3.0, 5.0, 100.0]),
    noise=st.sampled_from([0.0, 0.1, 1.0]),
)


@st.composite
def cut(draw: st.DrawFn) -> list[Stretch]:
    """A rise, a cut, and a level near that of before: what warmup waits for is the way back, or else patience."""
    every, level = draw(st.sampled_from([1, 3, 20])), draw(st.floats(10.0, 40.0))
    rise, back = draw(st.integers(5, 150)), level * draw(st.floats(0.9, 1.3))
    path = [(1, 4.0 * level), (rise, level), (3, 10.0 * level), (30, back), (900, back)]
    return [Stretch(steps, ratio, 0.1, every, 0.0, math.nan, math.nan, 1.0, 0.0, 1.0, 0.0) for steps, ratio in path]


Step = tuple[float, Reading | None, float, float, float]


def curve(run: list[Stretch], tolerant: bool, noisy: bool, seed: int) -> Iterator[Step]:
    """What the law is given at each step: rate, reading, e, surprise, and RRC over the rate."""
    draw, ratio, rate = random.Random(seed), run[0].ratio, 0.1
    for stretch in run:
        there = stretch.ratio if min(ratio, stretch.ratio) > 0.0 else math.nan
        for step in range(1, stretch.steps + 1):
            part = step / stretch.steps
            now = stretch.ratio if math.isnan(there) else ratio ** (1 - part) * there**part
            scheduled = rate ** (1 - part) * stretch.rate**part
            reading = None
            if step % stretch.every == 0 or step == 1:
                measured = now * math.exp(stretch.noise * draw.gauss(0, 1)) * scheduled
                measured = draw.choice([math.nan, math.inf]) if draw.random() < stretch.failing else measured
                reading = Reading(
                    measured, stretch.share, stretch.relative_update * scheduled, tolerant, noisy, draw.random() < 0.2
                )
            event, slope = draw.random() < 0.1, stretch.slope + 0.3 * draw.gauss(0, 1)
            change = stretch.change * math.exp(stretch.noise * draw.gauss(0, 1)) if draw.random() < 0.5 else math.nan
            slope = min(max(slope, -1.0), 1.0) if math.isfinite(slope) else math.nan
            yield scheduled, reading, slope, stretch.surprise if event else 1.0, change
        ratio, rate = stretch.ratio, stretch.rate


def agree(steps: Iterator[Step], persistence: float = 1.0) -> None:
    controller, law = Controller(target=0.8, after="guard"), ReferenceLaw()
    for number, (rate, reading, slope, surprise, change) in enumerate(steps, start=1):
        decision = controller.update(rate, reading, slope, surprise, persistence)
        expected = law.step(rate, reading, slope, surprise, persistence)
        assert (decision.scale, decision.phase) == expected, f"step {number}"
        if decision.phase == "warmup" or number % 7 == 0:
            applied = rate * decision.scale
            controller.changed(change * applied, applied)
            law.changed(change * applied, applied)


@given(
    run=st.lists(STRETCH, min_size=1, max_size=8) | cut(),
    tolerant=st.booleans(),
    noisy=st.booleans(),
    seed=st.integers(0, 10_000),
    persistence=st.sampled_from([1.0, 3.0, 4.4]),
)
@settings(max_examples=300, deadline=None)
def test_the_controller_is_the_law(
    run: list[Stretch], tolerant: bool, noisy: bool, seed: int, persistence: float
) -> None:
    agree(curve(run, tolerant, noisy, seed), persistence)


@given(
    failing=st.sampled_from([1, 30, 998, 999, 1000, 1200]),
    every=st.integers(1, 50),
    run=st.lists(STRETCH, max_size=2),
    seed=st.integers(0, 99),
)
@settings(max_examples=50, deadline=None)
def test_the_controller_is_the_law_where_probes_fail_first(
    failing: int, every: int, run: list[Stretch], seed: int
) -> None:
    def steps() -> Iterator[Step]:
        for step in range(failing):
            yield (
                0.1,
                Reading(math.nan) if step % every == 0 else None,
                math.nan,
                3.0 if step % 97 == 0 else 1.0,
                math.nan,
            )
        if run:
            yield from curve(run, False, False, seed)

    agree(steps())
