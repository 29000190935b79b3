"""The momentum of running averages against its formula, and the averages against exact means."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD

from tests.follow.helpers import AFTER, WARMUP, drive, parameter
from warmctl import BatchNormMomentum


def batches(count: int) -> torch.Tensor:
    return torch.randn(count, 32, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_the_momentum_is_the_formula_and_in_the_end_the_layers_own() -> None:
    layer = nn.BatchNorm1d(3, momentum=0.1)
    steps = [*WARMUP * 12, *AFTER]
    seen = drive(SGD([parameter()], lr=0.1), BatchNormMomentum(layer, low=0.02), steps, look=lambda: layer.momentum)
    expected = [max(1 / (t + 1), 0.1 * max(scale, 0.02 / 0.1)) for t, (scale, _) in enumerate(steps, start=1)]
    assert seen == pytest.approx(expected, rel=1e-15)
    assert layer.momentum == 0.1 and 0.02 in seen


def test_while_little_moves_the_average_is_the_exact_mean_of_all_batches() -> None:
    layer, data = nn.BatchNorm1d(3, momentum=0.5).double(), batches(40)
    coming = iter(data[1:])

    def forward() -> None:
        if (batch := next(coming, None)) is not None:
            layer(batch)

    follower = BatchNormMomentum(layer, low=0.01)
    follower.attach(type("Start", (), {"scale": 0.01})())  # the forward pass of the first step comes before it
    layer(data[0])
    for _ in range(39):
        follower.follow(0.01, 0.0, "warmup")
        forward()
    torch.testing.assert_close(layer.running_mean, data.mean((0, 1)), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(layer.running_var, data.var(1).mean(0), rtol=1e-12, atol=1e-14)


def test_averages_that_were_trained_before_are_not_thrown_away() -> None:
    layer = nn.BatchNorm1d(3)
    for batch in batches(50).float():
        layer(batch)
    drive(SGD([parameter()], lr=0.1), BatchNormMomentum(layer), [(1.0, "warmup")])
    assert layer.momentum == 0.1


def test_a_small_momentum_of_the_layers_own_is_never_raised_to_the_least() -> None:
    layer = nn.BatchNorm1d(3, momentum=0.001)
    for batch in batches(50).float():
        layer(batch)
    layer.num_batches_tracked.fill_(10**6)
    seen = drive(SGD([parameter()], lr=0.1), BatchNormMomentum(layer), WARMUP, look=lambda: layer.momentum)
    assert seen == [0.001] * len(WARMUP)


def test_models_without_running_averages_are_refused() -> None:
    for model in (nn.Linear(2, 2), nn.BatchNorm1d(2, momentum=None), nn.BatchNorm1d(2, track_running_stats=False)):
        with pytest.raises(ValueError, match="has no layer that keeps running averages with a momentum"):
            BatchNormMomentum(model)
    with pytest.raises(ValueError, match="model is compiled"):
        BatchNormMomentum(torch.compile(nn.BatchNorm1d(2)))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Module, got list"):
        BatchNormMomentum([nn.BatchNorm1d(2)])  # type: ignore[arg-type]
    for low in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="low must be in"):
            BatchNormMomentum(nn.BatchNorm1d(2), low=low)
