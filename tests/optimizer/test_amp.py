"""Mixed precision on CPU: gradient scalers and skipped steps, fused optimizers, autocast, bfloat16."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers import (
    Batch,
    OwnLoss,
    assert_same,
    batch_of,
    closure_for,
    everything,
    loss_fn,
    mlp,
    monitor,
    own_loss,
    train,
    weights,
)
from warmctl import AdaptiveWarmup
from warmctl.proxy import OptimizerProxy

SKIPPED = {2, 5}
"""Steps whose loss overflows."""


@pytest.fixture(autouse=True)
def _no_failed_probes() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


class CountedLoss(OwnLoss):
    """Keeps count of its forward passes in a buffer, as batch norm does."""

    def __init__(self) -> None:
        super().__init__()
        self.autocast: set[bool] = set()
        self.register_buffer("forwards", torch.zeros(()))

    def forward(self, batch: Batch) -> dict[str, Any]:
        self.forwards.add_(1)  # type: ignore[operator]
        self.autocast.add(torch.is_autocast_enabled("cpu"))
        return super().forward(batch)


def scaled_run(optimizer: str, clip: bool, wrap: bool, **options: Any) -> tuple[Any, list[dict[str, Any]]]:
    model = CountedLoss()
    opt: Any
    if optimizer == "sgd":
        opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    else:
        opt = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    if wrap:
        opt = AdaptiveWarmup(opt, model, every=1, **options)
    scaler = torch.amp.GradScaler("cpu", growth_interval=3)
    rows = []
    for step in range(8):
        opt.zero_grad()
        loss: Any = model(batch_of(step))["loss"] * (math.inf if step in SKIPPED else 1.0)
        scaler.scale(loss).backward()
        if clip:
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        scaler.step(opt)
        scaler.update()
        rows.append(dict(getattr(opt, "metrics", {})))
    return (model, opt, scaler), rows


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("optimizer", ["sgd", "fused"])
def test_watching_a_scaled_run_leaves_no_trace(optimizer: str, clip: bool) -> None:
    (bare_model, bare, bare_scaler), _ = scaled_run(optimizer, clip, wrap=False)
    (model, opt, scaler), rows = scaled_run(optimizer, clip, wrap=True, control=False)
    assert rows[-1]["probes"] >= 5
    found, expected = everything(model, opt), everything(bare_model, bare)
    if optimizer == "fused" and not clip:  # unscaled before the kernel: .grad is, too
        found.pop("grad"), expected.pop("grad")
    assert_same(found, expected)
    assert_same(scaler.state_dict(), bare_scaler.state_dict())
    assert not {"grad_scale", "found_inf"} & vars(opt.base).keys()


@pytest.mark.parametrize("bare", [True, False])
def test_a_step_that_was_interrupted_does_not_scale_the_next(bare: bool) -> None:
    """Fused kernels unscale: the scale of a step that ended in an error was multiplied with that of the next."""
    moved = []
    for interrupted in (False, True):
        torch.manual_seed(0)
        model = CountedLoss()
        base = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
        opt = OptimizerProxy(base) if bare else monitor(model, base)
        before, scaler = weights(model), torch.amp.GradScaler("cpu")
        scaler.scale(model(batch_of(0))["loss"]).backward()
        if interrupted:
            hook = base.register_step_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                scaler.step(opt)
            hook.remove()
            opt.zero_grad()
            scaler = torch.amp.GradScaler("cpu")
            scaler.scale(model(batch_of(0))["loss"]).backward()
        scaler.step(opt)
        moved.append(weights(model) - before)
    assert_same(*moved)


def interrupt(*step: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("optimizer", ["sgd", "fused"])
def test_a_skipped_step_is_none(optimizer: str, clip: bool) -> None:
    (_, opt, _), rows = scaled_run(optimizer, clip, wrap=True)
    for step in SKIPPED:
        assert rows[step] == rows[step - 1]
    assert [row["step"] for row in rows] == [1, 2, 2, 3, 4, 4, 5, 6]
    assert [row["step"] for row in opt.history] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("optimizer", ["sgd", "fused"])
def test_a_skipped_step_is_none_when_warmup_is_over(optimizer: str) -> None:
    (_, opt, _), rows = scaled_run(optimizer, False, wrap=True, max_warmup=2, after="hold")
    assert opt.phase == rows[1]["phase"] == "done"
    assert [row["step"] for row in rows] == [1, 2, 2, 3, 4, 4, 5, 6]


@pytest.mark.stack("plain PyTorch", "AMP")
@pytest.mark.parametrize("optimizer", ["sgd", "fused"])
def test_the_loss_scale_does_not_reach_the_measurement(optimizer: str) -> None:
    def sharpness(scale: float) -> float:
        model = CountedLoss()
        kwargs = {"fused": True} if optimizer == "fused" else {}
        rule: Any = torch.optim.AdamW if optimizer == "fused" else torch.optim.SGD
        opt = AdaptiveWarmup(rule(model.parameters(), lr=0.1, **kwargs), model, every=1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale > 0)
        scaler.scale(model(batch_of(0))["loss"]).backward()
        scaler.step(opt)
        return float(opt.metrics["sharpness"])

    bare = sharpness(0.0)
    assert bare > 0
    for scale in (2.0**12, 2.0**16):  # below that a factor counts as the user's own
        assert sharpness(scale) == pytest.approx(bare, rel=1e-3)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_the_loss_scale_does_not_reach_the_live_graph(optimizer: Any, clip: bool) -> None:
    """Products, preconditioner (second step: with momentum and accumulation) and recorded loss are without it."""

    def rows(enabled: bool) -> list[dict[str, Any]]:
        model = mlp()
        opt = AdaptiveWarmup(optimizer(model.parameters(), lr=0.01), model, every=1)
        scaler = torch.amp.GradScaler("cpu", enabled=enabled)
        for step in range(4):
            opt.zero_grad()
            for micro in range(2):
                opt.backward(scaler.scale(loss_fn(model, batch_of(2 * step + micro)) / 2))
            if clip:
                scaler.unscale_(opt)
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            scaler.step(opt)
            scaler.update()
        return list(opt.history)

    scaled, bare = rows(True), rows(False)
    assert scaled[-1]["probes"] == 4
    for found, expected in zip(scaled, bare, strict=True):
        for key in ("loss", "sharpness", "stability_ratio", "scale"):
            assert found[key] == pytest.approx(expected[key], rel=1e-3, nan_ok=True), key


def test_a_fused_step_is_still_unscaled_by_the_kernel_when_warmup_is_over() -> None:
    (bare_model, *_), _ = scaled_run("fused", clip=False, wrap=False)
    (model, opt, _), _ = scaled_run("fused", clip=False, wrap=True, control=False, max_warmup=2, after="hold")
    assert opt.phase == "done"
    assert_same(model.net.state_dict(), bare_model.net.state_dict())


# Low precision --------------------------------------------------------------------------------------------


def bfloat16_loss(model: nn.Module, batch: Batch) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return own_loss(model, batch)


def by_closure(opt: Any, model: nn.Module, batch: Batch) -> None:
    opt.step(closure_for(opt, model, batch, bfloat16_loss))


def by_capture(opt: Any, model: nn.Module, batch: Batch) -> None:
    closure_for(opt, model, batch, bfloat16_loss)()
    opt.step()


@pytest.mark.stack("plain PyTorch", "AMP")
@pytest.mark.parametrize("loop", [by_closure, by_capture])
def test_autocast_reaches_the_probe_and_leaves_no_trace(loop: Callable[..., None]) -> None:
    def run(wrap: bool) -> tuple[Any, Any]:
        model = CountedLoss()
        opt: Any = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        if wrap:
            opt = AdaptiveWarmup(opt, model, every=1, control=False)
        trace = []
        for step in range(4):
            loop(opt, model, batch_of(step))
            trace.append(everything(model, opt))
        assert model.autocast == {True} and not torch.is_autocast_enabled("cpu")
        return trace, opt

    found, expected = run(True), run(False)
    assert_same(found[0], expected[0])
    exact = CountedLoss()
    base = torch.optim.SGD(exact.parameters(), lr=0.1, momentum=0.9)
    reference = AdaptiveWarmup(base, exact, every=1, control=False)
    train(reference, exact.net, range(4))
    assert found[1].metrics["probes"] == 4
    assert found[1].metrics["sharpness"] == pytest.approx(reference.metrics["sharpness"], rel=0.1)


@pytest.mark.parametrize("hvp", ["auto", "finite_difference", "double_backward"])
def test_bfloat16_parameters_are_measured(hvp: str) -> None:
    def run(dtype: torch.dtype) -> dict[str, Any]:
        model = mlp().to(dtype)
        base = torch.optim.SGD(model.parameters(), lr=1e-3)
        opt = AdaptiveWarmup(base, model, every=1, hvp=hvp, probe_steps=6)
        x, y = batch_of(0)
        rows: list[dict[str, Any]] = []
        for _ in range(3):
            opt.step(closure_for(opt, model, (x.to(dtype), y.to(dtype))))
            rows.append(opt.metrics)
        assert all(p.dtype == dtype for p in model.parameters())
        return rows[-1]

    low, full = run(torch.bfloat16), run(torch.float32)
    assert low["probes"] == 3
    assert low["sharpness"] == pytest.approx(full["sharpness"], rel=0.3)
