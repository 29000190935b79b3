"""The swing of the rate by its formula, and the noise scale of gradients whose signal and noise are known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.optim import SGD

from tests.follow.helpers import drive, parameter
from warmctl import Dither
from warmctl.follow.noise import NoiseScale
from warmctl.follow.sampling import Sample

PERIOD, AMPLITUDE, RATE = 8, 0.4, 0.1


def gradients(noise: float, size: int = 20000) -> Any:
    """A function that sets the gradient of a batch: ‖G‖² = size, tr Σ/B = noise · size."""
    p, generator = torch.nn.Parameter(torch.zeros(size)), torch.Generator().manual_seed(0)

    def draw() -> None:
        p.grad = 1.0 + math.sqrt(noise) * torch.randn(size, generator=generator)

    draw()
    return p, draw


@pytest.mark.parametrize("noise", [0.0, 0.1, 1.0, 4.0])
def test_the_noise_scale_is_variance_over_squared_mean(noise: float) -> None:
    p, draw = gradients(noise)
    measured = NoiseScale([p])
    assert math.isnan(measured.ratio)
    for _ in range(60):
        draw()
        measured.see()
    assert measured.ratio == pytest.approx(noise, rel=0.1, abs=1e-6)


def test_gradients_that_turn_about_are_no_quiet_ones() -> None:
    p = torch.nn.Parameter(torch.zeros(10))
    measured = NoiseScale([p])
    for sign in (1.0, -1.0, 1.0):
        p.grad = torch.full((10,), sign)
        measured.see()
    assert measured.ratio == math.inf


def test_while_quiet_the_rate_swings_below_its_crest_and_after_warmup_it_is_left_alone() -> None:
    p, draw = gradients(0.1)
    optimizer = SGD([p], lr=RATE)
    steps = [(0.5, "warmup")] * 40 + [(0.5, "guard")] * 4
    seen = drive(optimizer, Dither(PERIOD, AMPLITUDE), steps, draw, lambda: optimizer.param_groups[0]["lr"])
    swing = [(1 + AMPLITUDE * math.sin(2 * math.pi * t / PERIOD)) / (1 + AMPLITUDE) for t in range(1, 41)]
    assert seen[0] == 0.5 * RATE  # nothing is known of the noise yet
    assert seen[1:40] == pytest.approx([0.5 * RATE * factor for factor in swing[1:]], rel=1e-14)
    assert seen[40:] == [0.5 * RATE] * 4
    assert max(seen) <= 0.5 * RATE * (1 + 1e-15)  # the crest is what is held below target
    assert max(seen[8:16]) == pytest.approx(0.5 * RATE) and min(seen) == pytest.approx(0.5 * RATE * 0.6 / 1.4)


def test_noisy_gradients_are_not_dithered() -> None:
    p, draw = gradients(4.0)
    optimizer, follower = SGD([p], lr=RATE), Dither(PERIOD, AMPLITUDE)
    seen = drive(optimizer, follower, [(0.5, "warmup")] * 20, draw, lambda: optimizer.param_groups[0]["lr"])
    assert seen == [0.5 * RATE] * 20
    assert follower.readings()["noise_scale"] > 1.0 and follower.readings()["dither"] == 1.0


def test_a_sample_is_the_same_entries_each_time_and_all_of_few() -> None:
    few = [torch.arange(3.0), torch.arange(10.0, 14.0).view(2, 2)]
    assert Sample(few, 100).take(few).tolist() == [0.0, 1.0, 2.0, 10.0, 11.0, 12.0, 13.0]
    assert Sample(few, 100).take([None, few[1]]).tolist() == [0.0, 0.0, 0.0, 10.0, 11.0, 12.0, 13.0]
    many = [torch.arange(5000.0), torch.arange(5000.0, 10000.0)]
    sample = Sample(many, 400)
    taken = sample.take(many)
    assert len(taken) == sample.size == 400 and torch.equal(taken, sample.take(many))
    assert abs(float(taken.mean()) - 5000) < 4 * 2900 / 20  # all over both


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((1, 0.3), "period must be at least 2"),
        ((8, 0.0), "amplitude must be in"),
        ((8, 1.0), "amplitude must be in"),
        ((8, 0.3, 0.0), "quiet must be above 0"),
        ((math.nan, 0.3), "period must be"),
    ],
)
def test_bad_arguments_are_named(arguments: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Dither(*arguments)


def test_a_parameter_without_gradient_counts_as_zero() -> None:
    optimizer = SGD([parameter(), parameter()], lr=RATE)
    drive(optimizer, Dither(PERIOD, AMPLITUDE), [(0.5, "warmup")] * 3)
