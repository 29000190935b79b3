"""The smallest linear warmup, against brute force and against training on quadratics whose curvature falls."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor, nn

from warmctl import AdaptiveWarmup, ExponentialFall, History, ReferenceRun, plan
from warmctl.planning.warmup import recorded_ratios, smallest_linear_warmup

PEAK = 0.1


def peak_ratio(ratios: Any, warmup: int) -> float:
    steps = np.arange(1, len(ratios) + 1)
    return float((np.minimum(1.0, steps / max(warmup, 1e-9)) * ratios).max())


@given(st.lists(st.floats(0.0, 20.0), min_size=1, max_size=40), st.floats(0.1, 1.5))
def test_it_holds_and_none_shorter_does(ratios: list[float], target: float) -> None:
    found = smallest_linear_warmup(ratios, target)
    assert peak_ratio(ratios, found) <= target * (1 + 1e-6)
    assert found == 0 or peak_ratio(ratios, found - 1) > target * (1 - 1e-6)


class Bowl(nn.Module):
    """½ λ (x₁² + x₂²/10), with λ from the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.ones(2, dtype=torch.float64))


def bowl_loss(model: Any, curvature: Tensor) -> Tensor:
    loss: Tensor = 0.5 * curvature * (model.x[0] ** 2 + 0.1 * model.x[1] ** 2)
    return loss


def steep_then_gentle(step: int) -> float:
    """r₁ at the peak rate is 4.73 for twenty steps, .3 after."""
    return (4.73 if step <= 20 else 0.3) * 2 / PEAK


def exponential(step: int) -> float:
    return (0.4 + 5.6 * math.exp(-step / 30)) * 2 / PEAK


def curvature_at(course: Callable[[int], float], step: int) -> Tensor:
    return torch.tensor(course(step), dtype=torch.float64)


def train(course: Callable[[int], float], warmup: int, steps: int = 400) -> tuple[list[float], list[float]]:
    """Plain descent with a linear warmup: |x₁| after each step over that before, and the stability ratio of each."""
    model = Bowl()
    optimizer = torch.optim.SGD(model.parameters(), PEAK)
    growth, ratios = [], []
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = PEAK * min(1.0, step / warmup)
        optimizer.zero_grad()
        bowl_loss(model, curvature_at(course, step)).backward()  # type: ignore[no-untyped-call]
        before = abs(float(model.x[0].detach()))
        optimizer.step()
        growth.append(abs(float(model.x[0].detach())) / before)
        ratios.append(optimizer.param_groups[0]["lr"] * course(step) / 2)
    return growth, ratios


def recorded(course: Callable[[int], float], steps: int = 60) -> History:
    """The record of a run at a hundredth of the peak rate, with its exact ratio at each step."""
    rate = PEAK / 100
    return History({"step": t, "lr": rate, "stability_ratio": rate * course(t) / 2} for t in range(1, steps + 1))


def monitored(course: Callable[[int], float], steps: int = 60) -> History:
    """The same, measured at every step by the wrapper."""
    model = Bowl()
    opt = AdaptiveWarmup(torch.optim.SGD(model.parameters(), PEAK / 100), model, every=1, control=False)
    for step in range(1, steps + 1):

        def closure(step: int = step) -> Tensor:
            opt.zero_grad()
            loss = bowl_loss(model, curvature_at(course, step))
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        opt.step(closure)
    return opt.history


def planned(course: Callable[[int], float], reference: Any, **options: Any) -> int | None:
    model = Bowl()
    optimizer = torch.optim.SGD(model.parameters(), PEAK)
    return plan(model, bowl_loss, curvature_at(course, 0), optimizer, reference=reference, **options).warmup_steps


def test_steep_for_twenty_steps_then_gentle() -> None:
    """Step 20 at a ratio of 4.73 asks for 95 steps. With them the run is stable at every step; with half it is not."""
    found = planned(steep_then_gentle, recorded(steep_then_gentle))
    assert found == 95
    growth, ratios = train(steep_then_gentle, found)
    assert max(ratios) <= 1.001 and max(growth) <= 1.001
    growth, ratios = train(steep_then_gentle, found // 2)
    assert max(ratios) == pytest.approx(2.0, rel=0.05) and max(growth) == pytest.approx(3.0, rel=0.05)


def test_an_exponential_fall_by_its_model_and_by_its_record() -> None:
    exact = smallest_linear_warmup([exponential(t) * PEAK / 2 for t in range(1, 400)])
    found = planned(exponential, ExponentialFall(to=0.4 / 6, time=30))
    assert found == exact
    assert planned(exponential, ReferenceRun(history=recorded(exponential, 120))) == exact
    growth, ratios = train(exponential, exact)
    assert max(ratios) <= 1.0 + 1e-9 and max(growth) <= 1.0 + 1e-9
    growth, ratios = train(exponential, exact // 2)
    assert max(ratios) > 1.5 and max(growth) > 2.0


def test_the_record_of_a_monitored_run_does_as_well() -> None:
    found = planned(steep_then_gentle, monitored(steep_then_gentle, 21))
    assert found is not None and abs(found - 95) <= 5


def test_constant_curvature_in_closed_form() -> None:
    """Below the target none; above it the warmup never ends within the run, and says so."""

    def constant(step: int) -> float:
        return 3.0 * 2 / PEAK

    assert planned(constant, None) is None
    assert planned(constant, None, total_steps=50) == 150
    assert planned(constant, None, total_steps=50, target=1.5) == 100
    assert planned(lambda _: 0.9 * 2 / PEAK, None) == 0
    model = Bowl()
    found = plan(model, bowl_loss, curvature_at(constant, 0), torch.optim.SGD(model.parameters(), PEAK), 50)
    assert "longer than the run" in str(found)


def test_a_record_is_scaled_to_the_peak_rate_and_held_between_readings() -> None:
    rows = [
        {"step": 1, "lr": 0.01, "stability_ratio": 0.2},
        {"step": 2, "lr": 0.02, "stability_ratio": None},
        {"step": 4, "lr": 0.02, "stability_ratio": 0.1},
        {"step": 5, "lr": 0.0, "stability_ratio": 0.1},
        {"step": 6, "lr": 0.02, "stability_ratio": math.nan},
    ]
    assert recorded_ratios(History(rows), 0.1) == pytest.approx([2.0, 2.0, 2.0, 0.5])


def test_a_path_and_a_longer_run_than_the_record(tmp_path: Path) -> None:
    """What is after the end of a record is taken to be as it was there."""
    history = History([{"step": t, "lr": PEAK, "stability_ratio": 2.0} for t in range(1, 11)])
    history.to_jsonl(tmp_path / "run.jsonl")
    assert planned(exponential, tmp_path / "run.jsonl") == 20
    assert planned(exponential, str(tmp_path / "run.jsonl"), total_steps=40) == 80
    assert planned(exponential, list(history), total_steps=5) == 10


@pytest.mark.parametrize("bad", [{"to": -0.1, "time": 3}, {"to": 0.5, "time": 0}, {"to": math.nan, "time": 1}])
def test_an_impossible_fall_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="of ExponentialFall must be a number"):
        ExponentialFall(**bad)


def test_a_record_without_thresholds_is_read_by_its_ratios() -> None:
    """Of an optimizer without an update rule."""
    row = {"sharpness": 0.1, "threshold": math.nan, "lr": 0.5}
    record = History({"step": step, "stability_ratio": 0.1 * step, **row} for step in range(1, 4))
    assert recorded_ratios(record, rate=2.0) == pytest.approx([0.4, 0.8, 1.2])
