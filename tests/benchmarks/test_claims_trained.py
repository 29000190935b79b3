"""How the claims on what moves with the rate are tried: their steps against closed forms, their trials by the seed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from benchmarks.harness.models import LSTM
from benchmarks.what_is_said_of_warmup import followers, rate_coupled, regimes
from benchmarks.what_is_said_of_warmup.claim import Claim
from benchmarks.what_is_said_of_warmup.problems import PROBLEMS
from benchmarks.what_is_said_of_warmup.rate_coupled import saturated_gates
from benchmarks.what_is_said_of_warmup.training import Ascent, Half, Problem

RATE, RADIUS = 0.5, 0.3
Batch = tuple[torch.Tensor, torch.Tensor]


def linear(bias: bool = False) -> tuple[nn.Linear, Batch]:
    torch.manual_seed(0)
    return nn.Linear(6, 4, bias=bias), (torch.randn(32, 6), torch.randint(0, 4, (32,)))


def gradient(weight: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Of softmax cross-entropy: (p − y)ᵀx / n."""
    x, y = batch
    p = (x @ weight.T).softmax(1) - nn.functional.one_hot(y, 4)
    return p.T @ x / len(y)


def test_an_ascent_moves_by_the_gradient_at_its_top() -> None:
    model, batch = linear()
    start = model.weight.detach().clone()
    Ascent(RADIUS)(model, SGD(model.parameters(), lr=RATE), batch)
    g = gradient(start, batch)
    torch.testing.assert_close(model.weight.detach(), start - RATE * gradient(start + RADIUS * g / g.norm(), batch))


def test_half_precision_trains_as_float32_does_until_its_scale_overflows() -> None:
    model, batch = linear()
    start = model.weight.detach().clone()
    half, optimizer = Half(), SGD(model.parameters(), lr=RATE)
    half(model, optimizer, batch)
    torch.testing.assert_close(model.weight.detach(), start - RATE * gradient(start, batch), rtol=0, atol=2e-3)
    assert math.log2(half.scale).is_integer() and half.overflows == [False]
    stopped = model.weight.detach().clone()
    half.scale *= 2**16
    half(model, optimizer, batch)
    assert half.overflows == [False, True] and torch.equal(stopped, model.weight.detach())


def test_saturated_gates_are_those_beyond_97_percent() -> None:
    model: Any = LSTM(width=8)
    for parameter in model.lstm.parameters():
        nn.init.zeros_(parameter)
    symbols = torch.randint(0, 256, (2, 5))
    assert saturated_gates(model, symbols) == 0.0
    with torch.no_grad():
        model.lstm.bias_ih_l0[:8] = math.log(0.98 / 0.02)  # the input gates
        model.lstm.bias_ih_l0[8:16] = math.log(0.96 / 0.04)  # the forget gates
    assert saturated_gates(model, symbols) == pytest.approx(1 / 3)


@pytest.mark.parametrize("name", ["noisy labels", "placed, momentum", "graded", "text, LSTM"])
def test_weights_and_data_are_of_the_seed_alone(name: str) -> None:
    problem: Problem = PROBLEMS[name]

    def drawn(seed: int) -> list[torch.Tensor]:
        return [*next(problem.stream(seed)), *problem.model(seed).parameters()]

    first = drawn(3)
    torch.rand(5)
    assert all(torch.equal(a, b) for a, b in zip(first, drawn(3), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first[::2], drawn(4)[::2], strict=True) if a.is_floating_point())
    assert problem.held(3)[0].shape[1:] == first[0].shape[1:]


def test_each_of_the_sources_claims_and_each_follower_has_a_line() -> None:
    found: list[Claim] = [claim for module in (rate_coupled, regimes, followers) for claim in module.CLAIMS]
    assert {claim.number for claim in found} == {*range(11, 20), followers.NUMBER}
    assert len({claim.title for claim in found}) == len(found)
    names = ("SAMRadius", "BatchNormMomentum", "WeightDecay", "Difficulty", "Dither", "Momentum", "Unfreezing")
    assert all(any(claim.title.startswith(name) for claim in followers.CLAIMS) for name in names)


@pytest.mark.parametrize("title", ["SAMRadius", 'WeightDecay("delay")', "Dither"])
def test_a_trial_repeats_and_its_two_sides_differ(title: str) -> None:
    claim = next(claim for claim in followers.CLAIMS if claim.title.startswith(title))
    first = claim.trial(0, True)
    assert math.isfinite(claim.effect(first)) and claim.effect(first) != 0.0
    assert claim.trial(0, True) == first
