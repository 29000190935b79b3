"""Two optimizers on one model, and measurements beside it: what a probe must keep apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from tests.helpers import OwnLoss, batch_of, loss_fn, mlp
from warmctl import AdaptiveWarmup, sharpness


def halves(model: nn.Sequential) -> tuple[list[Tensor], list[Tensor]]:
    params = list(model.parameters())
    return params[:2], params[2:]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_probe_keeps_the_gradients_of_another_optimizer(set_to_none: bool) -> None:
    def run(wrap: bool) -> list[Tensor]:
        model = mlp()
        first, second = halves(model)
        one: Any = SGD(first, 0.05)
        one = AdaptiveWarmup(one, model, control=False, every=1) if wrap else one
        two = SGD(second, 0.05)
        for step in range(3):

            def closure(step: int = step) -> Tensor:
                model.zero_grad(set_to_none=set_to_none)
                loss = loss_fn(model, batch_of(step))
                loss.backward()
                return loss

            one.step(closure)
            two.step()
        return [p.detach() for p in model.parameters()]

    assert all(map(torch.equal, run(True), run(False)))


def captured(before: Callable[[OwnLoss, int], None], rate: float = 1e-4) -> list[float]:
    """Sharpness at each step of a loop without closures, which is `before` interrupted by something else."""
    model = OwnLoss()
    _, second = halves(model.net)
    opt = AdaptiveWarmup(SGD(second, rate), model, control=False, every=1)
    found = []
    for step in range(4):
        opt.zero_grad()
        model(batch_of(0))["loss"].backward()
        before(model, step)
        opt.step()
        found.append(opt.metrics["sharpness"])
    return found


def test_measurements_beside_a_captured_loss_are_no_micro_batches_of_it() -> None:
    def measure(model: OwnLoss, step: int) -> None:
        sharpness(model, lambda m, b: m(b)["loss"], batch_of(1), tol=0.1)

    assert captured(measure) == pytest.approx(captured(lambda model, step: None), rel=1e-6)


def test_another_wrapper_on_a_captured_loss_is_no_micro_batch_of_it() -> None:
    others: list[AdaptiveWarmup] = []

    def step_other(model: OwnLoss, step: int) -> None:
        if not others:
            others.append(AdaptiveWarmup(SGD(halves(model.net)[0], 1e-12), model, every=1))
        others[0].step()

    # The other is made after the first forward, which it has not seen.
    with pytest.raises(RuntimeError, match="no loss to measure"):
        captured(step_other)
    model = OwnLoss()
    one, two = (AdaptiveWarmup(SGD(half, 1e-6), model, control=False, every=1) for half in halves(model.net))
    alone = captured(lambda model, step: None, 1e-6)
    for expected in alone:
        model.zero_grad()
        model(batch_of(0))["loss"].backward()
        one.step()
        two.step()
        assert two.metrics["sharpness"] == pytest.approx(expected, rel=1e-2)


def test_an_optimizer_that_steps_before_does_not_mix_gradients_of_two_places() -> None:
    def step_other(model: OwnLoss, step: int) -> None:
        with torch.no_grad():
            for p in halves(model.net)[0]:
                p += 1e-3

    assert captured(step_other) == pytest.approx(captured(lambda model, step: None), rel=0.05)
