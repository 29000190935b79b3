"""The factor of a gradient scaler is none of the loss."""

from __future__ import annotations

import pytest
import torch
from torch.optim import SGD

from tests.helpers import OwnLoss, batch_of, loss_fn
from warmctl import AdaptiveWarmup
from warmctl.loss.scaler import loss_scale, trained_on


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


@pytest.mark.parametrize("clip, passes", [(None, 1), (0.1, 1), (None, 3), (0.1, 4)])
def test_a_scaler_that_begins_low_is_told_from_a_weight_by_what_was_divided_out(
    clip: float | None, passes: int
) -> None:
    """As after its first overflows: 1024 is no size that only a scaler has."""

    def run(scaler: torch.amp.GradScaler) -> float:
        model = OwnLoss()
        opt = AdaptiveWarmup(SGD(model.parameters(), 1e-3), model, control=False, every=1)
        for step in range(2):
            opt.zero_grad()
            for index in range(passes):
                scaler.scale(model(batch_of(10 * step + index))["loss"] / passes).backward()
            scaler.unscale_(opt)
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            scaler.step(opt)
            scaler.update()
        return float(opt.metrics["sharpness"])

    plain = run(torch.amp.GradScaler("cpu", enabled=False))
    assert run(torch.amp.GradScaler("cpu", init_scale=2.0**10)) == pytest.approx(plain, rel=1e-2)


@pytest.mark.parametrize("seed", [7, 38])  # where it is opposed, of the first forty
def test_a_scaler_that_begins_low_is_told_though_the_last_micro_batch_is_small_and_opposed(seed: int) -> None:
    def run(scaler: torch.amp.GradScaler) -> float:
        model, generator = OwnLoss(), torch.Generator().manual_seed(seed)
        opt = AdaptiveWarmup(SGD(model.parameters(), 1e-5), model, control=False, every=1)
        for size in (8, 8, 8, 2):
            batch = torch.randn(size, 6, generator=generator), torch.randn(size, 3, generator=generator)
            scaler.scale(model(batch)["loss"] * (size / 26)).backward()
        scaler.step(opt)
        return float(opt.metrics["sharpness"])

    low, high = (run(torch.amp.GradScaler("cpu", init_scale=size)) for size in (2.0**10, 2.0**16))
    assert low == pytest.approx(high, rel=1e-2)


def test_a_weight_that_the_user_gave_the_loss_is_no_scale() -> None:
    def sharpness(weight: float) -> float:
        model = OwnLoss()
        opt = AdaptiveWarmup(SGD(model.parameters(), 1e-5), model, control=False, every=1)
        (weight * model(batch_of(0))["loss"]).backward()
        opt.step()
        return float(opt.metrics["sharpness"])

    assert [sharpness(weight) / weight for weight in (3.0, 32.0, 1024.0)] == pytest.approx(
        [sharpness(1.0)] * 3, rel=1e-2
    )


def test_a_scaled_loss_may_be_divided_and_a_number_is_no_scaler() -> None:
    w = torch.ones((), requires_grad=True)
    scale = torch.full((1,), 2.0**12)  # as a GradScaler keeps it
    assert [float(loss_scale(loss)) for loss in (w * scale, w * scale / 2, w / 2 * scale, w * scale * 3.0)] == [
        2.0**12
    ] * 4
    assert [float(loss_scale(loss)) for loss in (w, w * 32, w * 32.0, w / 32, w * torch.tensor(3.0), w * w)] == [
        1.0
    ] * 6


def test_a_share_of_all_tokens_is_no_scale() -> None:
    w = torch.ones((), requires_grad=True)
    shares = w * torch.tensor(5000.0) / torch.tensor(10000.0), w * torch.tensor(64.0) / torch.tensor(128.0)
    assert [float(loss_scale(loss)) for loss in shares] == [1.0, 1.0]


@pytest.mark.parametrize(
    "weights, scaled, expected",
    [
        ([], False, None),
        ([0.25], False, 1.0),
        ([0.5, 0.5], False, 2.0),
        ([1.0, 1.0], False, 4.0),
        ([2.0, 2.0], False, 8.0),
        ([2.0, 2.0], True, 2.0),
        ([32768.0, 32768.0], False, 2.0),
    ],
)
def test_the_loss_of_a_step_is_that_of_its_passes(weights: list[float], scaled: bool, expected: float | None) -> None:
    losses = [torch.tensor(value) for value in (1.0, 3.0)][: len(weights)]
    found = trained_on(losses, [torch.tensor(weight) for weight in weights], scaled)
    assert found == expected if expected is None or found is None else float(found) == expected
