"""The factor of a gradient scaler is none of the loss."""

from __future__ import annotations

import pytest
import torch
from torch.optim import SGD

from tests.helpers import OwnLoss, batch_of, loss_fn
from warmctl import AdaptiveWarmup


@pytest.mark.parametrize("size", [2.0**16, 2.0**10, 2.0**5])
@pytest.mark.parametrize("source", ["captured", "backward"])
def test_the_factor_of_a_gradient_scaler_is_none_of_the_loss(size: float, source: str) -> None:
    def run(scaler: torch.amp.GradScaler) -> float:
        model = OwnLoss()
        opt = AdaptiveWarmup(SGD(model.parameters(), 1e-3), model, every=1)
        for step in range(3):
            opt.zero_grad()
            if source == "captured":
                scaler.scale(model(batch_of(step))["loss"]).backward()
            else:
                opt.backward(scaler.scale(loss_fn(model.net, batch_of(step))))
            scaler.step(opt)
            scaler.update()
        return float(opt.metrics["sharpness"])

    plain = run(torch.amp.GradScaler("cpu", enabled=False))
    assert run(torch.amp.GradScaler("cpu", init_scale=size)) == pytest.approx(plain, rel=1e-2)


def test_a_gradient_scaler_that_has_come_down_is_still_none_of_the_loss() -> None:
    model = OwnLoss()
    opt = AdaptiveWarmup(SGD(model.parameters(), 1e-5), model, control=False, every=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    found = []
    for scale in (2.0**16, 2.0**10, 2.0**3, 2.0**3):  # of the next step
        opt.zero_grad()
        for _ in range(2):
            scaler.scale(model(batch_of(0))["loss"]).backward()
        scaler.step(opt)
        scaler.update(scale)
        found.append(opt.metrics["sharpness"])
    assert found[1:] == pytest.approx([found[1]] * 3, rel=0.02)
