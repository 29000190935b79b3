"""Batch sizes: what becomes of Adam's v, of linear scaling and of its wall, in runs of torch's own optimizers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from warmctl import ReferenceRun, plan
from warmctl.planning.batch_size import largest_batch, scaled_rate, second_moment_steps


@pytest.mark.parametrize("batch_size", [32, 64, 256, 1024])
def test_adams_second_moment_is_as_full_as_was_asked_for(batch_size: int) -> None:
    """v of torch's Adam at a rate of 0, under gradients with E g² = 1: short of it by at most δ₀B₀/B from T_w(B) on."""
    beta2, first = 0.95, 32
    steps = second_moment_steps(beta2, first, batch_size)
    shortfall = math.exp(math.log(beta2) * 2 / (1 - beta2)) * first / batch_size
    x = nn.Parameter(torch.zeros(200_000))
    optimizer = torch.optim.Adam([x], 0.0, betas=(0.9, beta2))
    generator = torch.Generator().manual_seed(0)
    missing = []
    for _ in range(steps):
        x.grad = torch.randn(x.shape, generator=generator)
        optimizer.step()
        missing.append(1 - float(optimizer.state[x]["exp_avg_sq"].mean()))
    noise = 4 * math.sqrt(2 / x.numel() * (1 - beta2) / (1 + beta2))  # of a mean of squares, averaged over time
    assert missing[-1] <= shortfall + noise
    assert missing[steps - 15] > shortfall + noise


def test_ten_times_the_batch_adds_the_same_steps_each_time() -> None:
    steps = [second_moment_steps(0.99, 10, size, warmup_steps=50) for size in (10, 100, 1000)]
    assert steps[0] == 50 and steps[2] - steps[1] == pytest.approx(steps[1] - steps[0], abs=1)
    assert steps[1] == math.ceil(50 + math.log(10) / -math.log(0.99))
    assert second_moment_steps(0.99, 1000, 1) == 0 and second_moment_steps(0.0, 1, 10) == 0


def squares(model: nn.Module, batch: Any) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def test_linear_scaling_trains_up_to_the_wall_and_not_beyond() -> None:
    """Four batch sizes on a linear regression: under B* the loss falls, over it it blows up."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 8, generator=generator)
    y = x @ torch.randn(8, 1, generator=generator)

    def build(rate: float) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Linear(8, 1)
        return model, torch.optim.SGD(model.parameters(), rate, momentum=0.9)

    model, optimizer = build(0.05)
    found = plan(model, squares, (x, y), optimizer, reference=(0.05, 64))
    wall = found.largest_batch
    assert wall is not None and wall == pytest.approx(64 * 3.8 / (0.05 * found.sharpness))  # type: ignore[operator]
    for share, stable in ((0.25, True), (0.7, True), (1.3, False), (2.0, False)):
        size = round(share * wall)
        model, optimizer = build(scaled_rate(0.05, 64, size))
        start = float(squares(model, (x, y)).detach())
        for _ in range(60):
            rows = torch.randint(len(x), (size,), generator=generator)
            optimizer.zero_grad()
            squares(model, (x[rows], y[rows])).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        end = float(squares(model, (x, y)).detach())
        assert end < 0.5 * start if stable else not end < 10 * start, (share, start, end)


def test_the_plan_puts_them_together() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    batch = torch.randn(16, 4), torch.randn(16, 1)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, betas=(0.9, 0.99))
    found = plan(model, squares, batch, optimizer, batch_size=512, reference=ReferenceRun(2e-3, 128, warmup_steps=30))
    assert found.scaled_rate == pytest.approx(8e-3)
    assert found.largest_batch == pytest.approx(largest_batch(2e-3, 128, found.critical_rate or 0))
    assert found.second_moment_steps == second_moment_steps(0.99, 128, 512, 30)
    bare = plan(model, squares, batch, optimizer, batch_size=64)  # the rate that is set goes with the 16 rows
    assert bare.scaled_rate == pytest.approx(4e-3)
